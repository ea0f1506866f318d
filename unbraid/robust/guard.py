"""A step taken or left out, averaged, unscaled and clipped in the optimizer's own pass where it has one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from unbraid import dist
from unbraid.errors import UserError
from unbraid.robust.clip import Clipper, as_max_norm, divide_


class GuardedStep(NamedTuple):
    """What became of a step, in 0-d tensors that nobody has waited for yet."""

    grad_norm: Tensor
    """Of the unscaled gradient, before clipping."""
    max_norm: Tensor
    taken: Tensor
    """False where loss or norm were not finite, and nothing was changed."""


def guarded_step(
    optimizer: Optimizer, clipper: Clipper, *, loss: Tensor | None = None, scale: float = 1.0
) -> GuardedStep:
    """Clip and step, unless something is not finite: in place of ``clip_grad_norm_`` and ``step`` in any loop.

    Call it after backward. A step left out leaves weights, optimizer and clipper as they were, bit for bit. It does
    not zero the gradients: call ``zero_grad`` before the next backward, or a NaN stays in them. Torch's fused
    optimizers (``fused=True``) decide on the device, and nothing waits for it; for any other the host decides, which
    on an accelerator costs one synchronisation.

    Under fp16 keep the loss scale yourself and say it here: ``torch.amp.GradScaler`` leaves steps out too, and its
    ``step`` and ``unscale_`` must not be mixed with this. Halve the scale when a step is not taken.

    In several processes every rank must call it; DDP has made the gradients equal by then. A loss that is not finite
    on one rank leaves the step out on all.

    Args:
        optimizer: Any that needs no closure; its gradients are those of all its parameter groups.
        clipper: Kept by the caller from step to step, and saved with the checkpoint where it has a ``state_dict``.
        loss: Of any shape, detached or not. Some infinite losses have finite gradients: without it those pass.
        scale: What the loss was multiplied by before backward.

    Returns:
        Norm, limit, and whether the step was taken.

    Raises:
        UserError: If the optimizer calls the model again within its step, as LBFGS does.
    """
    if isinstance(_bare(optimizer), LBFGS):
        raise UserError(
            "LBFGS calls the model several times within one step, where no gradient can be guarded from outside; take "
            "an optimizer that steps once, such as AdamW."
        )
    initialise_optimizer_state(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)
    norm = total / scale
    fine = norm.isfinite()
    if loss is not None:
        bad = loss.detach().isfinite().logical_not().any().float()
        fine = fine & (dist.sum_over_ranks(bad) == 0).to(fine.device)
    limit = as_max_norm(clipper(norm, fine), norm)
    apply_update(optimizer, gradients, scale * (norm / limit).clamp_min(1), fine)
    return GuardedStep(norm, limit, fine)


def initialise_optimizer_state(optimizer: Optimizer) -> None:
    """Let a fused optimizer make its state before the first step, so that a first step left out finds it clean.

    It steps once with ``found_inf`` set: nothing moves, but moments are made. Fused SGD leaves its momentum buffer
    uninitialised in such a step; zeros make the first real step what it would have been (without dampening, from which
    torch spares the very first step).
    """
    optimizer = _bare(optimizer)
    if not supports_found_inf(optimizer) or optimizer.state:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        return
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    for p, gradient in zip(parameters, kept, strict=True):
        p.grad = gradient
        for moment in optimizer.state[p].values():
            if isinstance(moment, torch.Tensor):
                moment.zero_()


def apply_update(optimizer: Optimizer, gradients: list[Tensor], divisor: Tensor, fine: Tensor) -> None:
    """Divide the gradients and let the optimizer step, or leave everything alone where the step is not fine.

    An optimizer that takes ``grad_scale`` and ``found_inf`` does both in its own pass, where the tensors are. For any
    other the host decides, which on an accelerator costs one synchronisation.
    """
    if not supports_found_inf(optimizer):
        if bool(fine):
            divide_(gradients, divisor)
            optimizer.step()
        return
    bare = _bare(optimizer)
    # found_inf must be exactly 0 or 1; of what is divided by the divisor only finite numbers are used
    bare.grad_scale, bare.found_inf = divisor.float(), fine.logical_not().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del bare.grad_scale, bare.found_inf  # type: ignore[attr-defined]


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether it takes ``grad_scale`` and ``found_inf``, as torch's fused ones do: leaving a step out needs no host."""
    return bool(getattr(_bare(optimizer), "_step_supports_amp_scaling", False))


def _bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer in the wrapper of a training framework: its step goes through the wrapper, its flags do not."""
    inner = getattr(optimizer, "optimizer", None)
    return _bare(inner) if isinstance(inner, Optimizer) else optimizer
