"""The loss around a model, between two, and in the plane of a run's path: which points, and what it is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.errors import UserError
from unbraid.lab.hessian import exact_float32
from unbraid.lab.weight_directions import (
    Filters,
    Floats,
    PathPlane,
    Weights,
    combined,
    digest_of,
    filter_normalised,
    plane_of,
)

Measure = Callable[[Weights], float]
"""The loss of a model with these weights."""

N_LINES = 5
MAX_POINTS = 1001


def measured(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Measure:
    """The loss as a function of the weights, in eval mode, without gradients and without TF32.

    Args:
        model: Is copied, and never touched.
        loss: Of a model, 0-d.
    """
    copy = deepcopy(model).eval()
    held = dict(copy.named_parameters()) | dict(copy.named_buffers())  # tied weights once, by their first name

    def measure(weights: Weights) -> float:
        with torch.no_grad(), exact_float32():
            for name in held.keys() & weights.keys():
                held[name].copy_(weights[name])
            return float(loss(copy))

    return measure


@dataclass(frozen=True)
class Chart:
    """Points to take the loss at: sums of a few anchors.

    Attributes:
        anchors: States and directions, as `combined` takes them.
        coefficients: ``(point, anchor)``.
        made_from: What decides both, as JSON holds it: the states by their bits, and how the points were laid. Not
            what was computed of them, of which the last bits may change with the number of threads.
    """

    anchors: Sequence[Weights]
    coefficients: Floats
    made_from: Mapping[str, Any]

    def losses(self, measure: Measure, known: Sequence[float] = ()) -> Iterator[float]:
        """The loss at each point in order, from the first that is not known on."""
        for row in self.coefficients[len(known) :]:
            yield measure(combined(self.anchors, row))


def steps_from(low: float, high: float, n_points: int) -> Floats:
    """So many positions from low to high, both among them.

    Raises:
        UserError: If the range is upside down or empty, or there are fewer than three or more than `MAX_POINTS`.
    """
    if not -np.inf < low < high < np.inf:
        raise UserError(f"A range from {low:g} to {high:g} has no inside; give the lower end first.")
    if n_points < 3:
        raise UserError(f"A number of {n_points} points shows no shape; give 3 or more.")
    if n_points > MAX_POINTS:
        raise UserError(f"{n_points} points along an axis are more than can be taken; give at most {MAX_POINTS}.")
    return np.linspace(low, high, n_points)


@dataclass(frozen=True)
class Around:
    """The loss on a grid over two random directions, and along lines in a few others.

    Attributes:
        offsets: Positions along each direction, in norms of the filters, ``(point,)``; the middle one is 0.
        chart: First the lines, one after another, then the grid row by row.
    """

    offsets: Floats
    chart: Chart

    def split(self, losses: Floats) -> tuple[Floats, Floats]:
        """Losses of the chart's points as lines, ``(line, point)``, and grid, ``(row, column)``."""
        n, at = len(self.offsets), N_LINES * len(self.offsets)
        return losses[:at].reshape(N_LINES, n), losses[at:].reshape(n, n)


