"""The loss landscape around a model, between two models, and in the plane of a training path: points and their loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.errors import UserError
from unbraid.lab.hessian import exact_float32
from unbraid.lab.weight_directions import (
    FilterLayout,
    PathPlane,
    Weights,
    filter_normalised_direction,
    linear_combination,
    principal_plane,
    weights_digest,
)
from unbraid.type_aliases import FloatArray

LossFunction = Callable[[Weights], float]
"""Weights in, loss out."""

N_LINES = 5
MAX_POINTS = 1001


def loss_of_weights(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> LossFunction:
    """Return the loss as a function of the weights, in eval mode, without gradients and without TF32.

    Args:
        model: Model of the weights; it is copied and never changed.
        loss: Loss of a model, 0-d.
    """
    copy = deepcopy(model).eval()
    # Tied weights appear once, under their first name.
    tensors = dict(copy.named_parameters()) | dict(copy.named_buffers())

    def evaluate(weights: Weights) -> float:
        with torch.no_grad(), exact_float32():
            for name in tensors.keys() & weights.keys():
                tensors[name].copy_(weights[name])
            return float(loss(copy))

    return evaluate


@dataclass(frozen=True)
class WeightPoints:
    """Points in weight space at which to compute the loss: linear combinations of a few anchors.

    Attributes:
        anchors: State dicts and directions, as `linear_combination` takes them.
        coefficients: ``(point, anchor)``.
        cache_key: What decides both, as JSON values: a digest of the state dicts and the settings of the grid.
            Computed directions are not part of it, because their last bits may depend on the number of threads.
    """

    anchors: Sequence[Weights]
    coefficients: FloatArray
    cache_key: Mapping[str, Any]

    def losses(self, loss: LossFunction, n_done: int = 0) -> Iterator[float]:
        """Yield the loss at each point in order, without the first ``n_done``."""
        for row in self.coefficients[n_done:]:
            yield loss(linear_combination(self.anchors, row))


def axis_positions(low: float, high: float, n_points: int) -> FloatArray:
    """Return evenly spaced positions from low to high, both included.

    Raises:
        UserError: If the range is reversed or empty, or there are fewer than three points or more than `MAX_POINTS`.
    """
    if not -np.inf < low < high < np.inf:
        raise UserError(f"The range {low:g} to {high:g} is empty or not finite; give the lower end first.")
    if n_points < 3:
        raise UserError(f"{n_points} points are too few to show a shape; give 3 or more.")
    if n_points > MAX_POINTS:
        raise UserError(f"{n_points} points along an axis are too many; give at most {MAX_POINTS}.")
    return np.linspace(low, high, n_points)


@dataclass(frozen=True)
class RandomSlices:
    """Points along random directions around a model, and on a grid over two of them.

    Attributes:
        offsets: Positions along each direction, in norms of the filters, ``(position,)``; the middle one is 0.
        points: The lines one after another, then the grid row by row.
    """

    offsets: FloatArray
    points: WeightPoints

    def split(self, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Split the losses at the points into lines, ``(line, position)``, and grid, ``(row, column)``."""
        n = len(self.offsets)
        n_on_lines = N_LINES * n
        return losses[:n_on_lines].reshape(N_LINES, n), losses[n_on_lines:].reshape(n, n)


