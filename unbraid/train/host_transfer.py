"""Send many small tensors to the host in one transfer, without waiting for it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unbraid.train.all_reduce import flatten, slices_of


class HostTransfer:
    """Start copying small tensors to the host; `values` waits for them.

    On a GPU the copy goes to pinned memory without blocking, so the host can queue the next step meanwhile.

    Args:
        tensors: By name, all on one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._slices = slices_of(tensors)
        self._vector = flatten(tensors)
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
