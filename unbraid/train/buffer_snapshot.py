"""The model's buffers, such as BatchNorm's statistics, kept while a step is tried, and given back if it is left out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]
"""A module and the name of its buffer: what lies there may be another tensor after a forward."""


def buffer_locations(model: nn.Module) -> list[Place]:
    """Where the model keeps buffers."""
    return [(module, name) for module in model.modules() for name, held in module._buffers.items() if held is not None]


class BufferSnapshot:
    """What the buffers hold now.

    Args:
        places: As `buffer_locations` found them.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.held = [_held(place) for place in places]
        self.values = [held.clone() for held in self.held]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put back what they held, in the same tensors; where `unless` is true (0-d), what they hold now stays."""
        for (module, name), held, value in zip(self.places, self.held, self.values, strict=True):
            now = _held((module, name)).detach()
            held.copy_(value if unless is None else torch.where(unless, now, value))
            module._buffers[name] = held


def _held(place: Place) -> Tensor:
    module, name = place
    held = module._buffers[name]
    assert held is not None
    return held