def random_slices(
    state: Weights,
    parameters: Sequence[str],
    *,
    span: float = 1.0,
    n_points: int = 21,
    seed: int = 0,
    filters: Mapping[str, FilterLayout] | None = None,
) -> RandomSlices:
    """Return points along random directions from a model, and on a grid of the first (columns) and second (rows).

    Args:
        state: State dict of the model.
        parameters: Names of its parameters.
        span: Distance to go each way; at 1 the step is as long as the weights themselves.
        n_points: Number of positions along each direction; odd, so that the model itself is one of them.
        seed: Seed of the directions.
        filters: As `filter_normalised_direction` takes them.

    Raises:
        UserError: If the range or the number of points cannot be used.
    """
    offsets = axis_positions(-span, span, n_points)
    if n_points % 2 == 0:
        raise UserError(f"{n_points} points have no middle one for the model itself; give {n_points + 1}.")
    offsets[n_points // 2] = 0.0  # linspace may round the middle to 1e-17, and the model's own loss must be exact
    weights = {name: state[name] for name in parameters}
    directions = [filter_normalised_direction(weights, seed, index, filters=filters) for index in range(N_LINES)]

    # Anchor 0 is the model itself and always counts 1; then the lines, then the grid over directions 1 and 2.
    coefficients = np.zeros((N_LINES * n_points + n_points**2, 1 + N_LINES))
    coefficients[:, 0] = 1
    for line in range(N_LINES):
        coefficients[line * n_points : (line + 1) * n_points, 1 + line] = offsets
    coefficients[N_LINES * n_points :, 1] = np.tile(offsets, n_points)
    coefficients[N_LINES * n_points :, 2] = np.repeat(offsets, n_points)
    cache_key = {
        "around": weights_digest([state]),
        "span": span,
        "points": n_points,
        "seed": seed,
        "lines": N_LINES,
        "filters": {name: {"axes": f.axes, "rows": f.group_sizes} for name, f in (filters or {}).items()},
    }
    return RandomSlices(offsets, WeightPoints([state, *directions], coefficients, cache_key))


@dataclass(frozen=True)
class Interpolation:
    """Points on the straight line through two models.

    Attributes:
        positions: 0 is the first model, 1 the second, ``(point,)``; both are among them.
        points: In this order.
    """

    positions: FloatArray
    points: WeightPoints


def interpolate(first: Weights, second: Weights, *, beyond: float = 0.25, n_points: int = 21) -> Interpolation:
    """Return points on the line through two models; buffers, such as BatchNorm's statistics, are interpolated too.

    Args:
        first: State dict.
        second: Another state dict of the same model.
        beyond: Distance to continue past both ends, as a share of the distance between them.
        n_points: Number of points from the first to the second. Points beyond are extra, at the same spacing.

    Raises:
        UserError: If the range or the number of points cannot be used.
    """
    axis_positions(-beyond, 1 + beyond, n_points)  # only for its checks
    # 1e-9 less, or rounding of the product would add a point on either side.
    n_beyond = int(np.ceil(beyond * (n_points - 1) - 1e-9))
    if n_beyond > MAX_POINTS:
        raise UserError(
            f"A span of {beyond:g} beyond both ends, at {n_points - 1} steps per unit, needs {n_beyond} points on each "
            f"side; choose a span and a number of points that need at most {MAX_POINTS}."
        )
    # Integers over an integer: 0 and 1 are exact, so the ends are the models bit for bit.
    positions = np.arange(-n_beyond, n_points + n_beyond) / (n_points - 1)
    cache_key = {"between": weights_digest([first, second]), "beyond": beyond, "points": n_points}
    coefficients = np.stack([1 - positions, positions], axis=1)
    return Interpolation(positions, WeightPoints([first, second], coefficients, cache_key))


def loss_barrier(positions: FloatArray, losses: FloatArray) -> tuple[float, float]:
    """Return the height and position of the loss barrier between two models.

    The barrier is the largest rise of the loss above the straight line from one model's loss to the other's.

    Args:
        positions: As in `Interpolation`.
        losses: ``(point,)``.

    Returns:
        Height, never below 0, and position. Both are NaN if a loss between the models is not finite.

    Reference:
        Entezari et al., "The role of permutation invariance in linear mode connectivity of neural networks",
        ICLR 2022, arXiv:2110.06296.
    """
    # Points beyond the models may be higher, but are no barrier between them.
    inside = (positions >= 0) & (positions <= 1)
    positions = positions[inside]
    losses = losses[inside]
    if not np.isfinite(losses).all():
        return float("nan"), float("nan")
    rise = losses - ((1 - positions) * losses[0] + positions * losses[-1])
    highest = int(rise.argmax())
    return float(rise[highest]), float(positions[highest])


@dataclass(frozen=True)
class PathSlice:
    """Points in the plane of a training path.

    Attributes:
        steps: Training step of each checkpoint, ``(checkpoint,)``.
        plane: Axes of the plane, and the path projected on it.
        x: Positions along the first axis, ``(column,)``.
        y: Positions along the second axis, ``(row,)``.
        points: The checkpoints themselves, then the grid row by row.
    """

    steps: Sequence[int]
    plane: PathPlane
    x: FloatArray
    y: FloatArray
    points: WeightPoints

    def split(self, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Split the losses into those of the checkpoints, ``(checkpoint,)``, and of the grid, ``(row, column)``."""
        n = len(self.steps)
        return losses[:n], losses[n:].reshape(len(self.y), len(self.x))


def path_slice(
    states: Mapping[int, Weights], parameters: Sequence[str], *, margin: float = 0.25, n_points: int = 21
) -> PathSlice:
    """Return points in the plane through the last checkpoint along the path's principal axes, with its buffers.

    Args:
        states: State dicts of the checkpoints by training step; three or more.
        parameters: Names of the parameters in a state dict.
        margin: Distance to continue beyond the path, as a share of its width and height.
        n_points: Number of positions along each axis.

    Raises:
        UserError: If the checkpoints span no plane, or the range or the number of points cannot be used.
    """
    steps = sorted(states)
    path = [states[step] for step in steps]
    try:
        plane = principal_plane(path, parameters)
    except ValueError as error:
        raise UserError(f"The checkpoints span no plane. {error}") from None
    low = plane.coordinates.min(0)
    high = plane.coordinates.max(0)
    extra = margin * (high - low)
    x = axis_positions(low[0] - extra[0], high[0] + extra[0], n_points)
    y = axis_positions(low[1] - extra[1], high[1] + extra[1], n_points)

    # Anchors: the last checkpoint, both axes, then the earlier checkpoints.
    anchors = [path[-1], *plane.axes, *path[:-1]]
    n_earlier = len(steps) - 1
    coefficients = np.zeros((len(steps) + n_points**2, len(anchors)))
    coefficients[:n_earlier, 3:] = np.eye(n_earlier)
    coefficients[n_earlier:, 0] = 1
    coefficients[len(steps) :, 1] = np.tile(x, n_points)
    coefficients[len(steps) :, 2] = np.repeat(y, n_points)
    cache_key = {"path": weights_digest(path), "margin": margin, "points": n_points}
    return PathSlice(steps, plane, x, y, WeightPoints(anchors, coefficients, cache_key))
