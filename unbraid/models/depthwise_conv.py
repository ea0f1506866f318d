"""Depthwise convolutions over the frames of ``(batch, frame, channel)``: each channel by its own taps, few or many."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ShortConv(nn.Module):
    """A depthwise convolution over few frames, as a sum of shifted products, which a compiler fuses with the rest.

    As long as its input, or with ``stride=2`` half as long.
    """

    def __init__(self, n_channels: int, *, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.taps, self.bias = depthwise_weights(n_channels, kernel_size)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out; the frames are a multiple of the stride."""
        n_frames, reach = features.shape[1], len(self.taps) - 1
        padded = F.pad(features, (0, 0, reach // 2, reach - reach // 2))
        return shifted_products(padded, self.taps, self.bias, n_frames=n_frames, stride=self.stride)


class LongConv(nn.Module):
    """A depthwise convolution over many frames, as long as its input, as products with banded matrices.

    Twice the arithmetic, but in matrix products: on the CPU a step with 65 taps takes less than half of a grouped
    convolution's time, and without a compiler a fifth of that of shifted products. Windows are joined from blocks, not
    unfolded: of the gradient of `unfold` the compiler for CPUs (torch 2.13) makes code that is wrong with two threads.
    """

    BLOCK = 64

    def __init__(self, n_channels: int, *, kernel_size: int) -> None:
        super().__init__()
        self.taps, self.bias = depthwise_weights(n_channels, kernel_size)

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, frame, channel)`` in and out."""
        n_frames, reach = features.shape[1], len(self.taps) - 1
        n_blocks, n_more = -(-n_frames // self.BLOCK), -(-reach // self.BLOCK)
        end = (n_blocks + n_more) * self.BLOCK - n_frames - reach // 2
        blocks = rearrange(F.pad(features, (0, 0, reach // 2, end)), "b (n t) c -> c b n t", t=self.BLOCK)
        windows = torch.cat([blocks[:, :, k : k + n_blocks] for k in range(n_more + 1)], -1)[..., : self.BLOCK + reach]
        mixed = torch.einsum("cbnt,cit->bnic", windows, banded(self.taps.T, self.BLOCK)).flatten(1, 2)
        return mixed[:, :n_frames] + self.bias.to(mixed.dtype)


def depthwise_weights(n_channels: int, kernel_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Taps, ``(kernel, channel)``, and bias, as `nn.Conv1d` begins with them."""
    bound = kernel_size**-0.5
    taps, bias = torch.empty(kernel_size, n_channels), torch.empty(n_channels)
    return nn.Parameter(taps.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


def shifted_products(
    padded: Tensor, taps: Tensor, bias: Tensor, *, n_frames: int, dilation: int = 1, stride: int = 1
) -> Tensor:
    """A depthwise convolution as it is defined, over ``(batch, frame, channel)`` with all frames that the taps reach.

    Taps and bias are taken in the dtype of what they are applied to.
    """
    taps, mixed = taps.to(padded.dtype), bias.to(padded.dtype)
    for k in range(len(taps)):
        mixed = mixed + padded[:, k * dilation : k * dilation + n_frames : stride] * taps[k]
    return mixed


def banded(taps: Tensor, n_rows: int) -> Tensor:
    """``(channel, kernel)`` to ``(channel, row, column)``: each row has the taps one column further to the right."""
    n_columns = n_rows + taps.shape[1] - 1
    rows = F.pad(taps, (0, n_rows)).repeat(1, n_rows)  # each one longer than a row of the result, which moves the next
    return rows[:, : n_rows * n_columns].unflatten(1, (n_rows, n_columns))
