"""Exact running percentiles, as ``numpy.percentile``: on the host, or on an accelerator without synchronisation."""

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.dist import widest_float


def quantile_for(device: torch.device, window: int | None = None) -> "HostQuantile | DeviceQuantile":
    """Return an empty container for values that lie on a device; a state saved by one kind loads into the other."""
    return HostQuantile(window) if device.type == "cpu" else DeviceQuantile(window)


class HostQuantile:
    """Percentiles of the last values, or of all of them, in plain Python.

    The values are kept sorted in blocks of a few thousand, so that an insertion moves only one block: after a million
    steps it still takes microseconds, where one sorted list would take 200.

    Args:
        window: How many of the last values to keep, at least 1; None keeps all.
    """

    _BLOCK = 4000

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self._recent: deque[float] = deque()  # in order of arrival, to know which one leaves; only with a window
        self._blocks: list[list[float]] = [[]]  # one sorted sequence, cut into blocks
        self._n_values = 0

    def add(self, value: Tensor, valid: Tensor) -> None:
        """Add a 0-d value; if it is not valid or not finite, nothing changes."""
        number = float(value)
        if not bool(valid) or not math.isfinite(number):
            return
        if self.window is not None:
            if self._n_values == self.window:
                self._remove(self._recent.popleft())
            self._recent.append(number)
        self._insert(number)

    def percentile(self, percent: float, at_least: int = 1) -> Tensor:
        """Return a percentile, 0-d and float64; infinity while there are fewer than ``at_least`` values."""
        if self._n_values < max(at_least, 1):
            return torch.tensor(math.inf, dtype=torch.float64)
        position = (self._n_values - 1) * percent / 100
        low = math.floor(position)
        below = self._value_at(low)
        above = self._value_at(min(low + 1, self._n_values - 1))
        return torch.tensor(below + position % 1 * (above - below), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return ``"values"``, float64: oldest first with a window, else sorted."""
        values = list(self._recent) if self.window is not None else [value for block in self._blocks for value in block]
        return {"values": torch.tensor(values, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values; if there are more than the window holds, only the last ones."""
        values = state["values"].tolist()
        if self.window is not None:
            values = values[-self.window :]
            self._recent = deque(values)
        values = sorted(values)
        self._n_values = len(values)
        starts = range(0, len(values), self._BLOCK)
        self._blocks = [values[start : start + self._BLOCK] for start in starts] or [[]]

    def _insert(self, number: float) -> None:
        index = min(self._block_index(number), len(self._blocks) - 1)
        block = self._blocks[index]
        insort(block, number)
        if len(block) > 2 * self._BLOCK:
            self._blocks[index : index + 1] = [block[: self._BLOCK], block[self._BLOCK :]]
        self._n_values += 1

    def _remove(self, number: float) -> None:
        index = self._block_index(number)
        block = self._blocks[index]
        del block[bisect_left(block, number)]
        if not block and len(self._blocks) > 1:
            del self._blocks[index]
        self._n_values -= 1

    def _block_index(self, number: float) -> int:
        """Return the index of the first block whose largest value is not below a number."""
        return bisect_left(self._blocks, number, key=lambda block: block[-1] if block else math.inf)

    def _value_at(self, index: int) -> float:
        for block in self._blocks:
            if index < len(block):
                return block[index]
            index -= len(block)
        raise IndexError(index)


class DeviceQuantile:
    """Percentiles of the last values, or of all of them, in tensors; nothing here makes the host wait for the device.

    Only the device knows how many values are valid, so no shape may depend on that number. Unused slots hold infinity,
    which sorts behind every value.

    Args:
        window: How many of the last values to keep, at least 1; None keeps all.
    """

    _FIRST_CAPACITY = 1024
    _values: Tensor
    _n_seen: Tensor
    _index: Tensor

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.load_state_dict({"values": torch.empty(0, dtype=torch.float64)})

    @property
    def count(self) -> Tensor:
        """Number of values, 0-d."""
        return self._n_seen if self.window is None else self._n_seen.clamp_max(self.window)

    def move_to(self, device: torch.device) -> None:
        """Move the values to a device, as float64 where the device has it."""
        if self._values.device != device:
            self._values = self._values.to(device, widest_float(device))
            self._n_seen = self._n_seen.to(device)
            self._index = self._index.to(device)

    def add(self, values: Tensor, valid: Tensor) -> None:
        """Add the values that are ``valid`` and finite, in their order; both are 0-d or ``(n,)``."""
        values = values.detach().reshape(-1)
        if values.numel() == 0:
            return
        self.move_to(values.device)
        values = values.to(self._values.dtype)
        valid = valid.reshape(-1) & values.isfinite()
        if self.window is None:
            for value in torch.where(valid, values, math.inf).split(1):
                self._insert_sorted(value)
        else:
            self._overwrite_oldest(values, valid, self.window)
        self._n_seen = self._n_seen + valid.sum()

    def percentile(self, percent: float, at_least: int = 1) -> Tensor:
        """Return a percentile, 0-d; infinity while there are fewer than ``at_least`` values."""
        in_order = self._values if self.window is None else self._values.sort().values
        return _percentile_of_sorted(in_order, self.count, percent, at_least)

    def median(self, at_least: int = 1) -> Tensor:
        """Return the 50th percentile, 0-d."""
        return self.percentile(50.0, at_least)

    def mad(self, at_least: int = 1) -> Tensor:
        """Return the median absolute deviation from the median, 0-d, not scaled to a standard deviation."""
        # An unused slot is infinity; without any value the median is, too, and their difference is NaN.
        deviations = (self._values - self.median()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        return _percentile_of_sorted(deviations.sort().values, self.count, 50.0, at_least)

    def state_dict(self) -> dict[str, Any]:
        """Return ``"values"``, float64 on the host: oldest first with a window, else sorted. Waits for the device."""
        n_seen = int(self._n_seen)
        values = self._values.to("cpu", torch.float64, copy=True)
        if self.window is None or n_seen < self.window:
            return {"values": values[:n_seen].clone()}
        return {"values": values[: self.window].roll(-(n_seen % self.window))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values; if there are more than the window holds, only the last ones. They move with `add`."""
        values = state["values"]
        if self.window is None:
            values = values.sort().values
            capacity = max(self._FIRST_CAPACITY, 2 * len(values))
        else:
            values = values[-self.window :]
            capacity = self.window + 1  # the last slot takes what is not kept
        self._values = F.pad(values, (0, capacity - len(values)), value=math.inf)
        self._index = torch.arange(capacity)
        self._n_seen = torch.tensor(len(values))
        self._n_seen_at_most = len(values)  # what the host knows without waiting: no more than were added

    def _insert_sorted(self, value: Tensor) -> None:
        """Insert a value ``(1,)`` into the sorted tensor by shifting what is larger; infinity changes nothing."""
        self._n_seen_at_most += 1
        if self._n_seen_at_most > len(self._values):
            self._values = F.pad(self._values, (0, len(self._values)), value=math.inf)
            self._index = torch.arange(len(self._values), device=value.device)
        position = torch.searchsorted(self._values, value)
        shifted = torch.where(self._index == position, value, self._values.roll(1))
        self._values = torch.where(self._index < position, self._values, shifted)

    def _overwrite_oldest(self, values: Tensor, valid: Tensor, window: int) -> None:
        """Write the valid values ``(n,)`` into the ring buffer, in their order."""
        order = valid.cumsum(0)
        fits = valid & (order > valid.sum() - window)
        # A boolean index would wait for the device: what is not kept is written as infinity to the spare slot instead.
        slots = torch.where(fits, (self._n_seen + order - 1) % window, window)
        self._values = self._values.scatter(0, slots, torch.where(fits, values, math.inf))


def _percentile_of_sorted(values: Tensor, n_values: Tensor, percent: float, at_least: int) -> Tensor:
    """Return a percentile of a sorted tensor whose first ``n_values`` count; infinity if fewer than ``at_least``."""
    last = (n_values - 1).clamp_min(0)
    position = last.to(values.dtype) * percent / 100
    low = position.long()
    below, above = values.index_select(0, torch.stack([low, (low + 1).minimum(last)])).unbind()
    return torch.where(n_values >= max(at_least, 1), below + (position - low) * (above - below), math.inf)
