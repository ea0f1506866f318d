"""Gradient clipping by norm: fixed, AutoClip, ZClip; and `clip_` for any training loop."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbraid.dist import widest_float
from unbraid.errors import CheckpointError, RecipeError
from unbraid.robust.quantile import quantile_for


class Clipper(Protocol):
    """Computes the largest gradient norm allowed in a step from the norm that the gradient has.

    A clipper with memory also has ``state_dict`` and ``load_state_dict``.
    """

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor | float:
        """Return the maximum norm for this step.

        Args:
            norm: The gradient's L2 norm, 0-d.
            finite: Whether the step can be taken, 0-d, on the norm's device. Where it is false, the step will be
                skipped and the clipper must not learn from it.

        Returns:
            The maximum norm, 0-d, on the norm's device; a clipper that never looks at the tensors may return a number.
        """
        ...


def as_max_norm(max_norm: Tensor | float, norm: Tensor) -> Tensor:
    """Return what a clipper returned as a 0-d tensor on the norm's device."""
    return max_norm if isinstance(max_norm, Tensor) else torch.full_like(norm, float(max_norm))


class FixedClip:
    """Clips to the same norm in every step.

    Args:
        max_norm: The largest L2 norm of the whole gradient, above 0; separation recipes use 5.
    """

    def __init__(self, *, max_norm: float = 5.0) -> None:
        if not max_norm > 0 or math.isinf(max_norm):
            raise RecipeError(
                f"[clip] max_norm = {max_norm:g} must be above 0 and finite; to train without clipping, set "
                'name = "none".'
            )
        self.max_norm = max_norm

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Return ``max_norm``, whatever the norm."""
        return torch.full_like(norm, self.max_norm)


class NoClip:
    """Never clips."""

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Return infinity, whatever the norm."""
        return torch.full_like(norm, math.inf)


