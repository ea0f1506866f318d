"""DPRNN: masks on a learned transform, from LSTMs over short chunks and across them."""

from typing import Literal

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
    """What an LSTM found, brought to the width of the features, normalised and added to them."""

    def __init__(self, *, hidden: int, n_channels: int) -> None:
        super().__init__()
        self.narrow, self.norm = nn.Linear(2 * hidden, n_channels), GlobalLayerNorm(n_channels)

    def forward(self, features: Tensor, found: Tensor) -> Tensor:
        """``(batch, chunk, frame, channel)`` and ``(batch, chunk, frame, 2 hidden)`` to the former's shape."""
        return features + self.norm(self.narrow(found).flatten(1, 2)).view_as(features)


class ChunkLSTM(nn.Module):
    """A bidirectional LSTM over the frames of each chunk, or over chunks at each frame, with a way around it."""

    def __init__(self, *, n_channels: int, hidden: int, across: bool) -> None:
        super().__init__()
        self.across = across
        self.lstm = nn.LSTM(n_channels, hidden, batch_first=not across, bidirectional=True)
        self.merge = ResidualProjection(hidden=hidden, n_channels=n_channels)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, chunk, frame, channel)`` in and out."""
        batch, n_chunks = features.shape[:2]
        if self.across:  # chunks first is the order of an LSTM without batch_first, and moves whole rows only
            found = self.recur(rearrange(features, "b s l c -> s (b l) c"))
            return self.merge(features, rearrange(found, "s (b l) c -> b s l c", b=batch))
        found = self.recur(rearrange(features, "b s l c -> (b s) l c"))
        return self.merge(features, rearrange(found, "(b s) l c -> b s l c", s=n_chunks))

    def recur(self, features: Tensor) -> Tensor:
        """The LSTM alone."""
        with lstm_autocast(features.device):
            found: Tensor = self.lstm(features)[0]
        return found


class DPRNN(nn.Module):
    """Mask a learned transform of the mixture, once per source, by LSTMs within short chunks and across them.

    The defaults are Asteroid's, 3.7 million parameters, and its weights fit them; ``bottleneck=64`` is the published
    size, 2.6 million. SpeechBrain's is ``n_filters=256, bottleneck=256, hidden=256, chunk_size=250, mask="relu",
    rectify=True, ends="pairs"``. The published results have ``kernel_size=2``, which costs eight times as much.

    Args:
        n_sources: How many sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`; half of it if not given.
        bottleneck: Channels between the LSTMs.
        hidden: Units of an LSTM in each direction.
        chunk_size: Frames in a chunk, even; chunks overlap by half.
        n_blocks: Pairs of an LSTM within chunks and one across them.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        rectify: Whether a ReLU follows the learned transform.
        ends: How chunks reach beyond the frames: by up to a `chunk`, as in Asteroid, or by so much that they come in
            `pairs`, as in SpeechBrain. Weights are at home in the one that they were trained with.

    Raises:
        ValueError: If a word is unknown, or `chunk_size` is odd.

    Reference:
        Luo, Chen and Yoshioka, "Dual-path RNN", ICASSP 2020, arXiv:1910.06379.
    """

    scale_equivariant = True
    """Twice the input, twice the output, but for input so soft that the norms' published ``eps`` is felt."""
    compile_seconds, compile_gain = 60.0, {"fp32": 1.03, "bf16": 1.04}
    """About what compiling takes at the first step and brings at the others: what ``compile = "auto"`` goes by."""

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
        for given, allowed in ((mask, MASKS), (ends, ("chunk", "pairs"))):
            if given not in allowed:
                raise ValueError(f"{given!r} is not one of {', '.join(allowed)}.")
        if chunk_size % 2 or chunk_size < 2:
            raise ValueError(f"chunk_size {chunk_size} must be even and above 0: chunks overlap by half.")
        stride = stride or max(1, kernel_size // 2)
        self.n_sources, self.chunk_size, self.mask, self.rectify, self.ends = n_sources, chunk_size, mask, rectify, ends
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.norm, self.enter = GlobalLayerNorm(n_filters), nn.Linear(n_filters, bottleneck)
        self.paths = nn.ModuleList(
            ChunkLSTM(n_channels=bottleneck, hidden=hidden, across=across)
            for _ in range(n_blocks)
            for across in (False, True)
        )
        self.activation, self.split = nn.PReLU(), nn.Linear(bottleneck, n_sources * bottleneck)
        self.output, self.gate = nn.Linear(bottleneck, bottleneck), nn.Linear(bottleneck, bottleneck)
        self.leave = nn.Linear(bottleneck, n_filters, bias=False)

    def compile_regions(self) -> None:
        """Compile what lies between the LSTMs, which no compiler enters; batch and lengths are left open."""
        for module in self.modules():
            if isinstance(module, ResidualProjection):
                module.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return separate_by_masking(
            mixture, encoder=self.encoder, masks=self.masks, decoder=self.decoder, rectify=self.rectify
        )

    def masks(self, encoded: Tensor) -> Tensor:
        """``(batch, frame, filter)`` to ``(batch, frame, source, filter)``; what all paths add to stays float32."""
        features = self.enter(self.norm(encoded)).float()
        before, after = published_padding(features.shape[1], self.chunk_size, self.ends)
        chunks = split_into_chunks(F.pad(features, (0, 0, before, after)), self.chunk_size)
        for path in self.paths:
            chunks = path(chunks)
        padded = merge_and_split_sources(
            self.activation(chunks), before + features.shape[1], self.split, self.n_sources
        )
        sources = padded[:, before:]
        masks = self.leave(self.output(sources).tanh() * self.gate(sources).sigmoid())
        return MASKS[self.mask](masks)
