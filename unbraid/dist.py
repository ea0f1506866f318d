"""Rank, agreement and sums over ranks; no-ops in a single process."""

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
import torch.distributed.nn.functional  # imported once a group is there, its default arguments would keep the group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; nothing where torchrun did not start us.

    Where the work ends without an exception, which would hold on to models, the group's threads end with it: one that
    still held a tensor while the interpreter goes down would abort the process, after all was done.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1 or td.is_initialized():
        yield
        return
    td.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        gc.collect()  # a wrapped model, in cycles, would keep the group
        td.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its own machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes the run directory."""
    return rank() == 0


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point format of a device: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Copy numbers of the host to a device, ``(n,)``, without waiting for it; as float64 where the device has it."""
    dtype = widest_float(device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor over all ranks, in place; every rank must call it."""
    if td.is_initialized():
        td.all_reduce(values)
    return values


def max_over_ranks(values: Sequence[float], device: torch.device | None = None) -> list[float]:
    """The largest of each value over all ranks, in one collective; every rank must call it."""
    if world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(shared, op=td.ReduceOp.MAX)
    return shared.tolist()


def gather(some: Sequence[T], device: torch.device | None = None) -> list[tuple[int, T]]:
    """What every rank brought, with its rank; where none brought anything, that costs one small collective."""
    if world_size() == 1:
        return [(0, item) for item in some]
    if not any_rank(bool(some), device):
        return []
    everyone: list[list[T]] = [[] for _ in range(world_size())]
    td.all_gather_object(everyone, list(some))
    return [(number, item) for number, items in enumerate(everyone) for item in items]


def from_main_process(value: T) -> T:
    """The main process's object, on every rank; every rank must call it."""
    if world_size() == 1:
        return value
    shared = [value]
    td.broadcast_object_list(shared, 0)
    return shared[0]


def wrap(model: nn.Module) -> nn.Module:
    """The model as its gradients are averaged over ranks; itself in a single process. Buffers are left alone."""
    if world_size() == 1:
        return model
    arguments = inspect.signature(DistributedDataParallel).parameters
    if "forward_sync_buffers" in arguments:  # torch 2.13 and newer
        return DistributedDataParallel(model, forward_sync_buffers=False)
    return DistributedDataParallel(model, broadcast_buffers=False)


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether any rank says so; every rank must call it."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def first_difference(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that is not bit for bit the same on all ranks; None where all are."""
    if world_size() == 1:
        return None
    hashes = [
        (name, hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest())
        for name, tensor in model.state_dict().items()
    ]
    everyone: list[list[tuple[str, str]]] = [[] for _ in range(world_size())]
    td.all_gather_object(everyone, hashes)
    return next((rows[0][0] for rows in zip(*everyone, strict=True) if len(set(rows)) > 1), None)
