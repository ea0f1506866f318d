"""Layers that two or more models share.

Features are channels last, ``(batch, frame, channel)``, so that a convolution of length 1 is one matrix product and
nothing has to be transposed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from unbraid.dsp import overlap_add


class GlobalLayerNorm(nn.Module):
    """Normalise each example over all frames and channels, then scale and shift each channel.

    Mean and variance are taken in float32 whatever comes in, and the result has the input's dtype: in bfloat16 the
    variance of a long signal is wrong in its second digit, and slow.

    Reference:
        Luo and Mesgarani, "Conv-TasNet", TASLP 2019, arXiv:1809.07454.
    """

    def __init__(self, n_channels: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.fused(features)
        wide = features.float()
        mean = wide.mean((1, 2), keepdim=True)
        variance = (wide.square().mean((1, 2), keepdim=True) - mean.square()).clamp(min=0)  # var_mean compiles to 1.2x
        return ((wide - mean) * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias).to(features.dtype)

    def fused(self, features: Tensor) -> Tensor:
        """The same in fewer passes, by torch's own norm; a GPU would be slow over so many numbers at once."""
        with torch.autocast("cpu", enabled=False):
            normed = F.layer_norm(features, features.shape[1:], eps=self.eps)
            return torch.addcmul(self.bias.to(features.dtype), normed, self.weight.to(features.dtype))


def check_mixture(mixture: Tensor, weight: Tensor, *, n_channels: int | None = None) -> None:
    """Refuse what no separator can take.

    Args:
        mixture: To be ``(batch, channel, time)``, at least one sample of floating-point audio, as precise as the model.
        weight: One of the model's.
        n_channels: How many channels the model is made for; None where each is separated for itself.

    Raises:
        ValueError: In one sentence.
    """
    if mixture.dim() != 3 or mixture.numel() == 0:
        raise ValueError(
            f"A mixture must be (batch, channel, time) with at least one sample, not {tuple(mixture.shape)}."
        )
    if not mixture.is_floating_point():
        raise ValueError(
            f"A mixture must be floating-point audio in [-1, 1], not {mixture.dtype}; divide integers first."
        )
    fits = mixture.dtype == weight.dtype
    if not fits and (mixture.dtype == torch.float64 or not torch.is_autocast_enabled(mixture.device.type)):
        raise ValueError(
            f"A mixture in {mixture.dtype} cannot be separated by a model in {weight.dtype}; bring it to that by .to()."
        )
    if n_channels is not None and mixture.shape[1] != n_channels:
        raise ValueError(f"This model is made for {n_channels} channels and the mixture has {mixture.shape[1]}.")


class _ReluByOutput(torch.autograd.Function):
    """A ReLU whose gradient needs nothing but its output."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        output = features.relu()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradient * output.sign()


def relu(features: Tensor) -> Tensor:
    """`torch.relu` for layers that are compiled.

    Of torch's own, the compiler for CPUs (torch 2.13) keeps a mask for the backward, which it makes one number at a
    time. Here the gradient is multiplied by the output's sign: one that is infinite is NaN where torch's would be 0.
    """
    if not torch.compiler.is_compiling():
        return features.relu()
    return _ReluByOutput.apply(features)  # type: ignore[no-untyped-call]


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softmax": lambda masks: masks.softmax(2),
}
"""What makes masks of ``(batch, frame, source, filter)``; a softmax is over the sources."""

NORMS: dict[str, Callable[[int], nn.Module]] = {"gln": GlobalLayerNorm, "cln": partial(nn.LayerNorm, eps=1e-8)}


def n_frames(time: int, kernel_size: int, stride: int) -> int:
    """How many frames cover `time` samples, at least one."""
    return max(0, -(-(time - kernel_size) // stride)) + 1


def fourier_filters(n_filters: int, kernel_size: int) -> Tensor:
    """Windowed cosines in several phases, ``(filter, kernel)``: a start from which a short training gets further.

    Phases come in opposite pairs where there are at least two for every frequency; then a ReLU loses nothing, and the
    transposed filters give the waveform back.
    """
    n_freqs = min(kernel_size // 2, max(1, n_filters // 4))
    n_phases = -(-n_filters // n_freqs)
    n_phases += n_phases % 2
    index = torch.arange(n_filters)[:, None]
    freq = (index % n_freqs + 0.5) * (0.5 / n_freqs)
    position = torch.arange(kernel_size) + 0.5
    window = torch.sin(torch.pi * position / kernel_size)
    angle = 2 * torch.pi * (freq * (position - kernel_size / 2) + (index // n_freqs) / n_phases)
    return window * angle.cos() * (2 / kernel_size) ** 0.5


def without_fp16(device: torch.device) -> AbstractContextManager[Any]:
    """Float32 where autocast would take fp16; bfloat16 stays, its range is float32's.

    For what is as loud as the recording. At a gain of 1e-4 fp16 keeps five bits of a sample and of a masked frame, and
    the gradient of SI-SDR, which grows as the level falls, overflows. Between first norm and masks no level is left.
    """
    narrow = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if narrow else nullcontext()


def lstm_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Float32 on a CPU whose LSTM has not what autocast would take: none has fp16, and bf16 needs AVX-512.

    There oneDNN raises instead of taking a slower way.
    """
    dtype = torch.get_autocast_dtype(device.type)
    lacks = dtype == torch.float16 or (dtype == torch.bfloat16 and not _cpu_lstm_has_bf16())
    return torch.autocast(device.type, enabled=False) if device.type == "cpu" and lacks else nullcontext()


