"""A run's records as curves, read in pieces and thinned: a million steps are drawn as a hundred are; no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.errors import CheckpointError, UserError
from unbraid.health.series import Floats, numbers, rows_of
from unbraid.records import RunDirectory, read_rows

OF_STEP = ("step", "loss", "grad_norm", "limit", "clipped", "lr", "seconds", "data_seconds", "examples_per_second")

OF_VALIDATION = ("step", "loss", "si_sdri", "best")

ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run. What was not written down is NaN.

    Attributes:
        of_step: The numbers of `unbraid.records.StepRecord` named in `OF_STEP`, each ``(step,)``.
        outcome: What became of each step, as a place in ``outcomes``, ``(step,)``.
        outcomes: All that became of steps; "trained" first.
        sampled: The steps whose blocks were looked at, ``(sample,)``.
        blocks: Names of the model's blocks, in its order.
        ratios: Of each block's update to its weights, ``(sample, block)``.
        of_validation: The numbers of `unbraid.records.ValidationRecord` named in `OF_VALIDATION`, ``(validation,)``.
    """

    of_step: Mapping[str, Floats]
    outcome: npt.NDArray[np.int8]
    outcomes: tuple[str, ...]
    sampled: Floats
    blocks: tuple[str, ...]
    ratios: Floats
    of_validation: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """Whether the weights moved, ``(step,)``."""
        return self.outcome == 0

    @property
    def left_out(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Whether a step was left out for a reason, ``(step,)``, by the reason, in the order in which they came."""
        return {reason: self.outcome == place for place, reason in enumerate(self.outcomes) if place}

    def of_trained(self, name: str) -> tuple[Floats, Floats]:
        """Step and value of the trained steps whose value is finite, each ``(n,)``."""
        values = self.of_step[name]
        known = self.trained & np.isfinite(values)
        return self.of_step["step"][known], values[known]


def read_curves(run: RunDirectory) -> Curves:
    """The curves of a run, during it or after it.

    Raises:
        CheckpointError: If it is no run directory.
        UserError: If it has no steps yet.
    """
    if not run.steps.exists():
        raise CheckpointError(f"{run.path} holds no {run.steps.name}: it is no run directory, or its run never began.")
    outcomes = {"trained": 0}
    pieces = [_piece(rows, outcomes) for rows in _rows_in_pieces(run.steps)]
    if not pieces:
        raise UserError(f"{run.path} has no steps yet; there is nothing to draw.")
    blocks = next((piece.blocks for piece in pieces if piece.blocks), ())
    looked_at = [piece for piece in pieces if piece.blocks == blocks]
    validations = [row for row in read_rows(run.validation)[0] if isinstance(row.get("step"), int)]
    return Curves(
        of_step={name: np.concatenate([piece.of_step[name] for piece in pieces]) for name in OF_STEP},
        outcome=np.concatenate([piece.outcome for piece in pieces]),
        outcomes=tuple(outcomes),
        sampled=np.concatenate([piece.sampled for piece in looked_at]),
        blocks=blocks,
        ratios=np.concatenate([piece.ratios for piece in looked_at]),
        of_validation={name: numbers(validations, name) for name in OF_VALIDATION},
    )


def _rows_in_pieces(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open("rb") as file:
        while lines := list(islice(file, ROWS_AT_A_TIME)):
            if rows := [row for line in lines if (row := _row(line)) is not None]:
                yield rows


def _row(line: bytes) -> dict[str, Any] | None:
    """A line that can be read and is of a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _piece(rows: list[dict[str, Any]], outcomes: dict[str, int]) -> Curves:
    """The curves of some steps; what became of them is added to the outcomes known so far."""
    sampled = [row for row in rows if row.get("blocks")]
    blocks = tuple(sampled[0]["blocks"]) if sampled else ()
    ratios = [[(row["blocks"].get(block) or {}).get("update_ratio") for block in blocks] for row in sampled]
    return Curves(
        of_step={name: numbers(rows, name) for name in OF_STEP},
        outcome=np.array([outcomes.setdefault(str(row.get("outcome")), len(outcomes)) for row in rows], dtype=np.int8),
        outcomes=tuple(outcomes),
        sampled=numbers(sampled, "step"),
        blocks=blocks,
        ratios=rows_of(ratios, len(blocks)),
    )


def thin(x: Floats, y: Floats, n_bins: int = 1500) -> tuple[Floats, Floats]:
    """A curve that looks the same with the lowest and the highest point of each bin alone.

    Args:
        x: Ascending, ``(n,)``.
        y: Finite, ``(n,)``.
        n_bins: As many bins as columns can be seen.

    Returns:
        Both with at most ``2 * n_bins`` points, in the order of ``x``.
    """
    if len(x) <= 2 * n_bins:
        return x, y
    starts = bin_starts(len(x), n_bins)
    bins = np.repeat(np.arange(n_bins), np.diff(np.append(starts, len(x))))
    by_value = np.lexsort((y, bins))
    lowest, highest = by_value[starts], by_value[np.append(starts[1:], len(x)) - 1]
    chosen = np.unique(np.concatenate([lowest, highest]))
    return x[chosen], y[chosen]


def running_mean(values: Floats, width: int) -> Floats:
    """Mean of each value and up to ``width - 1`` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def shares(marked: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> Floats:
    """The share of marks among some steps in each bin, ``(bin,)``; NaN in a bin that has none of those.

    Args:
        marked: ``(step,)``.
        among: ``(step,)``.
        starts: The first place of each bin, ``(bin,)``.
    """
    counts = np.add.reduceat(among.astype(np.float64), starts)
    hits = np.add.reduceat((marked & among).astype(np.float64), starts)
    return np.divide(hits, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def bin_starts(n: int, n_bins: int) -> npt.NDArray[np.int64]:
    """The first place of each of so many equal bins, or of as many as there are places, ``(bin,)``."""
    return np.linspace(0, n, min(n, n_bins), endpoint=False).astype(np.int64)
