"""SepFormer and RE-SepFormer: masks for a learned transform, by transformers within short chunks and across them."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.models.attention import attend
from unbraid.models.chunking import merge_and_split_sources, published_padding, split_into_chunks
from unbraid.models.layers import (
    GlobalLayerNorm,
    LearnedDecoder,
    LearnedEncoder,
    relu,
    run_layer,
    separate_by_masking,
    without_fp16,
)


class TransformerLayer(nn.Module):
    """Self-attention over frames, then a feed-forward network, both with pre-norm and a residual connection."""

    def __init__(self, *, d_model: int, n_heads: int, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.hidden_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.merge = nn.Linear(d_model, d_model)
        self.widen = nn.Linear(d_model, d_hidden)
        self.narrow = nn.Linear(d_hidden, d_model)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``."""
        features = features + self.drop(self.attend(self.attention_norm(features)))
        hidden = relu(self.widen(self.hidden_norm(features)))
        return features + self.drop(self.narrow(self.drop(hidden)))

    def attend(self, features: Tensor) -> Tensor:
        """Compute multi-head self-attention."""
        # n is query, key or value; h the head; l the frame; c the channel of a head
        query, key, value = rearrange(self.query_key_value(features), "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        heads = attend(query, key, value, dropout=self.dropout if self.training else 0.0)
        return self.merge(rearrange(heads, "b h l c -> b l (h c)"))

    def drop(self, features: Tensor) -> Tensor:
        """Apply dropout, in training only."""
        return F.dropout(features, self.dropout, self.training) if self.dropout else features


class ChunkTransformer(nn.Module):
    """A transformer over one axis of the chunks, with a residual connection.

    Args:
        n_layers: Layers of the transformer.
        d_model: Channels of input and output.
        n_heads: Attention heads.
        d_hidden: Width of the feed-forward networks.
        dropout: Dropout probability in training.
        checkpoint: Store only the input of each layer for the backward pass, and recompute the rest.
        eps: ``eps`` of the last norm, which runs over all sequences of an example.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        n_heads: int,
        d_hidden: int,
        dropout: float,
        checkpoint: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.uses_rng = dropout > 0
        self.layers = nn.ModuleList(
            TransformerLayer(d_model=d_model, n_heads=n_heads, d_hidden=d_hidden, dropout=dropout)
            for _ in range(n_layers)
        )
        self.last_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.norm = GlobalLayerNorm(d_model, eps=eps)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Transform ``(batch, sequence, frame, channel)``; attention runs over the frames of each sequence."""
        hidden = rearrange(features + positions[: features.shape[2]].to(features.dtype), "b s l c -> (b s) l c")
        for layer in self.layers:
            hidden = run_layer(layer, hidden, recompute=self.checkpoint, uses_rng=self.uses_rng)
        hidden = rearrange(self.last_norm(hidden), "(b s) l c -> b (s l) c", b=len(features))
        return features + self.norm(hidden).view_as(features)


def compile_layers(model: nn.Module) -> None:
    """Compile the transformer layers, which share one graph, instead of the whole network at once."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.compile()


def check_sizes(*, n_filters: int, n_heads: int, chunk_size: int, kernel_size: int) -> None:
    """Raise an error if the sizes of a model do not fit each other.

    Raises:
        ValueError: If a size is below 1, not even, or `n_filters` is not a multiple of `n_heads`.
    """
    if min(n_filters, n_heads, chunk_size, kernel_size) < 1:
        raise ValueError(
            f"n_filters {n_filters}, n_heads {n_heads}, chunk_size {chunk_size} and kernel_size {kernel_size} must all "
            "be above 0."
        )
    if n_filters % n_heads or n_filters % 2 or chunk_size % 2 or kernel_size % 2:
        raise ValueError(
            f"n_filters {n_filters} must be a multiple of n_heads {n_heads}; it, chunk_size {chunk_size} and "
            f"kernel_size {kernel_size} must be even."
        )


class SepFormer(nn.Module):
    """SepFormer: one mask per source for a learned transform, computed by a dual-path transformer.

    The defaults are the sizes of the standard recipe, 25.7 million parameters, and SpeechBrain's weights fit them.

    Args:
        n_sources: Number of sources to return.
        n_filters: Channels of the learned transform, and of the transformers.
        kernel_size: Filter length in samples, even; the hop is half of it.
        chunk_size: Frames in a chunk, even; chunks overlap by half.
        n_blocks: Pairs of a transformer within chunks and one across them.
        n_layers: Layers in each transformer.
        n_heads: Attention heads.
        d_hidden: Width of the feed-forward networks.
        dropout: Dropout probability in training. N processes then draw other random numbers than one process.
        checkpoint: Recompute activations in the backward pass instead of storing them: less memory, up to a third
            more time.

    Raises:
        ValueError: If sizes do not fit each other.

    Reference:
        Subakan et al., "Attention is all you need in speech separation", ICASSP 2021, arXiv:2010.13154.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources, except for input so quiet that the norms' published ``eps`` matters."""
    compile_seconds = 60.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.02, "bf16": 1.21}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

    def __init__(
        self,
        *,
        n_sources: int = 2,
        n_filters: int = 256,
        kernel_size: int = 16,
        chunk_size: int = 250,
        n_blocks: int = 2,
        n_layers: int = 8,
        n_heads: int = 8,
        d_hidden: int = 1024,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_filters=n_filters, n_heads=n_heads, chunk_size=chunk_size, kernel_size=kernel_size)
        self.n_sources = n_sources
        self.n_filters = n_filters
        self.chunk_size = chunk_size
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=kernel_size // 2)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=kernel_size // 2)
        self.norm = GlobalLayerNorm(n_filters)
        self.enter = nn.Linear(n_filters, n_filters, bias=False)
        sizes = {"n_layers": n_layers, "d_model": n_filters, "n_heads": n_heads, "d_hidden": d_hidden}
        self.within = nn.ModuleList(
            ChunkTransformer(**sizes, dropout=dropout, checkpoint=checkpoint) for _ in range(n_blocks)
        )
        self.across = nn.ModuleList(
            ChunkTransformer(**sizes, dropout=dropout, checkpoint=checkpoint) for _ in range(n_blocks)
        )
        self.activation = nn.PReLU()
        self.split = nn.Linear(n_filters, n_sources * n_filters)
        self.output = nn.Linear(n_filters, n_filters)
        self.gate = nn.Linear(n_filters, n_filters)
        self.leave = nn.Linear(n_filters, n_filters, bias=False)

    def compile_regions(self) -> None:
        """Compile the transformer layers, which share one graph."""
        compile_layers(self)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return separate_by_masking(mixture, encoder=self.encoder, masks=self.masks, decoder=self.decoder)

    def masks(self, encoded: Tensor) -> Tensor:
        """Compute the masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``."""
        n_frames = encoded.shape[1]
        # The residual stream stays in float32 under autocast too, as the norms would make it on a GPU. In bfloat16 the
        # roundings of 32 layers would add up to more than 1 % of the output, and save 1 % of the time.
        pads = published_padding(n_frames, self.chunk_size, "pairs")
        chunks = split_into_chunks(F.pad(self.enter(self.norm(encoded)).float(), (0, 0, *pads)), self.chunk_size)
        positions = sinusoidal_positions(max(chunks.shape[1:3]), self.n_filters, encoded.device)
        for within, across in zip(self.within, self.across, strict=True):
            chunks = within(chunks, positions)
            # (batch, chunk, frame, channel): transposed, attention runs over chunks at each position in them.
            chunks = across(chunks.transpose(1, 2), positions).transpose(1, 2)
        sources = merge_and_split_sources(self.activation(chunks), n_frames, self.split, self.n_sources)
        return self.leave(self.output(sources).tanh() * self.gate(sources).sigmoid()).relu()


