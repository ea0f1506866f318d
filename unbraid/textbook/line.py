"""Gradient descent on a line: a model of two parameters whose right answers are known in closed form.

The model is a linear layer of one unit, ``y = m x + b``. A line is a float64 tensor whose last axis is (m, b).
Functions that take one line also take a batch of lines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from unbraid.errors import UserError, nearest
from unbraid.seeding import generator, seeded_torch

TRUE_M = 2.0
TRUE_B = 1.0
NOISE_STD = 0.5

# Ranges of the grid search. The truth is not in their middle, because in practice it never is.
M_RANGE = (-2.0, 5.0)
B_RANGE = (-4.0, 4.0)


def _huber(residual: Tensor) -> Tensor:
    return F.huber_loss(residual, torch.zeros_like(residual), reduction="none")


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square, "huber": _huber}
"""Loss of each residual. Huber has PyTorch's delta of 1: half of l2 up to there, a straight line beyond."""


@dataclass(frozen=True)
class Points:
    """Data points that a line is fitted to.

    Attributes:
        x: Neither centred nor scaled, so that the best m depends on b, ``(point,)``.
        y: The true line plus noise, ``(point,)``.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """A line to be fitted.

    Attributes:
        seed: Seed of data and untrained line.
        loss: Name in `LOSSES`; its mean over the points is minimised.
        points: The data.
        start: The untrained line, ``(2,)``.
        best: The line of lowest mean loss, ``(2,)``.
    """

    seed: int
    loss: str
    points: Points
    start: Tensor
    best: Tensor


def make_problem(loss: str = "l2", seed: int = 0) -> Problem:
    """Return data, an untrained line and the exact answer.

    Raises:
        UserError: If there is no such loss.
    """
    if loss not in LOSSES:
        raise UserError(f"The loss {loss!r} is not one of {', '.join(LOSSES)}.{nearest(loss, LOSSES)}")
    points = noisy_points(seed)
    return Problem(seed, loss, points, untrained_line(seed), best_line(points, loss))


def noisy_points(seed: int, n_points: int = 40) -> Points:
    """Return points around the line ``2 x + 1``, with normal noise of standard deviation 0.5.

    There is one point in each of ``n_points`` equal intervals from -1 to 3.
    """
    rng = generator(seed, "line: points")
    x = torch.from_numpy(4 * (np.arange(n_points) + rng.uniform(size=n_points)) / n_points - 1)
    noise = NOISE_STD * torch.from_numpy(rng.standard_normal(n_points))
    return Points(x, TRUE_M * x + TRUE_B + noise)


def untrained_line(seed: int) -> Tensor:
    """Return the initial weight and bias of a PyTorch linear layer of one unit, ``(2,)``, each between -1 and 1."""
    with seeded_torch(seed, "line: untrained"):
        layer = nn.Linear(1, 1, dtype=torch.float64)
    return torch.cat([layer.weight[0], layer.bias]).detach()


def residuals(points: Points, lines: Tensor) -> Tensor:
    """Return predictions minus targets, ``(..., 2)`` to ``(..., point)``."""
    return lines[..., :1] * points.x + lines[..., 1:] - points.y


def point_losses(points: Points, lines: Tensor, loss: str) -> Tensor:
    """Return the loss of every point, ``(..., 2)`` to ``(..., point)``."""
    return LOSSES[loss](residuals(points, lines))


def mean_loss(points: Points, lines: Tensor, loss: str) -> Tensor:
    """Return the mean loss over the points, ``(..., 2)`` to ``(...,)``."""
    return point_losses(points, lines, loss).mean(-1)


def gradients(points: Points, lines: Tensor, loss: str) -> Tensor:
    """Return the gradient of the mean loss at every line, ``(..., 2)`` to ``(..., 2)``, in one pass.

    At a kink of l1 it is one of the slopes there, as in PyTorch.
    """
    line_gradient = grad(lambda line: mean_loss(points, line, loss))
    return vmap(line_gradient)(lines.reshape(-1, 2)).reshape(lines.shape)


def l2_gradient(points: Points, lines: Tensor) -> Tensor:
    """Return the gradient of the mean squared error by its formula, ``(..., 2)`` to ``(..., 2)``."""
    residual = residuals(points, lines)
    return 2 * torch.stack([(residual * points.x).mean(-1), residual.mean(-1)], -1)


def difference_gradient(points: Points, lines: Tensor, loss: str, step: float = 1e-5) -> Tensor:
    """Return the gradient by central differences of the loss, without backward, ``(..., 2)`` to ``(..., 2)``."""
    # One row moves m, the other b.
    moves = step * torch.eye(2, dtype=torch.float64)
    ahead = mean_loss(points, lines[..., None, :] + moves, loss)
    behind = mean_loss(points, lines[..., None, :] - moves, loss)
    return (ahead - behind) / (2 * step)


def hessian(points: Points) -> Tensor:
    """Return the Hessian of the mean squared error, ``(2, 2)``; it is the same at every line."""
    design = _design_matrix(points)
    return 2 * design.T @ design / len(design)


def highest_stable_lr(points: Points) -> float:
    """Return 2 / largest eigenvalue: above this learning rate, descent on the mean squared error diverges."""
    return float(2 / torch.linalg.eigvalsh(hessian(points))[-1])


def _design_matrix(points: Points) -> Tensor:
    return torch.stack([points.x, torch.ones_like(points.x)], -1)


def best_line(points: Points, loss: str) -> Tensor:
    """Return the line of lowest mean loss, ``(2,)``, without gradient descent."""
    if loss == "l1":
        # A best l1 line goes through two of the points, so try all pairs.
        lines = _lines_through_pairs(points)
        return lines[mean_loss(points, lines, "l1").argmin()]
    # Huber: least squares again and again, with a weight of 1 / residual for points more than 1 away. It converges
    # long before 100 rounds. With all weights 1, the first round is the answer for l2.
    design = _design_matrix(points)
    weights = torch.ones_like(points.x)
    for _ in range(1 if loss == "l2" else 100):
        root = weights.sqrt()
        line: Tensor = torch.linalg.lstsq(root[:, None] * design, root * points.y).solution
        weights = 1 / residuals(points, line).abs().clamp(min=1)
    return line


def _lines_through_pairs(points: Points) -> Tensor:
    first, second = torch.combinations(torch.arange(len(points.x))).T
    m = (points.y[second] - points.y[first]) / (points.x[second] - points.x[first])
    return torch.stack([m, points.y[first] - m * points.x[first]], -1)


@dataclass(frozen=True)
class Grid:
    """The mean loss on a grid of lines.

    Attributes:
        m: ``(m,)``.
        b: ``(b,)``.
        losses: ``(m, b)``.
    """

    m: Tensor
    b: Tensor
    losses: Tensor

    @property
    def best(self) -> Tensor:
        """The line of lowest loss on the grid, ``(2,)``."""
        row, column = divmod(int(self.losses.argmin()), len(self.b))
        return torch.stack([self.m[row], self.b[column]])


def brute_force(points: Points, loss: str, n_values: int = 100) -> Grid:
    """Return the mean loss for every pair of ``n_values`` values of m and of b, in one evaluation."""
    m = torch.linspace(*M_RANGE, n_values, dtype=torch.float64)
    b = torch.linspace(*B_RANGE, n_values, dtype=torch.float64)
    lines = torch.cartesian_prod(m, b).reshape(n_values, n_values, 2)
    return Grid(m, b, mean_loss(points, lines, loss))


def lines_along_axis(line: Tensor, axis: int, values: Tensor) -> Tensor:
    """Return copies of a line ``(2,)`` with other values ``(value,)`` of m (axis 0) or b (axis 1), ``(value, 2)``."""
    lines = line.repeat(len(values), 1)
    lines[:, axis] = values
    return lines


def zero_crossing(x: Tensor, y: Tensor) -> float:
    """Return where a sampled curve first rises through zero, by linear interpolation; NaN if it never does."""
    crossings = torch.nonzero((y[:-1] < 0) & (y[1:] >= 0))
    if not len(crossings):
        return float("nan")
    left = int(crossings[0])
    fraction = y[left] / (y[left] - y[left + 1])
    return float(x[left] + fraction * (x[left + 1] - x[left]))


def descend(points: Points, start: Tensor, *, lr: float, n_steps: int, loss: str) -> Tensor:
    """Run gradient descent by hand: backward, then a step against the gradient.

    Returns:
        The line before the first step and after each, ``(n_steps + 1, 2)``.
    """
    parameters = start.clone().requires_grad_()
    path = [start]
    for _ in range(n_steps):
        parameters.grad = None
        mean_loss(points, parameters, loss).backward()
        assert parameters.grad is not None
        with torch.no_grad():
            parameters -= lr * parameters.grad
        path.append(parameters.detach().clone())
    return torch.stack(path)


def descend_at_lrs(points: Points, start: Tensor, *, lrs: Sequence[float], n_steps: int, loss: str) -> Tensor:
    """Run gradient descent at several learning rates at once, ``(lr, n_steps + 1, 2)``.

    Nothing stops a run that diverges: the loss of l2 may end as infinity.
    """
    lr_column = torch.tensor(lrs, dtype=torch.float64)[:, None]
    path = [start.expand(len(lrs), 2)]
    for _ in range(n_steps):
        path.append(path[-1] - lr_column * gradients(points, path[-1], loss))
    return torch.stack(path, 1)


def closed_form_path(points: Points, start: Tensor, *, lr: float, n_steps: int) -> Tensor:
    """Return the exact path of descent on the mean squared error, ``(n_steps + 1, 2)``, without descending.

    Along each eigenvector of the Hessian, every step multiplies the distance from the minimum by
    ``1 - lr * eigenvalue``.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian(points))
    best = best_line(points, "l2")
    steps = torch.arange(n_steps + 1, dtype=torch.float64)[:, None]
    return best + ((1 - lr * eigenvalues) ** steps * (eigenvectors.T @ (start - best))) @ eigenvectors.T


