"""Batches of mixtures, from any step on, prepared ahead by worker processes."""

import multiprocessing
import os
import signal
import sys
import threading
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
from unbraid.data.mixing import AudioFault
from unbraid.errors import DataError

SIGTERM_GRACE_SECONDS = 20.0
"""How long a data worker goes on after a SIGTERM."""


class LoadedBatch(NamedTuple):
    """A batch, and what was found wrong on the way to it."""

    batch: Batch
    faults: tuple[AudioFault, ...]


def collate(examples: Sequence[Example]) -> LoadedBatch:
    """Put examples of one length together."""
    noise = [example.audio.noise for example in examples]
    batch = Batch.from_tensors(
        torch.from_numpy(np.stack([example.audio.mixture for example in examples])),
        torch.from_numpy(np.stack([example.audio.sources for example in examples])),
        weight=torch.tensor([example.weight for example in examples]),
        noise=None if noise[0] is None else torch.from_numpy(np.stack([part for part in noise if part is not None])),
        items=[example.item for example in examples],
    )
    return LoadedBatch(batch, tuple(fault for example in examples for fault in example.faults))


class StepSampler(Sampler[list[Key]]):
    """Which examples each micro-batch of this rank holds, from any step on, without end.

    The examples of a step follow from its number alone. Ranks and micro-batches take even shares of them; where there
    are fewer examples than shares, one is a stand-in that counts 0, so that every rank runs every backward.

    Args:
        n_items: Examples in an epoch.
        batch_size: Examples in a step, over all ranks and micro-batches.
        first_step: Step to begin with, from 0.
        rank: This process.
        world_size: How many there are.
        accumulate: Micro-batches a step on each rank.
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
        self.n_items, self.batch_size, self.first_step = n_items, batch_size, first_step
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        """Lists of keys, ``accumulate`` of them a step."""
        step = self.first_step
        while True:
            first = step * self.batch_size
            keys = [Key(*divmod(place, self.n_items)) for place in range(first, first + self.batch_size)]
            shares = np.array_split(np.arange(self.batch_size), self.world_size * self.accumulate)
            for share in shares[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]:
                yield [keys[i] for i in share] or [replace(keys[0], weight=0.0)]
            step += 1


def batches(dataset: MixtureDataset, keys: Sampler[list[Key]], *, workers: int) -> Iterator[LoadedBatch]:
    """Prepare batches ahead in worker processes, and yield them in the order of the keys.

    Raises:
        DataError: If an example could not be made; in its own words, wherever that was.
    """
    loader = DataLoader(
        _Told(dataset),
        batch_sampler=keys,
        collate_fn=_collate_told,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=("spawn" if sys.platform == "win32" else "forkserver") if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    for loaded in loader:
        if isinstance(loaded, DataError):
            raise loaded
        yield loaded


@dataclass(frozen=True)
class _Told(Dataset[Example | DataError]):
    """MixtureDataset whose errors are handed over: raised in a worker, they would arrive as the text of a traceback."""

    mixtures: MixtureDataset

    def __getitem__(self, key: Key) -> Example | DataError:
        try:
            return self.mixtures[key]
        except DataError as error:
            return error


def _collate_told(examples: Sequence[Example | DataError]) -> LoadedBatch | DataError:
    made = [example for example in examples if not isinstance(example, DataError)]
    return next((example for example in examples if isinstance(example, DataError)), None) or collate(made)


def _begin_worker(_worker: int) -> None:
    """Leave Ctrl-C to the main process, and end when it ends.

    A SIGTERM to the whole group of processes, as torchrun and batch systems send it, comes here too: the main process
    still needs batches to finish its step.

    Torch's own watch looks at the parent process: here that is the fork server, which lives as long as a worker does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _end_later(_number: int, _frame: FrameType | None) -> None:
    timer = threading.Timer(SIGTERM_GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


class ValidationSampler(Sampler[list[Key]]):
    """The first ``n_items`` examples of epoch 0, those of this rank, ``batch_size`` at a time: for validation."""

    def __init__(self, n_items: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, n_items, world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        """Lists of keys; the last may be shorter."""
        for first in range(0, len(self.indices), self.batch_size):
            yield [Key(0, index) for index in self.indices[first : first + self.batch_size]]
