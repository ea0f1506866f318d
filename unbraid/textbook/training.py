"""What training adds to descent: stochastic gradients, schedules, validation; on problems with known answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import legvander
from torch import Tensor

from unbraid.seeding import generator
from unbraid.textbook.line import Points, hessian, mean_loss, minimum, residuals
from unbraid.train.optim import Schedule


def descend_stochastic(
    points: Points, start: Tensor, *, lrs: Tensor, batch_size: int, seed: int, loss: str, n_runs: int = 1
) -> Tensor:
    """Descent on a few points at a time, drawn anew for each step, a point more than once if it so happens.

    Args:
        points: The data.
        start: Where every run begins, ``(2,)``.
        lrs: The learning rate of every step under each of several plans, ``(plan, step)``. All see the same draws.
        batch_size: Points a step.
        seed: Of the draws.
        loss: A name of `LOSSES`.
        n_runs: How many for each plan, each with draws of its own.

    Returns:
        The line before the first step and after each, ``(plan, run, step + 1, 2)``.
    """
    n_plans, n_steps = lrs.shape
    drawn = generator(seed, "line: batches").integers(len(points.x), size=(n_steps, n_runs, batch_size))
    path = [start.expand(n_plans, n_runs, 2)]
    for lr, at in zip(lrs.T, torch.from_numpy(drawn), strict=True):
        lines = path[-1].detach().requires_grad_()
        mean_loss(Points(points.x[at], points.y[at]), lines, loss).sum().backward()  # each line has its own gradient
        path.append(path[-1] - lr[:, None, None] * lines.grad)
    return torch.stack(path, 2)


def scheduled(schedule: Schedule, lr: float, n_steps: int) -> Tensor:
    """The learning rate of every step under one of the recipes' schedules, ``(n_steps,)``."""
    factors = [schedule.factor(step, (step - 1) / n_steps) for step in range(1, n_steps + 1)]
    return lr * torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True)
class _Moments:
    """How one point's gradient of the squared error depends on the distance from the minimum."""

    curvature: Tensor  # (point, 2, 2)
    pull: Tensor  # (point, 2): the gradient at the minimum; its mean is 0
    hessian: Tensor

    def step(self, mean: Tensor, square: Tensor, lr: float, batch_size: int) -> tuple[Tensor, Tensor]:
        """Mean ``(2,)`` and second moment ``(2, 2)`` of the distance after a step, from those before."""
        own = torch.einsum("pij,jk,plk->il", self.curvature, square, self.curvature)
        cross = torch.einsum("pij,j,pk->ik", self.curvature, mean, self.pull)
        noise = self.pull.T @ self.pull
        single = (own + cross + cross.T + noise) / len(self.pull)
        whole = self.hessian @ square @ self.hessian
        turned = self.hessian @ square + square @ self.hessian
        spread = single / batch_size + (1 - 1 / batch_size) * whole
        return mean - lr * self.hessian @ mean, square - lr * turned + lr**2 * spread


def _moments(points: Points) -> _Moments:
    design = torch.stack([points.x, torch.ones_like(points.x)], -1)
    pull = 2 * residuals(points, minimum(points, "l2"))[:, None] * design
    return _Moments(2 * design[:, :, None] * design[:, None, :], pull, hessian(points))


def expected_squares(points: Points, start: Tensor, *, lrs: Tensor, batch_size: int) -> Tensor:
    """The squared distance from the minimum that stochastic descent on l2 has on average, exactly, ``(step + 1,)``.

    The gradient of a squared error is linear, so mean and second moment after a step follow from those before it.
    """
    moments = _moments(points)
    mean = start - minimum(points, "l2")
    square = torch.outer(mean, mean)
    found = [square.trace()]
    for lr in lrs.tolist():
        mean, square = moments.step(mean, square, lr, batch_size)
        found.append(square.trace())
    return torch.stack(found)


def noise_floor(points: Points, *, lr: float, batch_size: int) -> float:
    """The mean squared distance that stochastic descent on l2 ends at under a constant learning rate; else infinity.

    It is the second moment that a step leaves as it is: four linear equations.
    """
    moments, still = _moments(points), torch.zeros(2, dtype=torch.float64)
    added = moments.step(still, torch.zeros(2, 2, dtype=torch.float64), lr, batch_size)[1].flatten()
    basis = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    kept = torch.stack([moments.step(still, one, lr, batch_size)[1].flatten() - added for one in basis], 1)
    if torch.linalg.eigvals(kept).abs().max() >= 1:
        return float("inf")
    settled = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - kept, added)
    return float(settled.reshape(2, 2).trace())


@dataclass(frozen=True)
class Curve:
    """Few noisy points of a smooth curve to train on, and more to validate on.

    Attributes:
        train: ``(point,)`` each.
        valid: ``(point,)`` each, with noise of their own.
        degree: Of the polynomial that is fitted: nearly as many weights as there are points to train on.
    """

    train: Points
    valid: Points
    degree: int


def true_curve(x: Tensor) -> Tensor:
    """What the points of `noisy_curve` lie around, ``(point,)`` to ``(point,)``."""
    return torch.sin(3 * x)


def noisy_curve(seed: int, *, n_train: int = 14, n_valid: int = 200, degree: int = 11, noise: float = 0.3) -> Curve:
    """Points of `true_curve` between -1 and 1, with normal noise."""
    draws = generator(seed, "line: curve")

    def drawn(n_points: int) -> Points:
        x = torch.from_numpy(draws.uniform(-1, 1, n_points)).sort().values
        return Points(x, true_curve(x) + noise * torch.from_numpy(draws.standard_normal(n_points)))

    return Curve(drawn(n_train), drawn(n_valid), degree)


def features(x: Tensor, degree: int) -> Tensor:
    """Legendre polynomials up to a degree, ``(point,)`` to ``(point, degree + 1)``."""
    return torch.from_numpy(legvander(x.numpy(), degree))


def polynomial_losses(weights: Tensor, points: Points) -> Tensor:
    """The mean squared error of polynomials, ``(..., degree + 1)`` to ``(...,)``."""
    return (weights @ features(points.x, weights.shape[-1] - 1).T - points.y).square().mean(-1)


def fit_polynomial(curve: Curve, *, lr: float, n_steps: int) -> Tensor:
    """Gradient descent on the training points' mean squared error, from zero.

    Returns:
        The weights before the first step and after each, ``(n_steps + 1, degree + 1)``.
    """
    design = features(curve.train.x, curve.degree)
    weights = torch.zeros(curve.degree + 1, dtype=torch.float64)
    path = [weights]
    for _ in range(n_steps):
        weights = weights - lr * 2 / len(design) * design.T @ (design @ weights - curve.train.y)
        path.append(weights)
    return torch.stack(path)


def stop_early(losses: Sequence[float], patience: int) -> tuple[int, int]:
    """Where early stopping stops: once so many validations in a row have not been better than the best before.

    Args:
        losses: One a validation.
        patience: How many to wait for a better one.

    Returns:
        The place of the last validation that is made, and of the best until then.
    """
    best = 0
    for place, loss in enumerate(losses):
        if loss < losses[best]:
            best = place
        elif place - best >= patience:
            return place, best
    return len(losses) - 1, best
