"""Step size, loss, gradient norm and local smoothness along a training run, and how strongly they correlate."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import pearsonr

import unbraid
from unbraid.config.recipe import Component, Recipe
from unbraid.config.registry import build_component
from unbraid.io import finite_or_none
from unbraid.lab.experiment import Experiment
from unbraid.lab.smoothness import FRACTIONS, flat_weights, gradient_function, smoothness
from unbraid.robust import CLIPPERS
from unbraid.train.state import TrainState, set_learning_rate
from unbraid.train.step import train_step
from unbraid.type_aliases import FloatArray

RECIPE_CLIPPER = "recipe"
"""Name of the recipe's own clipper with its options."""

Column = Literal["step", "loss", "grad_norm", "max_norm", "step_size", "smoothness"]
"""Numeric fields of a `StepMeasurement`."""

CORRELATED: dict[str, Column] = {
    "gradient norm with smoothness": "grad_norm",
    "step size with smoothness": "step_size",
    "loss with smoothness": "loss",
}
"""Columns whose correlation with the smoothness is reported."""


@dataclass(frozen=True)
class StepMeasurement:
    """One training step.

    Attributes:
        step: Number of the step, from 1.
        outcome: ``trained``, or why the step was skipped.
        loss: Mean loss of the batch before the step; None if there is none.
        grad_norm: Gradient norm before clipping.
        max_norm: Limit set by the clipper; infinite for no limit.
        step_size: L2 norm of the change of all weights; 0 if the step was skipped.
        smoothness: Local smoothness along the step; None if it was not measured or is not finite.
        clipped: True if the norm after transforms was above the limit.
    """

    step: int
    outcome: str
    loss: float | None
    grad_norm: float | None
    max_norm: float | None
    step_size: float
    smoothness: float | None = None
    clipped: bool = False


class Correlation(NamedTuple):
    """Pearson's correlation coefficient of two series.

    Attributes:
        r: From -1 to 1; NaN for fewer than three points or if one series is constant.
        n_points: Number of points it was computed from.
        low: Lower end of the 95 % confidence interval for independent points; NaN for fewer than four points.
        high: Upper end. Neighbouring steps are alike, so the true interval is wider.
    """

    r: float
    n_points: int
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Trajectory:
    """A training run, step by step.

    Attributes:
        clip: Name of the clipper.
        steps: One measurement for each step.
        stop_reason: Why training ended early, such as too many skipped steps; None if it did not.
    """

    clip: str
    steps: tuple[StepMeasurement, ...]
    stop_reason: str | None = None

    def column(self, name: Column) -> FloatArray:
        """Return one value for each step, ``(n_steps,)``; NaN where it is missing."""
        values = [getattr(step, name) for step in self.steps]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    @property
    def n_trained(self) -> int:
        """Number of steps that changed the weights."""
        return sum(step.outcome == "trained" for step in self.steps)

    @property
    def n_clipped(self) -> int:
        """Number of clipped steps."""
        return sum(step.clipped for step in self.steps)

    def correlation(self, x: Column, y: Column = "smoothness", *, first_step: int = 1) -> Correlation:
        """Return the correlation of two columns from a step on; of their logarithms, except for the loss."""
        is_late = self.column("step") >= first_step
        return correlate(self._log_column(x)[is_late], self._log_column(y)[is_late])

    def _log_column(self, name: Column) -> FloatArray:
        values = self.column(name)
        # A loss in dB falls below 0, where it has no logarithm; it is a logarithm already.
        return values if name == "loss" else log_or_nan(values)


