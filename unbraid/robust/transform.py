"""Gradient transforms, applied before clipping by norm: value clipping and adaptive gradient clipping (AGC)."""

import math
from typing import Protocol

import torch
from torch import Tensor

from unbraid.errors import RecipeError


class GradientTransform(Protocol):
    """Changes one parameter's gradient in place; the gradient is averaged and unscaled already.

    Elements that are not finite must stay so: the norm is checked afterwards, and a step with such a norm is skipped.
    """

    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Change the gradient in place; the parameter must not change."""
        ...


class ValueClip:
    """Clamps every element to ``[-max_value, max_value]``.

    This changes the gradient's direction; `unbraid.robust.clip.FixedClip` keeps it.

    Args:
        max_value: Each element of the gradient is clipped to this magnitude; above 0.
    """

    def __init__(self, *, max_value: float = 1.0) -> None:
        if not max_value > 0 or math.isinf(max_value):
            raise RecipeError(f"[[transform]] max_value = {max_value:g} must be above 0 and finite.")
        self.max_value = max_value

    @torch.no_grad()
    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Clamp the gradient in place."""
        clamped = gradient.clamp(-self.max_value, self.max_value)
        # A clamped infinity would pass for an ordinary large gradient, and a bad step would be taken. NaN stays NaN.
        gradient.copy_(torch.where(gradient.isinf(), gradient, clamped))


class AdaptiveClip:
    """Clips each unit's gradient to a fraction of the norm of the unit's weights (AGC).

    A unit is one index of the first dimension: a filter of a convolution, an output of a linear layer. A parameter of
    one dimension or none, such as a bias, is one unit, as in the code of `timm`.

    Args:
        ratio: Largest gradient norm, as a fraction of the weights' norm.
        eps: Lower bound of the weights' norm, so that weights of zero can move.

    Reference:
        Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021,
        arXiv:2102.06171.
    """

    def __init__(self, *, ratio: float = 0.01, eps: float = 1e-3) -> None:
        for name, value in (("ratio", ratio), ("eps", eps)):
            if not value > 0 or math.isinf(value):
                raise RecipeError(f"[[transform]] {name} = {value:g} must be above 0 and finite.")
        self.ratio = ratio
        self.eps = eps

    @torch.no_grad()
    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Scale down the gradient of each unit whose gradient is too long."""
        max_norm = self.ratio * _unit_norms(parameter).clamp_min(self.eps)
        # A gradient of zero gives infinity, which the clamp turns into 1; an infinite one becomes NaN.
        gradient.mul_((max_norm / _unit_norms(gradient)).clamp_max(1))


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each unit, in float32 or wider, in a shape that broadcasts against the tensor."""
    unit_dims = tuple(range(1, tensor.dim())) or None  # None: one norm over the whole tensor
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=unit_dims, keepdim=unit_dims is not None, dtype=dtype)
