"""Guarded optimizer steps: average, unscale and clip the gradients and update, or skip the step if it is not finite."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from unbraid import dist
from unbraid.errors import UserError
from unbraid.robust.clip import Clipper, as_max_norm, divide_


class GuardedStep(NamedTuple):
    """Result of a guarded step, in 0-d tensors; reading one on an accelerator waits for it."""

    grad_norm: Tensor
    """Norm of the unscaled gradient, before clipping."""
    max_norm: Tensor
    """Norm that the clipper allowed."""
    taken: Tensor
    """False if the loss or the norm was not finite, or the clipper returned NaN: the step was skipped."""


def guarded_step(
    optimizer: Optimizer, clipper: Clipper, *, loss: Tensor | None = None, scale: float = 1.0
) -> GuardedStep:
    """Clip and step, or skip the step if loss or gradient are not finite; replaces ``clip_grad_norm_`` and ``step``.

    Call it after backward. A skipped step leaves weights, optimizer and clipper bit for bit as they were. Gradients
    are not zeroed: call ``zero_grad`` before the next backward, or a NaN stays in them. With torch's fused optimizers
    (``fused=True``) the decision stays on the device and nothing waits for it. With any other optimizer the host
    decides, which costs one synchronisation on an accelerator.

    Under fp16, keep the loss scale yourself and pass it as ``scale``; halve it when a step is not taken. Do not combine
    this with ``torch.amp.GradScaler``: its ``step`` and ``unscale_`` skip steps as well, and overwrite ``found_inf``.

    With several processes, every rank must call this, after DDP has made the gradients equal. A loss that is not finite
    on one rank skips the step on all of them.

    Args:
        optimizer: Any optimizer that needs no closure; the gradients of all its parameter groups are clipped together.
        clipper: Use the same object in every step, and save its ``state_dict``, if it has one, with the checkpoint.
        loss: Loss of any shape, detached or not. Some infinite losses have finite gradients; without it those are not
            noticed.
        scale: Factor by which the loss was multiplied before backward.

    Returns:
        The norm, the maximum norm, and whether the step was taken.

    Raises:
        UserError: If the optimizer calls the model again within its step, as LBFGS does.
    """
    if isinstance(_unwrap(optimizer), LBFGS):
        raise UserError(
            "LBFGS calls the model several times within one step, so its gradients cannot be guarded from outside. Use "
            "an optimizer that steps once, such as AdamW."
        )
    initialise_optimizer_state(optimizer)

    # The norm of the unscaled gradient, over all parameter groups together.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    scaled_norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    grad_norm = scaled_norm / scale

    # Every rank must decide alike. The gradients are equal already, but each rank has its own loss.
    take_step = grad_norm.isfinite()
    if loss is not None:
        loss_is_bad = loss.detach().isfinite().logical_not().any().float()
        take_step = take_step & (dist.sum_over_ranks(loss_is_bad) == 0).to(take_step.device)

    # Unscaling and clipping are one division.
    max_norm = as_max_norm(clipper(grad_norm, take_step), grad_norm)
    take_step = take_step & (max_norm == max_norm)  # False for NaN: the clipper itself is at fault
    apply_update(optimizer, gradients, scale * (grad_norm / max_norm).clamp_min(1), take_step)
    return GuardedStep(grad_norm, max_norm, take_step)


def initialise_optimizer_state(optimizer: Optimizer) -> None:
    """Create the state of a fused optimizer before its first step, so that skipping the first step leaves it clean.

    The optimizer steps once with ``found_inf`` set, which creates its moments and moves nothing. Fused SGD leaves its
    momentum buffer uninitialised in such a step. Zeros make the first real step what it would have been, except with
    dampening, which torch does not apply in the very first step.
    """
    optimizer = _unwrap(optimizer)
    if not supports_found_inf(optimizer) or optimizer.state:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        return

    # Step once with zero gradients and found_inf set. The real gradients, if any, are put back afterwards.
    original_gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]

    # Step counts and moments begin at zero, whatever that step left in them.
    for p, gradient in zip(parameters, original_gradients, strict=True):
        p.grad = gradient
        for moment in optimizer.state[p].values():
            if isinstance(moment, torch.Tensor):
                moment.zero_()


def apply_update(optimizer: Optimizer, gradients: list[Tensor], divisor: Tensor, take_step: Tensor) -> None:
    """Divide the gradients and step, or change nothing if the step is not to be taken.

    An optimizer that supports ``grad_scale`` and ``found_inf`` does both in its own pass, on the device. For any other
    the host decides, which costs one synchronisation on an accelerator.

    Args:
        optimizer: Optimizer of the parameters.
        gradients: Their gradients.
        divisor: Factor to divide the gradients by, 0-d: loss scale, averaging and clipping in one.
        take_step: Whether to step, 0-d.
    """
    if not supports_found_inf(optimizer):
        if bool(take_step):
            divide_(gradients, divisor)
            optimizer.step()
        return
    inner = _unwrap(optimizer)
    # found_inf must be exactly 0 or 1: the kernels skip only at 1, so that a sum over ranks of 2 would take the step.
    # grad_scale divides the gradients in place; a skipped step leaves the weights alone, whatever the quotients are.
    inner.grad_scale = divisor.float()  # type: ignore[attr-defined]
    inner.found_inf = take_step.logical_not().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        # Left behind, they would scale or skip the next step of anybody who calls optimizer.step().
        del inner.grad_scale, inner.found_inf  # type: ignore[attr-defined]


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Return True if the optimizer reads ``grad_scale`` and ``found_inf``, as torch's fused ones do.

    Such an optimizer skips a step on the device, without the host.
    """
    return bool(getattr(_unwrap(optimizer), "_step_supports_amp_scaling", False))


def _unwrap(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a training framework's wrapper, such as Lightning's.

    ``step`` must be called on the wrapper, but the attributes that ``step`` reads must be set on the optimizer inside.
    """
    inner = getattr(optimizer, "optimizer", None)
    return _unwrap(inner) if isinstance(inner, Optimizer) else optimizer
