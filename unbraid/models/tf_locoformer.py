"""TF-Locoformer: spectra of the sources, from transformers with convolutions along frequency and along time."""

from contextlib import nullcontext

import torch
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import istft, stft
from unbraid.models.attention import apply_rotary, attend, rotary_angles
from unbraid.models.layers import GlobalLayerNorm, check_mixture, run_layer, without_fp16

EPS = 1e-5
"""What is added to the standard deviations in all norms, as published."""


class RMSGroupNorm(nn.Module):
    """Divide each group of channels by its root mean square, at every frame for itself; then scale each channel.

    Always in float32, and 1.7x as fast as by squares and a mean. At 0 the gradient of the norm is 0.
    """

    def __init__(self, n_channels: int, *, n_groups: int) -> None:
        super().__init__()
        self.groups = (n_groups, n_channels // n_groups)
        self.weight = nn.Parameter(torch.ones(n_channels))

    def forward(self, features: Tensor) -> Tensor:
        """``(..., channel)`` in and out."""
        groups = features.float().unflatten(-1, self.groups)  # a size of -1 is more than the compiler can take
        rms = torch.linalg.vector_norm(groups, dim=-1, keepdim=True) * self.groups[1] ** -0.5
        return (groups * (rms + EPS).reciprocal()).flatten(-2) * self.weight


class ConvSwiGLU(nn.Module):
    """Add a gated network of two convolutions: each frame sees ``kernel_size - 1`` others on either side.

    The first convolution sees the sequence with zeros around it and the second one takes them off again, which is what
    the published code does with a transposed convolution. Both are two-dimensional in name only: with channels last
    torch then copies nothing, and is 1.3x (bfloat16: 1.6x) as fast as in one dimension.
    """

    def __init__(self, *, d_model: int, d_hidden: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.norm = RMSGroupNorm(d_model, n_groups=n_groups)
        self.widen = nn.Conv2d(d_model, 2 * d_hidden, (1, kernel_size), padding=(0, kernel_size - 1))
        self.narrow = nn.Conv2d(d_hidden, d_model, (1, kernel_size))

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out.

        Not in fp16 on the CPU, where the backward pass of a convolution takes torch 200 times as long.
        """
        images = self.norm(features)[:, None].permute(0, 3, 1, 2)
        with without_fp16(features.device) if features.device.type == "cpu" else nullcontext():
            hidden, gate = self.widen(images).chunk(2, 1)
            added = self.narrow(hidden * nn.functional.silu(gate))
        return features + added.permute(0, 2, 3, 1)[:, 0]


class RotaryAttention(nn.Module):
    """Add multi-head self-attention with rotary positions."""

    def __init__(self, *, d_model: int, d_attention: int, n_heads: int, n_groups: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = RMSGroupNorm(d_model, n_groups=n_groups)
        self.query_key_value = nn.Linear(d_model, 3 * d_attention, bias=False)
        self.merge = nn.Linear(d_attention, d_model, bias=False)

    def forward(self, features: Tensor, angles: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        projected = self.query_key_value(self.norm(features))
        parts = rearrange(projected, "b l (n h c) -> n b h l c", n=3, h=self.n_heads)
        query, key = apply_rotary(parts[:2], angles)
        heads = attend(query, key, parts[2])
        return features + self.merge(rearrange(heads, "b h l c -> b l (h c)"))


class LocoformerLayer(nn.Module):
    """Convolutions, attention, convolutions; what they add to stays in float32 under autocast too.

    The published code does not halve what the convolutions add, though the paper does.
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
        """``(batch, frame, channel)`` in and out."""
        return self.last(self.attention(self.first(features), angles))


class TFLocoformer(nn.Module):
    """Map the spectrum of the mixture to one of each source, along frequency and along time in turns.

    The defaults are the small size. The published ones, trained with ``n_fft=128, hop_length=64`` at 8 kHz, 256 and 64
    where there is reverberation, 256 and 128 at 16 kHz:

    ====== ======== ======= ======== =========== ============
    size   n_layers d_model d_hidden kernel_size parameters
    ====== ======== ======= ======== =========== ============
    small         4      96      128           8  5.1 million
    medium        6     128      384           4 15.0 million
    large         9     128      384           4 22.5 million
    ====== ======== ======= ======== =========== ============

    The paper counts 5.0 million for the small one, which is what ``d_attention=96`` has; the weights that were
    published have 128. Each channel is separated for itself.

    Args:
        n_sources: How many sources to return.
        n_fft: Samples in a frame, even.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        n_layers: Pairs of a layer along frequency and one along time.
        d_model: Channels of every bin.
        d_hidden: Width of the feed-forward networks.
        kernel_size: Bins or frames that their convolutions span.
        d_attention: Channels of queries, keys and values together.
        n_heads: Attention heads.
        n_groups: Groups of channels in a norm.
        checkpoint: Compute each layer a second time in the backward pass instead of keeping what it computed: memory
            then grows little with `n_layers`, and a step costs about 1.3x.

    Raises:
        ValueError: If sizes do not divide.

    Reference:
        Saijo et al., "TF-Locoformer: transformer with local modeling by convolution for speech separation and
        enhancement", IWAENC 2024, arXiv:2408.03440.
    """

    scale_equivariant = True
    """Twice the input, twice the output."""
    compile_seconds, compile_gain = 90.0, {"fp32": 1.3, "bf16": 1.5}
    """About what compiling takes at the first step and brings at the others: what ``compile = "auto"`` goes by."""

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
            raise ValueError(f"n_fft {n_fft} must be even, and hop_length {hop_length} from 1 to half of it.")
        if d_attention % (2 * n_heads) or d_model % n_groups:
            raise ValueError(
                f"d_attention {d_attention} must be a multiple of twice n_heads {n_heads}, and d_model {d_model} of "
                f"n_groups {n_groups}."
            )
        self.n_sources, self.n_fft, self.hop_length = n_sources, n_fft, hop_length
        self.d_head, self.checkpoint = d_attention // n_heads, checkpoint
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.enter, self.norm = nn.Conv2d(2, d_model, 3, padding=1), GlobalLayerNorm(d_model, eps=EPS)
        sizes = {"d_model": d_model, "d_hidden": d_hidden, "kernel_size": kernel_size}
        sizes |= {"d_attention": d_attention, "n_heads": n_heads, "n_groups": n_groups}
        self.along_freq = nn.ModuleList(LocoformerLayer(**sizes) for _ in range(n_layers))
        self.along_time = nn.ModuleList(LocoformerLayer(**sizes) for _ in range(n_layers))
        self.leave = nn.Conv2d(d_model, 2 * n_sources, 3, padding=1)
        for name, weight in self.named_parameters():  # as the published recipes do
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def compile_regions(self) -> None:
        """Compile convolutions and attention, each for all layers and lengths; in one region the compiler fails."""
        for layer in (*self.along_freq, *self.along_time):
            for part in (layer.first, layer.attention, layer.last):
                part.compile(dynamic=True)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``.

        The spectrum reaches to the next whole hop. Else the last frame alone would hold the last samples, where its
        window is next to 0, and dividing by it would amplify whatever the network puts there.
        """
        check_mixture(mixture, self.enter.weight)
        batch, _, time = mixture.shape
        waveform = rearrange(mixture.float(), "b c t -> (b c) t")
        level = std_over_time(waveform)
        scaled = nn.functional.pad(waveform / level.clamp_min(1e-12), (0, -time % self.hop_length))
        spectra = self.spectra(stft(scaled, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window))
        waveforms = istft(
            spectra, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window, time=scaled.shape[-1]
        )
        return rearrange(waveforms[..., :time] * level[:, None], "(b c) s t -> b s c t", b=batch)

    def spectra(self, mixture: Tensor) -> Tensor:
        """Spectrum of the mixture, complex ``(batch, freq, frame)``, to ``(batch, source, freq, frame)``."""
        with torch.autocast(mixture.device.type, enabled=False):
            entered = self.enter(rearrange(torch.view_as_real(mixture), "b f l p -> b p l f"))
            features = self.norm(rearrange(entered, "b c l f -> b (l f) c"))
        features = self.layers(rearrange(features, "b (l f) c -> b l f c", f=mixture.shape[1]))
        with torch.autocast(mixture.device.type, enabled=False):
            left = self.leave(rearrange(features, "b l f c -> b c l f"))
        return torch.view_as_complex(rearrange(left, "b (s p) l f -> b s f l p", p=2).contiguous())

    def layers(self, features: Tensor) -> Tensor:
        """``(batch, frame, freq, channel)`` in and out."""
        batch, n_frames, n_freqs, _ = features.shape
        places = rotary_angles(n_freqs, self.d_head, features.device)
        moments = rotary_angles(n_frames, self.d_head, features.device)
        for along_freq, along_time in zip(self.along_freq, self.along_time, strict=True):
            features = rearrange(features, "b l f c -> (b l) f c")
            features = run_layer(along_freq, features, places, recompute=self.checkpoint)
            features = rearrange(features, "(b l) f c -> (b f) l c", b=batch)
            features = run_layer(along_time, features, moments, recompute=self.checkpoint)
            features = rearrange(features, "(b f) l c -> b l f c", b=batch)
        return features


def std_over_time(waveform: Tensor) -> Tensor:
    """Standard deviation over time, ``(batch, time)`` to ``(batch, 1)``; in silence exactly 0, with a gradient of 0."""
    centred = waveform - waveform.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * max(1, waveform.shape[-1] - 1) ** -0.5
