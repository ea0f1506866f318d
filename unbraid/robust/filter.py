"""Loss filters: weight 0 for examples that are too easy or outliers, by a threshold or by the losses so far."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unbraid.errors import RecipeError
from unbraid.robust.quantile import DeviceQuantile


class LossFilter(Protocol):
    """Turns per-example losses ``(batch,)`` into weights ``(batch,)``, 0 or more.

    An example's weight may depend on its own loss and on earlier steps, never on its neighbours in the batch: otherwise
    N processes, each with its own part of the batch, would not do what one does. The weight of a loss that is not
    finite is ignored.
    """

    needs_db: bool
    """True if the filter only makes sense for losses in dB."""

    def __call__(self, losses: Tensor) -> Tensor:
        """Return the weights."""
        ...


@runtime_checkable
class StatefulFilter(LossFilter, Protocol):
    """A `LossFilter` that learns from the losses of earlier steps."""

    def observe(self, losses: Tensor, valid: Tensor) -> None:
        """Learn from a step without a fault; called once after the step, identically on every rank.

        Args:
            losses: Losses of all examples of all ranks ``(n,)``, in the same order on every rank.
            valid: Which of them to learn from ``(n,)``; the filter must ignore those that are not finite as well.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what another run learned."""
        ...


class ThresholdFilter:
    """Drops examples that are already separated well: loss at or below a threshold in dB.

    Args:
        threshold_db: Examples with a loss at or below this, in dB, are dropped; the textbook recipe uses -30.
    """

    needs_db = True

    def __init__(self, *, threshold_db: float = -30.0) -> None:
        self.threshold_db = threshold_db

    def __call__(self, losses: Tensor) -> Tensor:
        """Return 1 above the threshold, else 0."""
        return (losses > self.threshold_db).to(losses.dtype)


class _RunningLimit:
    """Base of the stateful filters: the last losses, and a limit on the next ones that is computed from them.

    Dropped losses are added as well. After a lasting change of level the limit then follows, instead of dropping every
    example for ever. Nothing waits for the device.
    """

    def __init__(self, window: int, warmup: int) -> None:
        if window < 1:
            raise RecipeError(f"[[filter]] window = {window} must be 1 or more.")
        if not 0 <= warmup <= window:
            raise RecipeError(f"[[filter]] warmup = {warmup} must be from 0 to window = {window}; set both.")
        self.warmup = warmup
        # On the CPU too: losses come in batches, and a window of tensors takes them all at once.
        self._losses = DeviceQuantile(window)
        self._limit: Tensor | None = None

    def observe(self, losses: Tensor, valid: Tensor) -> None:
        """Add the losses ``(n,)`` of a step that are ``valid`` ``(n,)`` and finite."""
        self._losses.add(losses, valid)
        self._limit = None

    def state_dict(self) -> dict[str, Any]:
        """Return the last losses, oldest first."""
        return self._losses.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the last losses of another run."""
        self._losses.load_state_dict(state)
        self._limit = None

    def _limit_on(self, device: torch.device) -> Tensor:
        """Return the limit, 0-d, computed once for all micro-batches of a step."""
        if self._limit is None or self._limit.device != device:
            self._losses.move_to(device)
            self._limit = self._compute_limit()
        return self._limit

    def _compute_limit(self) -> Tensor:
        raise NotImplementedError


class PercentileFilter(_RunningLimit):
    """Drops examples that are easier than most: loss below a percentile of the last losses of earlier steps.

    Works for losses of any unit. Dropped losses count as well, so the share of dropped examples stays about the same.

    Args:
        percentile: Percentile of recent losses below which an example is dropped: 10 drops about every tenth example, 0
            drops none.
        window: Number of recent losses that the limit is computed from.
        warmup: Nothing is dropped until there are this many losses.
    """

    needs_db = False

    def __init__(self, *, percentile: float = 10.0, window: int = 1000, warmup: int = 100) -> None:
        if not 0 <= percentile < 100:
            raise RecipeError(f"[[filter]] percentile = {percentile:g} must be 0 or more, and below 100.")
        super().__init__(window, warmup)
        self.percentile = percentile

    def __call__(self, losses: Tensor) -> Tensor:
        """Return 0 below the percentile, else 1."""
        # A loss that equals the percentile stays: if all losses are equal, none is dropped.
        return (losses >= self._limit_on(losses.device)).to(losses.dtype)

    def _compute_limit(self) -> Tensor:
        limit = self._losses.percentile(self.percentile, self.warmup)
        if self.percentile == 0:  # a loss below all earlier ones is below the 0th percentile, but 0 means "drop none"
            return torch.full_like(limit, -math.inf)
        # During warm-up the percentile is +inf, which would drop everything.
        return torch.where(limit.isfinite(), limit, -math.inf)


class OutlierFilter(_RunningLimit):
    """Drops outliers: loss in dB far above the median of the last losses of earlier steps.

    The limit is a number of median absolute deviations (MADs) above the median, but never less than some decibels, so
    that ordinary examples do not become outliers while losses hardly vary. Dropped losses count as well: once half of
    the window is on a new level, so is the limit.

    Args:
        n_mads: Losses more than this many median absolute deviations above the median are dropped; a standard deviation
            is 1.48 of them.
        at_least_db: Losses less than this far above the median, in dB, are never dropped.
        window: Number of recent losses that the limit is computed from.
        warmup: Nothing is dropped until there are this many losses.
    """

    needs_db = True

    def __init__(self, *, n_mads: float = 6.0, at_least_db: float = 6.0, window: int = 1000, warmup: int = 100) -> None:
        for name, value in (("n_mads", n_mads), ("at_least_db", at_least_db)):
            if not value >= 0 or math.isinf(value):
                raise RecipeError(f"[[filter]] {name} = {value:g} must be 0 or more, and finite.")
        super().__init__(window, warmup)
        self.n_mads = n_mads
        self.at_least_db = at_least_db

    def __call__(self, losses: Tensor) -> Tensor:
        """Return 0 above the limit, else 1."""
        return (losses <= self._limit_on(losses.device)).to(losses.dtype)

    def _compute_limit(self) -> Tensor:
        # During warm-up the median, and with it the limit, is infinity: nothing is dropped.
        return self._losses.median(self.warmup) + (self.n_mads * self._losses.mad()).clamp_min(self.at_least_db)
