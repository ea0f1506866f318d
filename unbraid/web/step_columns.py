"""What the page shows of a step: rows of steps.jsonl as columns of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unbraid.columns import numbers
from unbraid.records import SKIPPED_OUTCOMES
from unbraid.web.downsample import Floats

RECORDED = ("grad_norm", "max_norm", "clipped_grad_norm", "lr", "seconds", "data_seconds", "examples_per_second")
COLUMNS = (
    "loss",
    *RECORDED,
    "si_sdr",
    "clipped",
    "update_ratio",
    "memory_bytes",
    "rescued",
    *SKIPPED_OUTCOMES,
)


def columns(rows: Sequence[Mapping[str, Any]]) -> Floats:
    """``(column, row)``, in the order of `COLUMNS`; NaN where a row says nothing.

    The loss, SI-SDR and whether the gradient was clipped are those of steps that were trained, so that no mean holds
    anything else.
    """
    outcomes = [row.get("outcome") for row in rows]
    trained = np.array([outcome == "trained" for outcome in outcomes])
    found = {name: numbers(rows, name) for name in RECORDED}
    found["memory_bytes"] = numbers(rows, "peak_memory_bytes")
    found |= {name: np.where(trained, numbers(rows, name), np.nan) for name in ("loss", "clipped")}
    found["si_sdr"] = np.where(trained, [_mean(row.get("si_sdr")) for row in rows], np.nan)
    found["update_ratio"] = np.array([_update_ratio(row.get("blocks")) for row in rows], dtype=float)
    found["rescued"] = (trained & (numbers(rows, "n_bad") > 0)).astype(float)
    found |= {name: np.array([outcome == name for outcome in outcomes], dtype=float) for name in SKIPPED_OUTCOMES}
    return np.stack([found[name] for name in COLUMNS])


def _mean(values: Any) -> float:
    known = [value for value in values if isinstance(value, (int, float))] if isinstance(values, list) else []
    return sum(known) / len(known) if known else np.nan


def _update_ratio(blocks: Any) -> float:
    """The median over the blocks of a step that was looked at closely; NaN of another."""
    if not isinstance(blocks, Mapping):
        return np.nan
    ratios = [block.get("update_ratio") for block in blocks.values() if isinstance(block, Mapping)]
    known = [ratio for ratio in ratios if isinstance(ratio, (int, float))]
    return float(np.median(known)) if known else np.nan
