"""Limits on the whole norm: fixed, AutoClip; each turns a norm into a limit."""

import heapq
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from unbraid.errors import RecipeError


class Clipper(Protocol):
    """Turns the gradient's norm into the longest norm allowed.

    Both tensors in and the one that comes out are 0-d, on the norm's device. Where ``finite`` is false the step will be
    left out, and a clipper learns nothing from it. One that remembers has ``state_dict`` and ``load_state_dict``.
    """

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """The limit for this step."""
        ...


class FixedClip:
    """The same limit in every step.

    Args:
        max_norm: The longest L2 norm of the whole gradient, above 0; 5 is what separation recipes use.
    """

    def __init__(self, *, max_norm: float = 5.0) -> None:
        if not max_norm > 0 or math.isinf(max_norm):
            raise RecipeError(
                f"[clip] max_norm = {max_norm:g} must be above 0 and finite; to train without clipping, write "
                'name = "none".'
            )
        self.max_norm = max_norm

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """The limit, whatever the norm."""
        return torch.full_like(norm, self.max_norm)


class NoClip:
    """No limit: infinity."""

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Infinity, whatever the norm."""
        return torch.full_like(norm, math.inf)


class AutoClip:
    """The p-th percentile of all gradient norms so far, this step's among them.

    Equal to ``numpy.percentile`` over the whole history, as published, but free of NaN, infinite and zero norms, and by
    two heaps: a step costs about the logarithm of the history's length. The heaps live on the host: with the norm
    on an accelerator each step waits for it once.

    Args:
        percentile: 0 takes the smallest norm so far, 10 is the published default, 100 never clips.

    Reference:
        Seetharaman et al., "AutoClip: Adaptive gradient clipping for source separation networks", MLSP 2020,
        arXiv:2007.14469.
    """

    def __init__(self, *, percentile: float = 10.0) -> None:
        if not 0 <= percentile <= 100:
            raise RecipeError(f"[clip] percentile = {percentile:g} must be between 0 and 100.")
        self.percentile = percentile
        self._low: list[float] = []  # negated: the smallest norms, the largest of them on top
        self._high: list[float] = []

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Remember the norm if the step counts, and return the percentile; infinity while nothing is known."""
        value = float(norm)
        if bool(finite) and 0 < value < math.inf:
            self._remember(value)
        return torch.full_like(norm, self._current())

    def state_dict(self) -> dict[str, Any]:
        """All norms so far, from small to large: what two heaps hold does not tell in which order they were filled."""
        norms = sorted([-value for value in self._low] + self._high)
        return {"norms": torch.tensor(norms, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the norms of another run."""
        norms = state["norms"].tolist()
        n_low = self._n_low(len(norms))
        self._low, self._high = [-value for value in reversed(norms[:n_low])], norms[n_low:]

    def _n_low(self, n_norms: int) -> int:
        """How many norms lie up to and with the order statistic below the percentile."""
        return math.floor((n_norms - 1) * self.percentile / 100) + 1 if n_norms else 0

    def _remember(self, value: float) -> None:
        if self._low and value < -self._low[0]:
            heapq.heappush(self._low, -value)
        else:
            heapq.heappush(self._high, value)
        wanted = self._n_low(len(self._low) + len(self._high))
        while len(self._low) < wanted:
            heapq.heappush(self._low, -heapq.heappop(self._high))
        while len(self._low) > wanted:
            heapq.heappush(self._high, -heapq.heappop(self._low))

    def _current(self) -> float:
        n_norms = len(self._low) + len(self._high)
        if n_norms == 0:
            return math.inf
        below = -self._low[0]
        if not self._high:
            return below
        share = (n_norms - 1) * self.percentile / 100 % 1
        return below + share * (self._high[0] - below)
