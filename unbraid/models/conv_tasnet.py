"""Conv-TasNet: masks for a learned transform, computed by a stack of dilated convolutions."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.models.depthwise_conv import depthwise_weights, shifted_products
from unbraid.models.layers import MASKS, NORMS, LearnedDecoder, LearnedEncoder, fourier_filters, separate_by_masking


class ConvBlock(nn.Module):
    """One dilated depthwise-separable convolution with a residual and a skip output.

    The depthwise convolution is a sum of shifted products, which a compiler fuses with the norms around it. The last
    two 1x1 convolutions, for the residual and the skip output, are one product.
    """

    def __init__(self, *, bottleneck: int, hidden: int, skip: int, kernel_size: int, dilation: int, norm: str) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.dilation = dilation
        self.inner = nn.Linear(bottleneck, hidden)
        self.inner_slope = nn.Parameter(torch.tensor(0.25))  # the initial slope of nn.PReLU
        self.outer_slope = nn.Parameter(torch.tensor(0.25))
        self.inner_norm = NORMS[norm](hidden)
        self.outer_norm = NORMS[norm](hidden)
        self.taps, self.taps_bias = depthwise_weights(hidden, kernel_size)
        self.outer = nn.Linear(hidden, bottleneck + skip)

    def forward(self, features: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
        """Return the new features, ``(batch, frame, channel)``, and the skip output, ``(batch, frame, skip)``.

        The dilation is an argument so that one compiled graph serves all blocks.
        """
        hidden = self.inner_norm(prelu(self.inner(features), self.inner_slope))
        hidden = self.outer_norm(prelu(self.depthwise(hidden, dilation), self.outer_slope))
        residual, skip = self.outer(hidden).tensor_split((self.bottleneck,), -1)
        return features + residual, skip

    def depthwise(self, hidden: Tensor, dilation: int) -> Tensor:
        """Compute the dilated depthwise convolution of ``(batch, frame, channel)``, as long as its input."""
        # Rows are padded alike on both sides, which is as long as the input only for an odd number of taps.
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and len(self.taps) % 2:
            return self.depthwise_in_rows(hidden, dilation)
        n_frames = hidden.shape[1]
        reach = dilation * (len(self.taps) - 1)
        padded = F.pad(hidden, (0, 0, reach // 2, reach - reach // 2))
        return shifted_products(padded, self.taps, self.taps_bias, n_frames=n_frames, dilation=dilation)

    def depthwise_in_rows(self, hidden: Tensor, dilation: int) -> Tensor:
        """Compute the same from frames laid out in rows as long as the dilation.

        Along a column the frames are one dilation apart, so the convolution down the columns has no dilation. The CPU's
        kernel for channels-last features is fast only without one.
        """
        n_frames = hidden.shape[1]
        whole_rows = F.pad(hidden, (0, 0, 0, -n_frames % dilation)) if n_frames % dilation else hidden
        grid = rearrange(whole_rows, "b (row column) c -> b c row column", column=dilation)
        kernel = rearrange(self.taps, "k c -> c 1 k 1").to(hidden.dtype)
        output = F.conv2d(
            grid, kernel, self.taps_bias.to(hidden.dtype), padding=(len(self.taps) // 2, 0), groups=hidden.shape[2]
        )
        return rearrange(output, "b c row column -> b (row column) c")[:, :n_frames]


def prelu(features: Tensor, slope: Tensor) -> Tensor:
    """Compute a ReLU with a learned slope below zero.

    On the CPU torch's own PReLU is fast, but the compiler does not fuse it.
    """
    if not torch.compiler.is_compiling():
        return F.prelu(features, slope.reshape(1).to(features.dtype))
    return torch.where(features > 0, features, slope.to(features.dtype) * features)


class ConvTasNet(nn.Module):
    """Conv-TasNet: one mask per source for a learned transform, computed by a stack of dilated convolutions.

    The defaults are the published sizes, 5.1 million parameters. `kernel_size=32` halves the frames and the cost.

    Args:
        n_sources: Number of sources to return.
        n_filters: Channels of the learned transform.
        kernel_size: Filter length in samples.
        stride: Hop in samples, a divisor of `kernel_size`; by default half of it.
        bottleneck: Channels between the blocks.
        hidden: Channels inside a block.
        skip: Channels of the skip connections from every block to the masks; with 0 the masks come from the last block
            alone.
        block_kernel: Taps of the depthwise convolutions.
        n_blocks: Blocks in a repeat, dilated by 1, 2, 4 and so on.
        n_repeats: Repeats of the whole series of dilations.
        norm: `gln` over frames and channels, or `cln` over channels.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        rectify: Whether a ReLU follows the learned transform; most weights from Asteroid have none.
        filters: Initialisation of the transform: `random` as published, or `fourier`, which suits long filters and
            short trainings.

    Raises:
        ValueError: If a choice is unknown, or `kernel_size` is not a multiple of `stride`.

    Reference:
        Luo and Mesgarani, "Conv-TasNet", TASLP 2019, arXiv:1809.07454.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources, except for input so quiet that the norms' published ``eps`` matters."""
    compile_seconds = 40.0
    """Time that compiling takes at the first step, roughly; used by ``compile = "auto"``."""
    compile_gain: ClassVar[dict[str, float]] = {"fp32": 1.34, "bf16": 1.83}
    """Speed-up of the later steps; used by ``compile = "auto"``."""

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
        for choice, allowed in ((norm, NORMS), (mask, MASKS), (filters, ("random", "fourier"))):
            if choice not in allowed:
                raise ValueError(f"{choice!r} is not one of {', '.join(allowed)}.")
        stride = stride or max(1, kernel_size // 2)
        self.n_sources = n_sources
        self.mask = mask
        self.rectify = rectify
        self.encoder = LearnedEncoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        self.decoder = LearnedDecoder(n_filters=n_filters, kernel_size=kernel_size, stride=stride)
        if filters == "fourier":
            with torch.no_grad():
                self.encoder.filters.weight.copy_(fourier_filters(n_filters, kernel_size))
                # The transpose of the analysis filters resynthesises what they analysed.
                self.decoder.filters.weight.copy_(self.encoder.filters.weight.T)
        self.norm = NORMS[norm](n_filters)
        self.narrow = nn.Linear(n_filters, bottleneck)
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
        """Compile the block, with dynamic batch, frames and dilation: one graph for all blocks and lengths."""
        for block in self.blocks:
            block.compile(dynamic=True)

    def masks(self, encoded: Tensor) -> Tensor:
        """Compute the masks: ``(batch, frame, filter)`` to ``(batch, frame, source, filter)``."""
        features = self.narrow(self.norm(encoded))
        total = torch.zeros_like(features[..., :0])  # stays empty without skip connections
        for i, block in enumerate(self.blocks):
            features, skip = block(features, block.dilation)
            total = skip if i == 0 else total + skip
        masks = self.widen(prelu(total if total.shape[-1] else features, self.slope))
        return MASKS[self.mask](rearrange(masks, "bc l (s f) -> bc l s f", s=self.n_sources))
