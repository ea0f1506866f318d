"""A run directory's records as arrays over steps; no torch."""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.columns import Columns, Sampled, numbers
from unbraid.errors import CheckpointError
from unbraid.records import read_rows, row_blocks
from unbraid.run_directory import RunDirectory
from unbraid.type_aliases import FloatArray, Row

DB_LOSSES = ("neg_sa_sdr", "neg_si_sdr", "neg_snr", "neg_thresholded_snr")
"""The losses of ours that are in dB, by name: for runs that have not written down whether theirs is."""

SCORES = ("step", "loss", "si_sdri", "lr", "best")


@dataclass(frozen=True)
class Series:
    """A run, as the doctor looks at it. What was not written down is NaN.

    Attributes:
        of_step: The numbers of `unbraid.records.StepRecord`, by name, ``(step,)``.
        outcome: What became of each step.
        si_sdr: Of each source, ``(step, source)``.
        sampled: The steps that were looked at closely.
        of_validation: The numbers of `unbraid.records.ValidationRecord`, by name, ``(validation,)``.
        validations: The last of them, as `unbraid.records.ValidationRecord` has them.
        events: As `unbraid.records.Event` has them.
        recipe: The resolved recipe.
        environment: As the run directory has it.
        data: As the run directory has it.
        n_torn: Lines that could not be read.
        thinned: Of a run whose end alone was read, some steps of all of it.
    """

    of_step: Mapping[str, FloatArray]
    outcome: npt.NDArray[np.str_]
    si_sdr: FloatArray
    sampled: Sampled
    of_validation: Mapping[str, FloatArray]
    validations: Sequence[Row] = ()
    events: Sequence[Row] = ()
    recipe: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    n_torn: int = 0
    thinned: "Series | None" = None

    def __len__(self) -> int:
        """Steps."""
        return len(self.outcome)

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Whether the weights moved, ``(step,)``."""
        return self.outcome == "trained"

    @property
    def left_out(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Whether a step was left out for a reason, ``(step,)``, by the reason, in the order in which they came."""
        reasons, first = np.unique(self.outcome, return_index=True)
        return {str(reasons[at]): self.outcome == reasons[at] for at in first.argsort() if reasons[at] != "trained"}

    def of_trained(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Step and value of the trained steps whose value is finite, each ``(n,)``."""
        values = self.of_step[name]
        known = self.trained & np.isfinite(values)
        return self.of_step["step"][known], values[known]

    @property
    def course(self) -> "Series":
        """The run from its first step on, so that early and late can be held against each other; some steps of it.

        Its first `N_HEAD` steps and its last ones are all there.
        """
        return self.thinned or self

    @property
    def whole(self) -> bool:
        """Whether `course` goes back to the first step."""
        course = self.course
        return len(course) > 0 and bool(course.of_step["step"][0] <= 1)

    @property
    def trains_signals(self) -> bool:
        """Whether the loss is one of signals, so that SI-SDR is what it should raise."""
        return self.said("loss.name", "neg_si_sdr") not in ("deep_clustering", "whitened_kmeans")

    @property
    def at_full_rate(self) -> npt.NDArray[np.bool_]:
        """The trained steps at half the recipe's learning rate or more, as schedules begin and end low, ``(step,)``."""
        lr = self.of_step["lr"]
        return self.trained & (lr >= 0.5 * self.top_rate)

    @property
    def top_rate(self) -> float:
        """The recipe's learning rate, or else the highest there was."""
        lr = self.of_step["lr"]
        return float(self.said("optim.lr") or (np.nanmax(lr) if np.isfinite(lr).any() else np.nan))

    @property
    def last_step(self) -> int:
        """The number of the last step; 0 where there is none."""
        return int(self.of_step["step"][-1]) if len(self) else 0

    def said(self, key: str, otherwise: Any = None) -> Any:
        """What the recipe has under a key such as ``optim.lr``."""
        table, _, name = key.partition(".")
        found = self.recipe.get(table)
        return found.get(name, otherwise) if isinstance(found, Mapping) else otherwise

    @property
    def loss_in_db(self) -> bool:
        """Whether the loss is in dB, as the run has written down; where it has not, as its name says."""
        written = self.environment.get("loss_in_db")
        return written if isinstance(written, bool) else self.said("loss.name", "neg_si_sdr") in DB_LOSSES

    def level(self, loss: FloatArray | None = None) -> FloatArray:
        """Losses as they can be compared: in dB as they are, else ten times their logarithm; the run's own if None.

        A loss of one's own that is ever 0 or below is taken as it is.
        """
        own = self.of_step["loss"]
        given = own if loss is None else loss
        if self.loss_in_db or (own <= 0).any():
            return given
        return 10 * np.log10(np.where(given > 0, given, np.nan))


N_HEAD = 600
N_WINDOWS, N_IN_WINDOW = 100, 30
"""What is read of a run whose end alone is looked at: its first steps, and so many places of so many steps."""

N_VALIDATIONS = 20
"""So many of the last validations are kept with their items."""


def read_series(path: Path, *, last: int | None = None, thinned: bool = False) -> Series:
    """The records of a run, during it or after it; block by block, so that a million steps need little memory.

    Args:
        path: Its run directory.
        last: Read no more than about so many of its last steps; all if None.
        thinned: Whether to read some steps of what lies before those, at a cost that does not grow with the run.

    Raises:
        CheckpointError: If it is no run directory, or a file of it cannot be read.
    """
    run = RunDirectory(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no run directory {path}.")
    if not run.steps.exists():
        raise CheckpointError(f"{path} holds no {run.steps.name}: it is no run directory, or its run never began.")
    end = None if last is None else read_rows(run.steps, last)
    validations, n_more = read_rows(run.validation)
    events, n_most = read_rows(run.events, last)
    others = (
        validations,
        events,
        _table(run.recipe, tomllib.loads),
        _table(run.environment, json.loads),
        _table(run.data, json.loads),
    )
    series = _series(row_blocks(run.steps) if end is None else [end], *others, n_torn=n_more + n_most)
    if end is None or not thinned or series.whole:
        return series
    return replace(series, thinned=_series([(_here_and_there(run.steps, end[0]), 0)], *others))


def _here_and_there(path: Path, end: Sequence[Row]) -> list[Row]:
    """The first steps of a run, some from places all over it, and its end."""
    places = np.linspace(0, path.stat().st_size, N_WINDOWS, endpoint=False).astype(int)[1:]
    some = [read_rows(path, first=N_HEAD)[0], *(read_rows(path, first=N_IN_WINDOW, begin=int(at))[0] for at in places)]
    by_step = {row["step"]: row for rows in (*some, end) for row in rows if isinstance(row.get("step"), int)}
    return [row for _, row in sorted(by_step.items())]


def series_of(
    steps: Sequence[Row],
    validations: Sequence[Row],
    events: Sequence[Row],
    recipe: Row,
    environment: Row | None = None,
    data: Row | None = None,
) -> Series:
    """Rows of a run directory's files, and its small files, as `read_series` has them."""
    return _series([(steps, 0)], validations, events, recipe, environment or {}, data or {})


def _series(
    blocks: Iterable[tuple[Sequence[Row], int]],
    validations: Sequence[Row],
    events: Sequence[Row],
    recipe: Row,
    environment: Row,
    data: Row,
    *,
    n_torn: int = 0,
) -> Series:
    columns = Columns()
    for rows, n_torn_here in blocks:
        columns.add(rows, n_torn_here)
    of_step, outcome, si_sdr, sampled = columns.take()
    validations, events = ([row for row in rows if isinstance(row.get("step"), int)] for rows in (validations, events))
    return Series(
        of_step=of_step,
        outcome=outcome,
        si_sdr=si_sdr,
        sampled=sampled,
        of_validation={name: numbers(validations, name) for name in SCORES},
        validations=validations[-N_VALIDATIONS:],
        events=events,
        recipe=recipe,
        environment=environment,
        data=data,
        n_torn=columns.n_torn + n_torn,
    )


def _table(path: Path, parse: Callable[[str], Any]) -> Row:
    """A small file of the run directory; empty where there is none."""
    try:
        table = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); mend it, or move it away.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} cannot be read (it is no table); mend it, or move it away.")
    return table
