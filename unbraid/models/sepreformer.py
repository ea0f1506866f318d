"""SepReformer: the sources are split early, and one shared network reconstructs each of them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import SILENCE
from unbraid.models.depthwise_conv import LongConv, ShortConv
from unbraid.models.layers import NORMS, GlobalLayerNorm, LearnedDecoder, LearnedEncoder, check_mixture

SIZES: dict[str, dict[str, int]] = {
    "T": {"d_model": 64, "kernel_size": 16, "stride": 4, "n_stages": 4},
    "S": {"d_model": 64, "kernel_size": 8, "stride": 2, "n_stages": 5},
    "B": {"d_model": 128, "kernel_size": 16, "stride": 4, "n_stages": 4},
    "M": {"d_model": 128, "kernel_size": 8, "stride": 2, "n_stages": 5},
}
"""The published sizes: S and M have half the hop of T and B, and one more stage."""


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for ``(batch, frame, channel)``."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalise with statistics in float32, over all examples and frames, and return the dtype of the input."""
        return super().forward(features.flatten(0, 1).float()).view_as(features).to(features.dtype)


STAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {**NORMS, "batch": ChannelsLastBatchNorm}


class FeedForward(nn.Module):
    """A gated feed-forward network with a convolution over neighbouring frames and a residual connection."""

    def __init__(self, *, d_model: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.widen = nn.Linear(d_model, 6 * d_model)
        self.narrow = nn.Linear(3 * d_model, d_model)  # the gate halves the channels
        self.mix = ShortConv(6 * d_model, kernel_size=3)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``."""
        hidden = F.glu(self.mix(self.widen(self.norm(features))))
        return features + self.scale * self.drop(self.narrow(self.drop(hidden)))


class GlobalAttention(nn.Module):
    """Attention over all frames at the lowest rate; a gate at the full rate scales what is added to each frame."""

    def __init__(self, *, d_model: int, n_heads: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(d_model)
        self.gate_norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.merge = nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``.

        Args:
            features: At any rate.
            positions: A vector for each distance of two frames at the lowest rate, ``(2, frame, channel / head)``:
                from ``frame - 1`` down to 0, and from -1 down to ``-frame``.
        """
        # The two axes of the distances tell the compiler the number of frames. With a single one it would have to halve
        # a dynamic size, and does not finish.
        n_frames = positions.shape[1]
        # The mean over neighbouring frames takes the features to the lowest rate.
        attended = self.scale * self.drop(self.attend(features.unflatten(1, (n_frames, -1)).mean(2), positions))
        gate = self.gate(self.gate_norm(features)).sigmoid()
        return features + (gate.unflatten(1, (n_frames, -1)) * attended[:, :, None]).flatten(1, 2)

    def attend(self, features: Tensor, positions: Tensor) -> Tensor:
        """Compute multi-head self-attention with relative positions."""
        # n is query, key or value; h the head; l the frame; c the channel of a head
        split = rearrange(self.query_key_value(self.norm(features)), "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        query, key, value = split
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2) + relative_to_absolute(query @ positions.flatten(0, 1).T.to(query.dtype))
        heads = self.drop(scores.float().softmax(-1)).to(value.dtype) @ value
        return self.merge(rearrange(heads, "b h l c -> b l (h c)"))


def relative_to_absolute(products: Tensor) -> Tensor:
    """Turn scores by relative distance into scores by frame: ``(..., frame, 2 * frame)`` to ``(..., frame, frame)``."""
    # Column k of the input is for the distance frame - 1 - k, so row i of the output begins at column frame - 1 - i.
    # In memory, the start of a row is then 2 * frame - 1 numbers after that of the row before.
    n_frames = products.shape[-2]
    first = n_frames - 1
    width = 2 * n_frames - 1
    rows = products.flatten(-2)[..., first : first + n_frames * width].unflatten(-1, (n_frames, width))
    return rows[..., :n_frames]


class LocalConvolution(nn.Module):
    """A gated convolution over neighbouring frames, with a residual connection."""

    def __init__(self, *, d_model: int, kernel_size: int, norm: str, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden_norm = STAGE_NORMS[norm](2 * d_model)
        self.gate = nn.Linear(d_model, 2 * d_model)
        self.widen = nn.Linear(d_model, 2 * d_model)
        self.mix = LongConv(d_model, kernel_size=kernel_size)
        self.narrow = nn.Linear(2 * d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``."""
        hidden = self.widen(self.mix(F.glu(self.gate(self.norm(features)))))
        return features + self.scale * self.drop(self.narrow(F.gelu(self.hidden_norm(hidden))))


class SourceAttention(nn.Module):
    """Attention over the sources, at each frame independently.

    Written as products and sums: torch's attention is made for long sequences, and here they are as long as there are
    sources.
    """

    def __init__(self, *, d_model: int, n_sources: int, n_heads: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.n_sources = n_sources
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.merge = nn.Linear(d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch * source, frame, channel)``."""
        query, key, value = rearrange(
            self.query_key_value(self.norm(features)),
            "(b s) l (n h c) -> n b s l h c",
            s=self.n_sources,
            n=3,
            h=self.n_heads,
        )
        # (batch, source of the query, source of the key, frame, head, channel), summed over channels
        scores = (query[:, :, None] * key[:, None]).sum(-1, keepdim=True, dtype=torch.float32)
        weights = self.drop((scores * query.shape[-1] ** -0.5).softmax(2)).to(value.dtype)
        heads = (weights * value[:, None]).sum(2)
        return features + self.scale * self.drop(self.merge(rearrange(heads, "b s l h c -> (b s) l (h c)")))


class Layer(nn.Module):
    """Attention over all frames, a convolution over neighbouring ones and, after the split, attention over sources."""

    def __init__(
        self,
        *,
        d_model: int,
        n_sources: int | None,
        n_heads: int,
        local_kernel: int,
        norm: str,
        layer_scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_model": d_model, "layer_scale": layer_scale, "dropout": dropout}
        self.globally = GlobalAttention(n_heads=n_heads, **sizes)
        self.global_hidden = FeedForward(**sizes)
        self.locally = LocalConvolution(kernel_size=local_kernel, norm=norm, **sizes)
        self.local_hidden = FeedForward(**sizes)
        self.across = SourceAttention(n_sources=n_sources, n_heads=n_heads, **sizes) if n_sources else None
        self.across_hidden = FeedForward(**sizes) if n_sources else None

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``; after the split, ``(batch * source, frame, channel)``."""
        features = self.global_hidden(self.globally(features, positions))
        features = self.local_hidden(self.locally(features))
        if self.across is None or self.across_hidden is None:
            return features
        return self.across_hidden(self.across(features))


class Stage(nn.Module):
    """Layers at one frame rate."""

    def __init__(self, *, n_layers: int, **sizes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**sizes) for _ in range(n_layers))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``."""
        for layer in self.layers:
            features = layer(features, positions)
        return features


class Downsample(nn.Module):
    """Halve the frame rate by a learned filter for each channel."""

    def __init__(self, *, d_model: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.mix = ShortConv(d_model, kernel_size=kernel_size, stride=2)
        self.norm = STAGE_NORMS[norm](d_model)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, 2 * frame, channel)`` to ``(batch, frame, channel)``."""
        return F.gelu(self.norm(self.mix(features)))


class Upsample(nn.Module):
    """Double the frame rate by repeating frames, and add the skip connection from before the split."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.low = nn.Linear(d_model, d_model)
        self.high = nn.Linear(d_model, d_model, bias=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Combine ``(batch, frame, channel)`` and ``(batch, 2 * frame, channel)`` to the latter shape, in float32."""
        # The published layer projects both rates concatenated; the sum of two projections is the same.
        repeated = self.high(high).float().unflatten(1, (-1, 2)) + self.low(low).float()[:, :, None]
        return repeated.flatten(1, 2)


class SourceSplit(nn.Module):
    """Split the features of the mixture into those of each source; shared by all rates."""

    def __init__(self, *, d_model: int, n_sources: int) -> None:
        super().__init__()
        self.n_sources = n_sources
        self.widen = nn.Linear(d_model, 4 * d_model * n_sources)
        self.narrow = nn.Linear(2 * d_model * n_sources, d_model * n_sources)
        self.norm = GlobalLayerNorm(d_model)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, frame, channel)`` to ``(batch * source, frame, channel)``."""
        sources = self.narrow(F.glu(self.widen(features)))
        return self.norm(rearrange(sources, "b l (s c) -> (b s) l c", s=self.n_sources))


class SepReformer(nn.Module):
    """SepReformer: split the sources early, and reconstruct each of them by networks that halve and double the rate.

    `size` selects one of the published sizes, of 3.7, 4.5, 14.2 and 17.3 million parameters; other arguments override
    it. Three things differ from the published model:

    - Each channel is normalised to an RMS of 1 first, and its level is restored last, so the output follows the gain.
    - Each example is normalised independently. BatchNorm, which mixes the examples of a batch, needs ``norm="batch"``.
    - The heads that output a waveform at every rate are omitted. They only serve an additional training loss, and the
      published parameter counts omit them as well.

    Args:
        size: `T`, `S`, `B` or `M`.
        n_sources: Number of sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`.
        d_model: Channels between the layers.
        n_stages: Number of times the rate is halved.
        n_heads: Attention heads, a divisor of `d_model`.
        n_split_layers: Layers at each rate before the split.
        n_rebuild_layers: Layers at each rate after the split.
        local_kernel: Kernel size of the local convolutions, in frames.
        halving_kernel: Kernel size of the filters that halve the rate, in frames.
        max_distance: Distance in frames at the lowest rate from which on attention treats all distances as the same.
        norm: `gln` over frames and channels, `cln` over channels, or `batch` as published.
        layer_scale: Initial value of the learned scale of each residual branch, for each channel.
        dropout: Dropout probability in training, published as 0.05. N processes then draw other random numbers than one
            process.

    Raises:
        ValueError: If a choice is unknown, or sizes do not fit each other.

    Reference:
        Shin et al., "Separate and reconstruct: asymmetric encoder-decoder for speech separation", NeurIPS 2024,
        arXiv:2406.05983.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources by the same factor."""

    def __init__(
        self,
        *,
        size: Literal["T", "S", "B", "M"] = "B",
        n_sources: int = 2,
        n_filters: int = 256,
        kernel_size: int | None = None,
        stride: int | None = None,
        d_model: int | None = None,
        n_stages: int | None = None,
        n_heads: int = 8,
        n_split_layers: int = 2,
        n_rebuild_layers: int = 3,
        local_kernel: int = 65,
        halving_kernel: int = 5,
        max_distance: int = 2000,
        norm: Literal["gln", "cln", "batch"] = "gln",
        layer_scale: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for choice, allowed in ((size, SIZES), (norm, STAGE_NORMS)):
            if choice not in allowed:
                raise ValueError(f"{choice!r} is not one of {', '.join(allowed)}.")
        # Arguments take precedence over the published size.
        kernel_size = kernel_size or SIZES[size]["kernel_size"]
        stride = stride or SIZES[size]["stride"]
        d_model = d_model or SIZES[size]["d_model"]
        n_stages = SIZES[size]["n_stages"] if n_stages is None else n_stages
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} must be a multiple of n_heads {n_heads}.")
        self.n_sources = n_sources
        self.n_stages = n_stages
        self.max_distance = max_distance
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.norm = GlobalLayerNorm(n_filters)
        self.enter = nn.Linear(n_filters, d_model, bias=False)
        self.positions = nn.Embedding(2 * max_distance, d_model // n_heads)
        sizes: dict[str, Any] = {
            "d_model": d_model,
            "n_heads": n_heads,
            "local_kernel": local_kernel,
            "norm": norm,
            "layer_scale": layer_scale,
            "dropout": dropout,
        }
        self.separating = nn.ModuleList(
            Stage(n_layers=n_split_layers, n_sources=None, **sizes) for _ in range(n_stages + 1)
        )
        self.halving = nn.ModuleList(
            Downsample(d_model=d_model, kernel_size=halving_kernel, norm=norm) for _ in range(n_stages)
        )
        self.split = SourceSplit(d_model=d_model, n_sources=n_sources)
        self.doubling = nn.ModuleList(Upsample(d_model=d_model) for _ in range(n_stages))
        self.rebuilding = nn.ModuleList(
            Stage(n_layers=n_rebuild_layers, n_sources=n_sources, **sizes) for _ in range(n_stages)
        )
        self.output = nn.Linear(d_model, 4 * d_model)
        self.leave = nn.Linear(2 * d_model, n_filters)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        check_mixture(mixture, self.output.weight)
        batch, _, time = mixture.shape
        waveforms, rms = normalize_rms(rearrange(mixture, "b c t -> (b c) t"))
        encoded = F.gelu(self.encoder(waveforms))
        sources = self.sources(self.enter(self.norm(encoded)).float())[:, : encoded.shape[1]]
        decoded = self.decoder(self.leave(F.glu(self.output(sources))).float(), time)
        # The RMS is one value per batch * channel; here b stands for both.
        scaled = rearrange(decoded, "(b s) t -> b s t", s=self.n_sources) * rms[:, None]
        return rearrange(scaled, "(b c) s t -> b s c t", b=batch)

    def sources(self, features: Tensor) -> Tensor:
        """Map ``(batch, frame, channel)`` to ``(batch * source, frame, channel)``, padded to whole frames at all rates.

        The residual stream stays in float32 under autocast too.
        """
        # 1. Down to the lowest rate, with a skip connection for each source at every rate.
        features = F.pad(features, (0, 0, 0, -features.shape[1] % 2**self.n_stages))
        positions = self.relative_positions(features.shape[1] // 2**self.n_stages, features.device)
        skips = []
        for stage, downsample in zip(self.separating[:-1], self.halving, strict=True):
            features = stage(features, positions)
            skips.append(self.split(features))
            features = downsample(features).float()

        # 2. Split into sources at the lowest rate, and back up to the full rate.
        features = self.split(self.separating[-1](features, positions))
        for stage, upsample in zip(self.rebuilding, self.doubling, strict=True):
            features = stage(upsample(features, skips.pop()), positions)
        return features

    def relative_positions(self, n_frames: int, device: torch.device) -> Tensor:
        """Return a vector for each distance of two frames at the lowest rate, in the layout of `GlobalAttention`."""
        distances = torch.arange(n_frames - 1, -n_frames - 1, -1, device=device)
        vectors = self.positions(distances.clamp(-self.max_distance, self.max_distance - 1) + self.max_distance)
        return vectors.unflatten(0, (2, n_frames))


def dropout_or_identity(dropout: float) -> nn.Module:
    """Return a dropout layer, or the identity for a probability of 0."""
    return nn.Dropout(dropout) if dropout else nn.Identity()


def normalize_rms(waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(batch, time)`` at a mean power of 1, and its RMS, ``(batch, 1)``, to restore the level afterwards.

    The RMS of silence is exactly 0, with a finite gradient.
    """
    # power * rsqrt(power) and not sqrt(power), whose gradient at 0 is infinite.
    power = waveform.square().mean(-1, keepdim=True)
    inverse = (power + SILENCE).rsqrt()
    return waveform * inverse, power * inverse
