"""Step size, loss, gradient norm and local smoothness along a training, and how closely they go together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.columns import Floats
from unbraid.config.recipe import Component, Recipe
from unbraid.config.registry import build_component
from unbraid.data.batch import Batch
from unbraid.lab.experiment import Experiment
from unbraid.lab.hessian import exact_float32
from unbraid.records import StepRecord
from unbraid.robust import CLIPPERS
from unbraid.robust.precision import Precision
from unbraid.seeding import seeded_torch
from unbraid.train.forward import ExampleLoss, compute_losses
from unbraid.train.state import TrainState, set_learning_rate
from unbraid.train.step import train_step

FRACTIONS = (1 / 3, 2 / 3, 1.0)
"""Of a step, at which the gradient is compared with that at its beginning."""

Gradient = Callable[[Tensor], Tensor]
"""Weights in, gradient out, both ``(n_weights,)``."""


@dataclass(frozen=True)
class Reading:
    """One training step.

    Attributes:
        step: From 1.
        outcome: ``trained``, or why it was left out.
        loss: Of the batch, before the step; None where it has none.
        grad_norm: Before clipping.
        max_norm:What the clipper allowed; infinite for no limit.
        step_size: L2 norm of the change of all weights; 0 where the step was left out.
        smoothness: As `smoothness` measures it; None where it was not, or not finite.
        clipped: Whether the step was shortened: its norm after transforms, if there are any, was above the limit.
    """

    step: int
    outcome: str
    loss: float | None
    grad_norm: float | None
    max_norm: float | None
    step_size: float
    smoothness: float | None = None
    clipped: bool = False


Column = Literal["step", "loss", "grad_norm", "max_norm", "step_size", "smoothness"]


@dataclass(frozen=True)
class Correlation:
    """How closely two series go together in a straight line (Pearson's).

    Attributes:
        value: From -1 to 1; NaN where there are fewer than three points, or one of the two never changes.
        n_points: How many steps it was computed from.
    """

    value: float
    n_points: int

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval by Fisher's transform, were the points independent; NaN of fewer than four.

        Neighbours along a training are alike, so that the true one is wider.
        """
        if self.n_points < 4 or not abs(self.value) < 1:
            return math.nan, math.nan
        middle, reach = math.atanh(self.value), 1.959964 / math.sqrt(self.n_points - 3)
        return math.tanh(middle - reach), math.tanh(middle + reach)


@dataclass(frozen=True)
class Trajectory:
    """A training, step by step.

    Attributes:
        clip: What the gradients were clipped by.
        readings: A reading for each step.
        ended: Why it could not go on, such as too many steps left out; None where it could.
    """

    clip: str
    readings: tuple[Reading, ...]
    ended: str | None = None

    def column(self, name: Column) -> Floats:
        """One number of each step, ``(n_steps,)``; NaN where it is not known."""
        values = [getattr(reading, name) for reading in self.readings]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    @property
    def trained(self) -> int:
        """How many steps moved the weights."""
        return sum(reading.outcome == "trained" for reading in self.readings)

    @property
    def clipped(self) -> int:
        """How many of them were clipped."""
        return sum(reading.clipped for reading in self.readings)

    def correlation(self, one: Column, other: Column = "smoothness", *, first_step: int = 1) -> Correlation:
        """Of two columns from a step on, where both are known: of their logarithms, but of a loss as it is."""
        late = self.column("step") >= first_step
        return correlation(self._scaled(one)[late], self._scaled(other)[late])

    def _scaled(self, name: Column) -> Floats:
        values = self.column(name)
        return values if name == "loss" else logarithms(values)  # a loss in dB goes below 0


def logarithms(values: Floats) -> Floats:
    """Natural ones, of the same shape; NaN for what is not above 0 or not finite."""
    known = np.isfinite(values) & (values > 0)
    return np.log(np.where(known, values, 1.0)) + np.where(known, 0.0, np.nan)


def correlation(one: Floats, other: Floats) -> Correlation:
    """Pearson's, of two series ``(n,)``, where both are finite."""
    known = np.isfinite(one) & np.isfinite(other)
    a, b = one[known], other[known]
    n_points = int(known.sum())
    if n_points < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, n_points)
    return Correlation(float(np.corrcoef(a, b)[0, 1]), n_points)


