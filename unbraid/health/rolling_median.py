"""What is usual at each step: the median and the spread of the steps before it."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unbraid.type_aliases import FloatArray

AT_A_TIME = 20_000


def usual(values: FloatArray, *, n_before: int = 100, at_least: int = 30) -> tuple[FloatArray, FloatArray]:
    """Median, and median distance from it, of the finite values before each one.

    Args:
        values: ``(step,)``.
        n_before: How many of them.
        at_least: With fewer finite ones before it, a step has NaN for both.

    Returns:
        Both ``(step,)``.
    """
    medians, spreads = np.full(len(values), np.nan), np.full(len(values), np.nan)
    padded = np.concatenate([np.full(n_before, np.nan), np.where(np.isfinite(values), values, np.nan)])
    windows = sliding_window_view(padded, n_before)[: len(values)]
    for begin in range(0, len(values), AT_A_TIME):
        some = windows[begin : begin + AT_A_TIME]
        known = np.isfinite(some).sum(1) >= at_least
        if known.any():
            median = _medians(some[known])
            place = begin + np.flatnonzero(known)
            medians[place] = median
            spreads[place] = _medians(np.abs(some[known] - median[:, None]))
    return medians, spreads


def _medians(rows: FloatArray) -> FloatArray:
    """The median of what is not NaN in each row; sorting is several times as fast as `numpy.nanmedian`."""
    ordered = np.sort(rows, axis=1)  # NaN comes last
    count = np.isfinite(ordered).sum(1)
    middles = np.stack([(count - 1) // 2, count // 2], axis=1)
    return np.take_along_axis(ordered, middles, axis=1).mean(1)


def middle(values: FloatArray) -> float:
    """The median of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def highest(values: FloatArray) -> float:
    """The largest of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else float("nan")


def lowest(values: FloatArray) -> float:
    """The smallest of what is finite; NaN where nothing is."""
    return -highest(-values)


def where_lowest(values: FloatArray) -> int | None:
    """The place of the smallest of what is finite; None where nothing is."""
    return int(np.where(np.isfinite(values), values, np.inf).argmin()) if np.isfinite(values).any() else None


def episodes(marked: np.ndarray, *, gap: int) -> list[tuple[int, int]]:
    """Where marks come one after the other, no further apart than a gap: first and last place of each."""
    places = np.flatnonzero(marked)
    if not len(places):
        return []
    splits = np.flatnonzero(np.diff(places) > gap) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(places, splits)]
