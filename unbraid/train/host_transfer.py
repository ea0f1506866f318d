"""Many small tensors as one: summed over the ranks together, brought to the host together."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from unbraid import dist


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors.values()])


def _edges(tensors: Mapping[str, Tensor]) -> list[int]:
    edges = [0]
    for tensor in tensors.values():
        edges.append(edges[-1] + tensor.numel())
    return edges


def sum_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor summed over all ranks, in one collective; every rank must bring the same names and shapes."""
    summed = dist.sum_over_ranks(_joined(tensors))
    places = pairwise(_edges(tensors))
    return {name: summed[a:b].view(t.shape) for (name, t), (a, b) in zip(tensors.items(), places, strict=True)}


class HostTransfer:
    """Small tensors on their way to the host, by name: one transfer, begun here and waited for in `open`.

    Args:
        tensors: On one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names, self._edges = list(tensors), _edges(tensors)
        self._vector, self._arrived = _joined(tensors), None
        if self._vector.is_cuda:
            on_host = torch.empty(self._vector.shape, dtype=self._vector.dtype, pin_memory=True)
            on_host.copy_(self._vector, non_blocking=True)
            self._vector, self._arrived = on_host, torch.cuda.Event()
            self._arrived.record()
        self._opened: dict[str, list[float]] | None = None

    def open(self) -> dict[str, list[float]]:
        """The values of each tensor, flattened; the first call waits for them."""
        if self._opened is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            values = self._vector.tolist()
            places = zip(self._names, pairwise(self._edges), strict=True)
            self._opened = {name: values[a:b] for name, (a, b) in places}
        return self._opened
