"""Gradient descent on a line: a model of two numbers whose right answers are known in closed form.

The model is a linear layer of one unit, ``y = m x + b``. A line is a tensor whose last axis is (m, b), everything is
float64, and whatever takes one line takes many at once.
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

TRUE_M, TRUE_B, NOISE = 2.0, 1.0, 0.5
M_RANGE, B_RANGE = (-2.0, 5.0), (-4.0, 4.0)
"""What is searched; the truth is not in the middle of it, as it would not be by chance."""


def _huber(residual: Tensor) -> Tensor:
    return F.huber_loss(residual, torch.zeros_like(residual), reduction="none")


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square, "huber": _huber}
"""The loss of each residual. Huber is torch's, delta 1: half of l2 up to there, a straight line beyond."""


@dataclass(frozen=True)
class Points:
    """What the line is fitted to.

    Attributes:
        x: Neither centred nor scaled, so that m and b depend on each other, ``(point,)``.
        y: On the true line but for noise, ``(point,)``.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """A line to be found.

    Attributes:
        seed: Of all its draws.
        loss: Its name in `LOSSES`; the mean over the points is minimised.
        points: The data.
        start: The untrained line, ``(2,)``.
        best: Where the loss is lowest, ``(2,)``.
    """

    seed: int
    loss: str
    points: Points
    start: Tensor
    best: Tensor


def make_problem(loss: str = "l2", seed: int = 0) -> Problem:
    """Data, an untrained line and the answer.

    Raises:
        UserError: If there is no such loss.
    """
    if loss not in LOSSES:
        raise UserError(f"The loss {loss!r} is not one of {', '.join(LOSSES)}.{nearest(loss, LOSSES)}")
    points = noisy_points(seed)
    return Problem(seed, loss, points, untrained_line(seed), minimum(points, loss))


def noisy_points(seed: int, n_points: int = 40) -> Points:
    """Points from -1 to 3, one in each equal share of it, off the line ``2 x + 1`` by normal noise of deviation 0.5."""
    draws = generator(seed, "line: points")
    x = torch.from_numpy(4 * (np.arange(n_points) + draws.uniform(size=n_points)) / n_points - 1)
    return Points(x, TRUE_M * x + TRUE_B + NOISE * torch.from_numpy(draws.standard_normal(n_points)))


def untrained_line(seed: int) -> Tensor:
    """The weight and bias that PyTorch gives a linear layer of one unit, ``(2,)``; each between -1 and 1."""
    with seeded_torch(seed, "line: untrained"):
        layer = nn.Linear(1, 1, dtype=torch.float64)
    return torch.cat([layer.weight[0], layer.bias]).detach()


def residuals(points: Points, lines: Tensor) -> Tensor:
    """What lines predict less what is there, ``(..., 2)`` to ``(..., point)``."""
    return lines[..., :1] * points.x + lines[..., 1:] - points.y


def point_losses(points: Points, lines: Tensor, loss: str) -> Tensor:
    """The loss of every point, ``(..., 2)`` to ``(..., point)``."""
    return LOSSES[loss](residuals(points, lines))


def mean_loss(points: Points, lines: Tensor, loss: str) -> Tensor:
    """The mean over the points, ``(..., 2)`` to ``(...,)``."""
    return point_losses(points, lines, loss).mean(-1)


def gradients(points: Points, lines: Tensor, loss: str) -> Tensor:
    """The mean loss's gradient at every line, ``(..., 2)`` to ``(..., 2)``, in one pass.

    At a kink of l1 it is one of the slopes there, as PyTorch has it.
    """
    found = vmap(grad(lambda line: mean_loss(points, line, loss)))(lines.reshape(-1, 2))
    return found.reshape(lines.shape)


def l2_gradient(points: Points, lines: Tensor) -> Tensor:
    """The gradient of the mean squared error as written on paper, ``(..., 2)`` to ``(..., 2)``."""
    off = residuals(points, lines)
    return 2 * torch.stack([(off * points.x).mean(-1), off.mean(-1)], -1)


def difference_gradient(points: Points, lines: Tensor, loss: str, step: float = 1e-5) -> Tensor:
    """The gradient by central differences, ``(..., 2)`` to ``(..., 2)``: the loss alone, no backward."""
    moves = step * torch.eye(2, dtype=torch.float64)
    ahead, behind = (mean_loss(points, lines[..., None, :] + sign * moves, loss) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def hessian(points: Points) -> Tensor:
    """The mean squared error's second derivatives, ``(2, 2)``; the same at every line."""
    design = _design(points)
    return 2 * design.T @ design / len(design)


def highest_stable_lr(points: Points) -> float:
    """Above this, descent on the mean squared error goes away from the minimum: 2 / largest eigenvalue."""
    return float(2 / torch.linalg.eigvalsh(hessian(points))[-1])


def _design(points: Points) -> Tensor:
    return torch.stack([points.x, torch.ones_like(points.x)], -1)


def minimum(points: Points, loss: str) -> Tensor:
    """The line of lowest mean loss, ``(2,)``, without descent.

    Least squares for l2. The best l1 line goes through two of the points: all pairs are tried. Huber's is least
    squares again, with each point's weight lowered to 1 / residual where that is more than 1, until nothing changes.
    """
    if loss == "l1":
        lines = _lines_through_pairs(points)
        return lines[mean_loss(points, lines, "l1").argmin()]
    design, weight = _design(points), torch.ones_like(points.x)
    for _ in range(1 if loss == "l2" else 100):
        root = weight.sqrt()
        line: Tensor = torch.linalg.lstsq(root[:, None] * design, root * points.y).solution
        weight = 1 / residuals(points, line).abs().clamp(min=1)
    return line


