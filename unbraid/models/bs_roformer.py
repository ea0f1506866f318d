"""BS-RoFormer: complex masks on a spectrum cut into bands, from transformers along time and across bands."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal

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
    """Bands that touch: those of the paper, at the same frequencies in Hz whatever the size and the rate.

    Where the bins are too wide for it, edges that fall together are one.
    """
    edges_hz = np.cumsum(PUBLISHED_WIDTHS[:-1]) * (44_100 / 2048)
    n_bins = n_fft // 2 + 1
    edges = np.round(edges_hz * n_fft / sample_rate).astype(int)
    return [range(*pair) for pair in pairwise(sorted({0, *edges[edges < n_bins].tolist(), n_bins}))]


def mel_bands(n_bands: int, n_fft: int, sample_rate: int) -> list[range]:
    """Bands that overlap by half: the bins under each triangle of Slaney's mel filter bank, as librosa has it.

    Bin 0 is given to the first band and the last bin to the last, as in the published implementations.

    Raises:
        ValueError: If a band would be narrower than a bin.
    """
    last_mel = 15 + 27 * np.log(sample_rate / 2000) / np.log(6.4) if sample_rate > 2000 else 3 * sample_rate / 400
    mels = np.linspace(0, last_mel, n_bands + 2)
    edges_hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    edges = edges_hz * n_fft / sample_rate
    first, end = np.floor(edges[:-2]).astype(int) + 1, np.ceil(edges[2:]).astype(int)
    first[0], end[-1] = 0, n_fft // 2 + 1
    if (first >= end).any():
        raise ValueError(
            f"{n_bands} mel bands are too many for n_fft {n_fft} at {sample_rate} Hz: band "
            f"{int((first >= end).argmax())} has no bin; take fewer n_bands or a larger n_fft."
        )
    return [range(*pair) for pair in zip(first.tolist(), end.tolist(), strict=True)]


def make_bands(bands: str | Sequence[int], n_bands: int, n_fft: int, sample_rate: int) -> list[range]:
    """The bins of each band: by name, or by widths that add up to all bins."""
    if bands == "uniform":
        return uniform_bands(n_fft, sample_rate)
    if bands == "mel":
        return mel_bands(n_bands, n_fft, sample_rate)
    if isinstance(bands, str):
        raise ValueError(f"bands {bands!r} is not one of uniform, mel; widths in bins may be given as a list.")
    if sum(bands) != n_fft // 2 + 1 or min(bands, default=0) < 1:
        raise ValueError(
            f"The widths of bands must be positive and add up to the {n_fft // 2 + 1} bins of n_fft {n_fft}, "
            f"not to {sum(bands)}."
        )
    return [range(*pair) for pair in pairwise(np.cumsum([0, *bands]).tolist())]


class RoPELayer(nn.Module):
    """Gated attention with rotary positions, then a feed-forward network; both added to what came in."""

    def __init__(self, *, d_model: int, n_heads: int, d_head: int, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.attention_norm, self.hidden_norm = nn.RMSNorm(d_model, eps=1e-12), nn.RMSNorm(d_model, eps=1e-12)
        self.query_key_value = nn.Linear(d_model, 3 * n_heads * d_head, bias=False)
        self.gates, self.merge = nn.Linear(d_model, n_heads), nn.Linear(n_heads * d_head, d_model, bias=False)
        self.widen, self.narrow = nn.Linear(d_model, d_hidden), nn.Linear(d_hidden, d_model)

    def forward(self, features: Tensor, angles: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        features = features + self.drop(self.attend(self.attention_norm(features), angles))
        hidden = F.gelu(self.widen(self.hidden_norm(features)))
        return features + self.drop(self.narrow(self.drop(hidden)))

    def attend(self, features: Tensor, angles: Tensor) -> Tensor:
        """Multi-head self-attention; every head can be faded out at every frame."""
        projected = rearrange(self.query_key_value(features), "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        turning, value = projected.split((2, 1))
        query, key = apply_rotary(turning, angles)
        heads = attend(query, key, value[0], dropout=self.dropout if self.training else 0.0)
        gated = heads * rearrange(self.gates(features), "b l h -> b h l 1").sigmoid()
        return self.merge(rearrange(gated, "b h l c -> b l (h c)"))

    def drop(self, features: Tensor) -> Tensor:
        """Dropout, in training only."""
        return F.dropout(features, self.dropout, self.training) if self.dropout else features


class Block(nn.Module):
    """Transformers along time, each band for itself, and across bands, each frame for itself."""

    def __init__(self, *, along_time: list[RoPELayer], across_bands: list[RoPELayer], norms: list[nn.Module]) -> None:
        super().__init__()
        self.along_time, self.across_bands = nn.ModuleList(along_time), nn.ModuleList(across_bands)
        self.norms = nn.ModuleList(norms)

    def forward(self, features: Tensor, time_angles: Tensor, band_angles: Tensor) -> Tensor:
        """``(band, batch, frame, channel)`` in and out; each path is one copy."""
        batch = features.shape[1]
        hidden = rearrange(features, "k b l d -> (k b) l d")
        for layer in self.along_time:
            hidden = layer(hidden, time_angles)
        hidden = rearrange(self.norms[0](hidden), "(k b) l d -> (b l) k d", b=batch)
        for layer in self.across_bands:
            hidden = layer(hidden, band_angles)
        return rearrange(self.norms[1](hidden), "(b l) k d -> k b l d", b=batch)


class BandSplit(nn.Module):
    """The numbers of each band, freed of their level, to features: a linear layer of its own for each band.

    Neighbouring bands of equal width are one batched product. The rows of ``weight`` are the numbers, band
    after band.

    Args:
        widths: Numbers in each band.
        d_model: Features of a band.
    """

    def __init__(self, *, widths: list[int], d_model: int) -> None:
        super().__init__()
        self.width_groups = group_equal_widths(widths)
        self.scale = nn.Parameter(torch.ones(sum(widths)))
        self.weight = nn.Parameter(torch.cat([uniform(width, d_model, n_inputs=width) for width in widths]))
        self.bias = nn.Parameter(torch.cat([uniform(1, d_model, n_inputs=width) for width in widths]))

    def forward(self, numbers: Tensor) -> Tensor:
        """``(batch, frame, number)`` to ``(band, batch, frame, channel)``."""
        sizes, counts = (
            [n_bands * width for n_bands, width in self.width_groups],
            [n_bands for n_bands, _ in self.width_groups],
        )
        parts = (numbers.split(sizes, -1), self.scale.split(sizes), self.weight.split(sizes), self.bias.split(counts))
        features = []
        for (_, width), split, scale, weight, bias in zip(self.width_groups, *parts, strict=True):
            bands = rearrange(split, "b l (k n) -> (b l) k n", n=width)
            power = bands.square().sum(-1, keepdim=True).clamp_min(1e-24)  # silence stays zero, its gradient finite
            scaled = bands * (power.rsqrt() * width**0.5) * scale.view(-1, width)
            inputs = rearrange(scaled, "l k n -> k l n")
            features.append(torch.baddbmm(bias[:, None], inputs, weight.view(-1, width, weight.shape[-1])))
        return torch.cat(features).unflatten(1, numbers.shape[:2]).to(numbers.dtype)


class BandMasks(nn.Module):
    """Features to masks: a small network with gated linear units at its end for each band and source.

    The rows of the last ``weight`` are, band after band and in it source after source, as many values and then gates as
    the band has numbers.

    Args:
        widths: Numbers in each band, and in each mask of it.
        n_sources: Masks of each band.
        d_model: Features of a band.
        d_hidden: Width of the hidden layers.
        n_layers: Linear layers, the last one included.
    """

    def __init__(self, *, widths: list[int], n_sources: int, d_model: int, d_hidden: int, n_layers: int) -> None:
        super().__init__()
        self.width_groups, self.n_sources = group_equal_widths(widths), n_sources
        sizes = [d_model, *[d_hidden] * (n_layers - 1)]
        self.hidden = nn.ModuleList(
            BandLinear(n_bands=len(widths), n_sources=n_sources, d_in=d_in, d_out=d_out)
            for d_in, d_out in pairwise(sizes)
        )
        n_rows = 2 * n_sources * sum(widths)
        self.weight = nn.Parameter(uniform(n_rows, sizes[-1], n_inputs=sizes[-1]))
        self.bias = nn.Parameter(uniform(n_rows, n_inputs=sizes[-1]))

    def forward(self, features: Tensor) -> Tensor:
        """``(band, batch, frame, channel)`` to ``(batch, source, frame, number)``."""
        batch = features.shape[1]
        hidden = rearrange(features, "k b l d -> k 1 d (b l)").expand(-1, self.n_sources, -1, -1).flatten(0, 1)
        for layer in self.hidden:
            hidden = layer(hidden).tanh()
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
    """A linear layer for each band and source, all of one size, as one batched product.

    Frames come last: weights are then the first factor, and their gradient has their layout without a copy of it.
    """

    def __init__(self, *, n_bands: int, n_sources: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(n_bands, n_sources, d_out, d_in, n_inputs=d_in))
        self.bias = nn.Parameter(uniform(n_bands, n_sources, d_out, n_inputs=d_in))

    def forward(self, features: Tensor) -> Tensor:
        """``(band and source, channel, frame)`` in and out."""
        return torch.baddbmm(self.bias.flatten(0, 1)[..., None], self.weight.flatten(0, 1), features)


def group_equal_widths(widths: list[int]) -> list[tuple[int, int]]:
    """Neighbouring bands of equal width: how many, and the width."""
    return [(len(list(equal)), width) for width, equal in groupby(widths)]


def uniform(*shape: int, n_inputs: int) -> Tensor:
    """Initial weights as `nn.Linear` draws them."""
    bound = n_inputs**-0.5
    return torch.empty(shape).uniform_(-bound, bound)


class BSRoFormer(nn.Module):
    """Mask the spectrum of the mixture, once per source, by transformers along time and across bands.

    The defaults are the published sizes with 6 blocks, 72.2 million parameters: one source from stereo at 44.1 kHz.
    The Mel-band RoFormer is ``bands="mel"``.

    Args:
        n_sources: How many sources to return.
        n_channels: Channels that are separated together. With 1 each channel is separated as if it were alone, and a
            mixture may have any number.
        sample_rate: In Hz; what the bands are laid out for.
        n_fft: Frame of the spectrum in samples, even.
        hop_length: From frame to frame in samples; at most half of `n_fft`.
        bands: `uniform`, the bands of the BS-RoFormer paper at their frequencies, which touch; `mel`, which overlap;
            or the width of each band in bins, which must add up to all ``n_fft / 2 + 1``.
        n_bands: How many mel bands.
        d_model: Features of a band in a frame.
        n_blocks: Pairs of a transformer along time and one across bands.
        n_time_layers: Layers in each transformer along time.
        n_band_layers: Layers in each transformer across bands.
        n_heads: Attention heads.
        d_head: Channels of a head, even.
        expansion: Width of the feed-forward networks, in `d_model`.
        n_mask_layers: Linear layers of the networks that give the masks.
        mask_expansion: Width of their hidden layers, in `d_model`.
        norm: Where features are normalised outside of the layers: `last`, once before the masks, or `paths`, after
            every transformer and not again, as in the published weights for mel bands.
        zero_dc: Whether sources have no bin of frequency 0.
        dropout: In training; N processes then draw other numbers than one.
        checkpoint: Whether to compute each block again in the backward pass instead of keeping it: less memory, and a
            third more time.

    Raises:
        ValueError: If sizes do not fit each other.

    Reference:
        Lu et al., "Music source separation with band-split RoPE transformer", ICASSP 2024, arXiv:2309.02612; Wang et
        al., "Mel-band RoFormer for music source separation", ISMIR 2023 late-breaking, arXiv:2310.01809.
    """

    scale_equivariant = True
    """Twice the input, twice the output."""
    compile_seconds, compile_gain = 60.0, {"fp32": 1.4, "bf16": 1.5}
    """About what compiling takes at the first step and brings at the others: what ``compile = "auto"`` goes by."""

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
                f"n_fft {n_fft} and d_head {d_head} must be even, and hop_length {hop_length} at most half of n_fft."
            )
        if norm not in ("last", "paths"):
            raise ValueError(f"norm {norm!r} is not one of last, paths.")
        if n_mask_layers < 1:
            raise ValueError(f"n_mask_layers {n_mask_layers} must be at least 1.")
        self.n_sources, self.n_channels, self.d_head = n_sources, n_channels, d_head
        self.n_fft, self.hop_length, self.zero_dc = n_fft, hop_length, zero_dc
        self.dropout, self.checkpoint = dropout, checkpoint
        ranges = make_bands(bands, n_bands, n_fft, sample_rate)
        chosen = [index for band in ranges for index in band]
        self.overlap = len(chosen) > n_fft // 2 + 1
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("bins", torch.tensor(chosen), persistent=False)
        self.register_buffer("n_overlapping", torch.tensor(np.bincount(chosen).tolist()), persistent=False)
        widths = [2 * n_channels * len(band) for band in ranges]
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
        """Compile the transformer layer: one graph for all of them, along time and across bands, at any length."""
        for layer in self.modules():
            if isinstance(layer, RoPELayer):
                layer.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        check_mixture(mixture, self.split.weight, n_channels=self.n_channels if self.n_channels > 1 else None)
        batch, _, time = mixture.shape
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
        """``(batch, frame, freq, channel)`` to ``(batch, source, frame, freq, channel)``, both complex, in float32.

        What all layers add to stays in float32 under autocast too.
        """
        numbers = torch.view_as_real(spectrum)
        chosen = numbers[:, :, self.bins] if self.overlap else numbers
        features = self.split(rearrange(chosen, "b l f c n -> b l (f c n)"))
        device = spectrum.device
        time_angles = rotary_angles(features.shape[2], self.d_head, device)
        band_angles = rotary_angles(features.shape[0], self.d_head, device)
        for block in self.blocks:
            features = run_layer(
                block, features, time_angles, band_angles, recompute=self.checkpoint, draws=self.dropout > 0
            )
        masks = rearrange(self.estimate(self.norm(features)), "b s l (f c n) -> b s l f c n", c=self.n_channels, n=2)
        return torch.view_as_complex(self.average(masks) if self.overlap else masks)

    def average(self, masks: Tensor) -> Tensor:
        """Where bands overlap a bin has the mean of their masks."""
        total = masks.new_zeros(*masks.shape[:3], len(self.n_overlapping), *masks.shape[4:])
        return total.index_add(3, self.bins, masks) / self.n_overlapping[:, None, None]