def classify_lrs(problem: Problem, losses: Tensor, lrs: Sequence[float]) -> list[str]:
    """Return ``"too high"``, ``"right"`` or ``"too low"`` for each learning rate.

    For l2 this follows from theory: too high from 2 / largest eigenvalue on; too low if the slowest direction keeps
    more than 1 % of its excess loss. For other losses it follows from the run: right if at most 1 % of the first excess
    is left on average over the last tenth of the steps; otherwise too low if the loss fell in each of those steps, and
    too high if it did not.

    Args:
        problem: The problem that was descended on.
        losses: Mean losses before the first step and after each, ``(lr, n_steps + 1)``.
        lrs: The learning rates.
    """
    n_steps = losses.shape[1] - 1
    if problem.loss == "l2":
        smallest_eigenvalue = float(torch.linalg.eigvalsh(hessian(problem.points))[0])
        limit = highest_stable_lr(problem.points)
        classes = []
        for lr in lrs:
            # The loss is quadratic in the distance, hence the factor 2.
            excess_left = (1 - lr * smallest_eigenvalue) ** (2 * n_steps)
            classes.append("too high" if lr >= limit else "too low" if excess_left > 0.01 else "right")
        return classes

    excess = losses - mean_loss(problem.points, problem.best, problem.loss)
    last_tenth = excess[:, -max(1, n_steps // 10) :]
    has_arrived = last_tenth.mean(1) <= 0.01 * excess[:, 0]
    is_falling = (last_tenth.diff(dim=1) < 0).all(1)
    return [
        "right" if arrived else "too low" if falling else "too high"
        for arrived, falling in zip(has_arrived.tolist(), is_falling.tolist(), strict=True)
    ]


def grad_norm(gradient: Sequence[Tensor]) -> float:
    """Return the L2 norm over all elements of all gradients."""
    return float(torch.nn.utils.get_total_norm(list(gradient)))


def norm_of_sums(gradient: Sequence[Tensor]) -> float:
    """Return the root of the squared *sums* of the gradients: a common mistake, right only for single elements."""
    return float(torch.stack([tensor.sum().square() for tensor in gradient]).sum().sqrt())


def convolution_gradient(seed: int) -> list[Tensor]:
    """Return the gradient of an untrained convolution (8 channels, 15 taps) fitted to map noise to other noise."""
    rng = generator(seed, "line: convolution")
    inputs = torch.from_numpy(rng.standard_normal((4, 1, 256)))
    targets = torch.from_numpy(rng.standard_normal((4, 8, 256)))
    with seeded_torch(seed, "line: convolution"):
        layer = nn.Conv1d(1, 8, 15, padding="same", dtype=torch.float64)
    return list(torch.autograd.grad(F.mse_loss(layer(inputs), targets), list(layer.parameters())))
