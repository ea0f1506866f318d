"""DPRNN: masks for a learned transform, computed by LSTMs within short chunks and across them."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.models.chunking import merge_and_split_sources, published_padding, split_into_chunks
from unbraid.models.layers import (
    MASKS,
    GlobalLayerNorm,
    LearnedDecoder,
    LearnedEncoder,
    lstm_autocast,
    separate_by_masking,
)


class ResidualProjection(nn.Module):
    """Project the output of an LSTM to the width of the features, normalise it and add it to them."""

    def __init__(self, *, hidden: int, n_channels: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(2 * hidden, n_channels)
        self.norm = GlobalLayerNorm(n_channels)

    def forward(self, features: Tensor, lstm_output: Tensor) -> Tensor:
        """Add ``(batch, chunk, frame, 2 * hidden)`` to features ``(batch, chunk, frame, channel)``."""
        # The norm runs over all frames of all chunks, so both axes become one.
        return features + self.norm(self.narrow(lstm_output).flatten(1, 2)).view_as(features)


class ChunkLSTM(nn.Module):
    """A bidirectional LSTM with a residual connection, over the frames of each chunk or across the chunks."""

    def __init__(self, *, n_channels: int, hidden: int, across: bool) -> None:
        super().__init__()
        self.across = across
        self.lstm = nn.LSTM(n_channels, hidden, batch_first=not across, bidirectional=True)
        self.merge = ResidualProjection(hidden=hidden, n_channels=n_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch, chunk, frame, channel)``; in the patterns ``s`` is the chunk and ``l`` the frame."""
        batch, n_chunks = features.shape[:2]
        if self.across:
            # Time first, the order of an LSTM without batch_first: the rearrangement then copies whole rows.
            output = self.run_lstm(rearrange(features, "b s l c -> s (b l) c"))
            return self.merge(features, rearrange(output, "s (b l) c -> b s l c", b=batch))
        output = self.run_lstm(rearrange(features, "b s l c -> (b s) l c"))
        return self.merge(features, rearrange(output, "(b s) l c -> b s l c", s=n_chunks))

    def run_lstm(self, features: Tensor) -> Tensor:
        """Run the LSTM in a dtype that the device supports."""
        with lstm_autocast(features.device):
            output: Tensor = self.lstm(features)[0]
        return output


class DPRNN(nn.Module):
    """DPRNN: one mask per source for a learned transform, computed by LSTMs within short chunks and across them.

    The defaults are those of Asteroid, 3.7 million parameters, whose weights fit them. ``bottleneck=64`` is the
    published size, 2.6 million. SpeechBrain's is ``n_filters=256, bottleneck=256, hidden=256, chunk_size=250,
    mask="relu", rectify=True, ends="pairs"``. The published results use ``kernel_size=2``, which costs eight times as
    much.

    Args:
        n_sources: Number of sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`; by default half of it.
        bottleneck: Channels between the LSTMs.
        hidden: Units of an LSTM in each direction.
        chunk_size: Frames in a chunk, even; chunks overlap by half.
        n_blocks: Pairs of an LSTM within chunks and one across them.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        rectify: Whether a ReLU follows the learned transform.
        ends: Padding of the frames: `chunk` for chunks that reach up to a whole chunk beyond them, as in Asteroid, or
            `pairs` for an even number of chunks, as in SpeechBrain. Use weights with the padding of their training.

    Raises:
        ValueError: If a choice is unknown, `chunk_size` is odd, or `kernel_size` is not a multiple of `stride`.

    Reference:
        Luo, Chen and Yoshioka, "Dual-path RNN", ICASSP 2020, arXiv:1910.06379.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources, except for input so quiet that the norms' published ``eps`` matters."""
    compile_seconds = 60.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.03, "bf16": 1.04}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

    def __init__(
        self,
        *,
        n_sources: int = 2,
        n_filters: int = 64,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck: int = 128,
        hidden: int = 128,
        chunk_size: int = 100,
        n_blocks: int = 6,
        mask: Literal["sigmoid", "relu", "softmax"] = "sigmoid",
        rectify: bool = False,
        ends: Literal["chunk", "pairs"] = "chunk",
    ) -> None:
        super().__init__()
        for choice, allowed in ((mask, MASKS), (ends, ("chunk", "pairs"))):
            if choice not in allowed:
                raise ValueError(f"{choice!r} is not one of {', '.join(allowed)}.")
        if chunk_size % 2 or chunk_size < 2:
            raise ValueError(f"chunk_size {chunk_size} must be even and above 0: chunks overlap by half.")
        stride = stride or max(1, kernel_size // 2)
        self.n_sources = n_sources
        self.chunk_size = chunk_size
        self.mask = mask
        self.rectify = rectify
        self.ends = ends
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.norm = GlobalLayerNorm(n_filters)
        self.enter = nn.Linear(n_filters, bottleneck)
        self.paths = nn.ModuleList(
            ChunkLSTM(n_channels=bottleneck, hidden=hidden, across=across)
            for _ in range(n_blocks)
            for across in (False, True)
        )
        self.activation = nn.PReLU()
        self.split = nn.Linear(bottleneck, n_sources * bottleneck)
        self.output = nn.Linear(bottleneck, bottleneck)
        self.gate = nn.Linear(bottleneck, bottleneck)
        self.leave = nn.Linear(bottleneck, n_filters, bias=False)

    def compile_regions(self) -> None:
        """Compile the layers between the LSTMs, which the compiler cannot enter; batch and lengths are dynamic."""
        for module in self.modules():
            if isinstance(module, ResidualProjection):
                module.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return separate_by_masking(
            mixture, encoder=self.encoder, masks=self.masks, decoder=self.decoder, rectify=self.rectify
        )

    def masks(self, encoded: Tensor) -> Tensor:
        """Compute the masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``."""
        # The residual stream stays in float32 under autocast too.
        features = self.enter(self.norm(encoded)).float()
        before, after = published_padding(features.shape[1], self.chunk_size, self.ends)
        chunks = split_into_chunks(F.pad(features, (0, 0, before, after)), self.chunk_size)
        for path in self.paths:
            chunks = path(chunks)
        padded = merge_and_split_sources(
            self.activation(chunks), before + features.shape[1], self.split, self.n_sources
        )
        sources = padded[:, before:]
        # A gated output layer: tanh times sigmoid.
        masks = self.leave(self.output(sources).tanh() * self.gate(sources).sigmoid())
        return MASKS[self.mask](masks)
