"""Batch: mixtures, their sources, and where each example came from."""

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
        weight: ``(batch,)``; how much each example counts. It is 0 for the stand-in of a rank without an example.
        noise: The noise in the mixture, ``(batch, channel, time)``; None if none was added.
        items: The id of each example; empty if unknown.
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
        """Create a batch; without ``weight`` every example counts 1.

        Raises:
            ValueError: If mixture and sources differ in their number of examples, or there are none.
        """
        if len(mixture) != len(sources) or len(mixture) == 0:
            raise ValueError(f"mixture and sources must hold the same examples, not {len(mixture)} and {len(sources)}.")
        weight = torch.ones(len(mixture), device=mixture.device) if weight is None else weight
        return cls(mixture, sources, weight, noise, tuple(items))

    def select(self, indices: Sequence[int]) -> "Batch":
        """Return a batch of the examples at these indices."""
        indices = list(indices)
        return Batch(
            self.mixture[indices],
            self.sources[indices],
            self.weight[indices],
            None if self.noise is None else self.noise[indices],
            tuple(self.items[index] for index in indices) if self.items else (),
        )

    def split(self, n_batches: int) -> list["Batch"]:
        """Split into at most ``n_batches`` batches of nearly equal size, keeping the order."""
        size = -(-len(self.mixture) // n_batches)  # rounded up
        # Slices, unlike lists of indices, share the batch's memory.
        slices = [slice(start, start + size) for start in range(0, len(self.mixture), size)]
        return [
            Batch(
                self.mixture[part],
                self.sources[part],
                self.weight[part],
                None if self.noise is None else self.noise[part],
                self.items[part],
            )
            for part in slices
        ]

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which an accelerator copies without making the host wait.

        `torch.utils.data.DataLoader` calls this if ``pin_memory`` is set.
        """
        return Batch(
            self.mixture.pin_memory(),
            self.sources.pin_memory(),
            self.weight.pin_memory(),
            None if self.noise is None else self.noise.pin_memory(),
            self.items,
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the copy is asynchronous if the batch is pinned."""
        return Batch(
            self.mixture.to(device, non_blocking=True),
            self.sources.to(device, non_blocking=True),
            self.weight.to(device, non_blocking=True),
            None if self.noise is None else self.noise.to(device, non_blocking=True),
            self.items,
        )
