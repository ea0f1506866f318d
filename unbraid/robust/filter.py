"""How much each example counts in this step: too easy or an outlier, by threshold or by what earlier steps left."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unbraid.errors import RecipeError
from unbraid.robust.quantile import Recent


class LossFilter(Protocol):
    """Turns finite per-example losses ``(batch,)`` into weights ``(batch,)``, at least 0.

    An example's weight depends on its own loss and on what earlier steps left, never on its neighbours: otherwise N
    processes would not do what one does. What it says of a loss that is not finite is not used.
    """

    needs_db: bool
    """Whether it only means something for losses in dB."""

    def __call__(self, losses: Tensor) -> Tensor:
        """The weights."""
        ...


@runtime_checkable
class RememberingFilter(LossFilter, Protocol):
    """A `LossFilter` that learns from the losses of earlier steps."""

    def observe(self, losses: Tensor, sound: Tensor) -> None:
        """Learn from a step that was no fault; called once after it, on every rank alike.

        Args:
            losses: Of all examples of all ranks ``(n,)``, in the same order everywhere.
            sound: Which of them to learn from ``(n,)``; of those, what is not finite teaches nothing either.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what another run learned."""
        ...


class ThresholdFilter:
    """Drops examples that are separated well already: loss at or below a threshold in dB.

    Args:
        threshold_db: -30 is the textbook recipe's.
    """

    needs_db = True

    def __init__(self, *, threshold_db: float = -30.0) -> None:
        self.threshold_db = threshold_db

    def __call__(self, losses: Tensor) -> Tensor:
        """1 above the threshold, else 0."""
        return (losses > self.threshold_db).to(losses.dtype)


class _RecentLosses:
    """What the filters that remember share: the last losses, and a limit on the next ones that follows from them.

    Losses that were dropped are remembered as well: after a lasting change of level the limit follows, and does not
    lock everything out for ever. Nothing waits for the device.
    """

    def __init__(self, window: int, warmup: int) -> None:
        if window < 1:
            raise RecipeError(f"[[filter]] window = {window} must be 1 or more.")
        if not 0 <= warmup <= window:
            raise RecipeError(f"[[filter]] warmup = {warmup} must be from 0 to window = {window}; set both.")
        self.warmup = warmup
        self._recent = Recent(window)
        self._limit: Tensor | None = None

    def observe(self, losses: Tensor, sound: Tensor) -> None:
        """Remember the finite losses ``(n,)`` of a step that are sound ``(n,)``."""
        self._recent.add(losses, sound)
        self._limit = None

    def state_dict(self) -> dict[str, Any]:
        """The last losses, from old to new."""
        return self._recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the last losses of another run."""
        self._recent.load_state_dict(state)
        self._limit = None

    def _limit_on(self, device: torch.device) -> Tensor:
        """The limit, 0-d, worked out once for all micro-batches of a step."""
        if self._limit is None or self._limit.device != device:
            self._recent.move_to(device)
            self._limit = self._new_limit()
        return self._limit

    def _new_limit(self) -> Tensor:
        raise NotImplementedError


class PercentileFilter(_RecentLosses):
    """Drops examples that are easier than most: loss below a percentile of the last losses of earlier steps.

    It asks for no unit. Losses that it drops are remembered too, so it goes on dropping about that share.

    Args:
        percentile: 10 drops about every tenth example; 0 drops none.
        window: How many losses to remember.
        warmup: Nothing is dropped until so many are known.
    """

    needs_db = False

    def __init__(self, *, percentile: float = 10.0, window: int = 1000, warmup: int = 100) -> None:
        if not 0 <= percentile < 100:
            raise RecipeError(f"[[filter]] percentile = {percentile:g} must be 0 or more, and below 100.")
        super().__init__(window, warmup)
        self.percentile = percentile

    def __call__(self, losses: Tensor) -> Tensor:
        """0 below the percentile, else 1."""
        return (losses >= self._limit_on(losses.device)).to(losses.dtype)

    def _new_limit(self) -> Tensor:
        limit = self._recent.percentile(self.percentile, self.warmup)
        known = limit.isfinite() if self.percentile else torch.zeros_like(limit, dtype=torch.bool)
        return torch.where(known, limit, -math.inf)


class OutlierFilter(_RecentLosses):
    """Drops examples that went wrong: loss far above the median of the last losses of earlier steps, in dB.

    How far is said in median absolute deviations, but never less than some decibels, so that a quiet stretch does not
    make every ordinary example an outlier. Losses that it drops are remembered too: once half of the window is on a
    new level, so is the limit.

    Args:
        n_mads: Median absolute deviations above the median, as they are (a standard deviation is 1.48 of them).
        at_least_db: Never drop what is closer to the median than this.
        window: How many losses to remember.
        warmup: Nothing is dropped until so many are known.
    """

    needs_db = True

    def __init__(self, *, n_mads: float = 6.0, at_least_db: float = 6.0, window: int = 1000, warmup: int = 100) -> None:
        for name, value in (("n_mads", n_mads), ("at_least_db", at_least_db)):
            if not value >= 0 or math.isinf(value):
                raise RecipeError(f"[[filter]] {name} = {value:g} must be 0 or more, and finite.")
        super().__init__(window, warmup)
        self.n_mads, self.at_least_db = n_mads, at_least_db

    def __call__(self, losses: Tensor) -> Tensor:
        """0 above the limit, else 1."""
        return (losses <= self._limit_on(losses.device)).to(losses.dtype)

    def _new_limit(self) -> Tensor:
        recent = self._recent
        return recent.median(self.warmup) + (self.n_mads * recent.mad()).clamp_min(self.at_least_db)
