"""Local smoothness: how fast the gradient of a loss changes along a training step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unbraid.data.batch import Batch
from unbraid.lab.hessian import exact_float32
from unbraid.robust.precision import Precision
from unbraid.seeding import seeded_torch
from unbraid.train.forward import ExampleLoss, compute_losses

FRACTIONS = (1 / 3, 2 / 3, 1.0)
"""Fractions of a step at which the gradient is compared with the one at its start."""

GradientFunction = Callable[[Tensor], Tensor]
"""Weights to gradient, both ``(n_weights,)``."""


def smoothness(
    gradient: GradientFunction, weights: Tensor, change: Tensor, fractions: Sequence[float] = FRACTIONS
) -> float:
    """Return the largest change of the gradient per change of the weights, over a few points along a step.

    This bounds the second derivative along the step from below.

    Args:
        gradient: Gradient of the same loss on the same examples at every point.
        weights: Weights before the step, ``(n_weights,)``.
        change: Weights after the step minus weights before, ``(n_weights,)``.
        fractions: Points along the step, as fractions of it above 0.

    Returns:
        The largest ratio of L2 norms; NaN if the weights do not move.

    Reference:
        Zhang et al., "Why gradient clipping accelerates training", ICLR 2020, arXiv:1905.11881, appendix H.
    """
    start = gradient(weights).double()
    largest = math.nan
    for fraction in fractions:
        point = weights + fraction * change
        # Float32 rounds the new point, so divide by the distance really moved: a short step would look too long.
        distance = torch.linalg.vector_norm((point - weights).double())
        if distance > 0:
            ratio = float(torch.linalg.vector_norm(gradient(point).double() - start) / distance)
            largest = ratio if math.isnan(largest) else max(largest, ratio)
    return largest


def gradient_function(
    model: nn.Module, loss: ExampleLoss, micro_batches: Sequence[Batch], *, seed: int, step: int
) -> GradientFunction:
    """Return the gradient of the mean loss of a step's examples as a function of all weights.

    Calling it overwrites the model's weights.

    Args:
        model: In the mode it is trained in.
        loss: Loss of each example.
        micro_batches: Micro-batches of the step.
        seed: Seed of the training run.
        step: Number of the step.
    """
    precision = Precision("fp32")
    n_examples = sum(float(batch.weight.sum()) for batch in micro_batches)

    def gradient(weights: Tensor) -> Tensor:
        _set_weights(model, weights)
        model.zero_grad(set_to_none=True)
        # Seeding as the training step does repeats its dropout masks, at all weights alike.
        with torch.enable_grad(), exact_float32(), seeded_torch(seed, "step", step, 0):
            for batch in micro_batches:
                losses = compute_losses(model, loss, precision, batch)[1]
                ((losses * batch.weight).sum() / n_examples).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([grad.flatten() for grad in gradients])

    return gradient


def flat_weights(model: nn.Module) -> Tensor:
    """Return a copy of all weights as one vector, ``(n_weights,)``."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@torch.no_grad()
def _set_weights(model: nn.Module, weights: Tensor) -> None:
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values in zip(parameters, weights.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))
