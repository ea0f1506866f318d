"""Ranks, reductions and agreement between processes; in a single process they cost nothing."""

import gc
import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as td
import torch.distributed.nn.functional  # before any group exists: its default arguments would keep the group alive
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of torchrun, and destroy it at the end; does nothing if torchrun did not start us.

    Without destroying it, a thread of the group that still holds a tensor while the interpreter shuts down would abort
    the process, after all work is done. After an exception its traceback may keep models, and with them the group,
    alive.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or td.is_initialized():
        yield
        return
    td.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        gc.collect()  # a DDP model in a reference cycle would keep the group alive
        td.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Return the rank of this process on its own machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return True in the process that writes the run directory."""
    return rank() == 0


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point format of a device: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Copy numbers of the host to a device, ``(n,)``, without waiting for it; as float64 where the device has it."""
    dtype = widest_float(device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # Only a copy from pinned memory is asynchronous.
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor over all ranks, in place, and return it; every rank must call this."""
    if td.is_initialized():
        td.all_reduce(values)
    return values


def max_over_ranks(values: Sequence[float], device: torch.device | None = None) -> list[float]:
    """Return the maximum of each value over all ranks, in one collective; every rank must call this."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(shared, op=td.ReduceOp.MAX)
    return shared.tolist()


def gather(items: Sequence[T], device: torch.device | None = None) -> list[tuple[int, T]]:
    """Return the items of all ranks, each with its rank; every rank must call this."""
    if world_size() == 1:
        return [(0, item) for item in items]
    # Gathering objects is slow, and most calls have nothing to gather: ask that first, in one small collective.
    if not any_rank(bool(items), device):
        return []
    items_by_rank: list[list[T]] = [[] for _ in range(world_size())]
    td.all_gather_object(items_by_rank, list(items))
    return [(number, item) for number, items_there in enumerate(items_by_rank) for item in items_there]


def from_main_process(value: T) -> T:
    """Return the main process's object on every rank; every rank must call this."""
    if world_size() == 1:
        return value
    shared = [value]
    td.broadcast_object_list(shared, 0)
    return shared[0]


def wrap(model: nn.Module) -> nn.Module:
    """Wrap a model in DDP, without broadcasting its buffers; in a single process, return the model itself."""
    if world_size() == 1:
        return model
    # torch 2.13 renamed the argument.
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        return DistributedDataParallel(model, forward_sync_buffers=False)
    return DistributedDataParallel(model, broadcast_buffers=False)


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Return True if the flag is set on any rank; every rank must call this."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def first_difference(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that differs between ranks in any bit; None if none does."""
    if world_size() == 1:
        return None
    # Compare hashes: the weights themselves would be too much to exchange.
    hashes = [
        (name, hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest())
        for name, tensor in model.state_dict().items()
    ]
    hashes_by_rank: list[list[tuple[str, str]]] = [[] for _ in range(world_size())]
    td.all_gather_object(hashes_by_rank, hashes)
    for hashes_of_tensor in zip(*hashes_by_rank, strict=True):
        if len(set(hashes_of_tensor)) > 1:
            return hashes_of_tensor[0][0]
    return None