def smoothness(gradient: Gradient, weights: Tensor, change: Tensor, fractions: Sequence[float] = FRACTIONS) -> float:
    """How fast the gradient turns along a step: its change over that of the weights, at the worst of a few places.

    It bounds the second derivative along the step from below. Weights are rounded to their own precision before the
    two are divided, so that a short step is not measured by a length that it does not have.

    Args:
        gradient: Of the same loss on the same examples at each place.
        weights: Where the step begins, ``(n_weights,)``.
        change: Where it leads, less where it begins, ``(n_weights,)``.
        fractions: Of the step, above 0.

    Returns:
        The largest ratio of L2 norms; NaN where the weights do not move.

    Reference:
        Zhang et al., "Why gradient clipping accelerates training", ICLR 2020, arXiv:1905.11881, appendix H.
    """
    start, found = gradient(weights).double(), math.nan
    for fraction in fractions:
        place = weights + fraction * change
        moved = torch.linalg.vector_norm((place - weights).double())
        if moved > 0:
            ratio = float(torch.linalg.vector_norm(gradient(place).double() - start) / moved)
            found = ratio if math.isnan(found) else max(found, ratio)
    return found


def follow(subject: Experiment, state: TrainState, *, n_steps: int, every: int) -> Iterator[Reading]:
    """Train a state up to a step, and read what each step does; it ends earlier where a training would be ended.

    The smoothness is that of the mean loss of the step's batch, in float32 and without filters, with the noise that
    the model drew in the step; it is measured on a copy of the model, and the training goes on as if it were not, bit
    for bit. Nothing is validated, so that a plateau schedule never lowers the learning rate.

    Args:
        subject: Whose batches are taken; the state's step says from which on.
        state: Of `Experiment.fork`; changed in place.
        n_steps: Where to end, as a number of steps from the beginning; a schedule's budget too.
        every: Measure the smoothness in each step whose number is a multiple of it.

    Yields:
        A reading for each step.
    """
    probe, stream = subject.model().train(), subject.steps(first_step=state.step)
    while state.step < n_steps and state.faults.verdict() is None:
        set_learning_rate(state, state.schedule.factor(state.step + 1, state.step / n_steps))
        parts, before = next(stream), flat(state.unwrapped_model)
        measured = (state.step + 1) % every == 0
        if measured:
            probe.load_state_dict(state.unwrapped_model.state_dict())
        record = train_step(state, parts)
        change = flat(state.unwrapped_model) - before
        found = math.nan
        if measured and record.trained:
            gradient = gradient_of(probe, state.loss, parts, seed=state.seed, step=record.step)
            found = smoothness(gradient, before, change)
        yield _reading(record, float(torch.linalg.vector_norm(change.double())), found)


def _reading(record: StepRecord, step_size: float, found: float) -> Reading:
    known = found if math.isfinite(found) else None
    told = record.step, record.outcome, record.loss, record.grad_norm, record.max_norm
    return Reading(*told, step_size, known, record.clipped)


def gradient_of(model: nn.Module, loss: ExampleLoss, parts: Sequence[Batch], *, seed: int, step: int) -> Gradient:
    """The gradient of the mean loss of a step's examples, as a function of all weights; it moves the model's own.

    Args:
        model: In the mode it is trained in.
        loss: Of each example.
        parts: The step's micro-batches.
        seed: With the step it makes what the model draws: at all weights the same, and the same as in the step.
        step: Number of the step.
    """
    n_examples, precision = sum(float(part.weight.sum()) for part in parts), Precision("fp32")

    def gradient(weights: Tensor) -> Tensor:
        _put(model, weights)
        model.zero_grad(set_to_none=True)
        with torch.enable_grad(), exact_float32(), seeded_torch(seed, "step", step, 0):
            for part in parts:
                losses = compute_losses(model, loss, precision, part)[1]
                ((losses * part.weight).sum() / n_examples).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([grad.flatten() for grad in grads])

    return gradient


def flat(model: nn.Module) -> Tensor:
    """A copy of all weights in a row, ``(n_weights,)``."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@torch.no_grad()
def _put(model: nn.Module, weights: Tensor) -> None:
    parameters = list(model.parameters())
    for parameter, part in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


AS_RECIPE = "recipe"
"""The name that stands for the recipe's own clipper, with its options."""


def with_clip(subject: Experiment, name: str) -> Experiment:
    """The same subject, clipped by something else, as `clipped_by` takes it."""
    return replace(subject, recipe=clipped_by(subject.recipe, name))


def clipped_by(recipe: Recipe, name: str) -> Recipe:
    """A recipe with another clipper: with the recipe's options where it names the same, or else its defaults.

    Raises:
        RecipeError: If there is no such clipper.
    """
    if name in (AS_RECIPE, recipe.clip.name):
        return recipe
    build_component("clip", Component(name), CLIPPERS, recipe.folder)
    return replace(recipe, clip=Component(name))
