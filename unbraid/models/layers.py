"""Layers that two or more models share.

Features are channels last, ``(batch, frame, channel)``, so that a convolution of length 1 is one matrix product
without a transpose.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unbraid.dsp import overlap_add


class GlobalLayerNorm(nn.Module):
    """Normalise each example over all frames and channels, then scale and shift each channel.

    Mean and variance are computed in float32, and the result has the dtype of the input: in bfloat16 the variance of a
    long signal is wrong in its second digit, and slow to compute.

    Reference:
        Luo and Mesgarani, "Conv-TasNet", TASLP 2019, arXiv:1809.07454.
    """

    def __init__(self, n_channels: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(batch, frame, channel)``."""
        if features.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.fused(features)
        features32 = features.float()
        mean = features32.mean((1, 2), keepdim=True)
        # Compiled, torch.var_mean takes 1.2x the time. The clamp undoes roundings below zero.
        variance = (features32.square().mean((1, 2), keepdim=True) - mean.square()).clamp(min=0)
        return ((features32 - mean) * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias).to(features.dtype)

    def fused(self, features: Tensor) -> Tensor:
        """Compute the same in fewer passes, by torch's own norm, which is slow on a GPU for norms this large."""
        with torch.autocast("cpu", enabled=False):
            normed = F.layer_norm(features, features.shape[1:], eps=self.eps)
            return torch.addcmul(self.bias.to(features.dtype), normed, self.weight.to(features.dtype))


def check_mixture(mixture: Tensor, weight: Tensor, *, n_channels: int | None = None) -> None:
    """Raise an error if a model cannot separate this tensor.

    Args:
        mixture: Floating-point audio of at least one sample, ``(batch, channel, time)``, in the dtype of the model.
        weight: A weight of the model.
        n_channels: Number of channels that the model separates together; None if it separates each independently.

    Raises:
        ValueError: If the shape, dtype or number of channels does not fit the model.
    """
    if mixture.dim() != 3 or mixture.numel() == 0:
        raise ValueError(
            f"The mixture must be (batch, channel, time) with at least one sample, not {tuple(mixture.shape)}."
        )
    if not mixture.is_floating_point():
        raise ValueError(
            f"The mixture must be floating-point audio in [-1, 1], not {mixture.dtype}. Scale integer samples first."
        )
    # Under autocast a float32 model takes half-precision input as well, but never float64.
    same_dtype = mixture.dtype == weight.dtype
    if not same_dtype and (mixture.dtype == torch.float64 or not torch.is_autocast_enabled(mixture.device.type)):
        raise ValueError(
            f"A mixture in {mixture.dtype} cannot be separated by a model in {weight.dtype}. Convert it with .to()."
        )
    if n_channels is not None and mixture.shape[1] != n_channels:
        raise ValueError(f"The model separates {n_channels} channels together, but the mixture has {mixture.shape[1]}.")


class _ReLUFromOutput(torch.autograd.Function):
    """A ReLU whose gradient is computed from its output alone."""

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
    """Compute `torch.relu`, for layers that are compiled.

    For torch's own ReLU the compiler for CPUs (torch 2.13) stores a mask for the backward pass, which it computes one
    number at a time. Here the gradient is multiplied by the sign of the output, so an infinite gradient of a negative
    input becomes NaN, where torch's would be 0.
    """
    if not torch.compiler.is_compiling():
        return features.relu()
    return _ReLUFromOutput.apply(features)  # type: ignore[no-untyped-call]


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softmax": lambda masks: masks.softmax(2),
}
"""Activations of masks ``(batch, frame, source, filter)``; the softmax is over the sources."""

NORMS: dict[str, Callable[[int], nn.Module]] = {"gln": GlobalLayerNorm, "cln": partial(nn.LayerNorm, eps=1e-8)}


