"""Loading batches in worker processes, from any step on; the samplers for training and validation."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from unbraid.data.batch import Batch
from unbraid.data.dataset import Example, Key, MixtureDataset
from unbraid.data.excerpt import AudioFault
from unbraid.errors import DataError

TIMED_OUT = "No data worker delivered a batch"
"""How the message begins if the workers were killed because no batch came in time."""

SIGTERM_GRACE_SECONDS = 20.0
"""How long a worker process keeps running after a SIGTERM."""


class LoadedBatch(NamedTuple):
    """A batch, and the faults of the files that were rejected while making it."""

    batch: Batch
    faults: tuple[AudioFault, ...]


def collate(examples: Sequence[Example]) -> LoadedBatch:
    """Stack examples of one length to a batch."""
    noise = [example.audio.noise for example in examples]
    batch = Batch.from_tensors(
        torch.from_numpy(np.stack([example.audio.mixture for example in examples])),
        torch.from_numpy(np.stack([example.audio.sources for example in examples])),
        weight=torch.tensor([example.weight for example in examples]),
        noise=None if noise[0] is None else torch.from_numpy(np.stack([n for n in noise if n is not None])),
        items=[example.item for example in examples],
    )
    return LoadedBatch(batch, tuple(fault for example in examples for fault in example.faults))


class StepSampler(Sampler[list[Key]]):
    """Yields the keys of each micro-batch of this rank, from any step on, without end.

    The examples of a step follow from its number alone, so a resumed run trains on what the interrupted one would have.
    They are divided evenly among ranks and micro-batches. If there are fewer examples than micro-batches, a stand-in of
    weight 0 takes the place of a missing one: every rank must run every backward, or the others would wait for it.

    Args:
        n_items: Examples in an epoch.
        batch_size: Examples in a step, over all ranks and micro-batches.
        first_step: First step, from 0.
        rank: Rank of this process.
        world_size: Number of processes.
        accumulate: Micro-batches per step on each rank.
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.n_items = n_items
        self.batch_size = batch_size
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of keys, ``accumulate`` of them for each step."""
        shares = np.array_split(np.arange(self.batch_size), self.world_size * self.accumulate)
        own_shares = shares[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]
        for step in itertools.count(self.first_step):
            # Steps run on across epochs: a batch at the end of one epoch is filled up from the next.
            first = step * self.batch_size
            keys = [Key(*divmod(index, self.n_items)) for index in range(first, first + self.batch_size)]
            for share in own_shares:
                yield [keys[i] for i in share] or [replace(keys[0], weight=0.0)]


def batches(
    dataset: MixtureDataset, keys: Sampler[list[Key]], *, workers: int, timeout_seconds: float = 0.0
) -> Iterator[LoadedBatch]:
    """Prepare batches in advance in worker processes, and yield them in the order of the keys.

    Args:
        dataset: Makes the examples.
        keys: Yields the keys of one batch at a time.
        workers: Number of processes; 0 prepares the batches in this one.
        timeout_seconds: How long to wait for a batch of a worker; 0 waits for ever.

    Raises:
        DataError: If an example could not be made, with the original message.
        RuntimeError: If a worker died, or no batch came in time; the workers are ended then.
    """
    # A plain fork would copy the main process's threads and CUDA state, which do not survive it.
    start_method = "spawn" if sys.platform == "win32" else "forkserver"
    loader = DataLoader(
        _ErrorReturningDataset(dataset),
        batch_sampler=keys,
        collate_fn=_collate_or_error,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator, the loader would draw its workers' seeds from torch's global generator.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    watchdog = _Watchdog(getattr(iterator, "_workers", ()), timeout_seconds)
    try:
        while True:
            with watchdog:
                loaded = next(iterator, None)
            if loaded is None:
                return
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded
    except (RuntimeError, ConnectionError, EOFError) as error:
        if watchdog.has_killed:  # what arrives is only that the workers are gone
            raise RuntimeError(f"{TIMED_OUT} for {timeout_seconds:g} s") from error
        raise
    finally:
        watchdog.stop()


class _Watchdog:
    """Kills workers that deliver nothing for too long; a context to wait in.

    torch's own time-out does not help if a worker hangs after it has announced a batch: the main process then waits for
    the shared memory without one. Once the workers are dead, the wait ends with an error.

    Args:
        workers: Processes; empty for none.
        timeout_seconds: How long to wait; 0 for ever.
    """

    def __init__(self, workers: Sequence[BaseProcess], timeout_seconds: float) -> None:
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.has_killed = False
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        if workers and timeout_seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> None:
        self._waiting_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._waiting_since = None

    def stop(self) -> None:
        """End the watching thread."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout_seconds / 4)):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self.timeout_seconds:
                self.has_killed = True
                for worker in self.workers:
                    worker.kill()  # a process that is stopped, or hangs in a read, reacts to nothing else
                return


@dataclass(frozen=True)
class _ErrorReturningDataset(Dataset[Example | DataError]):
    """Returns a `DataError` instead of raising it: raised in a worker, it would arrive as the text of a traceback."""

    dataset: MixtureDataset

    def __getitem__(self, key: Key) -> Example | DataError:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


def _collate_or_error(examples: Sequence[Example | DataError]) -> LoadedBatch | DataError:
    """Return the batch, or the first error among the examples."""
    collected: list[Example] = []
    for example in examples:
        if isinstance(example, DataError):
            return example
        collected.append(example)
    return collate(collected)


def _init_worker(_worker: int) -> None:
    """Prepare a worker process for signals and for the end of the main process."""
    # Ctrl-C goes to every process of the terminal, but only the main process may decide what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torchrun and batch systems send SIGTERM to all processes; the main one still needs batches to finish its step.
    signal.signal(signal.SIGTERM, _exit_later)
    # torch watches the parent process, which here is the fork server: it lives as long as its workers. Watch the main
    # process instead, so that no worker outlives it.
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        threading.Thread(target=_exit_after, args=(main_process,), daemon=True).start()


def _exit_later(_signal: int, _frame: FrameType | None) -> None:
    timer = threading.Timer(SIGTERM_GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _exit_after(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


class ValidationSampler(Sampler[list[Key]]):
    """Yields this rank's share of the first ``n_items`` examples of epoch 0, ``batch_size`` at a time.

    Every validation thus uses the same examples, and each of them once.
    """

    def __init__(self, n_items: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, n_items, world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of keys; the last may be shorter."""
        for first in range(0, len(self.indices), self.batch_size):
            yield [Key(0, index) for index in self.indices[first : first + self.batch_size]]
