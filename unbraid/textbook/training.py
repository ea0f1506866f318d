"""Stochastic gradients, learning-rate schedules and early stopping, on problems with known answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import legvander
from torch import Tensor

from unbraid.seeding import generator
from unbraid.textbook.line import Points, best_line, hessian, mean_loss, residuals
from unbraid.train.optim import Schedule


def stochastic_descent(
    points: Points, start: Tensor, *, lrs: Tensor, batch_size: int, seed: int, loss: str, n_runs: int = 1
) -> Tensor:
    """Run stochastic gradient descent on a few points a step, drawn with replacement.

    Args:
        points: The data.
        start: Where every run begins, ``(2,)``.
        lrs: Learning rate of every step under each of several schedules, ``(schedule, step)``.
        batch_size: Number of points in a step.
        seed: Seed of the draws.
        loss: A name in `LOSSES`.
        n_runs: Number of runs for each schedule, each with other draws; all schedules see the same draws.

    Returns:
        The line before the first step and after each, ``(schedule, run, step + 1, 2)``.
    """
    n_schedules, n_steps = lrs.shape
    draws = generator(seed, "line: batches").integers(len(points.x), size=(n_steps, n_runs, batch_size))
    path = [start.expand(n_schedules, n_runs, 2)]
    for lr, indices in zip(lrs.T, torch.from_numpy(draws), strict=True):
        lines = path[-1].detach().requires_grad_()
        batch = Points(points.x[indices], points.y[indices])
        # Each loss depends on its own line only, so the gradient of the sum holds every line's own gradient.
        mean_loss(batch, lines, loss).sum().backward()
        path.append(path[-1] - lr[:, None, None] * lines.grad)
    return torch.stack(path, 2)


def scheduled_lrs(schedule: Schedule, lr: float, n_steps: int) -> Tensor:
    """Return the learning rate of every step under a recipe's schedule, ``(n_steps,)``."""
    factors = [schedule.factor(step, (step - 1) / n_steps) for step in range(1, n_steps + 1)]
    return lr * torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True)