class AutoClip:
    """Clips to the p-th percentile of the gradient norms so far, including this step's.

    Equal to ``numpy.percentile`` over the whole history, as published, but ignores norms that are NaN, infinite or
    zero. On an accelerator the history lies there too, and no step waits for it. A run may be resumed on another kind
    of device.

    Args:
        percentile: Percentile of the norms so far to clip to: 0 clips to the smallest, 10 is the published
            default, 100 never clips.
        window: Number of recent norms to use; 0 uses all of them, as published.
        warmup_steps: Nothing is clipped until there are this many norms.

    Reference:
        Seetharaman et al., "AutoClip: Adaptive gradient clipping for source separation networks", MLSP 2020,
        arXiv:2007.14469.
    """

    def __init__(self, *, percentile: float = 10.0, window: int = 0, warmup_steps: int = 0) -> None:
        if not 0 <= percentile <= 100:
            raise RecipeError(f"[clip] percentile = {percentile:g} must be between 0 and 100.")
        for name, value in (("window", window), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise RecipeError(f"[clip] {name} = {value} must be 0 or more.")
        if 0 < window < warmup_steps:
            raise RecipeError(f"[clip] warmup_steps = {warmup_steps} must not be above window = {window}.")
        self.percentile = percentile
        self.window = window
        self.warmup_steps = warmup_steps
        self._device = torch.device("cpu")
        self._norms = quantile_for(self._device, window or None)

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Add the norm if the step can be taken, and return the percentile; infinity during warm-up."""
        self._move_to(norm.device)
        # One NaN in the history would make every later percentile NaN. A norm of zero (silence, a dead batch) says
        # nothing about the size of gradients, and a percentile of zero would clip every later step to nothing.
        self._norms.add(norm, finite & (norm > 0))
        return self._norms.percentile(self.percentile, self.warmup_steps).to(norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms: sorted, or oldest first with a window."""
        return {"norms": self._norms.state_dict()["values"], "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the norms of another run, whatever device they were on.

        Raises:
            CheckpointError: If this clipper has a window and the other had none, so that its norms have no order.
        """
        if self.window and not state.get("window", 0) and len(state["norms"]):
            raise CheckpointError(
                f"[clip] window = {self.window} cannot be resumed from this checkpoint: its AutoClip used all norms "
                "(window = 0) and did not store which came last. Resume with window = 0."
            )
        self._norms.load_state_dict({"values": state["norms"].to("cpu", torch.float64)})

    def _move_to(self, device: torch.device) -> None:
        if device != self._device:
            state = self._norms.state_dict()
            self._norms = quantile_for(device, self.window or None)
            self._norms.load_state_dict(state)
            self._device = device


class ZClip:
    """Clips only norms that are outliers; the farther out one is, the nearer to the mean it is brought.

    A norm z standard deviations above the running mean, with z above the threshold, is clipped to
    ``mean + z_threshold**2 / z * std``. The statistics then learn the clipped norm, so a lasting change of level is
    learned slowly. Everything stays on the norm's device.

    Args:
        z_threshold: Norms up to this many standard deviations above the mean are not outliers.
        alpha: Decay of the running mean and variance per step, between 0 and 1.
        warmup_steps: Number of norms that make the first mean and variance; nothing is clipped before.

    Reference:
        Kumar et al., "ZClip: Adaptive spike mitigation for LLM pre-training", 2025, arXiv:2504.02507; without the fixed
        limit that its code adds.
    """

    def __init__(self, *, z_threshold: float = 2.5, alpha: float = 0.97, warmup_steps: int = 25) -> None:
        if not z_threshold > 0 or math.isinf(z_threshold):
            raise RecipeError(
                f"[clip] z_threshold = {z_threshold:g} must be above 0 and finite; to train without clipping, set "
                'name = "none".'
            )
        if not 0 < alpha < 1:
            raise RecipeError(f"[clip] alpha = {alpha:g} must be between 0 and 1, both excluded.")
        if warmup_steps < 2:
            raise RecipeError(f"[clip] warmup_steps = {warmup_steps} must be 2 or more: one norm has no variance.")
        self.z_threshold = z_threshold
        self.alpha = alpha
        self.warmup_steps = warmup_steps
        self._statistics = torch.zeros(3, dtype=torch.float64)  # number of norms, their mean and variance

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Return the maximum norm by the statistics so far, then update them with the clipped norm."""
        if self._statistics.device != norm.device:
            self._statistics = self._statistics.to(norm.device, widest_float(norm.device))
        n_norms, mean, variance = self._statistics.unbind()
        norm_wide = norm.detach().to(self._statistics.dtype)

        # Clip. The small share of the mean keeps z finite while all norms were equal.
        std = variance.sqrt()
        z = (norm_wide - mean) / (std + 1e-6 * mean)
        warming_up = n_norms < self.warmup_steps
        is_outlier = (z > self.z_threshold) & (n_norms >= self.warmup_steps)
        max_norm = torch.where(is_outlier, mean + self.z_threshold**2 / z * std, math.inf)

        # Learn: a plain mean and variance (Welford's update) during warm-up, exponential decay after it.
        clipped = norm_wide.minimum(max_norm)
        rate = torch.where(warming_up, 1 / (n_norms + 1), 1 - self.alpha)
        new_mean = mean + rate * (clipped - mean)
        squared = torch.where(warming_up, clipped - mean, clipped - new_mean) * (clipped - new_mean)
        updated = torch.stack([n_norms + 1, new_mean, variance + rate * (squared - variance)])

        # One NaN would stay in the running mean for good, and a norm of zero is no gradient at all.
        is_valid = finite & norm_wide.isfinite() & (norm_wide > 0)
        self._statistics = torch.where(is_valid, updated, self._statistics)
        return max_norm.to(norm.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of norms, their running mean and variance, as one tensor ``(3,)``."""
        return {"known": self._statistics.to("cpu", torch.float64, copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics of another run; they move to the norm's device with the next norm."""
        self._statistics = state["known"].to("cpu", torch.float64, copy=True)


def clip_(parameters: Tensor | Iterable[Tensor], clipper: Clipper) -> Tensor:
    """Clip gradients in place with any clipper; replaces ``torch.nn.utils.clip_grad_norm_``.

    If the norm is not finite, the clipper learns nothing and the gradients stay as they are: scaling would only spread
    the NaN. The caller must then skip the step, and also if the loss is not finite;
    `unbraid.robust.guard.guarded_step` does both. Nothing here waits for an accelerator.

    Args:
        parameters: The parameters whose gradients make the norm; those without a gradient are ignored.
        clipper: Use the same object in every step, and save its ``state_dict``, if it has one, with the checkpoint.

    Returns:
        The norm before clipping, 0-d.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(gradients)
    finite = norm.isfinite()
    divisor = (norm / as_max_norm(clipper(norm, finite), norm)).clamp_min(1)
    divide_(gradients, torch.where(finite, divisor, 1))
    return norm


@torch.no_grad()
def divide_(tensors: list[Tensor], divisor: Tensor) -> None:
    """Divide tensors by a 0-d tensor, in place, with one call for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, tensors_there in by_device.items():
        torch._foreach_div_(tensors_there, divisor.to(device))
