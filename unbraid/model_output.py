"""The output of a separation model: sources, and further outputs for losses."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Sources with an embedding, for losses that need more than waveforms.

    A model without an embedding returns the tensor of sources alone.

    Attributes:
        sources: ``(batch, source, channel, time)``.
        embedding: A unit vector for each bin of the spectrum of the mixture, ``(batch, channel, frame, freq, dim)``;
            None if the model has none.
        n_fft: Samples in a frame of that spectrum.
        hop_length: Samples from frame to frame of that spectrum.
    """

    sources: Tensor
    embedding: Tensor | None = None
    n_fft: int = 0
    hop_length: int = 0


def get_sources(output: Tensor | ModelOutput) -> Tensor:
    """Return the sources alone, ``(batch, source, channel, time)``."""
    return output.sources if isinstance(output, ModelOutput) else output


def iter_tensors(output: Any) -> Iterator[Tensor]:
    """Iterate over all tensors in the output of a module, in nested tuples and lists too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from iter_tensors(part)
