"""Plates of descent on the line: by hand, at six learning rates, its gradient's norm, and on a few points at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unbraid.figures import AnimationSpec, FigureSpec
from unbraid.textbook.drawing import (
    BEST,
    PATH,
    RATES,
    START,
    draw_contour,
    draw_line,
    draw_points,
    drawable,
    equation,
    finite,
    heights,
    rate_name,
)
from unbraid.textbook.line import (
    Problem,
    brute_force,
    convolution_gradient,
    descend,
    descend_at_rates,
    gradients,
    highest_stable_lr,
    mean_loss,
    norm_of_sums,
    true_norm,
    verdicts,
)
from unbraid.textbook.training import descend_stochastic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_STEPS, N_FRAMES = 300, 60
LOST = 1e6
"""So many times the first loss, and a descent is lost."""


def by_hand_figure(problem: Problem, *, lr: float = 0.1, n_steps: int = N_FRAMES - 1) -> FigureSpec:
    """Descent seen three ways at once: the line in the data, its path on the contours, the loss."""
    path = descend(problem.points, problem.start, lr=lr, n_steps=n_steps, loss=problem.loss)
    losses = mean_loss(problem.points, path, problem.loss)
    lowest = float(mean_loss(problem.points, problem.best, problem.loss))
    grid = brute_force(problem.points, problem.loss)

    def begin(figure: "Figure") -> Callable[[int], None]:
        data, contour, curve = figure.subplots(1, 3)
        draw_points(data, problem.points)
        draw_line(data, problem.start, START, "untrained", linewidth=0.8)
        line = draw_line(data, problem.start, PATH, "descending", animated=True)
        data.legend(frameon=False, fontsize="small", loc="upper left")
        draw_contour(contour, grid, problem)
        (trail,) = contour.plot([], [], ".-", color=PATH, linewidth=1, markersize=3, animated=True)
        curve.plot(losses, color="#cccccc", linewidth=0.8)
        (done,) = curve.plot([], [], color=PATH, animated=True)
        curve.axhline(lowest, color=BEST, linewidth=0.8, linestyle="--", label=f"lowest: {lowest:.3f}")
        curve.set(xlabel="step", ylabel="mean loss", yscale="log")
        curve.legend(frameon=False)
        title = data.set_title(" ", animated=True)

        def move(frame: int) -> None:
            line.set_ydata(heights(path[frame]))
            trail.set_data(*drawable(path[: frame + 1]))
            done.set_data(np.arange(frame + 1), losses[: frame + 1].numpy())
            title.set_text(f"step {frame}: {equation(path[frame])}")

        return move

    return FigureSpec(
        name="09-descent-by-hand",
        title="Descent by hand",
        caption=f"Backward, then parameters -= {lr:g} * gradient, {n_steps} times. The first steps fall across the "
        f"valley, the rest walk along its floor: the loss comes from {losses[0]:.3f} to {losses[5]:.4f} in 5 steps, "
        f"and to {losses[-1]:.4f} in all ({lowest:.4f} is the lowest there is). The line is now {equation(path[-1])}.",
        numbers=finite(
            m=path[-1, 0],
            b=path[-1, 1],
            first_loss=losses[0],
            loss_after_5=losses[5],
            last_loss=losses[-1],
            lowest_loss=lowest,
            last_distance=(path[-1] - problem.best).norm(),
        ),
        draw=lambda figure: begin(figure)(n_steps),
        figsize=(12.0, 4.0),
        animation=AnimationSpec(n_steps + 1, begin),
    )


@dataclass(frozen=True)
class SixRates:
    """Descent from one start at the learning rates of `RATES`.

    Attributes:
        problem: What was descended on.
        paths: ``(lr, step + 1, 2)``.
        losses: ``(lr, step + 1)``.
        words: Too high, right or too low.
    """

    problem: Problem
    paths: Tensor
    losses: Tensor
    words: list[str]


def six_rates(problem: Problem) -> SixRates:
    """All six in one pass."""
    paths = descend_at_rates(problem.points, problem.start, lrs=RATES, n_steps=N_STEPS, loss=problem.loss)
    losses = mean_loss(problem.points, paths, problem.loss)
    return SixRates(problem, paths, losses, verdicts(problem, losses, RATES))


def _lost_at(losses: Tensor) -> int | None:
    """The first step at which a descent is lost."""
    lost = torch.nonzero(~(losses <= LOST * losses[0]))
    return int(lost[0]) if len(lost) else None


def _outcome(losses: Tensor) -> tuple[str, float]:
    """What became of one learning rate: a name and a number."""
    lost = _lost_at(losses)
    return ("last_loss", float(losses[-1])) if lost is None else ("lost_at_step", float(lost))


def rates_figure(six: SixRates) -> FigureSpec:
    """Six learning rates from one start, side by side."""
    problem, paths, losses, words = six.problem, six.paths, six.losses, six.words
    grid = brute_force(problem.points, problem.loss)
    outcomes = [_outcome(one) for one in losses]
    steps = np.round(N_STEPS * np.linspace(0, 1, N_FRAMES) ** 2).astype(int)  # most happens at first

    def begin(figure: "Figure") -> Callable[[int], None]:
        moving = []
        for axes, path, lr, word in zip(figure.subplots(2, 3).flat, paths, RATES, words, strict=True):
            draw_contour(axes, grid, problem)
            axes.set_title(f"learning rate {lr:g}: {word}", fontsize="medium")
            axes.label_outer()
            (trail,) = axes.plot([], [], ".-", color=PATH, linewidth=0.9, markersize=3, animated=True)
            style: dict[str, Any] = {"fontsize": "small", "backgroundcolor": "white", "animated": True}
            note = axes.text(0.03, 0.04, "", transform=axes.transAxes, **style)
            moving.append((trail, note, drawable(path)))

        def move(frame: int) -> None:
            step = int(steps[frame])
            for (trail, note, path), curve in zip(moving, losses, strict=True):
                trail.set_data(*path[:, : step + 1])
                note.set_text(f"step {step}, loss {_short(float(curve[step]))}")

        return move

    told = ", ".join(
        f"{lr:g} {'is lost at step' if name == 'lost_at_step' else 'ends at'} {number:.4g}"
        for lr, (name, number) in zip(RATES, outcomes, strict=True)
    )
    return FigureSpec(
        name="10-six-learning-rates",
        title="Six learning rates from one start",
        caption=f"The same start and {N_STEPS} steps: {told} (lost: over a million times the first loss; the lowest "
        f"there is: {mean_loss(problem.points, problem.best, problem.loss):.4g}).{_limit_told(problem)}",
        numbers={f"{name}_{rate_name(lr)}": number for lr, (name, number) in zip(RATES, outcomes, strict=True)}
        | finite(first_loss=losses[0, 0], l2_stable_below=highest_stable_lr(problem.points)),
        draw=lambda figure: begin(figure)(N_FRAMES - 1),
        figsize=(10.0, 6.4),
        animation=AnimationSpec(N_FRAMES, begin),
    )


def _limit_told(problem: Problem) -> str:
    if problem.loss != "l2":
        return ""
    limit = highest_stable_lr(problem.points)
    return (
        f" What is too high is known beforehand: above 2 / largest eigenvalue of the Hessian = {limit:.3f} a step along"
        " the steepest direction lands farther from the minimum than it set out."
    )


def _short(loss: float) -> str:
    return f"{loss:.4g}" if loss < LOST else "beyond a million"


def norms_figure(six: SixRates) -> FigureSpec:
    """Loss and gradient norm of the six; and a norm that is not one."""
    problem, paths, losses, words = six.problem, six.paths, six.losses, six.words
    norms = gradients(problem.points, paths, problem.loss).norm(dim=-1)
    lowest = mean_loss(problem.points, problem.best, problem.loss)
    gradient = convolution_gradient(problem.seed)
    true, wrong = true_norm(gradient), norm_of_sums(gradient)
    right = RATES.index(0.01)
    share = (losses[right] - lowest) / (losses[right, 0] - lowest)
    tenth = int(torch.nonzero(share <= 0.1)[0])
    late, late_of_higher = norms[right, -50:], norms[RATES.index(0.1), -50:]

    def draw(figure: "Figure") -> None:
        left, after = figure.subplots(1, 2)
        for axes, curves, name in ((left, losses, "mean loss"), (after, norms, "gradient norm")):
            low, high = _limits(curves)
            for lr, curve, word, color in zip(RATES, curves, words, COLORS, strict=True):
                axes.plot(np.arange(1, N_STEPS + 2), _shown(curve), color=color, linewidth=1.2)
                at = int(torch.nonzero((curve < high) & (curve > low))[-1])  # the end, or the last place to be seen
                axes.plot(at + 1, curve[at], MARKS[word], color=color, clip_on=False, label=f"{lr:g}: {word}")
            axes.set(xlabel="step + 1", ylabel=name, xscale="log", yscale="log")
            axes.set(xlim=(1, 1.25 * N_STEPS), ylim=(low, high))
        left.axhline(float(lowest), color="black", linewidth=0.8, linestyle="--")
        after.legend(frameon=False, fontsize="small", loc="lower left")

    falls = (
        f"At 0.01, when nine tenths of the excess loss are gone (step {tenth}), the norm has come from "
        f"{norms[right, 0]:.2f} to {norms[right, tenth]:.2f}"
    )
    tail = (
        f": with l1 it hardly falls on the way. In the last 50 steps it jumps between {late.min():.2f} and "
        f"{late.max():.2f}, and at 0.1 between {late_of_higher.min():.2f} and {late_of_higher.max():.2f}: its fall "
        "tells little of how near the minimum is."
        if problem.loss == "l1"
        else f"; at the end it is {norms[right, -1]:.2g}."
    )
    return FigureSpec(
        name="11-loss-and-gradient-norm",
        title="Loss and gradient norm at six learning rates",
        caption=f"{falls}{tail} The norm is the L2 norm over all parameters; the root of the squared sums of each "
        f"gradient is the same for m and b alone, but gives {wrong:.3f} for a convolution whose norm is {true:.3f}.",
        numbers=finite(
            first_norm=norms[0, 0],
            nine_tenths_at_step=tenth,
            norm_at_nine_tenths=norms[right, tenth],
            last_norm_lr_0_01=norms[right, -1],
            highest_of_last_50_lr_0_01=late.max(),
            convolution_norm=true,
            convolution_norm_of_sums=wrong,
        )
        | {f"{word.replace(' ', '_')}_rates": float(words.count(word)) for word in ("too high", "right", "too low")},
        draw=draw,
        figsize=(10.0, 4.4),
    )


COLORS = ("#7f0000", "#d62728", "#2ca02c", "#17becf", "#1f77b4", "#9467bd")
MARKS = {"too high": "x", "right": "o", "too low": "v"}


def _shown(curve: Tensor) -> Tensor:
    """A curve that can be drawn on log axes; the figure ends long before."""
    return curve.nan_to_num(nan=1e30, posinf=1e30).clamp(1e-30, 1e30)


def _limits(curves: Tensor) -> tuple[float, float]:
    """A little more than the span of the curves, of what is within 6 decades below their start and 3 above."""
    first = float(curves[0, 0])
    seen = curves[(curves > 1e-6 * first) & (curves < 1e3 * first)]
    return 0.5 * float(seen.min()), 2 * float(seen.max())


def batch_figure(problem: Problem, *, lr: float = 0.1, batch_size: int = 4, n_steps: int = 150) -> FigureSpec:
    """All points at every step, or a few drawn anew."""
    points, best, loss = problem.points, problem.best, problem.loss
    full = descend(points, problem.start, lr=lr, n_steps=n_steps, loss=loss)
    rates = torch.full((1, n_steps), lr, dtype=torch.float64)
    few = descend_stochastic(points, problem.start, lrs=rates, batch_size=batch_size, seed=problem.seed, loss=loss)[
        0, 0
    ]
    paths = {f"all {len(points.x)} points": (full, BEST), f"{batch_size} points a step": (few, PATH)}
    lowest = mean_loss(points, best, loss)
    distances = [(path - best).norm(dim=-1) for path in (full, few)]
    ends = [distance[-n_steps // 3 :].mean() for distance in distances]
    grid = brute_force(points, loss)

    def draw(figure: "Figure") -> None:
        whole, near, curve = figure.subplots(1, 3)
        for axes in (whole, near):
            draw_contour(axes, grid, problem)
            for label, (path, color) in paths.items():
                axes.plot(*drawable(path), ".-", color=color, label=label, linewidth=0.7, markersize=3, alpha=0.8)
        reach = 1.3 * float((few[n_steps // 3 :] - best).abs().max())
        m, b = best.tolist()
        near.set(title="near the minimum", xlim=(m - reach, m + reach), ylim=(b - reach, b + reach))
        whole.legend(frameon=False, fontsize="small", loc="lower left")
        for path, color in paths.values():
            curve.plot(mean_loss(points, path, loss), color=color, linewidth=1)
        curve.axhline(float(lowest), color="black", linewidth=0.8, linestyle="--", label="lowest")
        curve.set(xlabel="step", ylabel="mean loss over all points", yscale="log")
        curve.legend(frameon=False)

    return FigureSpec(
        name="11b-batch-and-stochastic",
        title="All points at every step, or a few",
        caption=f"Descent on all {len(points.x)} points is not stochastic: it ends {ends[0]:.1e} from the minimum "
        f"(mean of the last third). A step on {batch_size} points, drawn anew each time, costs a "
        f"{len(points.x) // batch_size}th; after 5 of them the line is {distances[1][5]:.2f} away, with all points "
        f"{distances[0][5]:.2f}, and it keeps wandering {ends[1]:.3f} from the minimum.",
        numbers=finite(
            last_distance_all=ends[0],
            last_distance_few=ends[1],
            distance_after_5_all=distances[0][5],
            distance_after_5_few=distances[1][5],
        ),
        draw=draw,
        figsize=(12.0, 4.0),
    )
