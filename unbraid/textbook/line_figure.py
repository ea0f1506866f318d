"""Plates of the line: the untrained line, its loss everywhere, its gradient; what descends on it is drawn elsewhere."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unbraid.figures import FigureSpec
from unbraid.textbook.descent_figure import batch_figure, by_hand_figure, norms_figure, rates_figure, six_rates
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
    finite,
)
from unbraid.textbook.line import (
    B_RANGE,
    M_RANGE,
    TRUE_B,
    TRUE_M,
    Problem,
    along,
    brute_force,
    crossing,
    difference_gradient,
    gradients,
    l2_gradient,
    make_problem,
    mean_loss,
    point_losses,
)
from unbraid.textbook.training_figure import early_stopping_figure, schedule_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = (("m", M_RANGE, TRUE_M), ("b", B_RANGE, TRUE_B))


def line_figures(loss: str = "l2", seed: int = 0) -> list[FigureSpec]:
    """Every experiment on the line, in the chapter's order; nothing is drawn yet.

    Args:
        loss: ``l1``, ``l2`` or ``huber``. Stochastic descent under a schedule, and validation, are always shown on l2.
        seed: Of all draws.

    Raises:
        UserError: If there is no such loss.
    """
    problem = make_problem(loss, seed)
    six = six_rates(problem)
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
        rates_figure(six),
        norms_figure(six),
        batch_figure(problem),
        early_stopping_figure(seed),
        schedule_figure(seed),
    ]


def untrained_figure(problem: Problem) -> FigureSpec:
    """The line before anything is learnt."""
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
        caption=f"A linear layer of one unit is a line. Before training its two numbers are whatever the generator "
        f"gave: slope m = {m:.4f} and height b = {b:.4f}.",
        numbers=finite(m=m, b=b),
        draw=draw,
    )


def data_figure(problem: Problem) -> FigureSpec:
    """What the line is to go through."""
    points = problem.points
    off = points.y - (TRUE_M * points.x + TRUE_B)
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
        caption=f"{len(off)} points lie around {equation((TRUE_M, TRUE_B))}, off it by {off.std():.3f} (standard "
        f"deviation). The untrained line misses them: its mean {problem.loss} loss is {loss:.3f}.",
        numbers=finite(
            n_points=len(off), noise_deviation=off.std(), x_mean=points.x.mean(), y_mean=points.y.mean(), loss=loss
        ),
        draw=draw,
    )


def losses_figure(problem: Problem) -> FigureSpec:
    """One loss a point, and three ways to make one number of them."""
    points, start = problem.points, problem.start
    losses = point_losses(points, start, problem.loss)
    mean, total, highest = losses.mean(), losses.sum(), losses.max()
    slope = gradients(points, start, problem.loss).norm()

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        draw_line(left, start, START, "untrained")
        foot = start[0] * points.x + start[1]
        left.vlines(points.x, foot, points.y, colors=PATH, linewidths=0.8, label="what it is off by")
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
        caption=f"Each point has a loss of its own. Their mean is {mean:.3f}, their sum {total:.1f}, the largest "
        f"{highest:.2f}. The sum's gradient is {len(losses)} times the mean's (norm {len(losses) * slope:.1f} against "
        f"{slope:.2f}), so a learning rate that suits the mean is too high for the sum; the largest listens to a "
        "single point.",
        numbers=finite(mean=mean, sum=total, max=highest, norm_of_mean=slope, norm_of_sum=len(losses) * slope),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def brute_force_figure(problem: Problem) -> FigureSpec:
    """Every pair of values tried."""
    grid = brute_force(problem.points, problem.loss)
    found, lowest = grid.best, grid.losses.min()
    n_tried = grid.losses.numel()
    exponent = 1_000_000 * round(np.log10(len(grid.m)))

    def draw(figure: "Figure") -> None:
        surface = figure.add_subplot(1, 3, 1, projection="3d")
        mesh = np.meshgrid(grid.m, grid.b, indexing="ij")
        surface.plot_surface(*mesh, grid.losses.numpy(), cmap="viridis", rcount=40, ccount=40)
        surface.set(xlabel="m", ylabel="b", title="loss")
        surface.view_init(elev=35, azim=-60)
        contour = figure.add_subplot(1, 3, 2)
        draw_contour(contour, grid, problem)
        contour.plot(*found.tolist(), "o", color=BEST, markersize=9, fillstyle="none")
        contour.set(title=f"{n_tried:,} evaluations in one")
        fitted = figure.add_subplot(1, 3, 3)
        draw_points(fitted, problem.points)
        draw_truth(fitted)
        draw_line(fitted, found, BEST, equation(found))
        fitted.legend(frameon=False)

    return FigureSpec(
        name="04-brute-force",
        title="Brute force: every m with every b",
        caption=f"The lowest of {n_tried:,} losses is {lowest:.4f} at m = {found[0]:.3f}, b = {found[1]:.3f}; the "
        f"exact answer, not bound to the grid, is m = {problem.best[0]:.3f}, b = {problem.best[1]:.3f}. Two numbers "
        f"need {n_tried:,} evaluations; a million numbers would need 10^{exponent:,}.",
        numbers=finite(
            grid_m=found[0],
            grid_b=found[1],
            grid_loss=lowest,
            exact_m=problem.best[0],
            exact_b=problem.best[1],
            exact_loss=mean_loss(problem.points, problem.best, problem.loss),
            n_evaluations=n_tried,
            exponent_of_ten_for_a_million=exponent,
        ),
        draw=draw,
        figsize=(12.0, 4.0),
    )


def slices_figure(problem: Problem) -> FigureSpec:
    """The loss along one number: with the other held, or averaged over."""
    grid = brute_force(problem.points, problem.loss)
    curves: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for axis, values in enumerate((grid.m, grid.b)):
        at_best, at_start = (
            mean_loss(problem.points, along(line, axis, values), problem.loss) for line in (problem.best, problem.start)
        )
        curves.append((values, at_best, at_start, grid.losses.mean(1 - axis)))
    (m, m_best, m_start, m_mean), (b, b_best, b_start, b_mean) = curves
    lowest = finite(
        m_of_slice=m[m_best.argmin()],
        m_of_slice_through_start=m[m_start.argmin()],
        m_of_mean=m[m_mean.argmin()],
        b_of_slice=b[b_best.argmin()],
        b_of_slice_through_start=b[b_start.argmin()],
        b_of_mean=b[b_mean.argmin()],
    )

    def draw(figure: "Figure") -> None:
        for axes, (name, _, _), each in zip(figure.subplots(1, 2), AXES, curves, strict=True):
            _draw_slices(axes, name, *each)

    return FigureSpec(
        name="05-slices-and-means",
        title="The loss along one number",
        caption=f"A slice holds the other number still; the mean over all its values on the grid is another curve, "
        f"with another lowest point: m = {lowest['m_of_mean']:.2f} where the slice through the minimum has "
        f"{lowest['m_of_slice']:.2f}, and b = {lowest['b_of_mean']:.2f} where it has {lowest['b_of_slice']:.2f}. "
        "They would agree only if m and b did not depend on each other, or the grid were centred on the answer.",
        numbers=lowest | finite(loss_of_slice=m_best.min(), loss_of_mean_over_b=m_mean.min()),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def _draw_slices(axes: "Axes", name: str, at: Tensor, best: Tensor, start: Tensor, mean: Tensor) -> None:
    labels = ("slice through the minimum", "slice through the start", "mean over the grid")
    styles = ((BEST, "-"), (START, ":"), ("#9467bd", "--"))
    for curve, label, (color, style) in zip((best, start, mean), labels, styles, strict=True):
        axes.plot(at, curve, style, color=color, label=label)
        place = curve.argmin()
        axes.plot(at[place], curve[place], "o", color=color, markersize=5)
        axes.axvline(float(at[place]), color=color, linewidth=0.5, linestyle=style)
    axes.set(xlabel=name, ylabel="mean loss", ylim=(0, 1.05 * float(mean.max())))
    axes.legend(framealpha=0.9, edgecolor="white", fontsize="small")


def backward_figure(problem: Problem) -> FigureSpec:
    """PyTorch's gradient against gradients got without it."""
    points, loss, lines = problem.points, problem.loss, torch.stack([problem.best, problem.start])
    backward, differences = gradients(points, lines, loss), difference_gradient(points, lines, loss)
    sizes = torch.logspace(-12, 0, 49, dtype=torch.float64)
    start = problem.start
    central = torch.stack([difference_gradient(points, start, loss, float(h)) for h in sizes])
    moves = sizes[:, None, None] * torch.eye(2, dtype=torch.float64)
    here = mean_loss(points, start, loss)
    forward = (mean_loss(points, start + moves, loss) - here) / sizes[:, None]
    off = {name: (found - backward[1]).norm(dim=-1) for name, found in (("forward", forward), ("central", central))}
    on_paper = {"on paper": l2_gradient(points, lines)} if loss == "l2" else {}
    shown = {"backward": backward, "differences": differences, **on_paper}

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        _draw_sizes(left, shown)
        for name, error in off.items():
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
        f"{(backward - differences)[1].norm():.1e} at the start; made smaller, they drown in rounding.{kink}",
        numbers=finite(
            start_m_backward=backward[1, 0],
            start_b_backward=backward[1, 1],
            start_m_differences=differences[1, 0],
            start_b_differences=differences[1, 1],
        ),
        draw=draw,
        figsize=(9.6, 4.0),
    )


