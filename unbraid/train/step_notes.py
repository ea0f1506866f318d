"""StepNotes: values that the ranks exchange in each step's all-reduce."""

from collections.abc import Sequence
from dataclasses import dataclass

from unbraid import dist
from unbraid.signals import SIGNALS

SECTIONS = ("data", "forward")
"""Parts of a step whose busy time is compared over the ranks."""


@dataclass
class StepNotes:
    """Signals, the clock, new bad files and busy seconds: of one rank before the step, of all ranks after it.

    Attributes:
        signal: The signal that asks the run to stop; 0 for none.
        elapsed_seconds: Wall time of the run by the main process's clock.
        new_bad_files: Whether a bad file was found that no rank has reported yet.
        busy_seconds: Time that each rank worked in each of `SECTIONS`, ``(rank, section)`` flattened. Time spent
            waiting for other ranks does not count: so the slow rank stands out, although all take equally long.
    """

    signal: int
    elapsed_seconds: float
    new_bad_files: bool
    busy_seconds: Sequence[float]

    def pack(self) -> list[float]:
        """Return the notes of this rank as numbers that all ranks can sum: each rank fills in only its own."""
        signals = [float(self.signal == number) for number in SIGNALS]
        clock = self.elapsed_seconds if dist.is_main() else 0.0
        seconds = [0.0] * (len(SECTIONS) * dist.world_size())
        start = len(SECTIONS) * dist.rank()
        seconds[start : start + len(SECTIONS)] = self.busy_seconds
        return [*signals, clock, float(self.new_bad_files), *seconds]

    @classmethod
    def unpack(cls, sums: Sequence[float]) -> "StepNotes":
        """Return the notes of all ranks from the sums of what they packed."""
        n_signals = len(SIGNALS)
        received = [number for number, n_ranks in zip(SIGNALS, sums[:n_signals], strict=True) if n_ranks]
        return cls(
            signal=int(received[0]) if received else 0,
            elapsed_seconds=sums[n_signals],
            new_bad_files=bool(sums[n_signals + 1]),
            busy_seconds=sums[n_signals + 2 :],
        )
