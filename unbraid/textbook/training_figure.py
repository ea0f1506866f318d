"""Figures of validation with early stopping, and of learning-rate schedules under stochastic gradients."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from unbraid.figures import FigureSpec
from unbraid.textbook.drawing import BEST, DATA, PATH, START, TRUTH, finite_numbers
from unbraid.textbook.line import make_problem
from unbraid.textbook.training import (
    expected_squared_distances,
    fit_polynomial,
    legendre_features,
    noise_floor,
    noisy_curve,
    polynomial_losses,
    scheduled_lrs,
    stochastic_descent,
    stop_early,
    true_curve,
)
from unbraid.train.optim import Constant, Cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALIDATE_EVERY = 5
PATIENCE = 20


def early_stopping_figure(seed: int, *, n_steps: int = 5000) -> FigureSpec:
    """Return the figure of a polynomial with nearly as many weights as points, trained until it fits the noise."""
    curve = noisy_curve(seed)
    features = legendre_features(curve.train.x, curve.degree)
    # Half of the highest stable learning rate: fast, and it never overshoots.
    lr = float(1 / torch.linalg.eigvalsh(2 * features.T @ features / len(features))[-1])
    path = fit_polynomial(curve, lr=lr, n_steps=n_steps)
    train_losses = polynomial_losses(path, curve.train)
    valid_losses = polynomial_losses(path, curve.valid)
    last_validation, best_validation = stop_early(valid_losses[::VALIDATE_EVERY].tolist(), PATIENCE)
    stop_step = last_validation * VALIDATE_EVERY
    best_step = best_validation * VALIDATE_EVERY

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        steps = np.arange(1, n_steps + 2)
        left.loglog(steps, train_losses, color=BEST, label="training")
        left.loglog(steps, valid_losses, color=PATH, label="validation")
        left.axvline(best_step + 1, color=TRUTH, linewidth=1, label=f"best: step {best_step}")
        left.axvline(stop_step + 1, color="black", linewidth=1, linestyle=":", label=f"stops: step {stop_step}")
        left.set(xlabel="step + 1", ylabel="mean squared error")
        left.legend(frameon=False)
        x = torch.linspace(-1, 1, 300, dtype=torch.float64)
        right.plot(x, true_curve(x), "--", color=TRUTH, linewidth=1, label="truth")
        for step, color in ((best_step, BEST), (n_steps, PATH)):
            right.plot(x, legendre_features(x, curve.degree) @ path[step], color=color, label=f"step {step}")
        right.plot(curve.train.x, curve.train.y, "o", color=DATA, markersize=4, label="training data")
        right.set(xlabel="x", ylabel="y", ylim=(-2.5, 2.5))
        right.legend(frameon=False, fontsize="small")

    return FigureSpec(
        name="15-early-stopping",
        title="Training against validation loss",
        caption=f"A polynomial of degree {curve.degree} on {len(curve.train.x)} noisy points: from step {best_step} to "
        f"step {n_steps} the training loss keeps falling, from {train_losses[best_step]:.3f} to "
        f"{train_losses[-1]:.3f}, while the validation loss turns at {valid_losses[best_step]:.3f} and climbs to "
        f"{valid_losses[-1]:.3f}. Early stopping (validation every {VALIDATE_EVERY} steps, patience {PATIENCE}) stops "
        f"at step {stop_step} and keeps the weights of step {best_step}.",
        numbers=finite_numbers(
            best_step=best_step,
            stopped_at_step=stop_step,
            best_valid_loss=valid_losses[best_step],
            last_valid_loss=valid_losses[-1],
            train_loss_at_best=train_losses[best_step],
            last_train_loss=train_losses[-1],
            lr=lr,
        ),
        draw=draw,
        figsize=(10.0, 4.2),
    )


def schedule_figure(
    seed: int, *, lr: float = 0.1, batch_size: int = 4, n_steps: int = 500, warmup_steps: int = 50, n_runs: int = 256
) -> FigureSpec:
    """Return the figure of four schedules: constant learning rates end at a noise floor, decaying ones do not."""
    problem = make_problem("l2", seed)
    points = problem.points
    start = problem.start
    schedules = {
        f"constant {lr:g}": (scheduled_lrs(Constant(), lr, n_steps), PATH),
        f"constant {lr / 10:g}": (scheduled_lrs(Constant(), lr / 10, n_steps), START),
        "cosine": (scheduled_lrs(Cosine(), lr, n_steps), DATA),
        "warm-up and cosine": (scheduled_lrs(Cosine(warmup_steps=warmup_steps), lr, n_steps), BEST),
    }

    # Measured: root mean square of the distance over many runs.
    all_lrs = torch.stack([lrs for lrs, _ in schedules.values()])
    paths = stochastic_descent(points, start, lrs=all_lrs, batch_size=batch_size, seed=seed, loss="l2", n_runs=n_runs)
    distances = (paths - problem.best).square().sum(-1).mean(1).sqrt()
    measured = dict(zip(schedules, distances, strict=True))
    constant_end, tenth_end, cosine_end, warmup_end = (float(distance[-1]) for distance in distances)
    early_step = 20
    early = [float(distance[early_step]) for distance in distances]

    # Computed: the same in theory, and where constant learning rates settle.
    expected = {
        name: expected_squared_distances(points, start, lrs=lrs, batch_size=batch_size).sqrt()
        for name, (lrs, _) in schedules.items()
    }
    floor = noise_floor(points, lr=lr, batch_size=batch_size) ** 0.5
    tenth_floor = noise_floor(points, lr=lr / 10, batch_size=batch_size) ** 0.5

    def draw(figure: "Figure") -> None:
        lr_axes, distance_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
        for name, (lrs, color) in schedules.items():
            lr_axes.plot(np.arange(n_steps) + 1, lrs, color=color)
            distance_axes.semilogy(measured[name], color=color, linewidth=0.8, label=name)
            distance_axes.semilogy(expected[name], color=color, linewidth=3, alpha=0.3)
        # One legend entry in black for the theory of all schedules.
        distance_axes.plot([], [], color="black", linewidth=3, alpha=0.3, label="computed from theory")
        for level in (floor, tenth_floor):
            distance_axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        lr_axes.set(ylabel="learning rate")
        distance_axes.set(xlabel="step", ylabel=f"distance from the minimum\n(root mean square of {n_runs} runs)")
        distance_axes.legend(frameon=False, ncols=2, fontsize="small")

    return FigureSpec(
        name="16-warm-up-and-decay",
        title="Warm-up and decay",
        caption=f"Under a constant rate of {lr:g} the noise of {batch_size}-point gradients keeps the line "
        f"{constant_end:.3f} from the minimum (in theory, dotted: {floor:.3f}); a tenth of the rate has a floor of "
        f"{tenth_floor:.3f}, but is {early[1]:.2f} away after {early_step} steps, where the full rate has "
        f"{early[0]:.2f}. Decaying along a cosine it is as fast and ends at {cosine_end:.3f}; with a warm-up, at "
        f"{warmup_end:.3f}: here the decay helps, and warm-up only costs the first steps.",
        numbers=finite_numbers(
            last_distance_constant=constant_end,
            last_distance_constant_tenth=tenth_end,
            last_distance_cosine=cosine_end,
            last_distance_warm_up_cosine=warmup_end,
            expected_last_warm_up_cosine=expected["warm-up and cosine"][-1],
            expected_last_constant=expected[f"constant {lr:g}"][-1],
            distance_after_20_constant=early[0],
            distance_after_20_constant_tenth=early[1],
            distance_after_20_warm_up_cosine=early[3],
            floor_constant=floor,
            floor_constant_tenth=tenth_floor,
        ),
        draw=draw,
        figsize=(7.2, 5.4),
    )
