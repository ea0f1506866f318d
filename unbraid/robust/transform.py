"""Changes to single gradients before the limit on their norm: by value, unit-wise."""

import math
from typing import Protocol

import torch
from torch import Tensor

from unbraid.errors import RecipeError


class GradientTransform(Protocol):
    """Changes one parameter's gradient in place; it was averaged and unscaled before.

    What is not finite must not become finite: the step looks at the norm afterwards, and leaves such a step out.
    """

    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Change the gradient; the parameter is only read."""
        ...


class ValueClip:
    """Cuts every element off at a value, either side of 0. It turns the gradient; `FixedClip` keeps its direction.

    Args:
        max_value: The largest magnitude that stays, above 0.
    """

    def __init__(self, *, max_value: float = 1.0) -> None:
        if not max_value > 0 or math.isinf(max_value):
            raise RecipeError(f"[[transform]] max_value = {max_value:g} must be above 0 and finite.")
        self.max_value = max_value

    @torch.no_grad()
    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Clamp; infinity stays, so that it is not mistaken for a large number."""
        cut = gradient.clamp(-self.max_value, self.max_value)
        gradient.copy_(torch.where(gradient.isinf(), gradient, cut))


class AdaptiveClip:
    """Shortens each unit's gradient to a share of the length of its weights.

    A unit is one row over all dimensions but the first: a filter of a convolution, an output of a linear layer. A
    parameter of one dimension or none, such as a bias, is one unit, as in the code of `timm`.

    Args:
        ratio: Longest gradient, as a share of the weights' length.
        eps: Weights shorter than this count as this long, so that zeros can be left.

    Reference:
        Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021,
        arXiv:2102.06171.
    """

    def __init__(self, *, ratio: float = 0.01, eps: float = 1e-3) -> None:
        for name, value in (("ratio", ratio), ("eps", eps)):
            if not value > 0 or math.isinf(value):
                raise RecipeError(f"[[transform]] {name} = {value:g} must be above 0 and finite.")
        self.ratio, self.eps = ratio, eps

    @torch.no_grad()
    def __call__(self, parameter: Tensor, gradient: Tensor) -> None:
        """Scale each unit's gradient down where it is too long."""
        allowed = self.ratio * _unit_norms(parameter).clamp_min(self.eps)
        gradient.mul_((allowed / _unit_norms(gradient)).clamp_max(1))


def _unit_norms(tensor: Tensor) -> Tensor:
    """In float32 at least; broadcasts against the tensor."""
    dims = tuple(range(1, tensor.dim())) or None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None, dtype=wide)
