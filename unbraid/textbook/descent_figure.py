"""Figures of descent on the line: by hand, at six learning rates, its gradient norm, and on a few points a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unbraid.figures import AnimationSpec, FigureSpec
from unbraid.textbook.drawing import (
    BEST,
    LRS,
    PATH,
    START,
    draw_contour,
    draw_line,
    draw_points,
    drawable_path,
    equation,
    finite_numbers,
    line_ends,
    lr_key,
)
from unbraid.textbook.line import (
    Problem,
    brute_force,
    classify_lrs,
    convolution_gradient,
    descend,
    descend_at_lrs,
    grad_norm,
    gradients,
    highest_stable_lr,
    mean_loss,
    norm_of_sums,
)
from unbraid.textbook.training import stochastic_descent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_STEPS = 300
N_FRAMES = 60
DIVERGED = 1e6
"""A descent has diverged at this many times its first loss."""


def by_hand_figure(problem: Problem, *, lr: float = 0.1, n_steps: int = N_FRAMES - 1) -> FigureSpec:
    """Return the figure of one descent: the line in the data, its path on the contours, and the loss."""
    path = descend(problem.points, problem.start, lr=lr, n_steps=n_steps, loss=problem.loss)
    losses = mean_loss(problem.points, path, problem.loss)
    lowest = float(mean_loss(problem.points, problem.best, problem.loss))
    grid = brute_force(problem.points, problem.loss)

    def start_animation(figure: "Figure") -> Callable[[int], None]:
        data_axes, contour_axes, loss_axes = figure.subplots(1, 3)
        draw_points(data_axes, problem.points)
        draw_line(data_axes, problem.start, START, "untrained", linewidth=0.8)
        line = draw_line(data_axes, problem.start, PATH, "descending", animated=True)
        data_axes.legend(frameon=False, fontsize="small", loc="upper left")
        draw_contour(contour_axes, grid, problem)
        (trail,) = contour_axes.plot([], [], ".-", color=PATH, linewidth=1, markersize=3, animated=True)
        # The whole curve in grey, and the steps so far on top.
        loss_axes.plot(losses, color="#cccccc", linewidth=0.8)
        (steps_so_far,) = loss_axes.plot([], [], color=PATH, animated=True)
        loss_axes.axhline(lowest, color=BEST, linewidth=0.8, linestyle="--", label=f"lowest: {lowest:.3f}")
        loss_axes.set(xlabel="step", ylabel="mean loss", yscale="log")
        loss_axes.legend(frameon=False)
        title = data_axes.set_title(" ", animated=True)

        def go_to_frame(frame: int) -> None:
            line.set_ydata(line_ends(path[frame]))
            trail.set_data(*drawable_path(path[: frame + 1]))
            steps_so_far.set_data(np.arange(frame + 1), losses[: frame + 1].numpy())
            title.set_text(f"step {frame}: {equation(path[frame])}")

        return go_to_frame

    return FigureSpec(
        name="09-descent-by-hand",
        title="Descent by hand",
        caption=f"Backward, then parameters -= {lr:g} * gradient, {n_steps} times. The first steps fall across the "
        f"valley, the rest walk along its floor: the loss falls from {losses[0]:.3f} to {losses[5]:.4f} in 5 steps, "
        f"and to {losses[-1]:.4f} in all (the minimum is {lowest:.4f}). The line is now {equation(path[-1])}.",
        numbers=finite_numbers(
            m=path[-1, 0],
            b=path[-1, 1],
            first_loss=losses[0],
            loss_after_5=losses[5],
            last_loss=losses[-1],
            lowest_loss=lowest,
            last_distance=(path[-1] - problem.best).norm(),
        ),
        draw=lambda figure: start_animation(figure)(n_steps),
        figsize=(12.0, 4.0),
        animation=AnimationSpec(n_steps + 1, start_animation),
    )


@dataclass(frozen=True)
class LrComparison:
    """Descents from one start at each of `LRS`.

    Attributes:
        problem: What was descended on.
        paths: ``(lr, step + 1, 2)``.
        losses: Mean losses, ``(lr, step + 1)``.
        classes: ``"too high"``, ``"right"`` or ``"too low"`` for each learning rate.
    """

    problem: Problem
    paths: Tensor
    losses: Tensor
    classes: list[str]


def compare_lrs(problem: Problem) -> LrComparison:
    """Descend at every learning rate of `LRS`, all at once."""
    paths = descend_at_lrs(problem.points, problem.start, lrs=LRS, n_steps=N_STEPS, loss=problem.loss)
    losses = mean_loss(problem.points, paths, problem.loss)
    return LrComparison(problem, paths, losses, classify_lrs(problem, losses, LRS))


def lrs_figure(comparison: LrComparison) -> FigureSpec:
    """Return the figure of six paths on the contours, one for each learning rate."""
    problem = comparison.problem
    grid = brute_force(problem.points, problem.loss)
    # Most happens at first, so frames are close together there.
    frame_steps = np.round(N_STEPS * np.linspace(0, 1, N_FRAMES) ** 2).astype(int)

    def start_animation(figure: "Figure") -> Callable[[int], None]:
        moving = []
        panels = zip(figure.subplots(2, 3).flat, comparison.paths, LRS, comparison.classes, strict=True)
        for axes, path, lr, lr_class in panels:
            draw_contour(axes, grid, problem)
            axes.set_title(f"learning rate {lr:g}: {lr_class}", fontsize="medium")
            axes.label_outer()
            (trail,) = axes.plot([], [], ".-", color=PATH, linewidth=0.9, markersize=3, animated=True)
            style: dict[str, Any] = {"fontsize": "small", "backgroundcolor": "white", "animated": True}
            note = axes.text(0.03, 0.04, "", transform=axes.transAxes, **style)
            moving.append((trail, note, drawable_path(path)))

        def go_to_frame(frame: int) -> None:
            step = int(frame_steps[frame])
            for (trail, note, path), losses in zip(moving, comparison.losses, strict=True):
                trail.set_data(*path[:, : step + 1])
                loss = float(losses[step])
                note.set_text(f"step {step}, loss {f'{loss:.4g}' if loss < DIVERGED else 'above a million'}")

        return go_to_frame

    # What the caption says of each learning rate, and the number behind it.
    results = []
    numbers = {}
    for lr, losses in zip(LRS, comparison.losses, strict=True):
        diverged_at = _divergence_step(losses)
        if diverged_at is None:
            results.append(f"{lr:g} ends at {losses[-1]:.4g}")
            numbers[f"last_loss_{lr_key(lr)}"] = float(losses[-1])
        else:
            results.append(f"{lr:g} has diverged by step {diverged_at}")
            numbers[f"diverged_at_step_{lr_key(lr)}"] = float(diverged_at)
    limit = highest_stable_lr(problem.points)
    theory = (
        f" Theory says what is too high: above 2 / largest eigenvalue of the Hessian = {limit:.3f} a step along the "
        "steepest direction ends farther from the minimum than it began."
        if problem.loss == "l2"
        else ""
    )
    return FigureSpec(
        name="10-six-learning-rates",
        title="Six learning rates from one start",
        caption=f"The same start and {N_STEPS} steps: {', '.join(results)} (diverged: over a million times the first "
        f"loss; the minimum is {mean_loss(problem.points, problem.best, problem.loss):.4g}).{theory}",
        numbers=numbers | finite_numbers(first_loss=comparison.losses[0, 0], l2_stable_below=limit),
        draw=lambda figure: start_animation(figure)(N_FRAMES - 1),
        figsize=(10.0, 6.4),
        animation=AnimationSpec(N_FRAMES, start_animation),
    )


def _divergence_step(losses: Tensor) -> int | None:
    """Return the first step at which a descent has diverged, or None if it has not."""
    diverged = torch.nonzero(~(losses <= DIVERGED * losses[0]))  # "not below" is also true of NaN
    return int(diverged[0]) if len(diverged) else None


COLORS = ("#7f0000", "#d62728", "#2ca02c", "#17becf", "#1f77b4", "#9467bd")
MARKERS = {"too high": "x", "right": "o", "too low": "v"}


def grad_norm_figure(comparison: LrComparison) -> FigureSpec:
    """Return the figure of loss and gradient norm at six learning rates."""
    problem = comparison.problem
    losses = comparison.losses
    norms = gradients(problem.points, comparison.paths, problem.loss).norm(dim=-1)
    lowest = mean_loss(problem.points, problem.best, problem.loss)
    gradient = convolution_gradient(problem.seed)
    convolution_norm = grad_norm(gradient)
    wrong_norm = norm_of_sums(gradient)
    index_01 = LRS.index(0.1)
    index_001 = LRS.index(0.01)
    excess_fraction = (losses[index_001] - lowest) / (losses[index_001, 0] - lowest)
    nine_tenths_step = int(torch.nonzero(excess_fraction <= 0.1)[0])
    last_norms = norms[index_001, -50:]
    last_norms_01 = norms[index_01, -50:]

    def draw(figure: "Figure") -> None:
        loss_axes, norm_axes = figure.subplots(1, 2)
        for axes, curves, name in ((loss_axes, losses, "mean loss"), (norm_axes, norms, "gradient norm")):
            low, high = _y_limits(curves)
            for lr, curve, lr_class, color in zip(LRS, curves, comparison.classes, COLORS, strict=True):
                axes.plot(np.arange(1, N_STEPS + 2), _for_log_axes(curve), color=color, linewidth=1.2)
                # Mark the end of the curve, or the last step inside the figure.
                last_visible = int(torch.nonzero((curve < high) & (curve > low))[-1])
                marker = MARKERS[lr_class]
                label = f"{lr:g}: {lr_class}"
                axes.plot(last_visible + 1, curve[last_visible], marker, color=color, clip_on=False, label=label)
            axes.set(xlabel="step + 1", ylabel=name, xscale="log", yscale="log")
            axes.set(xlim=(1, 1.25 * N_STEPS), ylim=(low, high))
        loss_axes.axhline(float(lowest), color="black", linewidth=0.8, linestyle="--")
        norm_axes.legend(frameon=False, fontsize="small", loc="lower left")

    beginning = (
        f"At 0.01, when nine tenths of the excess loss are gone (step {nine_tenths_step}), the norm has fallen from "
        f"{norms[index_001, 0]:.2f} to {norms[index_001, nine_tenths_step]:.2f}"
    )
    end = (
        f": with l1 it hardly falls on the way. In the last 50 steps it jumps between {last_norms.min():.2f} and "
        f"{last_norms.max():.2f}, and at 0.1 between {last_norms_01.min():.2f} and {last_norms_01.max():.2f}: it says "
        "little about how near the minimum is."
        if problem.loss == "l1"
        else f"; at the end it is {norms[index_001, -1]:.2g}."
    )
    counts = {
        f"{name.replace(' ', '_')}_rates": float(comparison.classes.count(name))
        for name in ("too high", "right", "too low")
    }
    return FigureSpec(
        name="11-loss-and-gradient-norm",
        title="Loss and gradient norm at six learning rates",
        caption=f"{beginning}{end} The norm is the L2 norm over all parameters; the root of the squared sums of each "
        f"gradient is the same for m and b alone, but gives {wrong_norm:.3f} for a convolution whose norm is "
        f"{convolution_norm:.3f}.",
        numbers=finite_numbers(
            first_norm=norms[0, 0],
            nine_tenths_at_step=nine_tenths_step,
            norm_at_nine_tenths=norms[index_001, nine_tenths_step],
            last_norm_lr_0_01=norms[index_001, -1],
            highest_of_last_50_lr_0_01=last_norms.max(),
            convolution_norm=convolution_norm,
            convolution_norm_of_sums=wrong_norm,
        )
        | counts,
        draw=draw,
        figsize=(10.0, 4.4),
    )


def _for_log_axes(curve: Tensor) -> Tensor:
    """Return a curve without 0, NaN and infinity, which log axes cannot show; the replacements lie outside."""
    return curve.nan_to_num(nan=1e30, posinf=1e30).clamp(1e-30, 1e30)


def _y_limits(curves: Tensor) -> tuple[float, float]:
    """Return y limits around the values from 6 decades below the first value to 3 decades above it."""
    first = float(curves[0, 0])
    visible = curves[(curves > 1e-6 * first) & (curves < 1e3 * first)]
    return 0.5 * float(visible.min()), 2 * float(visible.max())


def batch_figure(problem: Problem, *, lr: float = 0.1, batch_size: int = 4, n_steps: int = 150) -> FigureSpec:
    """Return the figure of descent on all points, and on a few points redrawn for each step."""
    points = problem.points
    n_points = len(points.x)
    full_path = descend(points, problem.start, lr=lr, n_steps=n_steps, loss=problem.loss)
    lrs = torch.full((1, n_steps), lr, dtype=torch.float64)
    stochastic_path = stochastic_descent(
        points, problem.start, lrs=lrs, batch_size=batch_size, seed=problem.seed, loss=problem.loss
    )[0, 0]
    paths = {f"all {n_points} points": (full_path, BEST), f"{batch_size} points a step": (stochastic_path, PATH)}
    lowest = mean_loss(points, problem.best, problem.loss)
    full_distance = (full_path - problem.best).norm(dim=-1)
    stochastic_distance = (stochastic_path - problem.best).norm(dim=-1)
    # One step says little of a path that wanders: take the mean over the last third.
    full_end = full_distance[-n_steps // 3 :].mean()
    stochastic_end = stochastic_distance[-n_steps // 3 :].mean()
    grid = brute_force(points, problem.loss)

    def draw(figure: "Figure") -> None:
        whole_axes, near_axes, loss_axes = figure.subplots(1, 3)
        for axes in (whole_axes, near_axes):
            draw_contour(axes, grid, problem)
            for label, (path, color) in paths.items():
                style = {"linewidth": 0.7, "markersize": 3, "alpha": 0.8}
                axes.plot(*drawable_path(path), ".-", color=color, label=label, **style)
        radius = 1.3 * float((stochastic_path[n_steps // 3 :] - problem.best).abs().max())
        m, b = problem.best.tolist()
        near_axes.set(title="near the minimum", xlim=(m - radius, m + radius), ylim=(b - radius, b + radius))
        whole_axes.legend(frameon=False, fontsize="small", loc="lower left")
        for path, color in paths.values():
            loss_axes.plot(mean_loss(points, path, problem.loss), color=color, linewidth=1)
        loss_axes.axhline(float(lowest), color="black", linewidth=0.8, linestyle="--", label="lowest")
        loss_axes.set(xlabel="step", ylabel="mean loss over all points", yscale="log")
        loss_axes.legend(frameon=False)

    return FigureSpec(
        name="11b-batch-and-stochastic",
        title="All points at every step, or a few",
        caption=f"Descent on all {n_points} points is not stochastic: it ends {full_end:.1e} from the minimum "
        f"(mean of the last third). A step on {batch_size} points, redrawn each time, costs a "
        f"{n_points // batch_size}th; after 5 of them the line is {stochastic_distance[5]:.2f} away, with all points "
        f"{full_distance[5]:.2f}, and it keeps wandering {stochastic_end:.3f} from the minimum.",
        numbers=finite_numbers(
            last_distance_all=full_end,
            last_distance_few=stochastic_end,
            distance_after_5_all=full_distance[5],
            distance_after_5_few=stochastic_distance[5],
        ),
        draw=draw,
        figsize=(12.0, 4.0),
    )