def fourier_filters(n_filters: int, kernel_size: int) -> Tensor:
    """Return windowed cosines in several phases, ``(filter, kernel)``, an initialisation that suits short trainings.

    With at least two phases for each frequency they come in opposite pairs. A ReLU then loses no information, and the
    transposed filters reconstruct the waveform.
    """
    n_freqs = min(kernel_size // 2, max(1, n_filters // 4))
    n_phases = -(-n_filters // n_freqs)
    n_phases += n_phases % 2  # pairs of opposite phases
    # Filter i has frequency i % n_freqs, in cycles per sample, and phase i // n_freqs.
    index = torch.arange(n_filters)[:, None]
    freq = (index % n_freqs + 0.5) * (0.5 / n_freqs)
    position = torch.arange(kernel_size) + 0.5  # in samples
    window = torch.sin(torch.pi * position / kernel_size)
    angle = 2 * torch.pi * (freq * (position - kernel_size / 2) + (index // n_freqs) / n_phases)
    return window * angle.cos() * (2 / kernel_size) ** 0.5


def without_fp16(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that turns off autocast to fp16; bfloat16 stays, as it has the range of float32.

    This is for signals at the level of the recording. At a gain of 1e-4 fp16 leaves five bits of a sample and of a
    masked frame, and the gradient of SI-SDR, which grows as the level falls, overflows. Between the first norm and the
    masks, features do not depend on the level.
    """
    to_fp16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if to_fp16 else nullcontext()


def lstm_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that turns off autocast where the LSTM of the CPU does not support its dtype.

    No CPU has an LSTM in fp16, and bf16 needs AVX-512. oneDNN raises an error instead of using a slower kernel.
    """
    dtype = torch.get_autocast_dtype(device.type)
    unsupported = dtype == torch.float16 or (dtype == torch.bfloat16 and not _cpu_lstm_supports_bf16())
    return torch.autocast(device.type, enabled=False) if device.type == "cpu" and unsupported else nullcontext()


@cache
def _cpu_lstm_supports_bf16() -> bool:
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class LearnedEncoder(nn.Module):
    """A strided convolution: frames of a waveform multiplied by learned filters; never in fp16.

    The end is padded with zeros to a whole frame, so no sample is lost. The start is not padded. The published
    implementations do not pad it either, so their weights give the same frames.
    """

    def __init__(self, *, n_filters: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.filters = nn.Linear(kernel_size, n_filters, bias=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Transform ``(batch, time)`` to ``(batch, frame, filter)``, with at least one frame."""
        time = waveform.shape[-1]
        n_hops = max(0, -(-(time - self.kernel_size) // self.stride))  # ceiling division: the last frame may be padded
        end = n_hops * self.stride + self.kernel_size
        frames = F.pad(waveform, (0, end - time)).unfold(-1, self.kernel_size, self.stride)
        with without_fp16(waveform.device):
            return self.filters(frames)


class LearnedDecoder(nn.Module):
    """A transposed strided convolution: learned filters and overlap-add; never in fp16."""

    def __init__(self, *, n_filters: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        if kernel_size % stride:
            raise ValueError(f"kernel_size {kernel_size} must be a multiple of stride {stride}; half of it is usual.")
        self.stride = stride
        self.filters = nn.Linear(n_filters, kernel_size, bias=False)

    def forward(self, features: Tensor, time: int) -> Tensor:
        """Transform ``(batch, frame, filter)`` to ``(batch, time)`` in float32."""
        with without_fp16(features.device):
            filtered = self.filters(features).float()  # overlap-add in bfloat16 would add rounding noise
        return overlap_add(filtered, self.stride)[:, :time]


def separate_by_masking(
    mixture: Tensor,
    *,
    encoder: LearnedEncoder,
    masks: Callable[[Tensor], Tensor],
    decoder: LearnedDecoder,
    rectify: bool = True,
) -> Tensor:
    """Separate each channel of a mixture independently, by masks on a learned transform.

    Args:
        mixture: ``(batch, channel, time)``.
        encoder: The transform.
        masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``.
        decoder: The inverse transform.
        rectify: Whether a ReLU follows the transform.

    Returns:
        ``(batch, source, channel, time)``.

    Raises:
        ValueError: If `check_mixture` rejects the mixture.
    """
    check_mixture(mixture, encoder.filters.weight)
    batch, _, time = mixture.shape
    encoded = encoder(rearrange(mixture, "b c t -> (b c) t"))
    encoded = encoded.relu() if rectify else encoded
    # (batch * channel, frame, source, filter); bc is batch * channel below
    masked = masks(encoded) * encoded[:, :, None]
    waveforms = decoder(rearrange(masked, "bc l s f -> (bc s) l f"), time)
    return rearrange(waveforms, "(b c s) t -> b s c t", b=batch, s=masked.shape[2])


def run_layer(layer: nn.Module, *inputs: Tensor, recompute: bool, uses_rng: bool = False) -> Tensor:
    """Run one layer of many, with activation checkpointing if asked for.

    Args:
        layer: From tensors to a tensor.
        inputs: The arguments of the layer.
        recompute: Store only the inputs, and compute the rest again in the backward pass. This saves memory and costs
            time; without gradients it has no effect.
        uses_rng: Whether the layer draws random numbers. The random state then has to be saved, which takes time.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=uses_rng)
    return layer(*inputs)
