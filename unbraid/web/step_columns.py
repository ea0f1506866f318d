"""Rows of steps.jsonl as the columns of numbers that the page draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unbraid.columns import number_column
from unbraid.records import SKIPPED_OUTCOMES
from unbraid.type_aliases import FloatArray, Row

STEP_FLAGS = ("rescued", *SKIPPED_OUTCOMES)
"""Columns of zeros and ones: a step trained without its bad examples, and each reason to skip a step."""

AS_RECORDED = ("grad_norm", "max_norm", "clipped_grad_norm", "lr", "seconds", "data_seconds", "examples_per_second")
COLUMNS = ("loss", *AS_RECORDED, "si_sdr", "clipped", "update_ratio", "memory_bytes", *STEP_FLAGS)


def step_columns(rows: Sequence[Row]) -> FloatArray:
    """Return rows as ``(column, row)`` in the order of `COLUMNS`; NaN where a row has no value.

    ``loss``, ``si_sdr`` and ``clipped`` are NaN in skipped steps, so that their means are over trained steps only.
    """
    outcomes = [row.get("outcome") for row in rows]
    # dtype: of no rows at all, numpy would make an array of floats.
    trained = np.array([outcome == "trained" for outcome in outcomes], dtype=bool)
    values = {name: number_column(rows, name) for name in AS_RECORDED}
    values["memory_bytes"] = number_column(rows, "peak_memory_bytes")
    for name in ("loss", "clipped"):
        values[name] = np.where(trained, number_column(rows, name), np.nan)
    # The mean over the sources, and the median over the blocks, as a chart has one line per run.
    values["si_sdr"] = np.where(trained, [_mean(row.get("si_sdr")) for row in rows], np.nan)
    values["update_ratio"] = np.array([_median_update_ratio(row.get("blocks")) for row in rows], dtype=float)
    values["rescued"] = (trained & (number_column(rows, "n_bad") > 0)).astype(float)
    for name in SKIPPED_OUTCOMES:
        values[name] = np.array([outcome == name for outcome in outcomes], dtype=float)
    return np.stack([values[name] for name in COLUMNS])


# The files may be damaged or written by another program: whatever is not a number counts as missing.


def _mean(values: Any) -> float:
    if not isinstance(values, list):
        return np.nan
    present = [value for value in values if isinstance(value, (int, float))]
    return sum(present) / len(present) if present else np.nan


def _median_update_ratio(blocks: Any) -> float:
    """Return the median over the blocks of a sampled step; NaN for other steps, which record no blocks."""
    if not isinstance(blocks, Mapping):
        return np.nan
    ratios = [block.get("update_ratio") for block in blocks.values() if isinstance(block, Mapping)]
    present = [ratio for ratio in ratios if isinstance(ratio, (int, float))]
    return float(np.median(present)) if present else np.nan
