"""TF-Locoformer: spectra of the sources, by transformers with convolutions along frequency and along time."""

from contextlib import nullcontext
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import istft, stft
from unbraid.models.attention import apply_rotary, attend, rotary_angles
from unbraid.models.layers import GlobalLayerNorm, check_mixture, run_layer, without_fp16

EPS = 1e-5
"""The ``eps`` of all norms, added to the standard deviation, as published."""


class RMSGroupNorm(nn.Module):
    """Divide each group of channels by its root mean square, at each frame independently, then scale each channel.

    Always in float32.
    """

    def __init__(self, n_channels: int, *, n_groups: int) -> None:
        super().__init__()
        self.groups = (n_groups, n_channels // n_groups)
        self.weight = nn.Parameter(torch.ones(n_channels))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(..., channel)``."""
        groups = features.float().unflatten(-1, self.groups)  # both sizes explicit: the compiler fails on a size of -1
        # 1.7x as fast as the root of a mean of squares, and its gradient at 0 is 0.
        rms = torch.linalg.vector_norm(groups, dim=-1, keepdim=True) * self.groups[1] ** -0.5
        return (groups * (rms + EPS).reciprocal()).flatten(-2) * self.weight


class ConvSwiGLU(nn.Module):
    """A gated network of two convolutions with a residual connection.

    Each frame sees ``kernel_size - 1`` frames on either side. The first convolution adds zeros around the sequence and
    the second one removes them, which is what the published code does with a transposed convolution. Both are 2-d
    convolutions over images of height 1: with channels last, torch then copies nothing, and is 1.3x as fast as in one
    dimension (1.6x in bfloat16).
    """

    def __init__(self, *, d_model: int, d_hidden: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.norm = RMSGroupNorm(d_model, n_groups=n_groups)
        self.widen = nn.Conv2d(d_model, 2 * d_hidden, (1, kernel_size), padding=(0, kernel_size - 1))
        self.narrow = nn.Conv2d(d_hidden, d_model, (1, kernel_size))

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``."""
        # (batch, channel, 1, frame), a view in channels-last memory format
        images = self.norm(features)[:, None].permute(0, 3, 1, 2)
        # On the CPU the backward pass of a convolution takes 200 times as long in fp16.
        with without_fp16(features.device) if features.device.type == "cpu" else nullcontext():
            hidden, gate = self.widen(images).chunk(2, 1)
            output = self.narrow(hidden * nn.functional.silu(gate))
        return features + output.permute(0, 2, 3, 1)[:, 0]


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary position embeddings and a residual connection."""

    def __init__(self, *, d_model: int, d_attention: int, n_heads: int, n_groups: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = RMSGroupNorm(d_model, n_groups=n_groups)
        self.query_key_value = nn.Linear(d_model, 3 * d_attention, bias=False)
        self.merge = nn.Linear(d_attention, d_model, bias=False)

    def forward(self, features: Tensor, angles: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``, with angles from `rotary_angles`."""
        projected = self.query_key_value(self.norm(features))
        # n is query, key or value; h the head; l the frame; c the channel of a head
        projected = rearrange(projected, "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        query, key = apply_rotary(projected[:2], angles)
        heads = attend(query, key, projected[2])
        return features + self.merge(rearrange(heads, "b h l c -> b l (h c)"))


class LocoformerLayer(nn.Module):
    """Convolutions, attention, convolutions, each with a residual connection; the sum stays in float32 under autocast.

    The output of the convolutions is not halved, as in the published code; in the paper it is.
    """

    def __init__(
        self, *, d_model: int, d_hidden: int, kernel_size: int, d_attention: int, n_heads: int, n_groups: int
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "n_groups": n_groups}
        self.first = ConvSwiGLU(**sizes, d_hidden=d_hidden, kernel_size=kernel_size)
        self.attention = RotaryAttention(**sizes, d_attention=d_attention, n_heads=n_heads)
        self.last = ConvSwiGLU(**sizes, d_hidden=d_hidden, kernel_size=kernel_size)

    def forward(self, features: Tensor, angles: Tensor) -> Tensor:
        """Transform ``(batch, frame, channel)``, with angles from `rotary_angles`."""
        return self.last(self.attention(self.first(features), angles))


class TFLocoformer(nn.Module):
    """TF-Locoformer: map the spectrum of the mixture to one per source, alternately along frequency and along time.

    The defaults are the small size. The published sizes were trained with ``n_fft=128, hop_length=64`` at 8 kHz, with
    256 and 64 for reverberant speech, and with 256 and 128 at 16 kHz:

    ====== ======== ======= ======== =========== ============
    size   n_layers d_model d_hidden kernel_size parameters
    ====== ======== ======= ======== =========== ============
    small         4      96      128           8  5.1 million
    medium        6     128      384           4 15.0 million
    large         9     128      384           4 22.5 million
    ====== ======== ======= ======== =========== ============

    The paper states 5.0 million for the small size, which ``d_attention=96`` gives; the published weights have 128.
    Each channel is separated independently.

    Args:
        n_sources: Number of sources to return.
        n_fft: Samples in a frame, even.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        n_layers: Pairs of one layer along frequency and one along time.
        d_model: Features of every bin.
        d_hidden: Width of the feed-forward networks.
        kernel_size: Kernel size of the convolutions in the feed-forward networks, in bins or frames.
        d_attention: Channels of queries, keys and values together.
        n_heads: Attention heads.
        n_groups: Groups of channels in a norm.
        checkpoint: Recompute each layer in the backward pass instead of storing its activations: memory then grows
            little with `n_layers`, and a step takes about 1.3x the time.

    Raises:
        ValueError: If sizes do not fit each other.

    Reference:
        Saijo et al., "TF-Locoformer: transformer with local modeling by convolution for speech separation and
        enhancement", IWAENC 2024, arXiv:2408.03440.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources by the same factor."""
    compile_seconds = 90.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.3, "bf16": 1.5}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

    window: Tensor

    def __init__(
        self,
        *,
        n_sources: int = 2,
        n_fft: int = 128,
        hop_length: int = 64,
        n_layers: int = 4,
        d_model: int = 96,
        d_hidden: int = 128,
        kernel_size: int = 8,
        d_attention: int = 128,
        n_heads: int = 4,
        n_groups: int = 4,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if n_fft % 2 or not 0 < hop_length <= n_fft // 2:
            raise ValueError(f"n_fft {n_fft} must be even, and hop_length {hop_length} must be from 1 to half of it.")
        if d_attention % (2 * n_heads) or d_model % n_groups:
            raise ValueError(
                f"d_attention {d_attention} must be a multiple of twice n_heads {n_heads}, and d_model {d_model} must "
                f"be a multiple of n_groups {n_groups}."
            )
        self.n_sources = n_sources
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.d_head = d_attention // n_heads
        self.checkpoint = checkpoint
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.enter = nn.Conv2d(2, d_model, 3, padding=1)  # 2 for real and imaginary part
        self.norm = GlobalLayerNorm(d_model, eps=EPS)
        sizes = {"d_model": d_model, "d_hidden": d_hidden, "kernel_size": kernel_size}
        sizes |= {"d_attention": d_attention, "n_heads": n_heads, "n_groups": n_groups}
        self.along_freq = nn.ModuleList(LocoformerLayer(**sizes) for _ in range(n_layers))
        self.along_time = nn.ModuleList(LocoformerLayer(**sizes) for _ in range(n_layers))
        self.leave = nn.Conv2d(d_model, 2 * n_sources, 3, padding=1)
        # The initialisation of the published recipes.
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def compile_regions(self) -> None:
        """Compile convolutions and attention, one graph each for all layers and lengths."""
        for layer in (*self.along_freq, *self.along_time):
            # Not the layer as a whole, on which the compiler fails.
            for module in (layer.first, layer.attention, layer.last):
                module.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        check_mixture(mixture, self.enter.weight)
        batch, _, time = mixture.shape

        # 1. Normalise the level of each channel, and pad to whole hops. Otherwise only the last frame would cover the
        # last samples, with a window close to 0: dividing by the window would amplify the output of the network.
        waveform = rearrange(mixture.float(), "b c t -> (b c) t")
        level = std_over_time(waveform)
        scaled = nn.functional.pad(waveform / level.clamp_min(1e-12), (0, -time % self.hop_length))

        # 2. Map the spectrum to those of the sources, and restore the level.
        spectra = self.spectra(stft(scaled, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window))
        waveforms = istft(
            spectra, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window, time=scaled.shape[-1]
        )
        return rearrange(waveforms[..., :time] * level[:, None], "(b c) s t -> b s c t", b=batch)

    def spectra(self, mixture: Tensor) -> Tensor:
        """Map the spectrum of the mixture, complex ``(batch, freq, frame)``, to ``(batch, source, freq, frame)``.

        In the patterns ``p`` is the real or imaginary part, ``f`` the frequency and ``l`` the frame.
        """
        # The first and last convolutions stay in float32 under autocast too.
        with torch.autocast(mixture.device.type, enabled=False):
            features = self.enter(rearrange(torch.view_as_real(mixture), "b f l p -> b p l f"))
            features = self.norm(rearrange(features, "b c l f -> b (l f) c"))
        features = self.layers(rearrange(features, "b (l f) c -> b l f c", f=mixture.shape[1]))
        with torch.autocast(mixture.device.type, enabled=False):
            parts = self.leave(rearrange(features, "b l f c -> b c l f"))
        return torch.view_as_complex(rearrange(parts, "b (s p) l f -> b s f l p", p=2).contiguous())

    def layers(self, features: Tensor) -> Tensor:
        """Run all layers on ``(batch, frame, freq, channel)``."""
        batch, n_frames, n_freqs, _ = features.shape
        freq_angles = rotary_angles(n_freqs, self.d_head, features.device)
        time_angles = rotary_angles(n_frames, self.d_head, features.device)
        for along_freq, along_time in zip(self.along_freq, self.along_time, strict=True):
            # Along frequency every frame is a sequence; along time every frequency is one.
            features = rearrange(features, "b l f c -> (b l) f c")
            features = run_layer(along_freq, features, freq_angles, recompute=self.checkpoint)
            features = rearrange(features, "(b l) f c -> (b f) l c", b=batch)
            features = run_layer(along_time, features, time_angles, recompute=self.checkpoint)
            features = rearrange(features, "(b f) l c -> b l f c", b=batch)
        return features


def std_over_time(waveform: Tensor) -> Tensor:
    """Return the standard deviation of ``(batch, time)``, ``(batch, 1)``; exactly 0 for silence, with gradient 0."""
    centred = waveform - waveform.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * max(1, waveform.shape[-1] - 1) ** -0.5
