"""Numbers of a run's steps in a bounded number of buckets: the least, the greatest and the mean of each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

CAPACITY = 2**16
"""Buckets at most: a run of fewer steps is kept step by step, of a longer one two, four, eight ... go together."""


class Thinned(NamedTuple):
    """Some buckets, put together so that they fit on a screen.

    Attributes:
        steps: The first step of each, ``(bucket,)``.
        n_steps: How many steps each holds, ``(bucket,)``.
        low: The least value, ``(column, bucket)``; NaN where none is finite.
        high: The greatest.
        mean: The mean of what is finite.
        total: The sum of what is finite.
    """

    steps: Whole
    n_steps: Whole
    low: Floats
    high: Floats
    mean: Floats
    total: Floats


class Buckets:
    """Columns over steps that grow with a file and never take more memory than so much.

    A value that is not finite counts for nothing. Where the room is used up, neighbours are put together two and two.

    Args:
        n_columns: Numbers of each step.
        capacity: Buckets at most, even.
    """

    def __init__(self, n_columns: int, *, capacity: int = CAPACITY) -> None:
        self.capacity, self.width, self.n = capacity, 1, 0
        self.steps, self.n_steps, self.offsets = (np.zeros(1024, np.int64) for _ in range(3))
        self.low, self.high = (np.full((n_columns, 1024), np.nan, np.float32) for _ in range(2))
        self.total, self.count = np.zeros((n_columns, 1024)), np.zeros((n_columns, 1024), np.int32)

    def append(self, steps: Whole, offsets: Whole, values: Floats) -> None:
        """Add steps behind those that are there.

        Args:
            steps: Their numbers, rising, ``(step,)``.
            offsets: Where the line of each begins in its file, in bytes, ``(step,)``.
            values: ``(column, step)``.
        """
        while len(steps):
            has_room = self.n and self.n_steps[self.n - 1] < self.width
            if self.n == self.capacity and not has_room:
                self._halve()
                continue
            place = self.n - 1 if has_room else self.n
            room = self.width - (int(self.n_steps[place]) if has_room else 0)
            fit = room + (self.capacity - place - 1) * self.width
            self._fill(place, room, steps[:fit], offsets[:fit], values[:, :fit])
            steps, offsets, values = steps[fit:], offsets[fit:], values[:, fit:]

    def _fill(self, place: int, room: int, steps: Whole, offsets: Whole, values: Floats) -> None:
        """Put steps into the bucket at a place, which has room for so many, and into new ones behind it."""
        starts = np.concatenate([[0], np.arange(room, len(steps), self.width)])
        self._grow(place + len(starts))
        finite = np.isfinite(values)
        known = np.where(finite, values, np.nan).astype(np.float32)
        sizes = np.diff(np.append(starts, len(steps)))
        low, high = np.fmin.reduceat(known, starts, axis=1), np.fmax.reduceat(known, starts, axis=1)
        total = np.add.reduceat(np.where(finite, values, 0.0), starts, axis=1)
        count = np.add.reduceat(finite, starts, axis=1, dtype=np.int32)
        new = 0 if place == self.n else 1
        at = slice(place + new, place + len(starts))
        self.steps[at], self.offsets[at], self.n_steps[at] = steps[starts[new:]], offsets[starts[new:]], sizes[new:]
        self.low[:, at], self.high[:, at] = low[:, new:], high[:, new:]
        self.total[:, at], self.count[:, at] = total[:, new:], count[:, new:]
        if new:
            self.n_steps[place] += sizes[0]
            self.low[:, place] = np.fmin(self.low[:, place], low[:, 0])
            self.high[:, place] = np.fmax(self.high[:, place], high[:, 0])
            self.total[:, place] += total[:, 0]
            self.count[:, place] += count[:, 0]
        self.n = place + len(starts)

    def _grow(self, n: int) -> None:
        missing = n - len(self.steps)
        if missing <= 0:
            return
        missing = min(max(missing, len(self.steps)), self.capacity - len(self.steps))
        for name in ("steps", "n_steps", "offsets"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(missing, np.int64)]))
        for name in ("low", "high", "total", "count"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros((len(old), missing), old.dtype)], axis=1))

    def _halve(self) -> None:
        """Put full buckets together two and two."""
        half = self.n // 2
        even, odd = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        self.steps[:half], self.offsets[:half] = self.steps[even].copy(), self.offsets[even].copy()
        self.n_steps[:half] = self.n_steps[even] + self.n_steps[odd]
        self.low[:, :half] = np.fmin(self.low[:, even], self.low[:, odd])
        self.high[:, :half] = np.fmax(self.high[:, even], self.high[:, odd])
        self.total[:, :half] = self.total[:, even] + self.total[:, odd]
        self.count[:, :half] = self.count[:, even] + self.count[:, odd]
        self.n, self.width = half, 2 * self.width

    def thinned(self, first: int, last: int, n_most: int) -> Thinned:
        """The steps from one to another, in no more than so many buckets.

        Args:
            first: The first step wanted.
            last: The last.
            n_most: How many at most.
        """
        begin = max(0, int(np.searchsorted(self.steps[: self.n], first, side="right")) - 1)
        end = int(np.searchsorted(self.steps[: self.n], last, side="right"))
        at = slice(begin, max(begin, end))
        whole = self.low[:, at], self.high[:, at], self.total[:, at], self.count[:, at]
        return put_together(self.steps[at], self.n_steps[at], *whole, n_most=n_most)

    def offset_before(self, step: int) -> int:
        """Where reading has to begin in the file, in bytes, so that the line of a step is met."""
        place = int(np.searchsorted(self.steps[: self.n], step, side="right")) - 1
        return int(self.offsets[place]) if place >= 0 else 0


def put_together(
    steps: Whole,
    n_steps: Whole,
    low: npt.NDArray[np.floating],
    high: npt.NDArray[np.floating],
    total: Floats,
    count: npt.NDArray[np.int32],
    *,
    n_most: int,
) -> Thinned:
    """Neighbours put together, as many into each as are needed for no more than so many.

    Args:
        steps: The first step of each bucket, ``(bucket,)``.
        n_steps: Steps in each, ``(bucket,)``.
        low: ``(column, bucket)``.
        high: ``(column, bucket)``.
        total: Sums, ``(column, bucket)``.
        count: What is finite, ``(column, bucket)``.
        n_most: How many buckets at most.
    """
    if len(steps) == 0:
        nothing = np.zeros((len(low), 0))
        return Thinned(steps, n_steps, nothing, nothing, nothing, nothing)
    starts = np.arange(0, len(steps), -(-len(steps) // max(1, n_most)))
    sums, counts = np.add.reduceat(total, starts, axis=1), np.add.reduceat(count, starts, axis=1)
    with np.errstate(invalid="ignore"):
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    least, most = np.fmin.reduceat(low, starts, axis=1), np.fmax.reduceat(high, starts, axis=1)
    return Thinned(steps[starts], np.add.reduceat(n_steps, starts), least.astype(float), most.astype(float), mean, sums)


def of_each_step(steps: Sequence[int], values: Floats, *, n_most: int) -> Thinned:
    """Steps that were read one by one, put together as `Buckets.thinned` does.

    Args:
        steps: Their numbers, ``(step,)``.
        values: ``(column, step)``.
        n_most: How many buckets at most.
    """
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    numbers = np.asarray(steps, np.int64)
    sums = np.where(finite, values, 0.0)
    return put_together(numbers, np.ones_like(numbers), known, known, sums, finite.astype(np.int32), n_most=n_most)
