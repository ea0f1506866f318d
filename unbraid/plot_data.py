"""Curves made ready to be drawn: thinned without losing a spike, smoothed, counted in bins; no torch."""

import numpy as np
import numpy.typing as npt

from unbraid.type_aliases import FloatArray


def thin(x: FloatArray, y: FloatArray, n_bins: int = 1500) -> tuple[FloatArray, FloatArray]:
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


def running_mean(values: FloatArray, width: int) -> FloatArray:
    """Mean of each value and up to ``width - 1`` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def shares(marked: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> FloatArray:
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
