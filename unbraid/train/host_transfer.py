"""Pack many small tensors into one: one all-reduce over the ranks, one transfer to the host."""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from unbraid import dist


def _flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    # float64 holds counts and losses exactly; MPS has no float64
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors.values()])


def _slices(tensors: Mapping[str, Tensor]) -> dict[str, slice]:
    """Return where each tensor lies in the flat vector."""
    edges = [0, *accumulate(tensor.numel() for tensor in tensors.values())]
    return {name: slice(start, stop) for name, (start, stop) in zip(tensors, pairwise(edges), strict=True)}


def sum_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all ranks in one collective. Every rank must pass the same names and shapes."""
    total = dist.sum_over_ranks(_flatten(tensors))
    return {name: total[where].view(tensors[name].shape) for name, where in _slices(tensors).items()}


class HostTransfer:
    """Start copying small tensors to the host; `values` waits for them.

    On a GPU the copy goes to pinned memory without blocking, so the host can queue the next step meanwhile.

    Args:
        tensors: By name, all on one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._slices = _slices(tensors)
        self._vector = _flatten(tensors)
        self._copied: torch.cuda.Event | None = None
        self._values: dict[str, list[float]] | None = None
        if self._vector.is_cuda:
            pinned = torch.empty(self._vector.shape, dtype=self._vector.dtype, pin_memory=True)
            pinned.copy_(self._vector, non_blocking=True)
            self._vector = pinned
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> dict[str, list[float]]:
        """Return each tensor's values, flattened. The first call waits for the device."""
        if self._values is None:
            if self._copied is not None:
                self._copied.synchronize()
            vector = self._vector.tolist()
            self._values = {name: vector[where] for name, where in self._slices.items()}
        return self._values
