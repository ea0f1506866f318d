"""Batches for a run, from any step on, also after a data worker died."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from pickle import UnpicklingError

from unbraid.data.loader import LoadedBatch
from unbraid.errors import TrainingStopped
from unbraid.train.event_log import EventLog

Load = Callable[[int], Iterable[LoadedBatch]]
"""From a number of steps done to the batches of this rank from there on, without end."""


def _tells_of_a_death(error: Exception) -> bool:
    """Whether the loader lost a worker; what a living one raised comes as «Caught ...»."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return not str(error).startswith("Caught ")  # its end of a pipe is gone, or what came out of it was cut short


class BatchSource:
    """Batches from any step on; where a data worker dies, they are begun again at the same place.

    Args:
        load: Makes them.
        accumulate: Batches a step.
    """

    MAX_LOSSES = 3

    def __init__(self, load: Load, accumulate: int) -> None:
        self.load, self.accumulate = load, accumulate
        self.batches: Iterator[LoadedBatch] | None = None
        self.n_lost = 0

    def close(self) -> None:
        """Let the data workers go."""
        if isinstance(self.batches, Generator):
            self.batches.close()
        self.batches = None

    def next_micro_batches(self, n_steps_done: int, log: EventLog) -> list[LoadedBatch]:
        """The micro-batches of the next step.

        Raises:
            TrainingStopped: If workers died too often.
        """
        while True:
            if self.batches is None:
                self.batches = iter(self.load(n_steps_done))
            try:
                return list(itertools.islice(self.batches, self.accumulate))
            except (RuntimeError, ConnectionError, EOFError, UnpicklingError) as error:
                if not _tells_of_a_death(error):
                    raise
                self.batches, self.n_lost = None, self.n_lost + 1
                said = str(error).split("\n")[0].rstrip(".") or "A data worker broke off in the middle of a batch"
                if self.n_lost > self.MAX_LOSSES:
                    raise TrainingStopped(
                        f"Data workers died {self.n_lost} times, the last with: {said}. The machine may be short of "
                        "memory: lower data.workers, and go on with --resume."
                    ) from error
                log.tell(
                    "DATA_WORKER_LOST", n_steps_done + 1, f"{said} (memory may be short); its examples are made again."
                )
