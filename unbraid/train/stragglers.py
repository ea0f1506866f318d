"""What a run notices about itself while it goes: a process that holds up the others, an output that is dead."""

from collections.abc import Sequence
from typing import NamedTuple

from unbraid.health.outputs import BELOW_LOUDEST_DB, SILENT_DB
from unbraid.records import ItemRecord


class Slow(NamedTuple):
    """A process that the others wait for: which, in which section, and how many times as long as the middle one."""

    rank: int
    section: str
    factor: float


class Pace:
    """Seconds of each process in each section of its steps, and whether one holds up the others.

    What counts is time in which a process is busy itself, not time in which it waits for others; so the slow one
    stands out, while all of them take the same time for a step.

    Args:
        n_ranks: Processes.
    """

    SECTIONS = ("data", "forward")
    WINDOW, FACTOR, AT_LEAST_SECONDS = 100, 1.5, 0.01

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.told: set[tuple[int, str]] = set()
        self._clear()

    def _clear(self) -> None:
        self.n_steps, self.sums = 0, [[0.0] * self.n_ranks for _ in self.SECTIONS]

    def add(self, seconds: Sequence[float]) -> Slow | None:
        """Take up one step; every `WINDOW` steps, name the slowest process if it is slow, and was not named before.

        Args:
            seconds: ``(rank, section)``, flattened.
        """
        for section, sums in enumerate(self.sums):
            for rank in range(self.n_ranks):
                sums[rank] += seconds[rank * len(self.SECTIONS) + section]
        self.n_steps += 1
        if self.n_steps < self.WINDOW:
            return None
        found = [self._slowest(section) for section in range(len(self.SECTIONS))]
        self._clear()
        new = [slow for slow in found if slow is not None and (slow.rank, slow.section) not in self.told]
        self.told |= {(slow.rank, slow.section) for slow in new}
        return max(new, key=lambda slow: slow.factor, default=None)

    def _slowest(self, section: int) -> Slow | None:
        means = [total / self.n_steps for total in self.sums[section]]
        rank = max(range(self.n_ranks), key=means.__getitem__)
        others = sorted(means[:rank] + means[rank + 1 :])
        if not others:
            return None
        middle = others[len(others) // 2]
        if means[rank] < self.FACTOR * middle or means[rank] - middle < self.AT_LEAST_SECONDS:
            return None
        return Slow(rank, self.SECTIONS[section], means[rank] / max(middle, 1e-9))


class DeadOutputs:
    """Outputs that stay silent whatever the mixture: SI-SDR has no gradient there, so they never come back alone."""

    IN_A_ROW = 3

    def __init__(self) -> None:
        self.in_a_row: dict[int, int] = {}

    def add(self, items: Sequence[ItemRecord]) -> list[int]:
        """Take up a sampled step; returns the outputs, from 0, that have just been silent for the last time allowed."""
        if not items:
            return []
        silent = {
            output
            for output in range(len(items[0].estimate_levels_db))
            if all(item.estimate_levels_db[output] < self._silence(item) for item in items)
        }
        self.in_a_row = {output: self.in_a_row.get(output, 0) + 1 for output in silent}
        return sorted(output for output, n in self.in_a_row.items() if n == self.IN_A_ROW)

    def _silence(self, item: ItemRecord) -> float:
        """Below which level an output counts as silent: a loss that ignores level lets all of them be faint."""
        return max(SILENT_DB, max(item.estimate_levels_db) - BELOW_LOUDEST_DB)