class RESepFormer(nn.Module):
    """RE-SepFormer: a SepFormer for less memory and time, with chunks that do not overlap.

    A transformer runs within the chunks. The mean of each chunk goes through a transformer over all chunks, and its
    output is added to every frame of the chunk before the next transformer within chunks.

    The defaults are SpeechBrain's sizes, 8 million parameters. Its weights give the same output for one mixture at a
    time: there, the means of all mixtures in a batch attend to each other, and here they do not. As published, nothing
    normalises the level before the layers, so the model has to be trained at the levels that it will meet.

    Args:
        n_sources: Number of sources to return.
        n_filters: Channels of the learned transform, and of the transformers.
        kernel_size: Filter length in samples, even; the hop is half of it.
        chunk_size: Frames in a chunk, even.
        n_blocks: Transformers within chunks, with one across chunks between two of them.
        n_layers: Layers in each transformer.
        n_heads: Attention heads.
        d_hidden: Width of the feed-forward networks.
        dropout: Dropout probability in training. N processes then draw other random numbers than one process.
        checkpoint: Recompute activations in the backward pass instead of storing them: less memory, up to a third
            more time.

    Raises:
        ValueError: If sizes do not fit each other.

    Reference:
        Della Libera et al., "Resource-efficient separation transformer", ICASSP 2024, arXiv:2206.09507.
    """

    scale_equivariant = False
    """The layers see the level of the mixture, as nothing normalises it."""
    compile_seconds = 60.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.02, "bf16": 1.21}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

    def __init__(
        self,
        *,
        n_sources: int = 2,
        n_filters: int = 128,
        kernel_size: int = 16,
        chunk_size: int = 150,
        n_blocks: int = 2,
        n_layers: int = 8,
        n_heads: int = 8,
        d_hidden: int = 1024,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_filters=n_filters, n_heads=n_heads, chunk_size=chunk_size, kernel_size=kernel_size)
        self.n_sources = n_sources
        self.n_filters = n_filters
        self.chunk_size = chunk_size
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=kernel_size // 2)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=kernel_size // 2)
        sizes = {"n_layers": n_layers, "d_model": n_filters, "n_heads": n_heads, "d_hidden": d_hidden}
        eps = torch.finfo(torch.float32).eps  # the published one
        self.within = nn.ModuleList(
            ChunkTransformer(**sizes, dropout=dropout, checkpoint=checkpoint, eps=eps) for _ in range(n_blocks)
        )
        self.across = nn.ModuleList(
            ChunkTransformer(**sizes, dropout=dropout, checkpoint=checkpoint, eps=eps) for _ in range(n_blocks - 1)
        )
        self.activation = nn.PReLU()
        self.split = nn.Linear(n_filters, n_sources * n_filters)

    def compile_regions(self) -> None:
        """Compile the transformer layers, which share one graph."""
        compile_layers(self)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return separate_by_masking(mixture, encoder=self.encoder, masks=self.masks, decoder=self.decoder)

    def masks(self, encoded: Tensor) -> Tensor:
        """Compute the masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``."""
        batch, n_frames, _ = encoded.shape
        # As published, the chunks always exceed the frames: the last chunk may be all zeros.
        padded = F.pad(encoded.float(), (0, 0, 0, self.chunk_size - n_frames % self.chunk_size))
        chunks = rearrange(padded, "b (s l) c -> (b s) 1 l c", l=self.chunk_size)
        positions = sinusoidal_positions(max(chunks.shape[2], len(chunks) // batch), self.n_filters, encoded.device)
        # Each chunk is a separate example, (batch * chunk, 1, frame, channel), so that norms do not mix chunks.
        chunks = self.within[0](chunks, positions)
        for within, across in zip(self.within[1:], self.across, strict=True):
            means = rearrange(chunks.mean(2), "(b s) 1 c -> b 1 s c", b=batch)
            memory = rearrange(across(means, positions), "b 1 s c -> (b s) 1 1 c")
            chunks = within(chunks + memory, positions)
        frames = rearrange(chunks, "(b s) 1 l c -> b (s l) c", b=batch)[:, :n_frames]
        # These masks depend on the level of the recording, and the gradient of SI-SDR grows as the level falls.
        with without_fp16(frames.device):
            masks = self.split(self.activation(frames))
        return rearrange(masks, "b l (s f) -> b l s f", s=self.n_sources).relu()


def sinusoidal_positions(n_frames: int, n_channels: int, device: torch.device) -> Tensor:
    """Return sinusoidal position embeddings, ``(frame, channel)``, with wavelengths from 2 pi to 20,000 pi frames."""
    rates = torch.exp(torch.arange(0, n_channels, 2, device=device) * (-9.210340371976184 / n_channels))  # log(10,000)
    angles = torch.arange(n_frames, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
