"""Plates of training beyond descent: validation with early stopping, and schedules under stochastic gradients."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from unbraid.figures import FigureSpec
from unbraid.textbook.drawing import BEST, DATA, PATH, START, TRUTH, finite
from unbraid.textbook.line import make_problem
from unbraid.textbook.training import (
    descend_stochastic,
    expected_squares,
    features,
    fit_polynomial,
    noise_floor,
    noisy_curve,
    polynomial_losses,
    scheduled,
    stop_early,
    true_curve,
)
from unbraid.train.optim import Constant, Cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATE_EVERY, PATIENCE = 5, 20


def early_stopping_figure(seed: int, *, n_steps: int = 5000) -> FigureSpec:
    """A polynomial with a weight for nearly every point, fitted until it fits the noise."""
    curve = noisy_curve(seed)
    design = features(curve.train.x, curve.degree)
    lr = float(1 / torch.linalg.eigvalsh(2 * design.T @ design / len(design))[-1])
    path = fit_polynomial(curve, lr=lr, n_steps=n_steps)
    train, valid = (polynomial_losses(path, points) for points in (curve.train, curve.valid))
    stopped, best = (place * VALIDATE_EVERY for place in stop_early(valid[::VALIDATE_EVERY].tolist(), PATIENCE))

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        steps = np.arange(1, n_steps + 2)
        left.loglog(steps, train, color=BEST, label="training")
        left.loglog(steps, valid, color=PATH, label="validation")
        left.axvline(best + 1, color=TRUTH, linewidth=1, label=f"best: step {best}")
        left.axvline(stopped + 1, color="black", linewidth=1, linestyle=":", label=f"stops: step {stopped}")
        left.set(xlabel="step + 1", ylabel="mean squared error")
        left.legend(frameon=False)
        x = torch.linspace(-1, 1, 300, dtype=torch.float64)
        right.plot(x, true_curve(x), "--", color=TRUTH, linewidth=1, label="truth")
        for step, color, label in ((best, BEST, f"step {best}"), (n_steps, PATH, f"step {n_steps}")):
            right.plot(x, features(x, curve.degree) @ path[step], color=color, label=label)
        right.plot(curve.train.x, curve.train.y, "o", color=DATA, markersize=4, label="training data")
        right.set(xlabel="x", ylabel="y", ylim=(-2.5, 2.5))
        right.legend(frameon=False, fontsize="small")

    return FigureSpec(
        name="15-early-stopping",
        title="Training against validation loss",
        caption=f"A polynomial of degree {curve.degree} on {len(curve.train.x)} noisy points: from step {best} to step "
        f"{n_steps} the training loss goes on falling, from {train[best]:.3f} to {train[-1]:.3f}, while the validation "
        f"loss turns at {valid[best]:.3f} and climbs to {valid[-1]:.3f}. Early stopping (validation every "
        f"{VALIDATE_EVERY} steps, patience {PATIENCE}) stops at step {stopped} and keeps the weights of step {best}.",
        numbers=finite(
            best_step=best,
            stopped_at_step=stopped,
            best_valid_loss=valid[best],
            last_valid_loss=valid[-1],
            train_loss_at_best=train[best],
            last_train_loss=train[-1],
            lr=lr,
        ),
        draw=draw,
        figsize=(10.0, 4.2),
    )


def schedule_figure(
    seed: int, *, lr: float = 0.1, batch_size: int = 4, n_steps: int = 500, warmup_steps: int = 50, n_runs: int = 256
) -> FigureSpec:
    """Constant learning rates end at a floor of noise; one that falls does not."""
    problem = make_problem("l2", seed)
    points, start = problem.points, problem.start
    plans = {
        f"constant {lr:g}": (scheduled(Constant(), lr, n_steps), PATH),
        f"constant {lr / 10:g}": (scheduled(Constant(), lr / 10, n_steps), START),
        "cosine": (scheduled(Cosine(), lr, n_steps), DATA),
        "warm-up and cosine": (scheduled(Cosine(warmup_steps=warmup_steps), lr, n_steps), BEST),
    }
    rates = torch.stack([lrs for lrs, _ in plans.values()])
    paths = descend_stochastic(points, start, lrs=rates, batch_size=batch_size, seed=seed, loss="l2", n_runs=n_runs)
    runs = dict(zip(plans, (paths - problem.best).square().sum(-1).mean(1).sqrt(), strict=True))
    expected = {
        name: expected_squares(points, start, lrs=lrs, batch_size=batch_size).sqrt() for name, (lrs, _) in plans.items()
    }
    floors = [noise_floor(points, lr=one, batch_size=batch_size) ** 0.5 for one in (lr, lr / 10)]
    high, low, cosine, warm = (float(runs[name][-1]) for name in plans)
    early = 20
    after = [float(runs[name][early]) for name in plans]

    def draw(figure: "Figure") -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        for name, (lrs, color) in plans.items():
            above.plot(np.arange(n_steps) + 1, lrs, color=color)
            below.semilogy(runs[name], color=color, linewidth=0.8, label=name)
            below.semilogy(expected[name], color=color, linewidth=3, alpha=0.3)
        below.plot([], [], color="black", linewidth=3, alpha=0.3, label="worked out beforehand")
        for floor in floors:
            below.axhline(floor, color="black", linewidth=0.6, linestyle=":")
        above.set(ylabel="learning rate")
        below.set(xlabel="step", ylabel=f"distance from the minimum\n(root mean square of {n_runs} runs)")
        below.legend(frameon=False, ncols=2, fontsize="small")

    return FigureSpec(
        name="16-warm-up-and-decay",
        title="Warm-up and decay",
        caption=f"Under a constant rate of {lr:g} the noise of {batch_size}-point gradients keeps the line {high:.3f} "
        f"from the minimum (worked out beforehand, dotted: {floors[0]:.3f}); a tenth of the rate has a floor of "
        f"{floors[1]:.3f}, but is {after[1]:.2f} away after {early} steps, where the full rate has {after[0]:.2f}. "
        f"Falling along a cosine it is as fast and ends at {cosine:.3f}; with a warm-up, at {warm:.3f}: here the decay "
        "helps, and warm-up only costs the first steps.",
        numbers=finite(
            last_distance_constant=high,
            last_distance_constant_tenth=low,
            last_distance_cosine=cosine,
            last_distance_warm_up_cosine=warm,
            expected_last_warm_up_cosine=expected["warm-up and cosine"][-1],
            expected_last_constant=expected[f"constant {lr:g}"][-1],
            distance_after_20_constant=after[0],
            distance_after_20_constant_tenth=after[1],
            distance_after_20_warm_up_cosine=after[3],
            floor_constant=floors[0],
            floor_constant_tenth=floors[1],
        ),
        draw=draw,
        figsize=(7.2, 5.4),
    )
