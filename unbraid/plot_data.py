"""Curves prepared for plotting: thinned without losing a spike, smoothed, counted in bins."""

import numpy as np

from unbraid.type_aliases import BoolArray, FloatArray, IntArray


def thin(x: FloatArray, y: FloatArray, n_bins: int = 1500) -> tuple[FloatArray, FloatArray]:
    """Reduce a curve to the lowest and the highest point of each bin, so that it looks the same when plotted.

    Args:
        x: Ascending, ``(n,)``.
        y: Finite, ``(n,)``.
        n_bins: Number of bins; about the number of pixel columns of the figure.

    Returns:
        ``x`` and ``y`` with at most ``2 * n_bins`` points, in the order of ``x``.
    """
    if len(x) <= 2 * n_bins:
        return x, y
    starts = bin_starts(len(x), n_bins)
    bins = np.repeat(np.arange(n_bins), np.diff(np.append(starts, len(x))))
    # Sorted by bin and then by value, the first index of each bin is its minimum and the last its maximum.
    by_value = np.lexsort((y, bins))
    lowest = by_value[starts]
    highest = by_value[np.append(starts[1:], len(x)) - 1]
    indices = np.unique(np.concatenate([lowest, highest]))
    return x[indices], y[indices]


def running_mean(values: FloatArray, width: int) -> FloatArray:
    """Compute the mean of each value and up to ``width - 1`` values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def shares(marked: BoolArray, among: BoolArray, starts: IntArray) -> FloatArray:
    """Compute the share of marked steps among some steps in each bin, ``(bin,)``; NaN for a bin without such steps.

    Args:
        marked: The steps to count, ``(step,)``.
        among: The steps that could be marked, ``(step,)``.
        starts: First index of each bin, ``(bin,)``.
    """
    n_among = np.add.reduceat(among.astype(np.float64), starts)
    n_marked = np.add.reduceat((marked & among).astype(np.float64), starts)
    return np.divide(n_marked, n_among, out=np.full(len(starts), np.nan), where=n_among > 0)


def bin_starts(n: int, n_bins: int) -> IntArray:
    """Return the first index of each of ``n_bins`` equal bins of ``n`` values, ``(bin,)``; at most ``n``."""
    return np.linspace(0, n, min(n, n_bins), endpoint=False).astype(np.int64)
