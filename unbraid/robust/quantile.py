"""What earlier steps left, as exact percentiles of all of it or of a window, on the host or where the values lie."""

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class History(Protocol):
    """Finite values above 0 of earlier steps, and one percentile of them, as ``numpy.percentile`` takes it.

    What is saved by one kind loads into every other.
    """

    def add(self, value: Tensor, counts: Tensor) -> None:
        """Remember one value; a step that does not count, or a value not finite and above 0, leaves no trace."""
        ...

    def percentile(self, at_least: int = 1) -> Tensor:
        """The percentile, 0-d; infinity while fewer values than that are known."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``"norms"``: float64 on the host, from small to large, or in a window from old to new."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the values of another run."""
        ...


def history_for(device: torch.device, window: int = 0, percentile: float = 10.0) -> History:
    """The history for values on that device: heaps and lists on the host; elsewhere tensors, with no synchronisation.

    Args:
        device: Where the values lie.
        window: How many of the last values to keep; 0 keeps all.
        percentile: Which one is asked for, between 0 and 100.
    """
    if device.type == "cpu":
        return HostWindow(window, percentile) if window else HostHistory(percentile)
    return DeviceWindow(window, percentile) if window else DeviceHistory(percentile)


class HostHistory:
    """All values, in two heaps: a step costs about the logarithm of their number.

    Args:
        percentile: Between 0 and 100.
    """

    def __init__(self, percentile: float) -> None:
        self.percent = percentile
        self._low: list[float] = []  # negated: the smallest values, the largest of them on top
        self._high: list[float] = []

    def add(self, value: Tensor, counts: Tensor) -> None:
        """Put the value into its heap, and keep the two in proportion."""
        number = float(value)
        if not (bool(counts) and 0 < number < math.inf):
            return
        if self._low and number < -self._low[0]:
            heapq.heappush(self._low, -number)
        else:
            heapq.heappush(self._high, number)
        wanted = self._n_low(len(self._low) + len(self._high))
        while len(self._low) < wanted:
            heapq.heappush(self._low, -heapq.heappop(self._high))
        while len(self._low) > wanted:
            heapq.heappush(self._high, -heapq.heappop(self._low))

    def percentile(self, at_least: int = 1) -> Tensor:
        """Between the tops of the heaps."""
        n_values = len(self._low) + len(self._high)
        if n_values < max(at_least, 1):
            return _infinity()
        below = -self._low[0]
        above = self._high[0] if self._high else below
        share = (n_values - 1) * self.percent / 100 % 1
        return torch.tensor(below + share * (above - below), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """From small to large: what two heaps hold does not tell in which order they were filled."""
        values = torch.tensor(self._high + [-value for value in self._low], dtype=torch.float64)
        return {"norms": values.sort().values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sorted lists are heaps."""
        values = state["norms"].sort().values.tolist()
        n_low = self._n_low(len(values))
        self._low, self._high = [-value for value in reversed(values[:n_low])], values[n_low:]

    def _n_low(self, n_values: int) -> int:
        """How many values lie up to and with the order statistic below the percentile."""
        return math.floor((n_values - 1) * self.percent / 100) + 1 if n_values else 0


class HostWindow:
    """The last values, as they came and in order of size.

    Args:
        window: How many, at least 1.
        percentile: Between 0 and 100.
    """

    def __init__(self, window: int, percentile: float) -> None:
        self.window, self.percent = window, percentile
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: Tensor, counts: Tensor) -> None:
        """Put the value in its place; the oldest leaves."""
        number = float(value)
        if not (bool(counts) and 0 < number < math.inf):
            return
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(number)
        insort(self._sorted, number)

    def percentile(self, at_least: int = 1) -> Tensor:
        """Between the two values around it."""
        n_values = len(self._sorted)
        if n_values < max(at_least, 1):
            return _infinity()
        place = (n_values - 1) * self.percent / 100
        low = math.floor(place)
        below, above = self._sorted[low], self._sorted[min(low + 1, n_values - 1)]
        return torch.tensor(below + place % 1 * (above - below), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """From old to new."""
        return {"norms": torch.tensor(list(self._recent), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The last of them, where there are more than the window holds."""
        self._recent = deque(state["norms"].tolist()[-self.window :])
        self._sorted = sorted(self._recent)


class DeviceHistory:
    """All values, in a sorted tensor that is padded with infinity; never waits for the device.

    A value is put in its place by one shift of what is larger. One that does not count is an infinity, which changes
    nothing. How many values there are only the device knows; the host knows that they are no more than the steps.

    Args:
        percentile: Between 0 and 100.
    """

    _FIRST_CAPACITY = 1024
    _sorted: Tensor
    _index: Tensor
    _n_values: Tensor

    def __init__(self, percentile: float) -> None:
        self.percent = percentile
        self._keep(torch.empty(0, dtype=torch.float64))

    def add(self, value: Tensor, counts: Tensor) -> None:
        """Shift what is larger by one."""
        self._move_to(value.device)
        self._at_most += 1
        if self._at_most > len(self._sorted):
            self._sorted = F.pad(self._sorted, (0, len(self._sorted)), value=math.inf)
            self._index = torch.arange(len(self._sorted), device=value.device)
        wide = value.detach().to(self._sorted.dtype).reshape(1)
        wide = torch.where(counts & wide.isfinite() & (wide > 0), wide, math.inf)
        place = torch.searchsorted(self._sorted, wide)
        shifted = torch.where(self._index == place, wide, self._sorted.roll(1))
        self._sorted = torch.where(self._index < place, self._sorted, shifted)
        self._n_values = self._n_values + wide.isfinite().sum()

    def percentile(self, at_least: int = 1) -> Tensor:
        """Between the two values around it."""
        return _percentile(self._sorted, self._n_values, self.percent, at_least)

    def state_dict(self) -> dict[str, Any]:
        """From small to large; this one does wait for the device."""
        return {"norms": self._sorted[: int(self._n_values)].to("cpu", torch.float64, copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the values; they move to the device with the next one."""
        self._keep(state["norms"].sort().values)

    def _keep(self, values: Tensor) -> None:
        self._at_most = len(values)
        room = max(self._FIRST_CAPACITY, 2 * len(values)) - len(values)
        self._sorted = F.pad(values, (0, room), value=math.inf)
        self._index, self._n_values = torch.arange(len(self._sorted)), torch.tensor(len(values))

    def _move_to(self, device: torch.device) -> None:
        if self._sorted.device != device:
            self._sorted = self._sorted.to(device, widest(device))
            self._index, self._n_values = self._index.to(device), self._n_values.to(device)


class DeviceWindow:
    """The last values, where they lie; never waits for the device.

    Args:
        window: How many, at least 1.
        percentile: Between 0 and 100.
    """

    def __init__(self, window: int, percentile: float) -> None:
        self.percent = percentile
        self._recent = Recent(window)

    def add(self, value: Tensor, counts: Tensor) -> None:
        """The oldest value leaves."""
        self._recent.add(value.detach().reshape(1), (counts & (value > 0)).reshape(1))

    def percentile(self, at_least: int = 1) -> Tensor:
        """Between the two values around it."""
        return self._recent.percentile(self.percent, at_least)

    def state_dict(self) -> dict[str, Any]:
        """From old to new; this one does wait for the device."""
        return {"norms": self._recent.state_dict()["values"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the values; they move to the device with the next one."""
        self._recent.load_state_dict({"values": state["norms"]})


class Recent:
    """The last finite values of many steps, several a step, of either sign; never waits for their device.

    Args:
        window: How many to keep, at least 1.
    """

    _values: Tensor
    _seen: Tensor

    def __init__(self, window: int) -> None:
        self.window = window
        self._keep(torch.empty(0, dtype=torch.float64))

    @property
    def count(self) -> Tensor:
        """How many are known, 0-d."""
        return self._seen.clamp_max(self.window)

    def move_to(self, device: torch.device) -> None:
        """Keep the values there; float64 where that device has it."""
        if self._values.device != device:
            self._values, self._seen = self._values.to(device, widest(device)), self._seen.to(device)

    def add(self, values: Tensor, valid: Tensor) -> None:
        """Remember the values ``(n,)`` that are valid ``(n,)`` and finite, in their order; the oldest leave."""
        if values.numel() == 0:
            return
        self.move_to(values.device)
        wide = values.detach().to(self._values.dtype)
        valid = valid & wide.isfinite()
        order, n_new = valid.cumsum(0), valid.sum()
        kept = valid & (order > n_new - self.window)
        # what is not kept goes to a slot behind the window, which stays at infinity
        place = torch.where(kept, (self._seen + order - 1) % self.window, self.window)
        self._values = self._values.scatter(0, place, torch.where(kept, wide, math.inf))
        self._seen = self._seen + n_new

    def percentile(self, percent: float, at_least: int = 1) -> Tensor:
        """As ``numpy.percentile``, 0-d; infinity while fewer values than that are known."""
        return _percentile(self._values.sort().values, self.count, percent, at_least)

    def median(self, at_least: int = 1) -> Tensor:
        """The 50th percentile."""
        return self.percentile(50.0, at_least)

    def mad(self, at_least: int = 1) -> Tensor:
        """Median absolute deviation from the median, 0-d, as it is: not scaled to a standard deviation."""
        distances = (self._values - self.median()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        return _percentile(distances.sort().values, self.count, 50.0, at_least)

    def state_dict(self) -> dict[str, Any]:
        """``"values"``: float64 on the host, from old to new; this one does wait for the device."""
        seen, values = int(self._seen), self._values[:-1].to("cpu", torch.float64, copy=True)
        return {"values": values[:seen] if seen < self.window else values.roll(-(seen % self.window))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The last of them, where there are more than the window holds; they move with the next ones."""
        self._keep(state["values"][-self.window :])

    def _keep(self, values: Tensor) -> None:
        self._values = F.pad(values, (0, self.window + 1 - len(values)), value=math.inf)
        self._seen = torch.tensor(len(values))


def widest(device: torch.device) -> torch.dtype:
    """The floating-point format in which a device computes percentiles: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _infinity() -> Tensor:
    return torch.tensor(math.inf, dtype=torch.float64)


def _percentile(values: Tensor, n_values: Tensor, percent: float, at_least: int) -> Tensor:
    """Of a sorted tensor whose first ``n_values`` count; infinity while they are too few."""
    last = (n_values - 1).clamp_min(0)
    place = last.to(values.dtype) * percent / 100
    low = place.long()
    below, above = values.index_select(0, torch.stack([low, (low + 1).minimum(last)])).unbind()
    return torch.where(n_values >= max(at_least, 1), below + (place - low) * (above - below), math.inf)
