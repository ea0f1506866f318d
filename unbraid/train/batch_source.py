"""Batches for a run, from any step on, even after a data worker died."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from pickle import UnpicklingError

from unbraid.data.loader import TIMED_OUT, LoadedBatch
from unbraid.errors import TrainingStopped
from unbraid.train.event_log import EventLog

Load = Callable[[int], Iterable[LoadedBatch]]
"""From a number of finished steps to the endless batches of this rank from there on."""


class BatchSource:
    """Load batches; if a data worker dies, load again from the same place.

    Every example follows from (seed, epoch, index), so new workers make the same batches.

    Args:
        load: Makes the batches.
        accumulate: Batches per step.
    """

    MAX_WORKER_DEATHS = 3

    def __init__(self, load: Load, accumulate: int) -> None:
        self.load = load
        self.accumulate = accumulate
        self.batches: Iterator[LoadedBatch] | None = None
        self.n_worker_deaths = 0

    def close(self) -> None:
        """Stop the data workers."""
        if isinstance(self.batches, Generator):
            self.batches.close()
        self.batches = None

    def next_micro_batches(self, n_steps_done: int, log: EventLog) -> list[LoadedBatch]:
        """Return the micro-batches of the next step.

        Raises:
            TrainingStopped: If workers died too often.
        """
        while True:
            if self.batches is None:
                self.batches = iter(self.load(n_steps_done))
            try:
                return list(itertools.islice(self.batches, self.accumulate))
            except (RuntimeError, ConnectionError, EOFError, UnpicklingError) as error:
                if not _is_worker_death(error):
                    raise
                self.batches = None
                self.n_worker_deaths += 1
                reason = _reason(error)
                if self.n_worker_deaths > self.MAX_WORKER_DEATHS:
                    raise TrainingStopped(
                        f"Data workers failed {self.n_worker_deaths} times. The last error was: {reason}. Lower "
                        "data.workers, look at the disk with the data, and continue with --resume."
                    ) from error
                message = f"{reason}. Its examples are loaded again."
                log.emit("DATA_WORKER_LOST", n_steps_done + 1, message)


def _reason(error: Exception) -> str:
    first_line = str(error).split("\n")[0].rstrip(".")
    if first_line.startswith(TIMED_OUT):
        return f"{first_line}: a disk or a process hangs"
    return f"{first_line or 'A data worker broke off in the middle of a batch'} (memory may be short)"


def _is_worker_death(error: Exception) -> bool:
    """Return whether the loader lost a worker. What a living worker raised arrives as "Caught ..."."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(("DataLoader worker", TIMED_OUT))
    # else the worker's end of a pipe is gone, or what came through it was cut short
    return not str(error).startswith("Caught ")
