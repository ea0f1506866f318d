"""Conv-TasNet: masks on a learned transform, from a stack of dilated convolutions."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.models.depthwise_conv import depthwise_weights, shifted_products
from unbraid.models.layers import MASKS, NORMS, LearnedDecoder, LearnedEncoder, fourier_filters, separate_by_masking


class ConvBlock(nn.Module):
    """One dilated depthwise-separable convolution: what to add to the features, and what to add to the output.

    The depthwise convolution is a sum of shifted products, which a compiler fuses with the norms around it; the last
    two 1x1 convolutions are one product.
    """

    def __init__(self, *, bottleneck: int, hidden: int, skip: int, kernel_size: int, dilation: int, norm: str) -> None:
        super().__init__()
        self.bottleneck, self.dilation = bottleneck, dilation
        self.inner = nn.Linear(bottleneck, hidden)
        self.inner_slope, self.outer_slope = nn.Parameter(torch.tensor(0.25)), nn.Parameter(torch.tensor(0.25))
        self.inner_norm, self.outer_norm = NORMS[norm](hidden), NORMS[norm](hidden)
        self.taps, self.taps_bias = depthwise_weights(hidden, kernel_size)
        self.outer = nn.Linear(hidden, bottleneck + skip)

    def forward(self, features: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
        """``(batch, frame, channel)`` to the same and ``(batch, frame, skip)``.

        The dilation is an argument so that one compiled graph serves all blocks.
        """
        hidden = self.inner_norm(prelu(self.inner(features), self.inner_slope))
        hidden = self.outer_norm(prelu(self.depthwise(hidden, dilation), self.outer_slope))
        residual, skip = self.outer(hidden).tensor_split((self.bottleneck,), -1)
        return features + residual, skip

    def depthwise(self, hidden: Tensor, dilation: int) -> Tensor:
        """The dilated depthwise convolution, as long as its input."""
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and len(self.taps) % 2:
            return self.depthwise_by_rows(hidden, dilation)
        n_frames, reach = hidden.shape[1], dilation * (len(self.taps) - 1)
        padded = F.pad(hidden, (0, 0, reach // 2, reach - reach // 2))
        return shifted_products(padded, self.taps, self.taps_bias, n_frames=n_frames, dilation=dilation)

    def depthwise_by_rows(self, hidden: Tensor, dilation: int) -> Tensor:
        """The same, with the frames written in rows of the dilation's length: a convolution down the columns.

        That one has no dilation, which the CPU's kernel for channels that come last is fast without alone.
        """
        n_frames = hidden.shape[1]
        whole = F.pad(hidden, (0, 0, 0, -n_frames % dilation)) if n_frames % dilation else hidden
        grid = rearrange(whole, "b (row column) c -> b c row column", column=dilation)
        kernel = rearrange(self.taps, "k c -> c 1 k 1").to(hidden.dtype)
        mixed = F.conv2d(
            grid, kernel, self.taps_bias.to(hidden.dtype), padding=(len(self.taps) // 2, 0), groups=hidden.shape[2]
        )
        return rearrange(mixed, "b c row column -> b (row column) c")[:, :n_frames]


def prelu(features: Tensor, slope: Tensor) -> Tensor:
    """A ReLU with a learned slope below zero; torch's own is fast alone, but not fused by the compiler on the CPU."""
    if not torch.compiler.is_compiling():
        return F.prelu(features, slope.reshape(1).to(features.dtype))
    return torch.where(features > 0, features, slope.to(features.dtype) * features)


class ConvTasNet(nn.Module):
    """Mask a learned transform of the mixture, once per source, by a stack of dilated convolutions.

    The defaults are the published sizes, 5.1 million parameters. `kernel_size=32` halves the frames and costs half.

    Args:
        n_sources: How many sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`; half of it if not given.
        bottleneck: Channels between the blocks.
        hidden: Channels inside a block.
        skip: Channels of the way from every block to the masks; with 0 the masks come from the last block alone.
        block_kernel: Taps of the depthwise convolutions.
        n_blocks: Blocks in a repeat, dilated by 1, 2, 4 and so on.
        n_repeats: How often the dilations start again.
        norm: `gln` over frames and channels, or `cln` over channels.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        rectify: Whether a ReLU follows the learned transform; in Asteroid's weights mostly not.
        filters: What the transform starts from: `random` as published, or `fourier`, which suits long filters and
            short trainings.

    Raises:
        ValueError: If a choice is not known.

    Reference:
        Luo and Mesgarani, "Conv-TasNet", TASLP 2019, arXiv:1809.07454.
    """

    scale_equivariant = True
    """Twice the input, twice the output, but for input so soft that the norms' published ``eps`` is felt."""
    compile_seconds, compile_gain = 40.0, {"fp32": 1.34, "bf16": 1.83}
    """About what compiling takes at the first step and brings at the others: what ``compile = "auto"`` goes by."""

    def __init__(
        self,
        *,
        n_sources: int = 2,
        n_filters: int = 512,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck: int = 128,
        hidden: int = 512,
        skip: int = 128,
        block_kernel: int = 3,
        n_blocks: int = 8,
        n_repeats: int = 3,
        norm: Literal["gln", "cln"] = "gln",
        mask: Literal["sigmoid", "relu", "softmax"] = "sigmoid",
        rectify: bool = True,
        filters: Literal["random", "fourier"] = "random",
    ) -> None:
        super().__init__()
        for given, allowed in ((norm, NORMS), (mask, MASKS), (filters, ("random", "fourier"))):
            if given not in allowed:
                raise ValueError(f"{given!r} is not one of {', '.join(allowed)}.")
        stride = stride or max(1, kernel_size // 2)
        self.n_sources, self.mask, self.rectify = n_sources, mask, rectify
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        if filters == "fourier":
            with torch.no_grad():
                self.encoder.filters.weight.copy_(fourier_filters(n_filters, kernel_size))
                self.decoder.filters.weight.copy_(self.encoder.filters.weight.T)
        self.norm, self.narrow = NORMS[norm](n_filters), nn.Linear(n_filters, bottleneck)
        self.blocks = nn.ModuleList(
            ConvBlock(
                bottleneck=bottleneck, hidden=hidden, skip=skip, kernel_size=block_kernel, dilation=2**i, norm=norm
            )
            for _ in range(n_repeats)
            for i in range(n_blocks)
        )
        self.slope = nn.Parameter(torch.tensor(0.25))
        self.widen = nn.Linear(skip or bottleneck, n_sources * n_filters)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return separate_by_masking(
            mixture, encoder=self.encoder, masks=self.masks, decoder=self.decoder, rectify=self.rectify
        )

    def compile_regions(self) -> None:
        """Compile what pays: one block, with batch, frames and dilation left open, for all blocks and lengths."""
        for block in self.blocks:
            block.compile(dynamic=True)

    def masks(self, encoded: Tensor) -> Tensor:
        """``(batch, frame, filter)`` to ``(batch, frame, source, filter)``."""
        features = self.narrow(self.norm(encoded))
        total = torch.zeros_like(features[..., :0])
        for i, block in enumerate(self.blocks):
            features, skip = block(features, block.dilation)
            total = skip if i == 0 else total + skip
        masks = self.widen(prelu(total if total.shape[-1] else features, self.slope))
        return MASKS[self.mask](rearrange(masks, "bc l (s f) -> bc l s f", s=self.n_sources))
