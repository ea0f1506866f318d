"""Limits on the whole norm: fixed, AutoClip, running statistics; and `clip_` for other people's loops."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbraid.errors import CheckpointError, RecipeError
from unbraid.robust.quantile import History, history_for, widest


class Clipper(Protocol):
    """Turns the gradient's norm into the longest norm allowed.

    Both tensors in and the one that comes out are 0-d, on the norm's device. Where ``finite`` is false the step will be
    left out, and a clipper learns nothing from it. One that remembers has ``state_dict`` and ``load_state_dict``. One
    that never looks at the tensors may return a plain number.
    """

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor | float:
        """The limit for this step."""
        ...


def as_max_norm(limit: Tensor | float, norm: Tensor) -> Tensor:
    """What a clipper returned as a 0-d tensor beside the norm; your own may simply return a number."""
    return limit if isinstance(limit, Tensor) else torch.full_like(norm, float(limit))


class FixedClip:
    """The same limit in every step.

    Args:
        max_norm: The longest L2 norm of the whole gradient, above 0; 5 is what separation recipes use.
    """

    def __init__(self, *, max_norm: float = 5.0) -> None:
        if not max_norm > 0 or math.isinf(max_norm):
            raise RecipeError(
                f"[clip] max_norm = {max_norm:g} must be above 0 and finite; to train without clipping, write "
                'name = "none".'
            )
        self.max_norm = max_norm

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """The limit, whatever the norm."""
        return torch.full_like(norm, self.max_norm)


class NoClip:
    """No limit: infinity."""

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Infinity, whatever the norm."""
        return torch.full_like(norm, math.inf)


class AutoClip:
    """The p-th percentile of the gradient norms so far, this step's among them.

    Equal to ``numpy.percentile`` over the whole history, as published, but free of NaN, infinite and zero norms. On the
    host a step costs about the logarithm of the history's length; on an accelerator the history lies there too, and
    no step waits for it. A checkpoint of the one goes on as the other.

    Args:
        percentile: 0 takes the smallest norm so far, 10 is the published default, 100 never clips.
        window: How many of the last norms to look at; 0 looks at all of them, as published.
        warmup_steps: Nothing is clipped until so many norms are known.

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
        self.percentile, self.window, self.warmup_steps = percentile, window, warmup_steps
        self._history: History | None = None
        self._device: torch.device | None = None
        self._taken_up: dict[str, Any] = {"norms": torch.empty(0, dtype=torch.float64)}

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Remember the norm if the step counts, and return the percentile; infinity while too little is known."""
        history = self._history_on(norm.device)
        history.add(norm, finite)
        return history.percentile(self.warmup_steps).to(norm)

    def state_dict(self) -> dict[str, Any]:
        """The norms: all from small to large, or those in the window from old to new."""
        known = self._taken_up if self._history is None else self._history.state_dict()
        return {"norms": known["norms"], "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the norms of another run, whatever device they were on.

        Raises:
            CheckpointError: If the last norms are asked for, and the other run kept no order.
        """
        if self.window and not state.get("window", 0) and len(state["norms"]):
            raise CheckpointError(
                f"[clip] window = {self.window}: the checkpoint's AutoClip looked at all norms (window = 0) and does "
                "not know which came last; go on with window = 0."
            )
        self._taken_up, self._history = {"norms": state["norms"].to("cpu", torch.float64)}, None

    def _history_on(self, device: torch.device) -> History:
        if self._history is None or self._device != device:
            state = self.state_dict()
            self._history, self._device = history_for(device, self.window, self.percentile), device
            self._history.load_state_dict(state)
        return self._history


class ZClip:
    """No limit, unless the norm is an outlier: then the farther out it is, the nearer to the mean it is brought.

    A norm z standard deviations above the running mean, with z above the threshold, is limited to
    ``mean + z_threshold**2 / z * std``, and the statistics learn the limit in its place: a lasting change of level is
    learned slowly. Everything stays on the norm's device.

    Args:
        z_threshold: How many standard deviations above the mean are still no outlier.
        alpha: How much of the running mean and variance stays from step to step, between 0 and 1.
        warmup_steps: So many norms make the first mean and variance; nothing is clipped before.

    Reference:
        Kumar et al., "ZClip: Adaptive spike mitigation for LLM pre-training", 2025, arXiv:2504.02507; without the fixed
        limit that its code adds.
    """

    def __init__(self, *, z_threshold: float = 2.5, alpha: float = 0.97, warmup_steps: int = 25) -> None:
        if not z_threshold > 0 or math.isinf(z_threshold):
            raise RecipeError(
                f"[clip] z_threshold = {z_threshold:g} must be above 0 and finite; to train without clipping, write "
                'name = "none".'
            )
        if not 0 < alpha < 1:
            raise RecipeError(f"[clip] alpha = {alpha:g} must be between 0 and 1, both excluded.")
        if warmup_steps < 2:
            raise RecipeError(f"[clip] warmup_steps = {warmup_steps} must be 2 or more: one norm has no variance.")
        self.z_threshold, self.alpha, self.warmup_steps = z_threshold, alpha, warmup_steps
        self._known = torch.zeros(3, dtype=torch.float64)  # how many norms, their mean and variance

    def __call__(self, norm: Tensor, finite: Tensor) -> Tensor:
        """The limit by what was known before; then learn the norm, or the limit where it is shorter."""
        if self._known.device != norm.device:
            self._known = self._known.to(norm.device, widest(norm.device))
        n_norms, mean, variance = self._known.unbind()
        wide = norm.detach().to(self._known.dtype)
        counts = finite & wide.isfinite() & (wide > 0)
        std = variance.sqrt()
        z = (wide - mean) / (std + 1e-6 * mean)
        warming = n_norms < self.warmup_steps
        outlier = (z > self.z_threshold) & (n_norms >= self.warmup_steps)
        limit = torch.where(outlier, mean + self.z_threshold**2 / z * std, math.inf)
        learned = wide.minimum(limit)
        rate = torch.where(warming, 1 / (n_norms + 1), 1 - self.alpha)
        new_mean = mean + rate * (learned - mean)
        spread = torch.where(warming, learned - mean, learned - new_mean) * (learned - new_mean)
        new = torch.stack([n_norms + 1, new_mean, variance + rate * (spread - variance)])
        self._known = torch.where(counts, new, self._known)
        return limit.to(norm.dtype)

    def state_dict(self) -> dict[str, Any]:
        """How many norms were learned, their running mean and variance."""
        return {"known": self._known.to("cpu", torch.float64, copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the statistics of another run; they move to the norm's device with the next one."""
        self._known = state["known"].to("cpu", torch.float64, copy=True)


def clip_(parameters: Tensor | Iterable[Tensor], clipper: Clipper) -> Tensor:
    """Shorten a gradient in place to what a clipper allows: stands in for ``torch.nn.utils.clip_grad_norm_``.

    A norm that is not finite teaches the clipper nothing and leaves the gradients as they are: scaling would only
    spread the NaN. The caller must then not step, nor where the loss is not finite; `unbraid.robust.guard.guarded_step`
    sees to both. Nothing here waits for an accelerator.

    Args:
        parameters: Whose gradients make the norm; those without one have no say.
        clipper: Kept by the caller from step to step, and saved with the checkpoint where it has a ``state_dict``.

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
    """Divide all of them by a 0-d tensor, in place, in one call a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, some in by_device.items():
        torch._foreach_div_(some, divisor.to(device))
