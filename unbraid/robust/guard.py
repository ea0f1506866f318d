"""A step taken or left out, averaged, unscaled and clipped in the optimizer's own pass where it has one."""

import torch
from torch import Tensor
from torch.optim import Optimizer


def prime(optimizer: Optimizer) -> None:
    """Let a fused optimizer make its state before the first step, so that a first step left out finds it clean.

    It steps once with ``found_inf`` set: nothing moves, but moments are made. Fused SGD leaves its momentum buffer
    uninitialised in such a step; zeros make the first real step what it would have been.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or optimizer.state:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
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


def update(optimizer: Optimizer, gradients: list[Tensor], divisor: Tensor, fine: Tensor) -> None:
    """Divide the gradients and let the optimizer step, or leave everything alone where the step is not fine.

    An optimizer that takes ``grad_scale`` and ``found_inf`` does both in its own pass, where the tensors are. For any
    other the host decides, which on an accelerator costs one synchronisation.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if bool(fine):
            torch._foreach_div_(gradients, divisor)
            optimizer.step()
        return
    # found_inf must be exactly 0 or 1; of what is divided by the divisor only finite numbers are used
    optimizer.grad_scale, optimizer.found_inf = divisor.float(), (~fine).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
