"""Muon: orthogonalised momentum for weights that are matrices, AdamW for all others, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from unbraid.robust.precision import best_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the published quintic polynomial: small singular values grow fastest, and all end near 1."""


class Muon(Optimizer):
    """Step every direction of a weight matrix equally far, however large its gradients were.

    A weight of two axes or more is a matrix once it is flattened to (first axis, all others): a linear layer, a 1x1
    convolution of shape (out, in, 1), a convolution of shape (out, in, taps). If its smaller side is at least
    ``min_side``, Muon updates it. AdamW updates biases, norms, slopes, depthwise convolutions (one side is as short as
    the kernel) and short encoder and decoder filters.

    One learning rate suits both: updates of matrices are scaled to the usual size of AdamW's, so start from AdamW's
    learning rate. Each kind has its own parameter group, matrices first. Matrices of the same shape are processed
    together, in bfloat16 if the hardware multiplies it natively, else in float32; float64 stays float64.

    On 2-D weights the updates equal those of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, in bfloat16 bit for
    bit. That optimizer refuses convolutions, which hold most weights of many separators, and leaves all other weights
    to a second optimizer.

    Args:
        parameters: Parameters of the model.
        lr: Learning rate, for matrices (Muon) and all other weights (AdamW) alike.
        momentum: Decay of the running mean of a matrix's gradients; the step uses Nesterov's look-ahead.
        betas: Decay of the running means of the gradient and of its square, for the weights that AdamW updates.
        eps: Added to the denominator, for the weights that AdamW updates.
        weight_decay: Decoupled weight decay of all weights, in units of the learning rate.
        min_side: Weights whose shorter side is below this are updated by AdamW instead of Muon.

    Reference:
        Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon; the size of a step from Liu et al.,
        "Muon is scalable for LLM training", arXiv:2502.16982.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_side: int = 32,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"lr {lr:g} and weight_decay {weight_decay:g} must be 0 or more.")
        if not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ValueError(f"momentum {momentum:g} and betas {list(betas)} must be at least 0 and below 1.")
        if min_side < 1:
            raise ValueError(f"min_side {min_side} must be 1 or more.")
        parameters = list(parameters)
        matrices = [p for p in parameters if p.dim() >= 2 and min(as_matrix(p).shape) >= min_side]
        others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient.

        Args:
            closure: Computes the loss again, as in `torch.optim.Optimizer.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights and group["matrices"]:
                self._step_matrices(weights, group)
            elif weights:
                self._step_others(weights, group)
        return loss

    def _step_matrices(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        # 1. Momentum with Nesterov's look-ahead, then decoupled weight decay, all tensors in one call.
        momenta = [self._buffer(p, "momentum_buffer") for p in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(list[Tensor](weights), 1 - group["lr"] * group["weight_decay"])

        # 2. Orthogonalise matrices of the same shape as one batch: most models repeat the same few shapes.
        by_shape = defaultdict[tuple[torch.Size, torch.device, torch.dtype], list[int]](list)
        for index, p in enumerate(weights):
            by_shape[as_matrix(p).shape, p.device, p.dtype].append(index)
        for (shape, device, dtype), indices in by_shape.items():
            stacked = torch.stack([as_matrix(nesterov[index]) for index in indices])
            updates = orthogonalise(stacked.to(_working_dtype(dtype, device))).to(dtype)
            # An orthogonal matrix has an RMS of 1 / sqrt(longer side); 0.2 is the usual RMS of an AdamW update.
            scale = 0.2 * max(shape) ** 0.5
            for index, update in zip(indices, updates, strict=True):
                weights[index].add_(update.view_as(weights[index]), alpha=-group["lr"] * scale)

    def _step_others(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        adamw(
            list[Tensor](weights),
            [p.grad for p in weights if p.grad is not None],
            [self._buffer(p, "exp_avg") for p in weights],
            [self._buffer(p, "exp_avg_sq") for p in weights],
            [],
            [self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32)) for p in weights],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _buffer(self, weight: nn.Parameter, name: str) -> Tensor:
        if name not in self.state[weight]:
            self.state[weight][name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return self.state[weight][name]


def _working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to orthogonalise in."""
    if dtype == torch.float64:  # chosen for exact results, which must not depend on the machine
        return dtype
    return torch.bfloat16 if best_precision(device) == "bf16" else torch.float32


def as_matrix(weight: Tensor) -> Tensor:
    """Return ``(out, ...)`` as ``(out, rest)``."""
    return weight.flatten(1)


def orthogonalise(matrices: Tensor, *, n_iterations: int = 5) -> Tensor:
    """Approximate the nearest matrices with orthonormal rows or columns: singular values become about 1.

    Newton-Schulz iterations need only matrix products. Singular values above 1/500 of the matrix's norm end between
    0.68 and 1.21, smaller ones grow; singular vectors stay. Zero stays zero.

    Args:
        matrices: ``(batch, row, column)``, in the dtype to work in.
        n_iterations: 5 as published.
    """
    # work on wide matrices, whose Gram matrix is the smaller one
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    a, b, c = COEFFICIENTS  # x <- a x + b (x x^T) x + c (x x^T)^2 x
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
