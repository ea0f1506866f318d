"""A run directory's records as arrays over steps; no torch."""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.errors import CheckpointError
from unbraid.records import RunDirectory, read_rows

Floats = npt.NDArray[np.float64]

DB_LOSSES = ("neg_sa_sdr", "neg_si_sdr", "neg_snr", "neg_thresholded_snr")
"""The losses of ours that are in dB, by name: the same as `unbraid.losses.IN_DB`, which would bring torch along."""

LEFT_ALONE = ("trained", "all_easy", "loss_scale")
"""Outcomes of a step that are no fault of example or model."""

NUMBERS = (
    "step",
    "loss",
    "grad_norm",
    "limit",
    "norm_after",
    "lr",
    "loss_scale",
    "n_trained",
    "n_easy",
    "clipped",
    "seconds",
    "data_seconds",
    "peak_memory_bytes",
)
SCORES = ("step", "loss", "si_sdri", "lr")


@dataclass(frozen=True)
class Sampled:
    """The steps that were looked at closely.

    Attributes:
        step: ``(sample,)``.
        blocks: Names of the model's blocks, in its order.
        norms: Of each block's gradient, ``(sample, block)``.
        ratios: Of each block's update to its weights, ``(sample, block)``.
        items: The examples of each sampled step, as `unbraid.records.ItemRecord` has them.
    """

    step: Floats
    blocks: tuple[str, ...]
    norms: Floats
    ratios: Floats
    items: Sequence[Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Series:
    """A run, as the doctor looks at it. What was not written down is NaN.

    Attributes:
        of_step: The numbers of `unbraid.records.StepRecord`, by name, ``(step,)``.
        outcome: What became of each step.
        si_sdr: Of each source, ``(step, source)``.
        sampled: The steps that were looked at closely.
        of_validation: The numbers of `unbraid.records.ValidationRecord`, by name, ``(validation,)``.
        events: As `unbraid.records.Event` has them.
        recipe: The resolved recipe.
        n_torn: Lines that could not be read.
    """

    of_step: Mapping[str, Floats]
    outcome: npt.NDArray[np.str_]
    si_sdr: Floats
    sampled: Sampled
    of_validation: Mapping[str, Floats]
    events: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    n_torn: int = 0

    def __len__(self) -> int:
        """Steps."""
        return len(self.outcome)

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Whether the weights moved, ``(step,)``."""
        return self.outcome == "trained"

    @property
    def whole(self) -> bool:
        """Whether it goes back to the first step, so that early and late can be held against each other."""
        return len(self) > 0 and bool(self.of_step["step"][0] <= 1)

    @property
    def trains_signals(self) -> bool:
        """Whether the loss is one of signals, so that SI-SDR is what it should raise."""
        return self.said("loss.name", "neg_si_sdr") not in ("deep_clustering", "whitened_kmeans")

    @property
    def at_full_rate(self) -> npt.NDArray[np.bool_]:
        """The trained steps at half the recipe's learning rate or more, as schedules begin and end low, ``(step,)``."""
        lr = self.of_step["lr"]
        top = self.said("optim.lr") or (np.nanmax(lr) if np.isfinite(lr).any() else np.nan)
        return self.trained & (lr >= 0.5 * float(top))

    @property
    def last_step(self) -> int:
        """The number of the last step; 0 where there is none."""
        return int(self.of_step["step"][-1]) if len(self) else 0

    def said(self, key: str, otherwise: Any = None) -> Any:
        """What the recipe has under a key such as ``optim.lr``."""
        table, _, name = key.partition(".")
        found = self.recipe.get(table)
        return found.get(name, otherwise) if isinstance(found, Mapping) else otherwise

    def level(self, loss: Floats | None = None) -> Floats:
        """Losses as they can be compared: in dB as they are, else ten times their logarithm; the run's own if None.

        A loss of one's own that is ever 0 or below is taken as it is.
        """
        own = self.of_step["loss"]
        given = own if loss is None else loss
        if self.said("loss.name", "neg_si_sdr") in DB_LOSSES or (own <= 0).any():
            return given
        return 10 * np.log10(np.where(given > 0, given, np.nan))


def read_series(path: Path, *, last: int | None = None) -> Series:
    """The records of a run, during it or after it.

    Args:
        path: Its run directory.
        last: Read no more than about so many of its last steps; all if None.

    Raises:
        CheckpointError: If it is no run directory, or its recipe cannot be read.
    """
    run = RunDirectory(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no run directory {path}.")
    if not run.steps.exists():
        raise CheckpointError(f"{path} holds no {run.steps.name}: it is no run directory, or its run never began.")
    steps, n_torn = read_rows(run.steps, last)
    validations, n_more = read_rows(run.validation, last)
    events, n_most = read_rows(run.events, last)
    try:
        recipe = tomllib.loads(run.recipe.read_text(encoding="utf-8")) if run.recipe.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{run.recipe} cannot be read ({error}); mend it, or move it away.") from error
    return series_of(steps, validations, events, recipe, n_torn=n_torn + n_more + n_most)


def series_of(
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    *,
    n_torn: int = 0,
) -> Series:
    """Rows of a run directory's files as arrays; rows without a number of their step are left out."""
    steps, validations, events = (
        [row for row in rows if isinstance(row.get("step"), int)] for rows in (steps, validations, events)
    )
    sampled = [row for row in steps if row.get("blocks") or row.get("items")]
    blocks = tuple(next((row["blocks"] for row in sampled if row.get("blocks")), {}))
    n_sources = max((len(row.get("si_sdr") or ()) for row in steps), default=0)
    return Series(
        of_step={name: numbers(steps, name) for name in NUMBERS},
        outcome=np.array([str(row.get("outcome", "")) for row in steps], dtype=np.str_),
        si_sdr=rows_of([row.get("si_sdr") or () for row in steps], n_sources),
        sampled=Sampled(
            step=numbers(sampled, "step"),
            blocks=blocks,
            norms=_of_blocks(sampled, blocks, "grad_norm"),
            ratios=_of_blocks(sampled, blocks, "update_ratio"),
            items=[row.get("items") or [] for row in sampled],
        ),
        of_validation={name: numbers(validations, name) for name in SCORES},
        events=events,
        recipe=recipe,
        n_torn=n_torn,
    )


def numbers(rows: Iterable[Mapping[str, Any]], name: str) -> Floats:
    """One number of each row; NaN where there is none, infinite where its text says so."""
    return np.array([_number(row, name) for row in rows], dtype=np.float64)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        value = row.get(f"{name}_text", math.nan)
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def rows_of(values: Sequence[Sequence[Any]], width: int | None = None) -> Floats:
    """Lists of numbers as an array as wide as asked for, or as the longest; NaN where one is missing."""
    width = max(map(len, values), default=0) if width is None else width
    table = np.full((len(values), width), np.nan)
    for place, row in enumerate(values):
        table[place, : len(row)] = [math.nan if value is None else value for value in row]
    return table


def _of_blocks(rows: Sequence[Mapping[str, Any]], blocks: Sequence[str], name: str) -> Floats:
    of_rows = [row.get("blocks") or {} for row in rows]
    return rows_of([[_number(found.get(block) or {}, name) for block in blocks] for found in of_rows], len(blocks))