@cache
def _cpu_lstm_has_bf16() -> bool:
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class LearnedEncoder(nn.Module):
    """A waveform cut into frames and multiplied by learned filters: a strided convolution; never in fp16.

    The end is padded with zeros to a whole frame, and nothing is cut off. The start is not padded, as in the published
    implementations, whose weights therefore give the same frames.
    """

    def __init__(self, *, n_filters: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.filters = nn.Linear(kernel_size, n_filters, bias=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """``(batch, time)`` to ``(batch, frame, filter)``."""
        time = waveform.shape[-1]
        end = (n_frames(time, self.kernel_size, self.stride) - 1) * self.stride + self.kernel_size
        frames = F.pad(waveform, (0, end - time)).unfold(-1, self.kernel_size, self.stride)
        with without_fp16(waveform.device):
            return self.filters(frames)


class LearnedDecoder(nn.Module):
    """Frames back to a waveform by learned filters and overlap-add: a transposed strided convolution; never in fp16."""

    def __init__(self, *, n_filters: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        if kernel_size % stride:
            raise ValueError(f"kernel_size {kernel_size} is not a multiple of stride {stride}; half of it is usual.")
        self.stride = stride
        self.filters = nn.Linear(n_filters, kernel_size, bias=False)

    def forward(self, features: Tensor, time: int) -> Tensor:
        """``(batch, frame, filter)`` to ``(batch, time)``, in float32: bfloat16 sums would add noise of their own."""
        with without_fp16(features.device):
            filtered = self.filters(features).float()
        return overlap_add(filtered, self.stride)[:, :time]


def separate_by_masking(
    mixture: Tensor,
    *,
    encoder: LearnedEncoder,
    masks: Callable[[Tensor], Tensor],
    decoder: LearnedDecoder,
    rectify: bool = True,
) -> Tensor:
    """What all models do that mask a learned transform of the mixture, each channel for itself.

    Args:
        mixture: ``(batch, channel, time)``.
        encoder: The transform.
        masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``.
        decoder: The way back.
        rectify: Whether a ReLU follows the transform.

    Returns:
        ``(batch, source, channel, time)``.

    Raises:
        ValueError: If it is no mixture.
    """
    check_mixture(mixture, encoder.filters.weight)
    batch, _, time = mixture.shape
    encoded = encoder(rearrange(mixture, "b c t -> (b c) t"))
    encoded = encoded.relu() if rectify else encoded
    masked = masks(encoded) * encoded[:, :, None]
    waveforms = decoder(rearrange(masked, "bc l s f -> (bc s) l f"), time)
    return rearrange(waveforms, "(b c s) t -> b s c t", b=batch, s=masked.shape[2])


def run_layer(layer: nn.Module, *given: Tensor, recompute: bool, draws: bool = False) -> Tensor:
    """One layer of many; with `recompute` nothing but its input is kept, and the backward computes the rest again.

    Args:
        layer: Of tensors to a tensor.
        given: What it is called with.
        recompute: Whether to trade time for memory; without gradients it makes no difference.
        draws: Whether it draws random numbers, so that the random state, which takes time, has to be kept.
    """
    if recompute and torch.is_grad_enabled():
        return recomputed(layer, *given, use_reentrant=False, preserve_rng_state=draws)
    return layer(*given)