def around(
    state: Weights,
    parameters: Sequence[str],
    *,
    span: float = 1.0,
    n_points: int = 21,
    seed: int = 0,
    filters: Mapping[str, Filters] | None = None,
) -> Around:
    """Points around a model: along random directions, and on a grid of the first (columns) and the second (rows).

    Args:
        state: The model's.
        parameters: Which of it are parameters.
        span: How far to go each way; at 1 the step is as long as the weights themselves.
        n_points: Along each direction, odd, so that the model itself is one of them.
        seed: Of the directions.
        filters: As `filter_normalised` takes them.

    Raises:
        UserError: If the range or the number of points cannot be used.
    """
    offsets = steps_from(-span, span, n_points)
    if n_points % 2 == 0:
        raise UserError(f"{n_points} points have no middle one, where the model itself is; give {n_points + 1}.")
    offsets[n_points // 2] = 0.0
    weights = {name: state[name] for name in parameters}
    directions = [filter_normalised(weights, seed, index, filters=filters) for index in range(N_LINES)]
    rows = np.zeros((N_LINES * n_points + n_points**2, 1 + N_LINES))
    rows[:, 0] = 1
    for line in range(N_LINES):
        rows[line * n_points : (line + 1) * n_points, 1 + line] = offsets
    rows[N_LINES * n_points :, 1] = np.tile(offsets, n_points)
    rows[N_LINES * n_points :, 2] = np.repeat(offsets, n_points)
    made_from: dict[str, Any] = {
        "around": digest_of([state]),
        "span": span,
        "points": n_points,
        "seed": seed,
        "lines": N_LINES,
    }
    made_from["filters"] = {name: asdict(given) for name, given in (filters or {}).items()}
    return Around(offsets, Chart([state, *directions], rows, made_from))


@dataclass(frozen=True)
class Between:
    """The loss on the straight line through two models.

    Attributes:
        at: 0 is the one, 1 the other, ``(point,)``; both are among them.
        chart: In this order.
    """

    at: Floats
    chart: Chart


def between(one: Weights, other: Weights, *, beyond: float = 0.25, n_points: int = 21) -> Between:
    """Points on the line through two models; buffers, such as BatchNorm's statistics, go along.

    Args:
        one: A state.
        other: Another state of the same model.
        beyond: How far past both ends to go, as a share of the way.
        n_points: From the one to the other; those beyond come on top, as close together.

    Raises:
        UserError: If the range or the number of points cannot be used.
    """
    steps_from(-beyond, 1 + beyond, n_points)
    n_beyond = int(np.ceil(beyond * (n_points - 1) - 1e-9))
    if n_beyond > MAX_POINTS:
        raise UserError(
            f"Going {beyond:g} of the way beyond both ends, {n_points - 1} steps to the way, takes {n_beyond} points "
            f"each; give a range or a number of points that takes at most {MAX_POINTS}."
        )
    at = np.arange(-n_beyond, n_points + n_beyond) / (n_points - 1)
    made_from = {"between": digest_of([one, other]), "beyond": beyond, "points": n_points}
    return Between(at, Chart([one, other], np.stack([1 - at, at], axis=1), made_from))


def barrier(at: Floats, losses: Floats) -> tuple[float, float]:
    """How far the loss between two models rises above the straight line from the one's to the other's.

    Args:
        at: As in `Between`.
        losses: ``(point,)``.

    Returns:
        Its height, never below 0, and where it is highest; both NaN where a loss on the way is not finite.

    Reference:
        Entezari et al., "The role of permutation invariance in linear mode connectivity of neural networks",
        ICLR 2022, arXiv:2110.06296.
    """
    inside = (at >= 0) & (at <= 1)
    at, losses = at[inside], losses[inside]
    if not np.isfinite(losses).all():
        return float("nan"), float("nan")
    above = losses - ((1 - at) * losses[0] + at * losses[-1])
    highest = int(above.argmax())
    return float(above[highest]), float(at[highest])


@dataclass(frozen=True)
class OfPath:
    """The loss in the plane of a run's path.

    Attributes:
        steps: After which training step each checkpoint was written, ``(checkpoint,)``.
        plane: Its axes, and the path on it.
        x: Along the first axis, ``(column,)``.
        y: Along the second, ``(row,)``.
        chart: First the checkpoints themselves, then the grid row by row.
    """

    steps: Sequence[int]
    plane: PathPlane
    x: Floats
    y: Floats
    chart: Chart

    def split(self, losses: Floats) -> tuple[Floats, Floats]:
        """Losses of the chart's points: the checkpoints' own, ``(checkpoint,)``, and the grid's, ``(row, column)``."""
        n = len(self.steps)
        return losses[:n], losses[n:].reshape(len(self.y), len(self.x))


def of_path(
    states: Mapping[int, Weights], parameters: Sequence[str], *, margin: float = 0.25, n_points: int = 21
) -> OfPath:
    """Points in the plane through the last checkpoint, along the two principal axes of the path; buffers are its own.

    Args:
        states: Of the checkpoints, by training step; three or more.
        parameters: Which of a state are parameters.
        margin: How far beyond the path to go, as a share of its width and height.
        n_points: Along each axis.

    Raises:
        UserError: If they span no plane, or range or number of points cannot be used.
    """
    steps = sorted(states)
    path = [states[step] for step in steps]
    try:
        plane = plane_of(path, parameters)
    except ValueError as error:
        raise UserError(f"The checkpoints have no plane to look at. {error}") from None
    low, high = plane.path.min(0), plane.path.max(0)
    wide = margin * (high - low)
    x, y = (steps_from(low[axis] - wide[axis], high[axis] + wide[axis], n_points) for axis in (0, 1))
    anchors = [path[-1], *plane.axes, *path[:-1]]
    rows = np.zeros((len(steps) + n_points**2, len(anchors)))
    rows[: len(steps) - 1, 3:] = np.eye(len(steps) - 1)
    rows[len(steps) - 1 :, 0] = 1
    rows[len(steps) :, 1] = np.tile(x, n_points)
    rows[len(steps) :, 2] = np.repeat(y, n_points)
    made_from = {"path": digest_of(path), "margin": margin, "points": n_points}
    return OfPath(steps, plane, x, y, Chart(anchors, rows, made_from))
