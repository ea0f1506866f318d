"""Series: the records of a run as arrays over steps and validations."""

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.columns import SampledSteps, StepColumns, number_column
from unbraid.errors import CheckpointError
from unbraid.records import read_rows, row_blocks
from unbraid.run_directory import RunDirectory
from unbraid.schema_version import SCHEMA_VERSION, steps_schema_version
from unbraid.type_aliases import BoolArray, FloatArray, Row

DB_LOSSES = ("neg_sa_sdr", "neg_si_sdr", "neg_snr", "neg_thresholded_snr")
"""Names of the built-in losses that are in dB, for runs that did not record whether theirs is."""

VALIDATION_FIELDS = ("step", "loss", "si_sdri", "lr", "best")

N_VALIDATION_ROWS = 20
"""Number of latest validations whose rows are stored with their items."""

N_FIRST_STEPS = 600
N_WINDOWS = 100
WINDOW_STEPS = 30
"""Thinned reading takes the first 600 steps and 30 steps at each of 100 byte offsets spread over the file."""


@dataclass(frozen=True)
class Series:
    """The records of a run. A value that was not recorded is NaN.

    Attributes:
        steps: The numbers of `unbraid.records.StepRecord` by name, each ``(step,)``.
        outcomes: The outcome of each step, ``(step,)``.
        si_sdr: SI-SDR of each source in dB, ``(step, source)``.
        sampled: The steps with statistics per block and per example.
        validation: The numbers of `unbraid.records.ValidationRecord` by name, each ``(validation,)``.
        validation_rows: The latest validations, as rows of `unbraid.records.ValidationRecord`.
        events: Rows of `unbraid.records.Event`.
        recipe: The resolved recipe.
        environment: The contents of ``environment.json``.
        data: The contents of ``data.json``.
        n_torn: Lines that could not be read.
        schema_version: Version that wrote the first step; older rows are read under today's names.
        thinned: If only the end of the run was read: a sample of the steps of the whole run.
    """

    steps: Mapping[str, FloatArray]
    outcomes: npt.NDArray[np.str_]
    si_sdr: FloatArray
    sampled: SampledSteps
    validation: Mapping[str, FloatArray]
    validation_rows: Sequence[Row] = ()
    events: Sequence[Row] = ()
    recipe: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    n_torn: int = 0
    schema_version: int = SCHEMA_VERSION
    thinned: "Series | None" = None

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.outcomes)

    @property
    def trained(self) -> BoolArray:
        """True where the weights were updated, ``(step,)``."""
        return self.outcomes == "trained"

    @property
    def skipped(self) -> dict[str, BoolArray]:
        """A mask ``(step,)`` for each outcome of skipped steps, in the order in which the outcomes first occurred."""
        # np.unique sorts by name; the order of first occurrence keeps the colours of a plot the same as a run grows.
        outcomes, first_index = np.unique(self.outcomes, return_index=True)
        in_order = [str(outcomes[index]) for index in first_index.argsort()]
        return {outcome: self.outcomes == outcome for outcome in in_order if outcome != "trained"}

    def trained_values(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Return step and value of the trained steps whose value is finite, each ``(n,)``."""
        values = self.steps[name]
        mask = self.trained & np.isfinite(values)
        return self.steps["step"][mask], values[mask]

    @property
    def overview(self) -> "Series":
        """The run from its first step, possibly thinned, for rules that compare early steps with late ones.

        The first `N_FIRST_STEPS` steps and the most recent ones are complete.
        """
        return self.thinned or self

    @property
    def covers_start(self) -> bool:
        """True if `overview` includes the first step."""
        return len(self.overview) > 0 and bool(self.overview.steps["step"][0] <= 1)

    @property
    def has_signal_loss(self) -> bool:
        """True if the loss compares signals, so that training should raise SI-SDR."""
        return self.recipe_value("loss.name", "neg_si_sdr") not in ("deep_clustering", "whitened_kmeans")

    @property
    def at_full_lr(self) -> BoolArray:
        """True for trained steps at half the recipe's learning rate or more, ``(step,)``; excludes warmup and decay."""
        return self.trained & (self.steps["lr"] >= 0.5 * self.peak_lr)

    @property
    def peak_lr(self) -> float:
        """The recipe's learning rate, or the highest recorded one if the recipe has none."""
        # A record read from its end may not include the peak, so the recipe comes first.
        lr = self.steps["lr"]
        return float(self.recipe_value("optim.lr") or (np.nanmax(lr) if np.isfinite(lr).any() else np.nan))

    @property
    def last_step(self) -> int:
        """The number of the last step; 0 if there is none."""
        return int(self.steps["step"][-1]) if len(self) else 0

    @property
    def reading_notes(self) -> list[str]:
        """Sentences for the user about unreadable lines and about records of an older version."""
        notes = []
        if self.n_torn:
            notes.append(f"{self.n_torn} lines of the records could not be read.")
        if self.schema_version < SCHEMA_VERSION:
            notes.append(
                f"The records have schema version {self.schema_version}; they are read under the names of version "
                f"{SCHEMA_VERSION}."
            )
        return notes

    def recipe_value(self, key: str, default: Any = None) -> Any:
        """Return the recipe's value for a key such as ``optim.lr``."""
        table_name, _, name = key.partition(".")
        table = self.recipe.get(table_name)
        return table.get(name, default) if isinstance(table, Mapping) else default

    @property
    def loss_in_db(self) -> bool:
        """True if the loss is in dB, as recorded by the run, or else judging by the name of the loss."""
        recorded = self.environment.get("loss_in_db")
        if isinstance(recorded, bool):
            return recorded
        return self.recipe_value("loss.name", "neg_si_sdr") in DB_LOSSES

    def loss_to_db(self, loss: FloatArray | None = None) -> FloatArray:
        """Return losses in dB, so that the same thresholds serve every loss; the losses of the steps if None.

        A loss that is not in dB becomes ten times its logarithm. If it is ever 0 or below, it is returned unchanged.
        """
        # The decision depends on the losses of the steps, also for validation losses: both must use one scale.
        step_loss = self.steps["loss"]
        loss = step_loss if loss is None else loss
        if self.loss_in_db or (step_loss <= 0).any():
            return loss
        return 10 * np.log10(np.where(loss > 0, loss, np.nan))


def read_series(path: Path, *, last: int | None = None, thinned: bool = False) -> Series:
    """Read the records of a run, while it runs or afterwards, block by block so that long runs need little memory.

    Args:
        path: The run directory.
        last: Read at most about this many of the latest steps; None reads all.
        thinned: With ``last``, also read a sample of the earlier steps, at a cost that does not grow with the run.

    Raises:
        CheckpointError: If the path is not a run directory, or one of its files cannot be read.
    """
    # 1. The small files, and the logs that have few lines.
    run = RunDirectory(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no run directory {path}.")
    if not run.steps.exists():
        raise CheckpointError(f"{path} has no {run.steps.name}: it is not a run directory, or its run never started.")
    validations, n_torn_validations = read_rows(run.validation)
    events, n_torn_events = read_rows(run.events, last)
    others = (
        validations,
        events,
        _read_table(run.recipe, tomllib.loads),
        _read_table(run.environment, json.loads),
        _read_table(run.data, json.loads),
    )
    # 2. The steps: all of them, block by block, or only the end of the file.
    recent = None if last is None else read_rows(run.steps, last)
    blocks = row_blocks(run.steps) if recent is None else [recent]
    series = _make_series(
        blocks,
        *others,
        n_torn=n_torn_validations + n_torn_events,
        schema_version=steps_schema_version(run.steps),
    )
    if recent is None or not thinned or series.covers_start:
        return series
    # 3. A sample of all steps, for rules that compare early with late.
    sample = _sample_steps(run.steps, recent[0])
    return replace(series, thinned=_make_series([(sample, 0)], *others))


def _sample_steps(path: Path, recent: Sequence[Row]) -> list[Row]:
    """Return the first steps of a run, windows of steps spread over the file, and the recent steps, in order."""
    offsets = np.linspace(0, path.stat().st_size, N_WINDOWS, endpoint=False).astype(int)[1:]
    rows, _ = read_rows(path, first=N_FIRST_STEPS)
    for offset in offsets:
        window, _ = read_rows(path, first=WINDOW_STEPS, begin=int(offset))
        rows += window
    # In a short run the windows overlap; each step must count once.
    by_step = {row["step"]: row for row in [*rows, *recent] if isinstance(row.get("step"), int)}
    return [row for _, row in sorted(by_step.items())]


def series_from_rows(
    steps: Sequence[Row],
    validations: Sequence[Row],
    events: Sequence[Row],
    recipe: Row,
    environment: Row | None = None,
    data: Row | None = None,
) -> Series:
    """Return the series of rows in memory, as `read_series` does for the files of a run directory."""
    return _make_series([(steps, 0)], validations, events, recipe, environment or {}, data or {})


def _make_series(
    blocks: Iterable[tuple[Sequence[Row], int]],
    validations: Sequence[Row],
    events: Sequence[Row],
    recipe: Row,
    environment: Row,
    data: Row,
    *,
    n_torn: int = 0,
    schema_version: int = SCHEMA_VERSION,
) -> Series:
    columns = StepColumns()
    for rows, n_torn_in_block in blocks:
        columns.add(rows, n_torn_in_block)
    steps, outcomes, si_sdr, sampled = columns.finish()
    validations = [row for row in validations if isinstance(row.get("step"), int)]
    events = [row for row in events if isinstance(row.get("step"), int)]
    return Series(
        steps=steps,
        outcomes=outcomes,
        si_sdr=si_sdr,
        sampled=sampled,
        validation={name: number_column(validations, name) for name in VALIDATION_FIELDS},
        validation_rows=validations[-N_VALIDATION_ROWS:],
        events=events,
        recipe=recipe,
        environment=environment,
        data=data,
        n_torn=columns.n_torn + n_torn,
        schema_version=schema_version,
    )


def _read_table(path: Path, parse: Callable[[str], Any]) -> Row:
    """Return the table in a small TOML or JSON file of the run directory; an empty one if the file is missing."""
    if not path.exists():
        return {}
    try:
        table = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Fix it, or move it away.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} cannot be read (it does not contain a table). Fix it, or move it away.")
    return table
