"""BS-RoFormer: complex masks for a spectrum split into bands, by transformers along time and across bands."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import istft, stft
from unbraid.models.attention import apply_rotary, attend, rotary_angles
from unbraid.models.layers import check_mixture, run_layer

PUBLISHED_WIDTHS = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)
"""Bins of each of the 62 bands in the paper, where a bin is 44,100 / 2,048 Hz wide."""


def uniform_bands(n_fft: int, sample_rate: int) -> list[range]:
    """Return the bands of the paper, at the same frequencies in Hz for any frame size and sample rate.

    The bands touch and do not overlap. Edges that fall on the same bin are merged.
    """
    edges_hz = np.cumsum(PUBLISHED_WIDTHS[:-1]) * (44_100 / 2048)
    n_bins = n_fft // 2 + 1
    edges = np.round(edges_hz * n_fft / sample_rate).astype(int)
    return [range(*pair) for pair in pairwise(sorted({0, *edges[edges < n_bins].tolist(), n_bins}))]


def mel_bands(n_bands: int, n_fft: int, sample_rate: int) -> list[range]:
    """Return bands that overlap by half: the bins under each triangle of Slaney's mel filter bank, as in librosa.

    The first band also gets bin 0 and the last band the last bin, as in the published implementations.

    Raises:
        ValueError: If a band would be narrower than a bin.
    """
    # Slaney's scale is linear up to 1000 Hz (15 mel), at 200/3 Hz per mel, and logarithmic above.
    last_mel = 15 + 27 * np.log(sample_rate / 2000) / np.log(6.4) if sample_rate > 2000 else 3 * sample_rate / 400
    mels = np.linspace(0, last_mel, n_bands + 2)
    edges_hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    edges = edges_hz * n_fft / sample_rate  # in bins
    first = np.floor(edges[:-2]).astype(int) + 1
    end = np.ceil(edges[2:]).astype(int)
    first[0] = 0
    end[-1] = n_fft // 2 + 1
    if (first >= end).any():
        raise ValueError(
            f"{n_bands} mel bands are too many for n_fft {n_fft} at {sample_rate} Hz: band "
            f"{int((first >= end).argmax())} has no bin. Use fewer n_bands or a larger n_fft."
        )
    return [range(*pair) for pair in zip(first.tolist(), end.tolist(), strict=True)]


def make_bands(bands: str | Sequence[int], n_bands: int, n_fft: int, sample_rate: int) -> list[range]:
    """Return the bins of each band, from the name of a layout or from widths that add up to all bins.

    Raises:
        ValueError: If the name is unknown, or the bands do not fit the spectrum.
    """
    if bands == "uniform":
        return uniform_bands(n_fft, sample_rate)
    if bands == "mel":
        return mel_bands(n_bands, n_fft, sample_rate)
    if isinstance(bands, str):
        raise ValueError(f"bands {bands!r} is not one of uniform, mel, and not a list of widths in bins.")
    if sum(bands) != n_fft // 2 + 1 or min(bands, default=0) < 1:
        raise ValueError(
            f"The widths of bands must be positive and add up to the {n_fft // 2 + 1} bins of n_fft {n_fft}, "
            f"not to {sum(bands)}."
        )
    return [range(*pair) for pair in pairwise(np.cumsum([0, *bands]).tolist())]


class RoPELayer(nn.Module):
    """Gated attention with rotary positions, then a feed-forward network, both with pre-norm and a residual."""

    def __init__(self, *, d_model: int, n_heads: int, d_head: int, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(d_model, eps=1e-12)
        self.hidden_norm = nn.RMSNorm(d_model, eps=1e-12)
        self.query_key_value = nn.Linear(d_model, 3 * n_heads * d_head, bias=False)
        self.gates = nn.Linear(d_model, n_heads)
        self.merge = nn.Linear(n_heads * d_head, d_model, bias=False)
        self.widen = nn.Linear(d_model, d_hidden)
        self.narrow = nn.Linear(d_hidden, d_model)

    def forward(self, features: Tensor, angles: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``, with angles from `rotary_angles`."""
        features = features + self.drop(self.attend(self.attention_norm(features), angles))
        hidden = F.gelu(self.widen(self.hidden_norm(features)))
        return features + self.drop(self.narrow(self.drop(hidden)))

    def attend(self, features: Tensor, angles: Tensor) -> Tensor:
        """Compute multi-head self-attention; a gate scales every head at every frame."""
        # n is query, key or value; h the head; l the frame; c the channel of a head
        projected = rearrange(self.query_key_value(features), "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        query_key, value = projected.split((2, 1))
        query, key = apply_rotary(query_key, angles)
        heads = attend(query, key, value[0], dropout=self.dropout if self.training else 0.0)
        gated = heads * rearrange(self.gates(features), "b l h -> b h l 1").sigmoid()
        return self.merge(rearrange(gated, "b h l c -> b l (h c)"))

    def drop(self, features: Tensor) -> Tensor:
        """Apply dropout, in training only."""
        return F.dropout(features, self.dropout, self.training) if self.dropout else features


class Block(nn.Module):
    """A transformer along time, in each band independently, then one across bands, in each frame independently."""

    def __init__(self, *, along_time: list[RoPELayer], across_bands: list[RoPELayer], norms: list[nn.Module]) -> None:
        super().__init__()
        self.along_time = nn.ModuleList(along_time)
        self.across_bands = nn.ModuleList(across_bands)
        self.norms = nn.ModuleList(norms)

    def forward(self, features: Tensor, time_angles: Tensor, band_angles: Tensor) -> Tensor:
        """Transform ``(band, batch, frame, channel)``."""
        batch = features.shape[1]
        # k is the band, l the frame and d the feature. With bands first, each rearrangement is one copy.
        hidden = rearrange(features, "k b l d -> (k b) l d")
        for layer in self.along_time:
            hidden = layer(hidden, time_angles)
        hidden = rearrange(self.norms[0](hidden), "(k b) l d -> (b l) k d", b=batch)
        for layer in self.across_bands:
            hidden = layer(hidden, band_angles)
        return rearrange(self.norms[1](hidden), "(b l) k d -> k b l d", b=batch)


class BandSplit(nn.Module):
    """Normalise the level of each band and map it to features, by a separate linear layer for each band.

    Neighbouring bands of equal width are one batched product. The rows of ``weight`` are the input values of all bands,
    band after band.

    Args:
        widths: Number of values in each band: real and imaginary parts of its bins in all channels.
        d_model: Features of a band.
    """

    def __init__(self, *, widths: list[int], d_model: int) -> None:
        super().__init__()
        self.width_groups = group_equal_widths(widths)  # pairs of (number of bands, width)
        self.scale = nn.Parameter(torch.ones(sum(widths)))
        self.weight = nn.Parameter(torch.cat([init_uniform(width, d_model, n_inputs=width) for width in widths]))
        self.bias = nn.Parameter(torch.cat([init_uniform(1, d_model, n_inputs=width) for width in widths]))

    def forward(self, values: Tensor) -> Tensor:
        """Map ``(batch, frame, value)`` to ``(band, batch, frame, channel)``."""
        # Split input and parameters into the groups of bands of equal width.
        counts = [n_bands for n_bands, _ in self.width_groups]
        sizes = [n_bands * width for n_bands, width in self.width_groups]
        parts = (values.split(sizes, -1), self.scale.split(sizes), self.weight.split(sizes), self.bias.split(counts))
        features = []
        # k is the band in its group, l the example and frame, n the value in its band
        for (_, width), split, scale, weight, bias in zip(self.width_groups, *parts, strict=True):
            bands = rearrange(split, "b l (k n) -> (b l) k n", n=width)
            power = bands.square().sum(-1, keepdim=True).clamp_min(1e-24)  # keeps silence 0 and its gradient finite
            scaled = bands * (power.rsqrt() * width**0.5) * scale.view(-1, width)
            inputs = rearrange(scaled, "l k n -> k l n")
            features.append(torch.baddbmm(bias[:, None], inputs, weight.view(-1, width, weight.shape[-1])))
        return torch.cat(features).unflatten(1, values.shape[:2]).to(values.dtype)


class BandMasks(nn.Module):
    """Map features to masks by a small network for each band and source, with gated linear units at the end.

    The rows of the last ``weight`` are ordered by band, then by source. For each they are first the values and then the
    gates, as many of both as the band has values.

    Args:
        widths: Number of values in each band and in its masks: real and imaginary parts of its bins in all channels.
        n_sources: Number of masks for each band.
        d_model: Features of a band.
        d_hidden: Width of the hidden layers.
        n_layers: Number of linear layers, including the last one.
    """

    def __init__(self, *, widths: list[int], n_sources: int, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.width_groups = group_equal_widths(widths)
        self.n_sources = n_sources
        sizes = [d_model, *[d_hidden] * (n_layers - 1)]
        self.hidden = nn.ModuleList(
            BandLinear(n_bands=len(widths), n_sources=n_sources, d_in=d_in, d_out=d_out)
            for d_in, d_out in pairwise(sizes)
        )
        n_rows = 2 * n_sources * sum(widths)
        self.weight = nn.Parameter(init_uniform(n_rows, sizes[-1], n_inputs=sizes[-1]))
        self.bias = nn.Parameter(init_uniform(n_rows, n_inputs=sizes[-1]))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(band, batch, frame, channel)`` to ``(batch, source, frame, value)``."""
        # 1. Hidden layers, on (band * source, channel, batch * frame).
        batch = features.shape[1]
        hidden = rearrange(features, "k b l d -> k 1 d (b l)").expand(-1, self.n_sources, -1, -1).flatten(0, 1)
        for layer in self.hidden:
            hidden = layer(hidden).tanh()

        # 2. The last layer, one batched product for each group of bands of equal width.
        counts = [n_bands * self.n_sources for n_bands, _ in self.width_groups]
        sizes = [2 * count * width for count, (_, width) in zip(counts, self.width_groups, strict=True)]
        parts = (hidden.split(counts), self.weight.split(sizes), self.bias.split(sizes))
        masks = []
        for (_, width), inputs, weight, bias in zip(self.width_groups, *parts, strict=True):
            rows = weight.view(-1, 2 * width, weight.shape[-1])
            mask = torch.baddbmm(bias.view(-1, 2 * width, 1), rows, inputs).to(features.dtype)
            masks.append(rearrange(F.glu(mask, 1), "(k s) n (b l) -> b s l (k n)", s=self.n_sources, b=batch))
        return torch.cat(masks, -1)


class BandLinear(nn.Module):
    """A separate linear layer for each band and source, all of one size, as one batched product.

    Frames come last. The weights are then the first factor, and their gradient has their layout without a copy.
    """

    def __init__(self, *, n_bands: int, n_sources: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(init_uniform(n_bands, n_sources, d_out, d_in, n_inputs=d_in))
        self.bias = nn.Parameter(init_uniform(n_bands, n_sources, d_out, n_inputs=d_in))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(band * source, d_in, frame)`` to ``(band * source, d_out, frame)``."""
        return torch.baddbmm(self.bias.flatten(0, 1)[..., None], self.weight.flatten(0, 1), features)


def group_equal_widths(widths: list[int]) -> list[tuple[int, int]]:
    """Return the groups of neighbouring bands of equal width, as pairs of number and width."""
    return [(len(list(equal)), width) for width, equal in groupby(widths)]


def init_uniform(*shape: int, n_inputs: int) -> Tensor:
    """Draw initial weights as `nn.Linear` does."""
    bound = n_inputs**-0.5
    return torch.empty(shape).uniform_(-bound, bound)


class BSRoFormer(nn.Module):
    """BS-RoFormer: complex masks for the spectrum of the mixture, by transformers along time and across bands.

    The defaults are the published sizes with 6 blocks, 72.2 million parameters: one source from stereo at 44.1 kHz.
    ``bands="mel"`` is the Mel-band RoFormer.

    Args:
        n_sources: Number of sources to return.
        n_channels: Number of channels that are separated together. With 1, each channel is separated independently, and
            a mixture may have any number of channels.
        sample_rate: Sample rate in Hz, which determines the bands.
        n_fft: Samples in a frame, even.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        bands: `uniform`, the bands of the BS-RoFormer paper, which touch; `mel`, which overlap; or the width of each
            band in bins, adding up to all ``n_fft / 2 + 1``.
        n_bands: Number of mel bands.
        d_model: Features of a band in a frame.
        n_blocks: Number of blocks, each a transformer along time and one across bands.
        n_time_layers: Layers in each transformer along time.
        n_band_layers: Layers in each transformer across bands.
        n_heads: Attention heads.
        d_head: Channels of a head, even.
        expansion: Width of the feed-forward networks, as a multiple of `d_model`.
        n_mask_layers: Linear layers of the networks that compute the masks.
        mask_expansion: Width of the hidden layers that compute the masks, as a multiple of `d_model`.
        norm: Where features are normalised outside of the layers: `last`, once before the masks, or `paths`, after
            every transformer instead, as in the published weights for mel bands.
        zero_dc: Whether to set the bin of frequency 0 to zero in all sources.
        dropout: Dropout probability in training. N processes then draw other random numbers than one process.
        checkpoint: Recompute each block in the backward pass instead of storing its activations: less memory, and a
            third more time.

    Raises:
        ValueError: If sizes do not fit each other.

    Reference:
        Lu et al., "Music source separation with band-split RoPE transformer", ICASSP 2024, arXiv:2309.02612; Wang et
        al., "Mel-band RoFormer for music source separation", ISMIR 2023 late-breaking, arXiv:2310.01809.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources by the same factor."""
    compile_seconds = 60.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.4, "bf16": 1.5}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

    bins: Tensor
    window: Tensor
    n_overlapping: Tensor

    def __init__(
        self,
        *,
        n_sources: int = 1,
        n_channels: int = 2,
        sample_rate: int = 44_100,
        n_fft: int = 2048,
        hop_length: int = 441,
        bands: Literal["uniform", "mel"] | Sequence[int] = "uniform",
        n_bands: int = 60,
        d_model: int = 384,
        n_blocks: int = 6,
        n_time_layers: int = 1,
        n_band_layers: int = 1,
        n_heads: int = 8,
        d_head: int = 48,
        expansion: int = 4,
        n_mask_layers: int = 2,
        mask_expansion: int = 4,
        norm: Literal["last", "paths"] = "last",
        zero_dc: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if n_fft % 2 or d_head % 2 or not 1 <= hop_length <= n_fft // 2:
            raise ValueError(
                f"n_fft {n_fft} and d_head {d_head} must be even, and hop_length {hop_length} must be from 1 to half "
                "of n_fft."
            )
        if norm not in ("last", "paths"):
            raise ValueError(f"norm {norm!r} is not one of last, paths.")
        if n_mask_layers < 1:
            raise ValueError(f"n_mask_layers {n_mask_layers} must be at least 1.")
        self.n_sources = n_sources
        self.n_channels = n_channels
        self.d_head = d_head
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.zero_dc = zero_dc
        self.dropout = dropout
        self.checkpoint = checkpoint

        # The bins of all bands in order; a bin is repeated where bands overlap.
        ranges = make_bands(bands, n_bands, n_fft, sample_rate)
        bins = [index for band in ranges for index in band]
        self.bands_overlap = len(bins) > n_fft // 2 + 1
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("bins", torch.tensor(bins), persistent=False)
        self.register_buffer("n_overlapping", torch.tensor(np.bincount(bins).tolist()), persistent=False)

        widths = [2 * n_channels * len(band) for band in ranges]  # 2 for real and imaginary part
        self.split = BandSplit(widths=widths, d_model=d_model)
        sizes = {"d_model": d_model, "n_heads": n_heads, "d_head": d_head, "d_hidden": expansion * d_model}
        self.blocks = nn.ModuleList(
            Block(
                along_time=[RoPELayer(**sizes, dropout=dropout) for _ in range(n_time_layers)],
                across_bands=[RoPELayer(**sizes, dropout=dropout) for _ in range(n_band_layers)],
                norms=[nn.RMSNorm(d_model, eps=1e-12) if norm == "paths" else nn.Identity() for _ in range(2)],
            )
            for _ in range(n_blocks)
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-12) if norm == "last" else nn.Identity()
        self.estimate = BandMasks(
            widths=widths,
            n_sources=n_sources,
            d_model=d_model,
            d_hidden=mask_expansion * d_model,
            n_layers=n_mask_layers,
        )

    def compile_regions(self) -> None:
        """Compile the transformer layers, which share one graph, along time and across bands, for any length."""
        for layer in self.modules():
            if isinstance(layer, RoPELayer):
                layer.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        check_mixture(mixture, self.split.weight, n_channels=self.n_channels if self.n_channels > 1 else None)
        batch, _, time = mixture.shape
        # g is the group of channels that are separated together
        grouped = rearrange(mixture, "b (g c) t -> (b g) c t", c=self.n_channels)
        spectrum = rearrange(
            stft(grouped, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window), "b c f l -> b l f c"
        )
        masked = self.masks(spectrum) * spectrum[:, None]
        if self.zero_dc:
            masked = F.pad(masked[..., 1:, :], (0, 0, 1, 0))
        waveforms = istft(
            rearrange(masked, "b s l f c -> b s c f l"),
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            window=self.window,
            time=time,
        )
        return rearrange(waveforms, "(b g) s c t -> b s (g c) t", b=batch)

    def masks(self, spectrum: Tensor) -> Tensor:
        """Compute the masks: ``(batch, frame, freq, channel)`` to ``(batch, source, frame, freq, channel)``, complex.

        They are in float32, and so is the residual stream of all layers, under autocast too.
        """
        # n is the real or imaginary part; the values of a band are its bins, then channels, then n
        values = torch.view_as_real(spectrum)
        values = values[:, :, self.bins] if self.bands_overlap else values
        features = self.split(rearrange(values, "b l f c n -> b l (f c n)"))
        device = spectrum.device
        time_angles = rotary_angles(features.shape[2], self.d_head, device)
        band_angles = rotary_angles(features.shape[0], self.d_head, device)
        for block in self.blocks:
            features = run_layer(
                block, features, time_angles, band_angles, recompute=self.checkpoint, uses_rng=self.dropout > 0
            )
        masks = rearrange(self.estimate(self.norm(features)), "b s l (f c n) -> b s l f c n", c=self.n_channels, n=2)
        return torch.view_as_complex(self.average_overlaps(masks) if self.bands_overlap else masks)

    def average_overlaps(self, masks: Tensor) -> Tensor:
        """Average the masks of all bands that a bin belongs to, along axis 3."""
        total = masks.new_zeros(*masks.shape[:3], len(self.n_overlapping), *masks.shape[4:])
        return total.index_add(3, self.bins, masks) / self.n_overlapping[:, None, None]
