"""Find the process that the others wait for."""

from collections.abc import Sequence
from typing import NamedTuple

from unbraid.train.step_notes import SECTIONS


class Straggler(NamedTuple):
    """A process that the others wait for, the section it is slow in, and how much slower than the median process."""

    rank: int
    section: str
    factor: float


class StragglerDetector:
    """Average the busy seconds of each rank and section over a window of steps, and name a rank that is too slow.

    Args:
        n_ranks: Number of processes.
    """

    WINDOW = 100
    FACTOR = 1.5
    MIN_SECONDS = 0.01  # below this difference a slow rank costs nothing worth a message

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.reported: set[tuple[int, str]] = set()
        self._clear()

    def _clear(self) -> None:
        self.n_steps = 0
        self.sums = [[0.0] * self.n_ranks for _ in SECTIONS]

    def add(self, busy_seconds: Sequence[float]) -> Straggler | None:
        """Add one step. Every `WINDOW` steps, return the slowest process if it is too slow and was not returned before.

        Args:
            busy_seconds: ``(rank, section)``, flattened.
        """
        for section, sums in enumerate(self.sums):
            for rank in range(self.n_ranks):
                sums[rank] += busy_seconds[rank * len(SECTIONS) + section]
        self.n_steps += 1
        if self.n_steps < self.WINDOW:
            return None
        slowest = [self._slowest(section) for section in range(len(SECTIONS))]
        self._clear()
        new = [s for s in slowest if s is not None and (s.rank, s.section) not in self.reported]
        self.reported |= {(straggler.rank, straggler.section) for straggler in new}
        return max(new, key=lambda straggler: straggler.factor, default=None)

    def _slowest(self, section: int) -> Straggler | None:
        means = [total / self.n_steps for total in self.sums[section]]
        rank = max(range(self.n_ranks), key=means.__getitem__)
        others = sorted(means[:rank] + means[rank + 1 :])
        if not others:
            return None
        median = others[len(others) // 2]
        if means[rank] < self.FACTOR * median or means[rank] - median < self.MIN_SECONDS:
            return None
        return Straggler(rank, SECTIONS[section], means[rank] / max(median, 1e-9))