def _lines_through_pairs(points: Points) -> Tensor:
    first, second = torch.combinations(torch.arange(len(points.x))).T
    m = (points.y[second] - points.y[first]) / (points.x[second] - points.x[first])
    return torch.stack([m, points.y[first] - m * points.x[first]], -1)


@dataclass(frozen=True)
class Grid:
    """The loss everywhere.

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
        """The line of the lowest loss on the grid, ``(2,)``."""
        row, column = divmod(int(self.losses.argmin()), len(self.b))
        return torch.stack([self.m[row], self.b[column]])


def brute_force(points: Points, loss: str, n_values: int = 100) -> Grid:
    """The mean loss of so many values of m times as many of b, in one evaluation."""
    m, b = (torch.linspace(*span, n_values, dtype=torch.float64) for span in (M_RANGE, B_RANGE))
    return Grid(m, b, mean_loss(points, torch.cartesian_prod(m, b).reshape(n_values, n_values, 2), loss))


def along(line: Tensor, axis: int, values: Tensor) -> Tensor:
    """Lines through one of them along m (axis 0) or b (1): ``(2,)`` and ``(value,)`` to ``(value, 2)``."""
    lines = line.repeat(len(values), 1)
    lines[:, axis] = values
    return lines


def crossing(values: Tensor, slopes: Tensor) -> float:
    """Where a rising curve first passes zero, between two of its samples by a straight line; NaN if nowhere."""
    rises = torch.nonzero((slopes[:-1] < 0) & (slopes[1:] >= 0))
    if not len(rises):
        return float("nan")
    at = int(rises[0])
    share = slopes[at] / (slopes[at] - slopes[at + 1])
    return float(values[at] + share * (values[at + 1] - values[at]))


def descend(points: Points, start: Tensor, *, lr: float, n_steps: int, loss: str) -> Tensor:
    """Gradient descent by hand: backward, and a step against the gradient.

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


def descend_at_rates(points: Points, start: Tensor, *, lrs: Sequence[float], n_steps: int, loss: str) -> Tensor:
    """The same at several learning rates at once, ``(lr, n_steps + 1, 2)``.

    Those too high are let go where they go: the loss of l2 may end as infinity.
    """
    step = vmap(lambda line, lr: line - lr * grad(lambda at: mean_loss(points, at, loss))(line))
    rates = torch.tensor(lrs, dtype=torch.float64)
    path = [start.expand(len(lrs), 2)]
    for _ in range(n_steps):
        path.append(step(path[-1], rates))
    return torch.stack(path, 1)


def exact_path(points: Points, start: Tensor, *, lr: float, n_steps: int) -> Tensor:
    """What descent on the mean squared error must give, ``(n_steps + 1, 2)``, without descending.

    In the Hessian's own directions each step multiplies the distance from the minimum by ``1 - lr * eigenvalue``.
    """
    values, directions = torch.linalg.eigh(hessian(points))
    best = minimum(points, "l2")
    steps = torch.arange(n_steps + 1, dtype=torch.float64)[:, None]
    return best + ((1 - lr * values) ** steps * (directions.T @ (start - best))) @ directions.T


def verdicts(problem: Problem, losses: Tensor, lrs: Sequence[float]) -> list[str]:
    """Whether each learning rate is too high, right or too low for so many steps.

    Of l2 it is told beforehand: too high from 2 / largest eigenvalue on, too low where the slowest direction keeps
    more than 1 % of its excess loss. Of others by the run: right if no more than 1 % of the first excess is left on
    average over the last tenth; otherwise too low if the loss fell in each of those steps, and too high if not.

    Args:
        problem: What was descended on.
        losses: Of each rate before the first step and after each, ``(lr, n_steps + 1)``.
        lrs: The learning rates.
    """
    n_steps = losses.shape[1] - 1
    if problem.loss == "l2":
        slowest = float(torch.linalg.eigvalsh(hessian(problem.points))[0])
        limit = highest_stable_lr(problem.points)
        kept = [(1 - lr * slowest) ** (2 * n_steps) for lr in lrs]
        return [_word(lr >= limit, share > 0.01) for lr, share in zip(lrs, kept, strict=True)]
    excess = losses - mean_loss(problem.points, problem.best, problem.loss)
    tenth = max(1, n_steps // 10)
    far = excess[:, -tenth:].mean(1) > 0.01 * excess[:, 0]
    falls = (excess[:, -tenth:].diff(dim=1) < 0).all(1)
    return [_word(bool(a and not f), bool(a and f)) for a, f in zip(far, falls, strict=True)]


def _word(too_high: bool, too_low: bool) -> str:
    return "too high" if too_high else "too low" if too_low else "right"


def true_norm(gradient: Sequence[Tensor]) -> float:
    """The L2 norm over all elements of all gradients."""
    return float(torch.nn.utils.get_total_norm(list(gradient)))


def norm_of_sums(gradient: Sequence[Tensor]) -> float:
    """The square root of the squared *sums* of the gradients: the same for tensors of one element, and only there."""
    return float(torch.stack([one.sum().square() for one in gradient]).sum().sqrt())


def convolution_gradient(seed: int) -> list[Tensor]:
    """The gradient of an untrained convolution (8 channels, 15 taps) that is to give noise for other noise."""
    draws = generator(seed, "line: convolution")
    given, wanted = (torch.from_numpy(draws.standard_normal((4, channels, 256))) for channels in (1, 8))
    with seeded_torch(seed, "line: convolution"):
        layer = nn.Conv1d(1, 8, 15, padding="same", dtype=torch.float64)
    return list(torch.autograd.grad(F.mse_loss(layer(given), wanted), list(layer.parameters())))