@dataclass(frozen=True)
class TrajectoryComparison:
    """One experiment trained under several clippers, from the same weights on the same batches.

    Attributes:
        name: Name of the recipe.
        recipe: The recipe as `recipe_table` returns it.
        n_steps: Number of steps requested for each arm.
        every: Number of steps from one measurement of smoothness to the next.
        arms: One trajectory for each clipper that was started.
    """

    name: str
    recipe: Mapping[str, Any]
    n_steps: int
    every: int
    arms: tuple[Trajectory, ...]

    def correlations(self, arm: Trajectory) -> dict[str, Correlation]:
        """Return the correlations of `CORRELATED` over all steps, and that of the norm over the second half."""
        correlations = {name: arm.correlation(column) for name, column in CORRELATED.items()}
        # The first steps from random weights are unlike all others and can dominate a correlation.
        late = arm.correlation("grad_norm", first_step=self.n_steps // 2 + 1)
        return correlations | {"gradient norm with smoothness, second half": late}

    def summary_lines(self) -> list[str]:
        """Return one line of text for each arm."""
        lines = []
        for arm in self.arms:
            whole = arm.correlation("grad_norm")
            late = arm.correlation("grad_norm", first_step=self.n_steps // 2 + 1)
            result = "is not known yet" if math.isnan(whole.r) else f"is {whole.r:.2f}"
            if not math.isnan(whole.low):
                result += f", 95 % interval {whole.low:.2f} to {whole.high:.2f} or wider"
            if not math.isnan(late.r):
                result += f" ({late.r:.2f} in the second half)"
            line = (
                f"{arm.clip}: {len(arm.steps)} of {self.n_steps} steps, {arm.n_clipped} clipped, "
                f"{len(arm.steps) - arm.n_trained} skipped; the correlation of log gradient norm with log smoothness "
                f"{result}, over {whole.n_points} points."
            )
            if arm.stop_reason:
                line += f" Training ended early: {arm.stop_reason}."
            lines.append(line)
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON: six digits, and null for missing or infinite values."""
        return {
            "unbraid": unbraid.__version__,
            "name": self.name,
            "steps": self.n_steps,
            "every": self.every,
            "fractions": [round(fraction, 6) for fraction in FRACTIONS],
            "recipe": dict(self.recipe),
            "arms": [self._arm_as_json(arm) for arm in self.arms],
        }

    def _arm_as_json(self, arm: Trajectory) -> dict[str, Any]:
        series: tuple[Column, ...] = ("loss", "grad_norm", "max_norm", "step_size")
        return {
            "clip": arm.clip,
            "steps": len(arm.steps),
            "trained": arm.n_trained,
            "clipped": arm.n_clipped,
            "stop_reason": arm.stop_reason,
            "correlations": {
                name: {"correlation": _json_number(correlation.r), "points": correlation.n_points}
                for name, correlation in self.correlations(arm).items()
            },
            "skipped": {step.step: step.outcome for step in arm.steps if step.outcome != "trained"},
            **{name: [_json_number(value) for value in arm.column(name)] for name in series},
            # Most steps have no smoothness, so it is a table by step and not a column.
            "smoothness": {s.step: _json_number(s.smoothness) for s in arm.steps if s.smoothness is not None},
        }


def _json_number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def log_or_nan(values: FloatArray) -> FloatArray:
    """Return natural logarithms of the same shape; NaN for values that are not finite or not above 0."""
    has_log = np.isfinite(values) & (values > 0)
    # np.log would warn about 0 and negative values, so they are replaced before and masked after.
    return np.where(has_log, np.log(np.where(has_log, values, 1.0)), np.nan)


def correlate(x: FloatArray, y: FloatArray) -> Correlation:
    """Return Pearson's correlation of two series, ``(n,)`` each, over the points where both are finite."""
    is_finite = np.isfinite(x) & np.isfinite(y)
    x = x[is_finite]
    y = y[is_finite]
    n_points = len(x)
    # Two points always lie on a line, and a constant series has no correlation.
    if n_points < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, n_points)
    result = pearsonr(x, y)
    r = float(result.statistic)
    # Fisher's transform needs four points, and has width 0 at a perfect correlation, which would claim too much.
    if n_points < 4 or abs(r) >= 1:
        return Correlation(r, n_points)
    interval = result.confidence_interval(0.95)
    return Correlation(r, n_points, float(interval.low), float(interval.high))


def measure_steps(experiment: Experiment, state: TrainState, *, n_steps: int, every: int) -> Iterator[StepMeasurement]:
    """Train up to a step and yield a measurement for each step; end early if training would be ended.

    The smoothness is that of the mean loss of the step's batch, in float32 and without filters, with the same dropout
    as in the step. It is measured on a copy of the model, so training is the same with and without it, bit for bit.
    Nothing is validated, so a plateau schedule never lowers the learning rate.

    Args:
        experiment: Provides the batches, beginning with the state's next step.
        state: Training state from `Experiment.new_state`; changed in place.
        n_steps: Last step, counted from the beginning of training; also the schedule's budget.
        every: Measure the smoothness in each step that is a multiple of it.
    """
    probe = experiment.copy_model().train()
    batches = experiment.training_batches(first_step=state.step)
    while state.step < n_steps and state.faults.reason_to_stop() is None:
        set_learning_rate(state, state.schedule.factor(state.step + 1, state.step / n_steps))
        micro_batches = next(batches)
        weights_before = flat_weights(state.unwrapped_model)
        measure = (state.step + 1) % every == 0
        if measure:
            # Buffers too must be those from before the step.
            probe.load_state_dict(state.unwrapped_model.state_dict())

        record = train_step(state, micro_batches)

        change = flat_weights(state.unwrapped_model) - weights_before
        local_smoothness = math.nan
        if measure and record.trained:
            gradient = gradient_function(probe, state.loss, micro_batches, seed=state.seed, step=record.step)
            local_smoothness = smoothness(gradient, weights_before, change)
        yield StepMeasurement(
            step=record.step,
            outcome=record.outcome,
            loss=record.loss,
            grad_norm=record.grad_norm,
            max_norm=record.max_norm,
            step_size=float(torch.linalg.vector_norm(change.double())),
            smoothness=finite_or_none(local_smoothness),
            clipped=record.clipped,
        )


def recipe_with_clipper(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe with another clipper.

    The recipe's own options are kept if it already uses this clipper, or if the name is ``recipe``; any other clipper
    has its defaults.

    Raises:
        RecipeError: If there is no such clipper.
    """
    if name in (RECIPE_CLIPPER, recipe.clip.name):
        return recipe
    build_component("clip", Component(name), CLIPPERS, recipe.folder)  # raises for an unknown name
    return replace(recipe, clip=Component(name))
