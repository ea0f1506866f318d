"""Figures of the line before any descent: the untrained line, its loss everywhere, and its gradient."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unbraid.figures import FigureSpec
from unbraid.textbook.descent_figure import batch_figure, by_hand_figure, compare_lrs, grad_norm_figure, lrs_figure
from unbraid.textbook.drawing import (
    BEST,
    PATH,
    START,
    TRUTH,
    draw_contour,
    draw_line,
    draw_points,
    draw_truth,
    equation,
    finite_numbers,
)
from unbraid.textbook.line import (
    B_RANGE,
    M_RANGE,
    TRUE_B,
    TRUE_M,
    Problem,
    brute_force,
    difference_gradient,
    gradients,
    l2_gradient,
    lines_along_axis,
    make_problem,
    mean_loss,
    point_losses,
    zero_crossing,
)
from unbraid.textbook.training_figure import early_stopping_figure, schedule_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARAMETERS = (("m", M_RANGE, TRUE_M), ("b", B_RANGE, TRUE_B))
"""Name, range and true value of the parameter along each axis."""


def line_figures(loss: str = "l2", seed: int = 0) -> list[FigureSpec]:
    """Run every experiment on the line and return its figure, in the chapter's order; nothing is drawn yet.

    Args:
        loss: ``l1``, ``l2`` or ``huber``. Stochastic descent under a schedule, and validation, are always shown on l2.
        seed: Seed of all random numbers.

    Raises:
        UserError: If there is no such loss.
    """
    problem = make_problem(loss, seed)
    comparison = compare_lrs(problem)
    return [
        untrained_figure(problem),
        data_figure(problem),
        losses_figure(problem),
        brute_force_figure(problem),
        slices_figure(problem),
        backward_figure(problem),
        gradient_along_figure(problem, 0),
        gradient_along_figure(problem, 1),
        by_hand_figure(problem),
        lrs_figure(comparison),
        grad_norm_figure(comparison),
        batch_figure(problem),
        early_stopping_figure(seed),
        schedule_figure(seed),
    ]


def untrained_figure(problem: Problem) -> FigureSpec:
    """Return the figure of the line before training."""
    m, b = problem.start.tolist()

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        draw_line(axes, problem.start, START, equation(problem.start))
        axes.plot(0, b, "o", color=START)
        axes.annotate(f"b = {b:.3f}: the height at x = 0", (0, b), (8, 14), textcoords="offset points")
        axes.axhline(0, color="black", linewidth=0.5)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set(xlabel="x", ylabel="y", ylim=(b - 2, b + 2))
        axes.legend(frameon=False)

    return FigureSpec(
        name="01-untrained-line",
        title="The untrained line",
        caption="A linear layer of one unit is a line. Before training its two parameters are whatever the random "
        f"generator gave: slope m = {m:.4f} and height b = {b:.4f}.",
        numbers=finite_numbers(m=m, b=b),
        draw=draw,
    )


def data_figure(problem: Problem) -> FigureSpec:
    """Return the figure of the data and the first prediction."""
    points = problem.points
    noise = points.y - (TRUE_M * points.x + TRUE_B)
    loss = mean_loss(points, problem.start, problem.loss)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        draw_points(axes, points)
        draw_truth(axes)
        draw_line(axes, problem.start, START, "untrained")
        axes.legend(frameon=False)

    return FigureSpec(
        name="02-data",
        title="Noisy data and the first prediction",
        caption=f"{len(noise)} points around {equation((TRUE_M, TRUE_B))}, with noise of standard deviation "
        f"{noise.std():.3f}. The untrained line misses them: its mean {problem.loss} loss is {loss:.3f}.",
        numbers=finite_numbers(
            n_points=len(noise),
            noise_deviation=noise.std(),
            x_mean=points.x.mean(),
            y_mean=points.y.mean(),
            loss=loss,
        ),
        draw=draw,
    )


def losses_figure(problem: Problem) -> FigureSpec:
    """Return the figure of each point's loss, and of three ways to reduce them to one number."""
    points = problem.points
    start = problem.start
    losses = point_losses(points, start, problem.loss)
    mean = losses.mean()
    total = losses.sum()
    highest = losses.max()
    mean_norm = gradients(points, start, problem.loss).norm()
    total_norm = len(losses) * mean_norm

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        draw_line(left, start, START, "untrained")
        predictions = start[0] * points.x + start[1]
        left.vlines(points.x, predictions, points.y, colors=PATH, linewidths=0.8, label="residual")
        draw_points(left, points)
        left.legend(frameon=False)
        right.bar(range(len(losses)), losses.numpy(), color=PATH, alpha=0.6)
        right.axhline(float(mean), color=BEST, label=f"mean {mean:.2f}")
        right.axhline(float(highest), color="black", linestyle=":", label=f"max {highest:.2f}")
        right.set(xlabel="point, from left to right", ylabel=f"{problem.loss} loss", title=f"sum {total:.1f}")
        right.legend(frameon=False)

    return FigureSpec(
        name="03-loss-of-each-point",
        title="The loss of each point, and of all",
        caption=f"Each point has its own loss. Their mean is {mean:.3f}, their sum {total:.1f}, the largest "
        f"{highest:.2f}. The sum's gradient is {len(losses)} times the mean's (norm {total_norm:.1f} against "
        f"{mean_norm:.2f}), so a learning rate that suits the mean is too high for the sum; the largest depends on a "
        "single point.",
        numbers=finite_numbers(mean=mean, sum=total, max=highest, norm_of_mean=mean_norm, norm_of_sum=total_norm),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def brute_force_figure(problem: Problem) -> FigureSpec:
    """Return the figure of a grid search over both parameters."""
    grid = brute_force(problem.points, problem.loss)
    grid_best = grid.best
    lowest = grid.losses.min()
    n_evaluations = grid.losses.numel()
    exponent = 1_000_000 * round(np.log10(len(grid.m)))

    def draw(figure: "Figure") -> None:
        surface = figure.add_subplot(1, 3, 1, projection="3d")
        mesh = np.meshgrid(grid.m, grid.b, indexing="ij")
        surface.plot_surface(*mesh, grid.losses.numpy(), cmap="viridis", rcount=40, ccount=40)
        surface.set(xlabel="m", ylabel="b", title="loss")
        surface.view_init(elev=35, azim=-60)
        contour = figure.add_subplot(1, 3, 2)
        draw_contour(contour, grid, problem)
        contour.plot(*grid_best.tolist(), "o", color=BEST, markersize=9, fillstyle="none")
        contour.set(title=f"{n_evaluations:,} evaluations in one")
        fitted = figure.add_subplot(1, 3, 3)
        draw_points(fitted, problem.points)
        draw_truth(fitted)
        draw_line(fitted, grid_best, BEST, equation(grid_best))
        fitted.legend(frameon=False)

    return FigureSpec(
        name="04-brute-force",
        title="Brute force: every m with every b",
        caption=f"The lowest of {n_evaluations:,} losses is {lowest:.4f} at m = {grid_best[0]:.3f}, b = "
        f"{grid_best[1]:.3f}; the exact answer, between the grid points, is m = {problem.best[0]:.3f}, b = "
        f"{problem.best[1]:.3f}. Two parameters need {n_evaluations:,} evaluations; a million parameters would need "
        f"10^{exponent:,}.",
        numbers=finite_numbers(
            grid_m=grid_best[0],
            grid_b=grid_best[1],
            grid_loss=lowest,
            exact_m=problem.best[0],
            exact_b=problem.best[1],
            exact_loss=mean_loss(problem.points, problem.best, problem.loss),
            n_evaluations=n_evaluations,
            exponent_of_ten_for_a_million=exponent,
        ),
        draw=draw,
        figsize=(12.0, 4.0),
    )


def slices_figure(problem: Problem) -> FigureSpec:
    """Return the figure of the loss along one parameter: with the other fixed, or averaged over."""
    grid = brute_force(problem.points, problem.loss)
    curves: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for axis, values in enumerate((grid.m, grid.b)):
        through_best = mean_loss(problem.points, lines_along_axis(problem.best, axis, values), problem.loss)
        through_start = mean_loss(problem.points, lines_along_axis(problem.start, axis, values), problem.loss)
        curves.append((values, through_best, through_start, grid.losses.mean(1 - axis)))
    m, m_best, m_start, m_mean = curves[0]
    b, b_best, b_start, b_mean = curves[1]
    lowest = finite_numbers(
        m_of_slice=m[m_best.argmin()],
        m_of_slice_through_start=m[m_start.argmin()],
        m_of_mean=m[m_mean.argmin()],
        b_of_slice=b[b_best.argmin()],
        b_of_slice_through_start=b[b_start.argmin()],
        b_of_mean=b[b_mean.argmin()],
    )

    def draw(figure: "Figure") -> None:
        for axes, (name, _, _), axis_curves in zip(figure.subplots(1, 2), PARAMETERS, curves, strict=True):
            _draw_slices(axes, name, *axis_curves)

    return FigureSpec(
        name="05-slices-and-means",
        title="The loss along one parameter",
        caption="A slice fixes the other parameter; the mean over all its values on the grid is another curve, "
        f"with another minimum: m = {lowest['m_of_mean']:.2f} where the slice through the minimum has "
        f"{lowest['m_of_slice']:.2f}, and b = {lowest['b_of_mean']:.2f} where it has {lowest['b_of_slice']:.2f}. "
        "They would agree only if m and b did not depend on each other, or the grid were centred on the answer.",
        numbers=lowest | finite_numbers(loss_of_slice=m_best.min(), loss_of_mean_over_b=m_mean.min()),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def _draw_slices(axes: "Axes", name: str, values: Tensor, best: Tensor, start: Tensor, mean: Tensor) -> None:
    curves = (
        (best, "slice through the minimum", BEST, "-"),
        (start, "slice through the start", START, ":"),
        (mean, "mean over the grid", "#9467bd", "--"),
    )
    for curve, label, color, style in curves:
        axes.plot(values, curve, style, color=color, label=label)
        lowest = curve.argmin()
        axes.plot(values[lowest], curve[lowest], "o", color=color, markersize=5)
        axes.axvline(float(values[lowest]), color=color, linewidth=0.5, linestyle=style)
    axes.set(xlabel=name, ylabel="mean loss", ylim=(0, 1.05 * float(mean.max())))
    axes.legend(framealpha=0.9, edgecolor="white", fontsize="small")


def backward_figure(problem: Problem) -> FigureSpec:
    """Return the figure that checks PyTorch's gradient against gradients computed without it."""
    points = problem.points
    loss = problem.loss
    start = problem.start
    lines = torch.stack([problem.best, start])
    backward = gradients(points, lines, loss)
    differences = difference_gradient(points, lines, loss)
    by_method = {"backward": backward, "differences": differences}
    if loss == "l2":
        by_method["formula"] = l2_gradient(points, lines)

    # The error of forward and central differences at the start, by the size of the difference.
    sizes = torch.logspace(-12, 0, 49, dtype=torch.float64)
    central = torch.stack([difference_gradient(points, start, loss, float(size)) for size in sizes])
    moves = sizes[:, None, None] * torch.eye(2, dtype=torch.float64)
    forward = (mean_loss(points, start + moves, loss) - mean_loss(points, start, loss)) / sizes[:, None]
    errors = {
        "forward": (forward - backward[1]).norm(dim=-1),
        "central": (central - backward[1]).norm(dim=-1),
    }

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        _draw_derivatives(left, by_method)
        for name, error in errors.items():
            # Clamped, because log axes have no 0.
            right.loglog(sizes, error.clamp(min=1e-17), ".-", label=f"{name} differences", linewidth=0.8)
        right.set(xlabel="size of the difference", ylabel="distance from backward's gradient", title="at the start")
        right.legend(frameon=False)

    kink = (
        " The best l1 line goes through two points: the loss has a kink there, and backward gives one of its slopes."
        if loss == "l1"
        else ""
    )
    return FigureSpec(
        name="06-backward",
        title="Backward, checked",
        caption=f"At the minimum backward gives a gradient of norm {backward[0].norm():.1e}, at the start "
        f"({backward[1, 0]:.4f}, {backward[1, 1]:.4f}). Central differences of the loss alone agree to "
        f"{(backward - differences)[1].norm():.1e} at the start; smaller differences drown in rounding.{kink}",
        numbers=finite_numbers(
            start_m_backward=backward[1, 0],
            start_b_backward=backward[1, 1],
            start_m_differences=differences[1, 0],
            start_b_differences=differences[1, 1],
        ),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def _draw_derivatives(axes: "Axes", by_method: dict[str, Tensor]) -> None:
    """Draw the size of both derivatives at minimum and start, side by side for each method."""
    for index, (name, gradient) in enumerate(by_method.items()):
        # What rounding leaves of 0 differs from machine to machine, and even from run to run: draw all of it alike.
        sizes = gradient.flatten().abs().clamp(min=1e-10)
        x = np.arange(4) + 0.15 * (index - (len(by_method) - 1) / 2)
        axes.semilogy(x, sizes, "os^"[index], label=name)
    axes.set_xticks(range(4), ["m, at the\nminimum", "b, at the\nminimum", "m, at the\nstart", "b, at the\nstart"])
    axes.set(ylabel="size of the derivative (1e-10: 0 up to rounding)", xlim=(-0.5, 3.5))
    axes.legend(frameon=False, loc="center left")


def gradient_along_figure(problem: Problem, axis: int) -> FigureSpec:
    """Return the figure of the gradient along m (axis 0) or b (axis 1), through the minimum and through the start."""
    name, value_range, truth = PARAMETERS[axis]
    other_name = PARAMETERS[1 - axis][0]
    values = torch.linspace(*value_range, 281, dtype=torch.float64)
    best_lines = lines_along_axis(problem.best, axis, values)
    start_lines = lines_along_axis(problem.start, axis, values)
    through_best = gradients(problem.points, best_lines, problem.loss)[:, axis]
    through_start = gradients(problem.points, start_lines, problem.loss)[:, axis]
    best_crossing = zero_crossing(values, through_best)
    start_crossing = zero_crossing(values, through_start)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.plot(values, through_best, color=BEST, label="through the minimum")
        axes.plot(values, through_start, ":", color=START, label="through the start")
        axes.plot([best_crossing, start_crossing], [0, 0], "o", color="black", markersize=5)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.axvline(truth, color=TRUTH, linestyle="--", linewidth=1, label=f"true {name}")
        axes.set(xlabel=name, ylabel=f"derivative by {name}")
        axes.legend(frameon=False)

    return FigureSpec(
        name=f"{7 + axis:02d}-gradient-along-{name}",
        title=f"The gradient along {name}",
        caption=f"With {other_name} fixed at its best value the derivative by {name} is negative to the left, positive "
        f"to the right, and passes zero at {name} = {best_crossing:.3f} (the minimum has "
        f"{float(problem.best[axis]):.3f}, the truth is {truth:g}). With {other_name} fixed at its initial value it "
        f"passes zero at {start_crossing:.3f}: one derivative of zero is not yet a minimum.",
        numbers=finite_numbers(
            crossing=best_crossing,
            crossing_through_start=start_crossing,
            lowest_derivative=through_best.min(),
            highest_derivative=through_best.max(),
        ),
        draw=draw,
    )
