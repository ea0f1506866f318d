"""Snapshot of a model's buffers, such as BatchNorm's statistics, to restore when a step is skipped."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BufferLocation = tuple[nn.Module, str]
"""A module and the name of its buffer. A forward may put another tensor there, so the tensor alone is not enough."""


def buffer_locations(model: nn.Module) -> list[BufferLocation]:
    """Return where the model keeps buffers."""
    return [
        (module, name) for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None
    ]


class BufferSnapshot:
    """The contents of buffers at the time of construction.

    Args:
        locations: From `buffer_locations`.
    """

    def __init__(self, locations: Sequence[BufferLocation]) -> None:
        self.locations = locations
        self.buffers = [_buffer_at(location) for location in locations]
        self.contents = [buffer.clone() for buffer in self.buffers]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put the old contents back into the original tensors.

        Args:
            unless: 0-d boolean; where it is true, the present contents stay. It is never read by the host.
        """
        for location, buffer, content in zip(self.locations, self.buffers, self.contents, strict=True):
            module, name = location
            present = _buffer_at(location).detach()
            buffer.copy_(content if unless is None else torch.where(unless, present, content))
            # a forward that assigned a new tensor must not leave it behind: graphs and EMA hold the original one
            module._buffers[name] = buffer


def _buffer_at(location: BufferLocation) -> Tensor:
    module, name = location
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer
