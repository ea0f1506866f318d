"""Batch: mixtures, the sources they were made of, and where they came from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.records import ItemId


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together.

    Attributes:
        mixture: ``(batch, channel, time)``.
        sources: ``(batch, source, channel, time)``.
        weight: ``(batch,)``; how much each example counts. 0 for a stand-in on a rank that has nothing left.
        noise: What was added to the sources, ``(batch, channel, time)``; None where nothing was.
        items: Where each example came from; empty where nobody said.
    """

    mixture: Tensor
    sources: Tensor
    weight: Tensor
    noise: Tensor | None = None
    items: tuple[ItemId, ...] = ()

    @classmethod
    def from_tensors(
        cls,
        mixture: Tensor,
        sources: Tensor,
        *,
        weight: Tensor | None = None,
        noise: Tensor | None = None,
        items: Sequence[ItemId] = (),
    ) -> "Batch":
        """A batch from tensors alone; every example counts 1 unless told.

        Raises:
            ValueError: If the numbers of examples differ, or there are no examples.
        """
        if len(mixture) != len(sources) or len(mixture) == 0:
            raise ValueError(f"mixture and sources must hold the same examples, not {len(mixture)} and {len(sources)}.")
        weight = torch.ones(len(mixture), device=mixture.device) if weight is None else weight
        return cls(mixture, sources, weight, noise, tuple(items))

    def select(self, places: Sequence[int]) -> "Batch":
        """The batch of some of its examples alone."""
        noise = None if self.noise is None else self.noise[list(places)]
        items = tuple(self.items[place] for place in places) if self.items else ()
        chosen = [part[list(places)] for part in (self.mixture, self.sources, self.weight)]
        return Batch(chosen[0], chosen[1], chosen[2], noise, items)

    def split(self, n_pieces: int) -> list["Batch"]:
        """At most so many batches with the same examples in the same order, as even as can be."""
        size = -(-len(self.mixture) // n_pieces)
        return [self._slice(slice(first, first + size)) for first in range(0, len(self.mixture), size)]

    def _slice(self, where: slice) -> "Batch":
        noise = None if self.noise is None else self.noise[where]
        return Batch(self.mixture[where], self.sources[where], self.weight[where], noise, self.items[where])

    def pin_memory(self) -> "Batch":
        """The same batch in memory that an accelerator copies from without making the host wait."""
        noise = None if self.noise is None else self.noise.pin_memory()
        return Batch(self.mixture.pin_memory(), self.sources.pin_memory(), self.weight.pin_memory(), noise, self.items)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        noise = None if self.noise is None else self.noise.to(device, non_blocking=True)
        moved = [t.to(device, non_blocking=True) for t in (self.mixture, self.sources, self.weight)]
        return Batch(moved[0], moved[1], moved[2], noise, self.items)