def _draw_sizes(axes: "Axes", shown: dict[str, Tensor]) -> None:
    """How large both derivatives are at both places, side by side for each way to get them."""
    for place, (name, found) in enumerate(shown.items()):
        sizes = found.flatten().abs().clamp(min=1e-17)
        axes.semilogy(np.arange(4) + 0.15 * (place - (len(shown) - 1) / 2), sizes, "os^"[place], label=name)
    axes.set_xticks(range(4), ["m, at the\nminimum", "b, at the\nminimum", "m, at the\nstart", "b, at the\nstart"])
    axes.set(ylabel="size of the derivative (1e-17 and less: 0)", xlim=(-0.5, 3.5))
    axes.legend(frameon=False, loc="center left")


def gradient_along_figure(problem: Problem, axis: int) -> FigureSpec:
    """The gradient along m (axis 0) or b (1): zero at the minimum, and elsewhere on another slice."""
    name, span, truth = AXES[axis]
    values = torch.linspace(*span, 281, dtype=torch.float64)
    at_best, at_start = (
        gradients(problem.points, along(line, axis, values), problem.loss)[:, axis]
        for line in (problem.best, problem.start)
    )
    best, other = crossing(values, at_best), crossing(values, at_start)

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.plot(values, at_best, color=BEST, label="through the minimum")
        axes.plot(values, at_start, ":", color=START, label="through the start")
        axes.plot([best, other], [0, 0], "o", color="black", markersize=5)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.axvline(truth, color=TRUTH, linestyle="--", linewidth=1, label=f"true {name}")
        axes.set(xlabel=name, ylabel=f"derivative by {name}")
        axes.legend(frameon=False)

    held = AXES[1 - axis][0]
    return FigureSpec(
        name=f"{7 + axis:02d}-gradient-along-{name}",
        title=f"The gradient along {name}",
        caption=f"With {held} held at its best value the derivative by {name} is negative to the left, positive to the "
        f"right, and passes zero at {name} = {best:.3f} (the minimum has {float(problem.best[axis]):.3f}, the truth is "
        f"{truth:g}). With {held} held where it starts it passes zero at {other:.3f}: one derivative of zero is not "
        "yet a minimum.",
        numbers=finite(
            crossing=best,
            crossing_through_start=other,
            lowest_derivative=at_best.min(),
            highest_derivative=at_best.max(),
        ),
        draw=draw,
    )
