"""Per-step values of a run in a bounded number of buckets: minimum, maximum and mean of each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from unbraid.type_aliases import FloatArray, IntArray

CAPACITY = 2**16
"""Most buckets kept. A shorter run has one step per bucket; a longer one has two, four, eight ..."""

INITIAL_BUCKETS = 1024


class Downsampled(NamedTuple):
    """Consecutive steps merged into few enough buckets for a screen.

    Attributes:
        steps: First step of each bucket, ``(bucket,)``.
        n_steps: Number of steps in each bucket, ``(bucket,)``.
        low: Smallest value, ``(column, bucket)``; NaN where none is finite.
        high: Largest value, ``(column, bucket)``; NaN where none is finite.
        mean: Mean of the finite values, ``(column, bucket)``; NaN where none is finite.
        total: Sum of the finite values, ``(column, bucket)``.
    """

    steps: IntArray
    n_steps: IntArray
    low: FloatArray
    high: FloatArray
    mean: FloatArray
    total: FloatArray


class Buckets:
    """Per-step columns that grow with a file within a fixed amount of memory.

    Values that are not finite are ignored. When all buckets are used, neighbouring pairs are merged.

    Args:
        n_columns: Number of values per step.
        capacity: Most buckets to keep; an even number.
    """

    def __init__(self, n_columns: int, *, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.width = 1  # steps per full bucket
        self.n_buckets = 0  # buckets in use; the arrays below are longer
        self.steps = np.zeros(INITIAL_BUCKETS, np.int64)
        self.n_steps = np.zeros(INITIAL_BUCKETS, np.int64)
        self.offsets = np.zeros(INITIAL_BUCKETS, np.int64)
        # float32 is exact enough for curves and halves the memory; sums need float64 over a million steps.
        self.low = np.full((n_columns, INITIAL_BUCKETS), np.nan, np.float32)
        self.high = np.full((n_columns, INITIAL_BUCKETS), np.nan, np.float32)
        self.total = np.zeros((n_columns, INITIAL_BUCKETS))
        self.n_finite = np.zeros((n_columns, INITIAL_BUCKETS), np.int32)

    def append(self, steps: IntArray, offsets: IntArray, values: FloatArray) -> None:
        """Add steps after those already present.

        Args:
            steps: Step numbers in increasing order, ``(step,)``.
            offsets: Byte offset of each step's line in its file, ``(step,)``.
            values: ``(column, step)``.
        """
        while len(steps):
            last_is_partial = self.n_buckets and self.n_steps[self.n_buckets - 1] < self.width
            if self.n_buckets == self.capacity and not last_is_partial:
                self._merge_pairs()
                continue
            bucket = self.n_buckets - 1 if last_is_partial else self.n_buckets
            room = self.width - (int(self.n_steps[bucket]) if last_is_partial else 0)
            n_fitting = room + (self.capacity - bucket - 1) * self.width
            self._fill(bucket, room, steps[:n_fitting], offsets[:n_fitting], values[:, :n_fitting])
            steps = steps[n_fitting:]
            offsets = offsets[n_fitting:]
            values = values[:, n_fitting:]

    def _fill(self, bucket: int, room: int, steps: IntArray, offsets: IntArray, values: FloatArray) -> None:
        """Put the first ``room`` steps into the given bucket and the rest into new buckets after it."""
        # Reduce the new steps to one column per bucket that they touch.
        starts = np.concatenate([[0], np.arange(room, len(steps), self.width)])
        end = bucket + len(starts)
        self._grow(end)
        is_finite = np.isfinite(values)
        finite_or_nan = np.where(is_finite, values, np.nan).astype(np.float32)
        n_steps = np.diff(np.append(starts, len(steps)))
        low = np.fmin.reduceat(finite_or_nan, starts, axis=1)
        high = np.fmax.reduceat(finite_or_nan, starts, axis=1)
        total = np.add.reduceat(np.where(is_finite, values, 0.0), starts, axis=1)
        n_finite = np.add.reduceat(is_finite, starts, axis=1, dtype=np.int32)

        # Merge the first column into a bucket that is only partly full.
        n_merged = 0 if bucket == self.n_buckets else 1
        if n_merged:
            self.n_steps[bucket] += n_steps[0]
            self.low[:, bucket] = np.fmin(self.low[:, bucket], low[:, 0])
            self.high[:, bucket] = np.fmax(self.high[:, bucket], high[:, 0])
            self.total[:, bucket] += total[:, 0]
            self.n_finite[:, bucket] += n_finite[:, 0]

        # Store the others as new buckets.
        new = slice(bucket + n_merged, end)
        self.steps[new] = steps[starts[n_merged:]]
        self.offsets[new] = offsets[starts[n_merged:]]
        self.n_steps[new] = n_steps[n_merged:]
        self.low[:, new] = low[:, n_merged:]
        self.high[:, new] = high[:, n_merged:]
        self.total[:, new] = total[:, n_merged:]
        self.n_finite[:, new] = n_finite[:, n_merged:]
        self.n_buckets = end

    def _grow(self, n_buckets: int) -> None:
        """Make the arrays long enough, doubling them so that appending stays linear over a run."""
        length = len(self.steps)
        if n_buckets <= length:
            return
        n_added = min(max(n_buckets - length, length), self.capacity - length)
        for name in ("steps", "n_steps", "offsets", "low", "high", "total", "n_finite"):
            array = getattr(self, name)
            padding = np.zeros((*array.shape[:-1], n_added), array.dtype)
            setattr(self, name, np.concatenate([array, padding], axis=-1))

    def _merge_pairs(self) -> None:
        """Merge full buckets in pairs, which frees half of them."""
        half = self.n_buckets // 2
        even = slice(0, 2 * half, 2)
        odd = slice(1, 2 * half, 2)
        # The source and destination ranges overlap, hence the copies.
        self.steps[:half] = self.steps[even].copy()
        self.offsets[:half] = self.offsets[even].copy()
        self.n_steps[:half] = self.n_steps[even] + self.n_steps[odd]
        self.low[:, :half] = np.fmin(self.low[:, even], self.low[:, odd])
        self.high[:, :half] = np.fmax(self.high[:, even], self.high[:, odd])
        self.total[:, :half] = self.total[:, even] + self.total[:, odd]
        self.n_finite[:, :half] = self.n_finite[:, even] + self.n_finite[:, odd]
        self.n_buckets = half
        self.width *= 2

    def downsample(self, first: int, last: int, max_buckets: int) -> Downsampled:
        """Return the steps from ``first`` to ``last``, both included, in at most ``max_buckets`` buckets."""
        starts = self.steps[: self.n_buckets]
        begin = max(0, int(np.searchsorted(starts, first, side="right")) - 1)
        end = max(begin, int(np.searchsorted(starts, last, side="right")))
        window = slice(begin, end)
        return merge_buckets(
            self.steps[window],
            self.n_steps[window],
            self.low[:, window],
            self.high[:, window],
            self.total[:, window],
            self.n_finite[:, window],
            max_buckets=max_buckets,
        )

    def offset_before(self, step: int) -> int:
        """Return the byte offset from which to read the file so that the line of a step is found."""
        bucket = int(np.searchsorted(self.steps[: self.n_buckets], step, side="right")) - 1
        return int(self.offsets[bucket]) if bucket >= 0 else 0


def merge_buckets(
    steps: IntArray,
    n_steps: IntArray,
    low: npt.NDArray[np.floating],
    high: npt.NDArray[np.floating],
    total: FloatArray,
    n_finite: npt.NDArray[np.int32],
    *,
    max_buckets: int,
) -> Downsampled:
    """Merge equally many neighbouring buckets each, until at most ``max_buckets`` are left.

    Args:
        steps: First step of each bucket, ``(bucket,)``.
        n_steps: Number of steps in each bucket, ``(bucket,)``.
        low: Smallest finite values, ``(column, bucket)``.
        high: Largest finite values, ``(column, bucket)``.
        total: Sums of the finite values, ``(column, bucket)``.
        n_finite: Numbers of finite values, ``(column, bucket)``.
        max_buckets: Most buckets to return.
    """
    if len(steps) == 0:  # reduceat does not accept empty arrays
        empty = np.zeros((len(low), 0))
        return Downsampled(steps, n_steps, empty, empty, empty, empty)
    n_merged = -(-len(steps) // max(1, max_buckets))
    starts = np.arange(0, len(steps), n_merged)
    totals = np.add.reduceat(total, starts, axis=1)
    counts = np.add.reduceat(n_finite, starts, axis=1)
    return Downsampled(
        steps=steps[starts],
        n_steps=np.add.reduceat(n_steps, starts),
        low=np.fmin.reduceat(low, starts, axis=1).astype(float),
        high=np.fmax.reduceat(high, starts, axis=1).astype(float),
        mean=np.where(counts > 0, totals / np.maximum(counts, 1), np.nan),
        total=totals,
    )


def downsample_steps(steps: Sequence[int], values: FloatArray, *, max_buckets: int) -> Downsampled:
    """Downsample single steps as `Buckets.downsample` does.

    Args:
        steps: Step numbers, ``(step,)``.
        values: ``(column, step)``.
        max_buckets: Most buckets to return.
    """
    numbers = np.asarray(steps, np.int64)
    is_finite = np.isfinite(values)
    finite_or_nan = np.where(is_finite, values, np.nan)
    return merge_buckets(
        numbers,
        np.ones_like(numbers),
        finite_or_nan,
        finite_or_nan,
        np.where(is_finite, values, 0.0),
        is_finite.astype(np.int32),
        max_buckets=max_buckets,
    )