class _PointGradients:
    """Each point's gradient of the squared error, as a linear function of the distance from the minimum.

    The gradient of point p at distance d is ``curvature[p] @ d + at_minimum[p]``.

    Attributes:
        curvature: ``(point, 2, 2)``.
        at_minimum: ``(point, 2)``; its mean over the points is 0.
        hessian: Mean of the curvatures, ``(2, 2)``.
    """

    curvature: Tensor
    at_minimum: Tensor
    hessian: Tensor

    def after_step(self, mean: Tensor, second: Tensor, lr: float, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return mean ``(2,)`` and second moment ``(2, 2)`` of the distance after a step, from those before it."""
        # E[g g'] for the gradient of one point drawn at random.
        own = torch.einsum("pij,jk,plk->il", self.curvature, second, self.curvature)
        cross = torch.einsum("pij,j,pk->ik", self.curvature, mean, self.at_minimum)
        noise = self.at_minimum.T @ self.at_minimum
        same_point = (own + cross + cross.T + noise) / len(self.at_minimum)
        # In a batch, 1 / batch_size of all pairs are a point with itself; the others are independent.
        other_point = self.hessian @ second @ self.hessian
        gradient_second = same_point / batch_size + (1 - 1 / batch_size) * other_point
        mixed = self.hessian @ second + second @ self.hessian
        return mean - lr * self.hessian @ mean, second - lr * mixed + lr**2 * gradient_second


def _point_gradients(points: Points) -> _PointGradients:
    design = torch.stack([points.x, torch.ones_like(points.x)], -1)
    at_minimum = 2 * residuals(points, best_line(points, "l2"))[:, None] * design
    return _PointGradients(2 * design[:, :, None] * design[:, None, :], at_minimum, hessian(points))


def expected_squared_distances(points: Points, start: Tensor, *, lrs: Tensor, batch_size: int) -> Tensor:
    """Compute the exact mean squared distance from the minimum of stochastic descent on l2, ``(step + 1,)``.

    The gradient of a squared error is linear, so mean and second moment after a step follow from those before it.
    """
    gradients = _point_gradients(points)
    mean = start - best_line(points, "l2")
    second = torch.outer(mean, mean)
    expected = [second.trace()]
    for lr in lrs.tolist():
        mean, second = gradients.after_step(mean, second, lr, batch_size)
        expected.append(second.trace())
    return torch.stack(expected)


def noise_floor(points: Points, *, lr: float, batch_size: int) -> float:
    """Return the mean squared distance at which stochastic descent on l2 settles under a constant learning rate.

    It is infinite if descent diverges.
    """
    gradients = _point_gradients(points)
    zero_mean = torch.zeros(2, dtype=torch.float64)

    def second_after_step(second: Tensor) -> Tensor:
        return gradients.after_step(zero_mean, second, lr, batch_size)[1].flatten()

    # A step is affine in the second moment, so its fixed point solves four linear equations.
    offset = second_after_step(torch.zeros(2, 2, dtype=torch.float64))
    basis = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    matrix = torch.stack([second_after_step(element) - offset for element in basis], 1)
    if torch.linalg.eigvals(matrix).abs().max() >= 1:
        return float("inf")
    fixed_point = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, offset)
    return float(fixed_point.reshape(2, 2).trace())


@dataclass(frozen=True)
class CurveData:
    """A few noisy points of a smooth curve for training, and more for validation.

    Attributes:
        train: Training points.
        valid: Validation points, with their own noise.
        degree: Degree of the fitted polynomial: nearly as many weights as training points.
    """

    train: Points
    valid: Points
    degree: int


def true_curve(x: Tensor) -> Tensor:
    """Return the curve that the points of `noisy_curve` scatter around, ``(point,)`` to ``(point,)``."""
    return torch.sin(3 * x)


def noisy_curve(seed: int, *, n_train: int = 14, n_valid: int = 200, degree: int = 11, noise: float = 0.3) -> CurveData:
    """Return points of `true_curve` between -1 and 1, with normal noise of this standard deviation."""
    rng = generator(seed, "line: curve")

    def random_points(n_points: int) -> Points:
        x = torch.from_numpy(rng.uniform(-1, 1, n_points)).sort().values
        return Points(x, true_curve(x) + noise * torch.from_numpy(rng.standard_normal(n_points)))

    # Both draw from one generator: keep the order, or every number of the chapter changes.
    train = random_points(n_train)
    valid = random_points(n_valid)
    return CurveData(train, valid, degree)


def legendre_features(x: Tensor, degree: int) -> Tensor:
    """Return the Legendre polynomials up to a degree, ``(point,)`` to ``(point, degree + 1)``."""
    return torch.from_numpy(legvander(x.numpy(), degree))


def polynomial_losses(weights: Tensor, points: Points) -> Tensor:
    """Return the mean squared error of polynomials, ``(..., degree + 1)`` to ``(...,)``."""
    features = legendre_features(points.x, weights.shape[-1] - 1)
    return (weights @ features.T - points.y).square().mean(-1)


def fit_polynomial(curve: CurveData, *, lr: float, n_steps: int) -> Tensor:
    """Fit a polynomial by gradient descent on the mean squared error of the training points, from zero.

    Returns:
        The weights before the first step and after each, ``(n_steps + 1, degree + 1)``.
    """
    features = legendre_features(curve.train.x, curve.degree)
    weights = torch.zeros(curve.degree + 1, dtype=torch.float64)
    path = [weights]
    for _ in range(n_steps):
        weights = weights - lr * 2 / len(features) * features.T @ (features @ weights - curve.train.y)
        path.append(weights)
    return torch.stack(path)


def stop_early(losses: Sequence[float], patience: int) -> tuple[int, int]:
    """Return the index of the last validation before early stopping, and that of the best until then.

    Args:
        losses: Loss of each validation.
        patience: Stop after this many validations in a row that are not better than the best.
    """
    best = 0
    for index, loss in enumerate(losses):
        if loss < losses[best]:
            best = index
        elif index - best >= patience:
            return index, best
    return len(losses) - 1, best
