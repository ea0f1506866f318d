"""Depthwise convolutions over the frames of ``(batch, frame, channel)``, for short and for long kernels."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ShortConv(nn.Module):
    """A depthwise convolution over few frames, as a sum of shifted products, which a compiler can fuse.

    The output is as long as the input, or half as long with ``stride=2``.
    """

    def __init__(self, n_channels: int, *, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.taps, self.bias = depthwise_weights(n_channels, kernel_size)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve ``(batch, frame, channel)``; the number of frames is a multiple of the stride."""
        n_frames = features.shape[1]
        reach = len(self.taps) - 1  # frames that a window extends beyond one frame
        padded = F.pad(features, (0, 0, reach // 2, reach - reach // 2))
        return shifted_products(padded, self.taps, self.bias, n_frames=n_frames, stride=self.stride)


class LongConv(nn.Module):
    """A depthwise convolution over many frames, as products with banded matrices; as long as its input.

    This doubles the arithmetic, but all of it is matrix products. On the CPU a step with 65 taps takes less than half
    the time of a grouped convolution, and without a compiler a fifth of the time of shifted products.
    """

    BLOCK = 64

    def __init__(self, n_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.taps, self.bias = depthwise_weights(n_channels, kernel_size)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve ``(batch, frame, channel)``."""
        # 1. Pad to whole blocks of output frames, plus as many blocks as the kernel reaches beyond them.
        n_frames = features.shape[1]
        reach = len(self.taps) - 1
        n_blocks = -(-n_frames // self.BLOCK)
        n_extra_blocks = -(-reach // self.BLOCK)
        end = (n_blocks + n_extra_blocks) * self.BLOCK - n_frames - reach // 2
        blocks = rearrange(F.pad(features, (0, 0, reach // 2, end)), "b (n t) c -> c b n t", t=self.BLOCK)

        # 2. Join neighbouring blocks to windows of BLOCK + reach frames. Not by `unfold`: for its gradient the compiler
        # for CPUs (torch 2.13) generates code that is wrong with two threads.
        shifted = [blocks[:, :, k : k + n_blocks] for k in range(n_extra_blocks + 1)]
        windows = torch.cat(shifted, -1)[..., : self.BLOCK + reach]

        # 3. One matrix product per channel; i is the output frame in its block and t the input frame in the window.
        output = torch.einsum("cbnt,cit->bnic", windows, banded_matrices(self.taps.T, self.BLOCK)).flatten(1, 2)
        return output[:, :n_frames] + self.bias.to(output.dtype)


def depthwise_weights(n_channels: int, kernel_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return taps, ``(kernel, channel)``, and bias, ``(channel,)``, initialised as in a depthwise `nn.Conv1d`."""
    bound = kernel_size**-0.5
    taps = torch.empty(kernel_size, n_channels)
    bias = torch.empty(n_channels)
    return nn.Parameter(taps.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


def shifted_products(
    padded: Tensor, taps: Tensor, bias: Tensor, *, n_frames: int, dilation: int = 1, stride: int = 1
) -> Tensor:
    """Compute a depthwise convolution as a sum of shifted inputs, each multiplied by one tap.

    Args:
        padded: ``(batch, frame, channel)``, with all frames that the taps reach.
        taps: ``(kernel, channel)``.
        bias: ``(channel,)``.
        n_frames: Frames of the output before the stride.
        dilation: Frames from tap to tap.
        stride: Frames from output to output.

    Returns:
        ``(batch, n_frames / stride, channel)``, in the dtype of ``padded``.
    """
    # Under autocast the input is in bfloat16; float32 weights would promote every product.
    taps = taps.to(padded.dtype)
    output = bias.to(padded.dtype)
    for k in range(len(taps)):
        output = output + padded[:, k * dilation : k * dilation + n_frames : stride] * taps[k]
    return output


def banded_matrices(taps: Tensor, n_rows: int) -> Tensor:
    """Return ``(channel, row, column)`` from taps ``(channel, kernel)``: each row has the taps one column later."""
    n_columns = n_rows + taps.shape[1] - 1
    # The rows that are repeated are one number longer than those of the result, which shifts each row by one column.
    rows = F.pad(taps, (0, n_rows)).repeat(1, n_rows)
    return rows[:, : n_rows * n_columns].unflatten(1, (n_rows, n_columns))
