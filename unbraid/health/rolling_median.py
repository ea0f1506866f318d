"""Statistics that ignore NaN and infinity: rolling median, median, minimum, maximum; and runs of marked steps."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unbraid.type_aliases import BoolArray, FloatArray

CHUNK_STEPS = 20_000
"""Steps whose windows are sorted at once. With 100 values each, that is a copy of 16 MB."""


def rolling_median(values: FloatArray, *, window: int = 100, min_count: int = 30) -> tuple[FloatArray, FloatArray]:
    """Compute median and median absolute deviation of the finite values before each step, the step itself excluded.

    Args:
        values: ``(step,)``.
        window: Number of preceding steps.
        min_count: Both results are NaN where fewer values than this are finite.

    Returns:
        The medians and the deviations, each ``(step,)``.
    """
    medians = np.full(len(values), np.nan)
    deviations = np.full(len(values), np.nan)
    # Padding in front gives the first steps a window as well; window i ends just before step i.
    padded = np.concatenate([np.full(window, np.nan), np.where(np.isfinite(values), values, np.nan)])
    windows = sliding_window_view(padded, window)[: len(values)]
    for start in range(0, len(values), CHUNK_STEPS):
        chunk = windows[start : start + CHUNK_STEPS]
        has_enough = np.isfinite(chunk).sum(1) >= min_count
        if has_enough.any():
            median = _row_medians(chunk[has_enough])
            index = start + np.flatnonzero(has_enough)
            medians[index] = median
            deviations[index] = _row_medians(np.abs(chunk[has_enough] - median[:, None]))
    return medians, deviations


def _row_medians(rows: FloatArray) -> FloatArray:
    # Sorting is several times as fast as numpy.nanmedian. It puts NaN last, so the finite values stand at the front.
    ordered = np.sort(rows, axis=1)
    count = np.isfinite(ordered).sum(1)
    middle = np.stack([(count - 1) // 2, count // 2], axis=1)
    return np.take_along_axis(ordered, middle, axis=1).mean(1)


def finite_median(values: FloatArray) -> float:
    """Return the median of the finite values, or NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def finite_max(values: FloatArray) -> float:
    """Return the largest finite value, or NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else float("nan")


def finite_min(values: FloatArray) -> float:
    """Return the smallest finite value, or NaN if there is none."""
    return -finite_max(-values)


def finite_argmin(values: FloatArray) -> int | None:
    """Return the index of the smallest finite value, or None if there is none."""
    if not np.isfinite(values).any():
        return None
    return int(np.where(np.isfinite(values), values, np.inf).argmin())


def episodes(marked: BoolArray, *, max_gap: int) -> list[tuple[int, int]]:
    """Group marked indices that are at most ``max_gap`` apart; return the first and the last index of each group."""
    indices = np.flatnonzero(marked)
    if not len(indices):
        return []
    splits = np.flatnonzero(np.diff(indices) > max_gap) + 1
    return [(int(group[0]), int(group[-1])) for group in np.split(indices, splits)]
