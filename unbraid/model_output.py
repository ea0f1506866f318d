"""What a separator returns: its sources, and what else a loss may ask for."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Sources, and beside them what a loss may want that no waveform shows.

    A model whose losses need nothing but sources returns the tensor alone.

    Attributes:
        sources: ``(batch, source, channel, time)``.
        embedding: A vector of unit length for each bin of the mixture's spectrum, ``(batch, channel, frame, freq,
            dim)``; None where the model has none.
        n_fft: Of the spectrum that the embedding belongs to, in samples.
        hop_length: Of the same, in samples.
    """

    sources: Tensor
    embedding: Tensor | None = None
    n_fft: int = 0
    hop_length: int = 0


def get_sources(output: Tensor | ModelOutput) -> Tensor:
    """The sources alone, ``(batch, source, channel, time)``."""
    return output.sources if isinstance(output, ModelOutput) else output


def iter_tensors(output: Any) -> Iterator[Tensor]:
    """All tensors that a module returns: itself one, or in tuples and lists."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from iter_tensors(part)
