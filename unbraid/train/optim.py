"""OPTIMIZERS and SCHEDULES, by name."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from unbraid.errors import RecipeError
from unbraid.train.muon import Muon

Parameters = Iterable[nn.Parameter]


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    # a fused optimizer updates all tensors in one pass, and can skip a step on the device through found_inf
    return {p.device.type for p in parameters} <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters)


def adam(
    parameters: Parameters,
    *,
    lr: float = 1.5e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam, fused. The default learning rate is that of the SepFormer recipe.

    Args:
        parameters: Of the model.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
    """
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr, betas, eps, weight_decay, fused=_can_fuse(parameters))


def adamw(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """AdamW: Adam with decoupled weight decay, fused.

    Args:
        parameters: Of the model.
        lr: Learning rate.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, in units of the learning rate.
    """
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=_can_fuse(parameters))


def sgd(parameters: Parameters, *, lr: float = 1e-2, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent with momentum, fused.

    Args:
        parameters: Of the model.
        lr: Learning rate.
        momentum: Decay of the sum of past gradients; 0 for none.
        weight_decay: L2 penalty, added to the gradient.
    """
    parameters = list(parameters)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=_can_fuse(parameters))


def rmsprop(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Optimizer:
    """RMSprop.

    It cannot skip a step on the device. The host decides instead, which costs one synchronisation per step on an
    accelerator. The same holds for `Muon` and `schedule_free`.

    Args:
        parameters: Of the model.
        lr: Learning rate.
        alpha: Decay of the running mean of the squared gradient.
        eps: Added to the denominator.
        momentum: Decay of the sum of past steps; 0 for none.
        weight_decay: L2 penalty, added to the gradient.
    """
    if not 0 <= alpha < 1:
        raise RecipeError(f"optim.alpha = {alpha:g} must be at least 0 and below 1.")
    return torch.optim.RMSprop(list(parameters), lr, alpha, eps, weight_decay, momentum, foreach=True)


def schedule_free(
    parameters: Parameters,
    *,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Schedule-free AdamW: average the weights instead of lowering the learning rate. Needs extra ``schedule_free``.

    Use the schedule ``constant`` with a warm-up. The averaged weights are the ones to evaluate: ``eval()`` puts them
    into the model, and ``train()`` takes them out again, up to rounding; `evaluation_weights` does it exactly. The
    optimizer is returned in training mode.

    Args:
        parameters: Of the model.
        lr: Learning rate; larger than AdamW's.
        betas: Interpolation between the averaged and the latest weights, and decay of the mean squared gradient.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, in units of the learning rate.

    Raises:
        RecipeError: If the extra is not installed.

    Reference:
        Defazio et al., "The road less scheduled", NeurIPS 2024, arXiv:2405.15682.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise RecipeError(
            '[optim] name = "schedule_free" needs the package schedulefree: pip install "unbraid[schedule_free]".'
        ) from error
    if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
        raise RecipeError(
            f"[optim] lr = {lr:g} and weight_decay = {weight_decay:g} must be 0 or more, and both of betas = "
            f"{list(betas)} at least 0 and below 1."
        )
    optimizer = AdamWScheduleFree(list(parameters), lr, betas, eps, weight_decay)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "muon": Muon,
    "rmsprop": rmsprop,
    "schedule_free": schedule_free,
    "sgd": sgd,
}


class Schedule(Protocol):
    """A factor on the learning rate. A schedule with a memory has ``state_dict`` and ``load_state_dict``."""

    def factor(self, step: int, progress: float) -> float:
        """Return the factor for a step (counted from 1) at a share of the run's budget (0 to 1)."""
        ...

    def observe(self, validation_loss: float) -> None:
        """Take note of a finite validation loss."""
        ...


class Constant:
    """Constant learning rate after a linear warm-up.

    Args:
        warmup_steps: Number of steps in which the learning rate rises linearly from 0.
    """

    def __init__(self, *, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise RecipeError(f"schedule.warmup_steps = {warmup_steps} must be 0 or more.")
        self.warmup_steps = warmup_steps

    def factor(self, step: int, progress: float) -> float:
        """Return the share of the warm-up that is done."""
        # + 1, so that the step after the warm-up is the first at the full rate, and step 1 does not have the rate 0.
        return min(1.0, step / (self.warmup_steps + 1)) if self.warmup_steps else 1.0

    def observe(self, validation_loss: float) -> None:
        """Do nothing."""


class Cosine(Constant):
    """Half a cosine over the run's budget of steps or minutes.

    With a budget of minutes the learning rate follows the clock: such a run ends well trained on any machine, but
    is not repeated bit for bit.

    Args:
        warmup_steps: Number of steps in which the learning rate rises linearly from 0.
        min_factor: Learning rate at the end of the run, as a fraction of ``optim.lr``.
    """

    def __init__(self, *, warmup_steps: int = 0, min_factor: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps)
        if not 0 <= min_factor <= 1:
            raise RecipeError(f"schedule.min_factor = {min_factor:g} must be between 0 and 1.")
        self.min_factor = min_factor

    def factor(self, step: int, progress: float) -> float:
        """Return warm-up times cosine."""
        # The last step may end after a budget of minutes, and the cosine would rise again.
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return super().factor(step, progress) * (self.min_factor + (1 - self.min_factor) * cosine)


class Plateau(Constant):
    """Lower the learning rate when the validation loss has stopped falling: the schedule of the SepFormer recipe.

    Args:
        warmup_steps: Number of steps in which the learning rate rises linearly from 0.
        reduce_by: Factor by which the learning rate is multiplied when the validation loss stops falling.
        patience: Number of validations without a lower loss that are tolerated before the learning rate is reduced.
        min_factor: Lower bound of the learning rate, as a fraction of ``optim.lr``.
    """

    def __init__(
        self, *, warmup_steps: int = 0, reduce_by: float = 0.5, patience: int = 2, min_factor: float = 1e-4
    ) -> None:
        super().__init__(warmup_steps=warmup_steps)
        if not 0 < reduce_by < 1 or patience < 0 or not 0 <= min_factor <= 1:
            raise RecipeError(
                f"[schedule] reduce_by = {reduce_by:g} must be between 0 and 1, patience = {patience} 0 or more, and "
                f"min_factor = {min_factor:g} from 0 to 1."
            )
        self.reduce_by = reduce_by
        self.patience = patience
        self.min_factor = min_factor
        self.current = 1.0
        self.best = math.inf
        self.n_worse = 0

    def factor(self, step: int, progress: float) -> float:
        """Return warm-up times all reductions so far."""
        return super().factor(step, progress) * self.current

    def observe(self, validation_loss: float) -> None:
        """Count validations without a better loss, and reduce the learning rate when patience runs out."""
        # Equal is not better: a model that no longer moves must not keep its rate for ever.
        if validation_loss < self.best:
            self.best = validation_loss
            self.n_worse = 0
            return
        self.n_worse += 1
        if self.n_worse > self.patience:
            self.current = max(self.min_factor, self.current * self.reduce_by)
            self.n_worse = 0

    def state_dict(self) -> dict[str, Any]:
        """Return factor, best loss, and the number of validations without a better one."""
        return {"current": self.current, "best": self.best, "n_worse": self.n_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of another run."""
        self.current = float(state["current"])
        self.best = float(state["best"])
        self.n_worse = int(state["n_worse"])


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": Constant, "cosine": Cosine, "plateau": Plateau}
