"""How much each example counts in this step: too easy, by threshold."""

from typing import Protocol

from torch import Tensor


class LossFilter(Protocol):
    """Turns finite per-example losses ``(batch,)`` into weights ``(batch,)``, at least 0.

    An example's weight depends on its own loss, never on its neighbours: otherwise N processes would not do what one
    does. What it says of a loss that is not finite is not used.
    """

    needs_db: bool
    """Whether it only means something for losses in dB."""

    def __call__(self, losses: Tensor) -> Tensor:
        """The weights."""
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
