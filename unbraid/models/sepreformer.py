"""SepReformer: the sources are split early, and one network that all of them share builds each of them up again."""

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
"""The published sizes: S and M see half the hop of T and B, and halve once more."""


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """Torch's, for ``(batch, frame, channel)``."""

    def forward(self, features: Tensor) -> Tensor:
        """Statistics in float32, over all examples and frames; the result has the input's dtype."""
        return super().forward(features.flatten(0, 1).float()).view_as(features).to(features.dtype)


STAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {**NORMS, "batch": ChannelsLastBatchNorm}


class FeedForward(nn.Module):
    """Widen, mix neighbouring frames, gate, narrow: what to add to each frame."""

    def __init__(self, *, d_model: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.widen, self.narrow = nn.Linear(d_model, 6 * d_model), nn.Linear(3 * d_model, d_model)
        self.mix = ShortConv(6 * d_model, kernel_size=3)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        hidden = F.glu(self.mix(self.widen(self.norm(features))))
        return features + self.scale * self.drop(self.narrow(self.drop(hidden)))


class GlobalAttention(nn.Module):
    """Attention over all frames at the lowest rate; at its own rate a gate says where its result is added."""

    def __init__(self, *, d_model: int, n_heads: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm, self.gate_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.query_key_value, self.merge = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out.

        Args:
            features: At any rate.
            positions: A vector for each distance of two frames at the lowest rate, from ``frame - 1`` down to 0 and
                from -1 down to ``-frame``, ``(2, frame, channel / head)``; in one axis the compiler would have to halve
                it to know the frames, and does not come to an end.
        """
        n_frames = positions.shape[1]
        attended = self.scale * self.drop(self.attend(features.unflatten(1, (n_frames, -1)).mean(2), positions))
        gate = self.gate(self.gate_norm(features)).sigmoid()
        return features + (gate.unflatten(1, (n_frames, -1)) * attended[:, :, None]).flatten(1, 2)

    def attend(self, features: Tensor, positions: Tensor) -> Tensor:
        """Multi-head self-attention that sees how far frames are apart."""
        split = rearrange(self.query_key_value(self.norm(features)), "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        query, key, value = split
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2) + relative_to_absolute(query @ positions.flatten(0, 1).T.to(query.dtype))
        heads = self.drop(scores.float().softmax(-1)).to(value.dtype) @ value
        return self.merge(rearrange(heads, "b h l c -> b l (h c)"))


def relative_to_absolute(products: Tensor) -> Tensor:
    """One column for each distance to one for each frame: ``(..., frame, 2 frame)`` to ``(..., frame, frame)``.

    Column ``k`` of the input is for a distance of ``frame - 1 - k``; row ``i`` of the output therefore begins
    ``frame - 1 - i`` columns in, which in memory is the same step from every row to the next.
    """
    n_frames = products.shape[-2]
    first, width = n_frames - 1, 2 * n_frames - 1
    rows = products.flatten(-2)[..., first : first + n_frames * width].unflatten(-1, (n_frames, width))
    return rows[..., :n_frames]


class LocalConvolution(nn.Module):
    """A gated convolution over the frames around each: what to add to it."""

    def __init__(self, *, d_model: int, kernel_size: int, norm: str, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.norm, self.hidden_norm = nn.LayerNorm(d_model), STAGE_NORMS[norm](2 * d_model)
        self.gate, self.widen = nn.Linear(d_model, 2 * d_model), nn.Linear(d_model, 2 * d_model)
        self.mix = LongConv(d_model, kernel_size=kernel_size)
        self.narrow = nn.Linear(2 * d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        hidden = self.widen(self.mix(F.glu(self.gate(self.norm(features)))))
        return features + self.scale * self.drop(self.narrow(F.gelu(self.hidden_norm(hidden))))


class SourceAttention(nn.Module):
    """Attention over the sources, at each frame for itself.

    Written as products and sums: torch's attention is made for many frames, and here are as many as sources.
    """

    def __init__(self, *, d_model: int, n_sources: int, n_heads: int, layer_scale: float, dropout: float) -> None:
        super().__init__()
        self.n_sources, self.n_heads = n_sources, n_heads
        self.norm = nn.LayerNorm(d_model)
        self.query_key_value, self.merge = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.scale = nn.Parameter(torch.full((d_model,), layer_scale))
        self.drop = dropout_or_identity(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch * source, frame, channel)`` in and out."""
        query, key, value = rearrange(
            self.query_key_value(self.norm(features)),
            "(b s) l (n h c) -> n b s l h c",
            s=self.n_sources,
            n=3,
            h=self.n_heads,
        )
        scores = (query[:, :, None] * key[:, None]).sum(-1, keepdim=True, dtype=torch.float32)
        weights = self.drop((scores * query.shape[-1] ** -0.5).softmax(2)).to(value.dtype)
        heads = (weights * value[:, None]).sum(2)
        return features + self.scale * self.drop(self.merge(rearrange(heads, "b s l h c -> (b s) l (h c)")))


class Layer(nn.Module):
    """Attention over all frames, then a convolution over near ones, and in the second half attention over sources."""

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
        both: dict[str, Any] = {"d_model": d_model, "layer_scale": layer_scale, "dropout": dropout}
        self.globally = GlobalAttention(n_heads=n_heads, **both)
        self.global_hidden = FeedForward(**both)
        self.locally = LocalConvolution(kernel_size=local_kernel, norm=norm, **both)
        self.local_hidden = FeedForward(**both)
        self.across = SourceAttention(n_sources=n_sources, n_heads=n_heads, **both) if n_sources else None
        self.across_hidden = FeedForward(**both) if n_sources else None

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out; with sources, ``(batch * source, frame, channel)``."""
        features = self.global_hidden(self.globally(features, positions))
        features = self.local_hidden(self.locally(features))
        if self.across is None or self.across_hidden is None:
            return features
        return self.across_hidden(self.across(features))


class Stage(nn.Module):
    """Layers at one rate."""

    def __init__(self, *, n_layers: int, **sizes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**sizes) for _ in range(n_layers))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        for layer in self.layers:
            features = layer(features, positions)
        return features


class Downsample(nn.Module):
    """Half the rate, by a learned filter for each channel."""

    def __init__(self, *, d_model: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.mix, self.norm = ShortConv(d_model, kernel_size=kernel_size, stride=2), STAGE_NORMS[norm](d_model)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` to half the frames."""
        return F.gelu(self.norm(self.mix(features)))


class Upsample(nn.Module):
    """Twice the rate, each frame repeated, together with what the first half of the network had there."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model, bias=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """``(batch, frame, channel)`` and ``(batch, 2 frame, channel)`` to the latter, in float32."""
        repeated = self.high(high).float().unflatten(1, (-1, 2)) + self.low(low).float()[:, :, None]
        return repeated.flatten(1, 2)


class SourceSplit(nn.Module):
    """The features of a mixture to those of each source; one for all rates."""

    def __init__(self, *, d_model: int, n_sources: int) -> None:
        super().__init__()
        self.n_sources = n_sources
        self.widen = nn.Linear(d_model, 4 * d_model * n_sources)
        self.narrow = nn.Linear(2 * d_model * n_sources, d_model * n_sources)
        self.norm = GlobalLayerNorm(d_model)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` to ``(batch * source, frame, channel)``."""
        sources = self.narrow(F.glu(self.widen(features)))
        return self.norm(rearrange(sources, "b l (s c) -> (b s) l c", s=self.n_sources))


class SepReformer(nn.Module):
    """Split the sources early, and build each of them up again, by networks that halve and double the rate.

    `size` chooses among the published ones, of 3.7, 4.5, 14.2 and 17.3 million parameters; what is given beside it
    goes before it. Three things are not as published. Each channel is brought to a level of 1 first and back to its own
    last, so that the output follows the gain. Where BatchNorm would tie the examples of a batch to each other, each is
    normalised for itself, unless ``norm="batch"``. And the heads that give a waveform from every rate, of use to a
    further loss in training and to nothing else, are left out; published counts leave them out as well.

    Args:
        size: `T`, `S`, `B` or `M`.
        n_sources: How many sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`.
        d_model: Channels between the layers.
        n_stages: How often the rate is halved.
        n_heads: Attention heads, a divisor of `d_model`.
        n_split_layers: Layers at each rate before the split.
        n_rebuild_layers: Layers at each rate after it.
        local_kernel: Frames that the local convolutions reach over.
        halving_kernel: Frames of the filters that halve the rate.
        max_distance: From how many frames on at the lowest rate attention sees a distance as the same.
        norm: `gln` over frames and channels, `cln` over channels, or `batch` as published.
        layer_scale: With what factor each part of a layer begins; it is learned, for each channel.
        dropout: In training, published as 0.05; N processes then draw other numbers than one.

    Raises:
        ValueError: If a size is not known, or sizes do not fit each other.

    Reference:
        Shin et al., "Separate and reconstruct: asymmetric encoder-decoder for speech separation", NeurIPS 2024,
        arXiv:2406.05983.
    """

    scale_equivariant = True
    """Twice the input, twice the output."""

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
        for given, allowed in ((size, SIZES), (norm, STAGE_NORMS)):
            if given not in allowed:
                raise ValueError(f"{given!r} is not one of {', '.join(allowed)}.")
        kernel_size, stride = kernel_size or SIZES[size]["kernel_size"], stride or SIZES[size]["stride"]
        d_model = d_model or SIZES[size]["d_model"]
        n_stages = SIZES[size]["n_stages"] if n_stages is None else n_stages
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} must be a multiple of n_heads {n_heads}.")
        self.n_sources, self.n_stages, self.max_distance = n_sources, n_stages, max_distance
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.norm, self.enter = GlobalLayerNorm(n_filters), nn.Linear(n_filters, d_model, bias=False)
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
        self.output, self.leave = nn.Linear(d_model, 4 * d_model), nn.Linear(2 * d_model, n_filters)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        check_mixture(mixture, self.output.weight)
        batch, _, time = mixture.shape
        waveforms, levels = normalize_rms(rearrange(mixture, "b c t -> (b c) t"))
        encoded = F.gelu(self.encoder(waveforms))
        sources = self.sources(self.enter(self.norm(encoded)).float())[:, : encoded.shape[1]]
        rebuilt = self.decoder(self.leave(F.glu(self.output(sources))).float(), time)
        leveled = rearrange(rebuilt, "(b s) t -> b s t", s=self.n_sources) * levels[:, None]
        return rearrange(leveled, "(b c) s t -> b s c t", b=batch)

    def sources(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` to ``(batch * source, frame, channel)``, zeros added to whole frames below.

        What all layers add to is in float32 under autocast too.
        """
        features = F.pad(features, (0, 0, 0, -features.shape[1] % 2**self.n_stages))
        positions = self.distances(features.shape[1] // 2**self.n_stages, features.device)
        rates = []
        for stage, halve in zip(self.separating[:-1], self.halving, strict=True):
            features = stage(features, positions)
            rates.append(self.split(features))
            features = halve(features).float()
        features = self.split(self.separating[-1](features, positions))
        for stage, double in zip(self.rebuilding, self.doubling, strict=True):
            features = stage(double(features, rates.pop()), positions)
        return features

    def distances(self, n_frames: int, device: torch.device) -> Tensor:
        """A vector for each distance of two frames at the lowest rate, as `GlobalAttention` asks for them."""
        distances = torch.arange(n_frames - 1, -n_frames - 1, -1, device=device)
        vectors = self.positions(distances.clamp(-self.max_distance, self.max_distance - 1) + self.max_distance)
        return vectors.unflatten(0, (2, n_frames))


def dropout_or_identity(dropout: float) -> nn.Module:
    """Dropout, or nothing at all where nothing is dropped."""
    return nn.Dropout(dropout) if dropout else nn.Identity()


def normalize_rms(waveform: Tensor) -> tuple[Tensor, Tensor]:
    """``(batch, time)`` at a mean power of 1, and the level to multiply by afterwards, ``(batch, 1)``.

    The level of silence is exactly 0, with a gradient that is finite.
    """
    power = waveform.square().mean(-1, keepdim=True)
    inverse = (power + SILENCE).rsqrt()
    return waveform * inverse, power * inverse
