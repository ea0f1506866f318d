"""Figures of the chapter's surfaces: optimizer races, a cliff, recurrent gradients, and AutoClip's limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import AnimationSpec, FigureSpec
from unbraid.seeding import generator
from unbraid.textbook.surfaces import (
    LR_GRID,
    DentedBowl,
    Descent,
    Quadratic,
    RecurrentNeuron,
    Surface,
    TunedDescent,
    autoclip_max_norms,
    clip_gradient,
    descend,
    grid_points,
    losses_at,
    lstm_gradients,
    make_clippers,
    race,
    random_orthogonal,
    recurrent_gradients,
    training_norms,
)
from unbraid.train.optim import OPTIMIZERS
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#111111")
N_FRAMES = 55
PERCENTILES = (0, 1, 10, 25, 50, 90, 100)


def surface_figures(seed: int) -> list[FigureSpec]:
    """Run the experiments on surfaces and return their figures, in the chapter's order; nothing is drawn yet."""
    return [
        narrow_valley_figure(),
        spiky_surface_figure(seed),
        cliff_figure(),
        recurrence_figure(seed),
        autoclip_figure(seed),
    ]


@dataclass(frozen=True)
class _SurfaceGrid:
    """A surface sampled on a grid.

    Attributes:
        x: ``(x,)``.
        y: ``(y,)``.
        losses: ``(y, x)``.
    """

    x: FloatArray
    y: FloatArray
    losses: FloatArray

    @classmethod
    def sample(
        cls, surface: Surface, x_range: tuple[float, float], y_range: tuple[float, float], n_points: int = 181
    ) -> "_SurfaceGrid":
        x, y, points = grid_points(x_range, y_range, n_points)
        return cls(x, y, losses_at(surface, points))

    def draw(self, axes: "Axes", levels: FloatArray, labels: tuple[str, str] = ("x", "y")) -> None:
        axes.contourf(self.x, self.y, self.losses, levels=levels, cmap="Blues_r", extend="both", alpha=0.6)
        axes.set(xlim=(self.x[0], self.x[-1]), ylim=(self.y[0], self.y[-1]), xlabel=labels[0], ylabel=labels[1])


# Optimizer races

_MUON_CAPTION = (
    "Muon is made for matrices and sees the two weights as a matrix of one row: what remains of it are momentum "
    "steps of constant length, so it cannot settle unless the learning rate decays."
)


def narrow_valley_figure() -> FigureSpec:
    """Return the figure of optimizers in a valley 100 times as steep across as along."""
    surface = Quadratic.rotated((0.08, 8.0), 30, (1.0, 0.5))
    n_steps = 150
    results = race(surface, [[-4.0, 2.0]], n_steps)
    final_losses = {name: float(result.descent.final_loss[0]) for name, result in results.items()}
    best = min(final_losses, key=final_losses.__getitem__)
    worst = max(final_losses, key=final_losses.__getitem__)
    sgd_lr = results["SGD"].lr
    distance_kept = max(abs(1 - sgd_lr * 0.08), abs(1 - sgd_lr * 8))
    caption = (
        f"A valley 100 times as steep across as along (curvatures 8 and 0.08), and {n_steps} steps from one start "
        f"(dot) towards the minimum (star). {_best_lrs_caption(results)} Plain SGD must stay below 2/8 = 0.25, or "
        f"it climbs the walls; at {sgd_lr:g} every step leaves {100 * distance_kept:.1f} % of the distance along the "
        f"valley. {best} ends lowest, at {final_losses[best]:.1e}; {worst} highest, at {final_losses[worst]:.1e}. "
        f"AdamW is Adam that also shrinks the weights a little, and here the minimum is not at 0. {_MUON_CAPTION}"
    )
    grid = _SurfaceGrid.sample(surface, (-6.0, 4.0), (-5.0, 4.0))
    show = partial(_show_race, results, grid, np.geomspace(0.01, 60, 14), surface.minimum, "log")
    return _animated_figure(
        "12-race-narrow-valley", "Six optimizers in a narrow valley", caption, _race_numbers(results), show, n_steps
    )


def spiky_surface_figure(seed: int, n_starts: int = 40) -> FigureSpec:
    """Return the figure of optimizers on a dented bowl; it shows one start, and its numbers are of many."""
    surface = DentedBowl.random(seed)
    n_steps = 150
    grid = _SurfaceGrid.sample(surface, (-4.2, 4.2), (-4.2, 4.2), 301)
    row, column = np.unravel_index(grid.losses.argmin(), grid.losses.shape)
    lowest = float(grid.losses.min())
    lowest_point = np.array([grid.x[column], grid.y[row]])
    starts = np.vstack([[-3.5, 3.0], generator(seed, "starts").uniform(-4, 4, (n_starts - 1, 2))])
    results = race(surface, starts, n_steps)
    fractions = {name: float((result.descent.final_loss < lowest + 0.05).mean()) for name, result in results.items()}
    numbers = _race_numbers(results)
    numbers["lowest"] = lowest
    numbers |= {f"{name}: fraction at the lowest": fraction for name, fraction in fractions.items()}
    percentages = ", ".join(f"{name} {100 * fraction:.0f} %" for name, fraction in fractions.items())
    caption = (
        f"A bowl with {len(surface.depths)} dents; the star marks the deepest ({lowest:.2f}). "
        f"{_best_lrs_caption(results, ', in the median over all starts')} The figure shows one start, and that is an "
        f"anecdote. Of {n_starts} starts, this many end within 0.05 of the deepest point in {n_steps} steps: "
        f"{percentages}. Small steps stop in the first dent; larger steps, and momentum, pass over dents, but steps "
        f"that are too large settle in none. {_MUON_CAPTION}"
    )
    show = partial(_show_race, results, grid, np.linspace(lowest, 6, 22), lowest_point, "linear")
    return _animated_figure(
        "12-race-spiky-surface", "Six optimizers on a spiky surface", caption, numbers, show, n_steps
    )


def _best_lrs_caption(results: Mapping[str, TunedDescent], over: str = "") -> str:
    lrs = ", ".join(f"{name} {result.lr:g}" for name, result in results.items())
    return (
        f"Each has its own best learning rate of {len(LR_GRID)} from {LR_GRID[0]:g} to {LR_GRID[-1]:g}, by the mean "
        f"loss of the last tenth of the steps{over}: {lrs}."
    )


def _race_numbers(results: Mapping[str, TunedDescent]) -> dict[str, float]:
    numbers = {f"{name}: learning rate": result.lr for name, result in results.items()}
    return numbers | {f"{name}: final loss": float(r.descent.final_loss[0]) for name, r in results.items()}


def _show_race(
    results: Mapping[str, TunedDescent],
    grid: _SurfaceGrid,
    levels: FloatArray,
    minimum: FloatArray,
    scale: str,
    figure: "Figure",
) -> Callable[[int], None]:
    """Draw the surface and the loss axes of a race, and return a function that moves the paths to a step."""
    surface_axes, loss_axes = figure.subplots(1, 2, width_ratios=(1.25, 1))
    grid.draw(surface_axes, levels)
    surface_axes.plot(*results["SGD"].descent.points[0, 0], "o", color="black", markersize=6)
    surface_axes.plot(*minimum, "*", color="gold", markeredgecolor="black", markersize=13, zorder=5)
    descents = {f"{name} at {result.lr:g}": result.descent for name, result in results.items()}
    losses = np.stack([descent.losses[:, 0] for descent in descents.values()])
    loss_axes.set(xlabel="step", title="loss", xlim=(0, losses.shape[1] - 1), yscale=scale)
    if scale == "log":
        loss_axes.set_ylim(max(losses.min() / 2, 1e-7), losses.max() * 1.5)
    else:
        # A percentile, because a single jump up a wall would flatten all curves.
        loss_axes.set_ylim(losses.min() - 0.1, np.percentile(losses, 99.5) + 0.3)
    return _draw_trails(figure, [surface_axes], loss_axes, descents)


def _draw_trails(
    figure: "Figure", surface_axes: "list[Axes]", loss_axes: "Axes", descents: Mapping[str, Descent]
) -> Callable[[int], None]:
    """Draw empty paths, their heads and their losses, and return a function that grows them to a step."""
    artists: list[tuple[Any, FloatArray]] = []
    for color, (name, descent) in zip(COLORS, descents.items(), strict=False):
        points = descent.points[:, 0]
        losses = descent.losses[:, 0]
        for axes in surface_axes:
            (line,) = axes.plot([], [], "-", color=color, linewidth=1.1, alpha=0.9, animated=True)
            style: dict[str, Any] = {"markeredgecolor": "white", "markersize": 7, "animated": True, "zorder": 6}
            (head,) = axes.plot([], [], "o", color=color, **style)
            artists += [(line, points), (head, points)]
        (curve,) = loss_axes.plot([], [], color=color, linewidth=1.2, label=name, animated=True)
        artists.append((curve, np.stack([np.arange(len(losses)), losses], axis=1)))
    n_columns = 4 if len(descents) == 4 else 3
    figure.legend(loc="outside lower center", ncols=n_columns, frameon=False, fontsize="small")

    def go_to_step(step: int) -> None:
        for artist, track in artists:
            # A head, drawn as "o", is the last point only.
            first = step if artist.get_marker() == "o" else 0
            artist.set_data(track[first : step + 1, 0], track[first : step + 1, 1])

    return go_to_step


def _animated_figure(
    name: str,
    title: str,
    caption: str,
    numbers: Mapping[str, float],
    show: "Callable[[Figure], Callable[[int], None]]",
    n_steps: int,
    figsize: tuple[float, float] = (7.2, 4.2),
) -> FigureSpec:
    """Return a figure whose still version is the last frame of its animation."""

    def draw_animation(figure: "Figure") -> Callable[[int], None]:
        go_to_step = show(figure)
        return lambda frame: go_to_step(round(frame * n_steps / (N_FRAMES - 1)))

    return FigureSpec(
        name,
        title,
        caption,
        numbers,
        draw=lambda figure: show(figure)(n_steps),
        figsize=figsize,
        animation=AnimationSpec(N_FRAMES, draw_animation),
    )


# The cliff


def cliff_figure() -> FigureSpec:
    """Return the figure of descent at a wall, without clipping and with three ways to clip."""
    surface = RecurrentNeuron()
    lr = 0.3
    n_steps = 80
    max_norm = 0.1
    descents = {
        name: descend(surface, [(5.5, -2.2)], OPTIMIZERS["sgd"], lr, n_steps, clip=partial(clip_gradient, clipper))
        for name, clipper in make_clippers(max_norm, max_norm, 10.0).items()
    }
    longest = {
        name: float(np.linalg.norm(np.diff(descent.points[:, 0], axis=0), axis=1).max())
        for name, descent in descents.items()
    }
    numbers = {f"{name}: longest step": step for name, step in longest.items()}
    numbers |= {f"{name}: largest gradient norm": float(d.grad_norms.max()) for name, d in descents.items()}
    numbers |= {f"{name}: final loss": float(d.final_loss[0]) for name, d in descents.items()}
    unclipped = descents["no clipping"]
    w, b = unclipped.points[-1, 0]
    final_losses = ", ".join(f"{name} {descent.final_loss[0]:.3f}" for name, descent in descents.items())
    caption = (
        f"The loss of one neuron with feedback over {surface.n_times} time steps, by its weight w and bias b (Pascanu "
        f"et al. 2013). A low region runs along the foot of a wall. SGD at a learning rate of {lr:g} starts at the "
        f"dot. Without clipping it meets a gradient of {unclipped.grad_norms.max():.0f}, moves "
        f"{longest['no clipping']:.1f} in one step and ends far away at w = {w:.1f}, b = {b:.1f} (left), on a plain "
        f"without a slope to return by. Clipped to {max_norm:g}, it takes no step above {longest['fixed norm']:.2f} "
        f"and stays at the wall (middle), although it meets gradients of "
        f"{descents['fixed norm'].grad_norms.max():.0f}. Clipping by value shortens each weight's gradient by itself, "
        f"which turns the step: up to {longest['by value']:.3f}. AutoClip's limit is the 10th percentile of the norms "
        f"so far: steps of at most {longest['AutoClip']:.3f}. Clipping stays near the minimum; to settle there, and "
        f"not oscillate across the wall, the learning rate would have to decay. Mean loss over the last "
        f"{max(1, (n_steps + 1) // 10)} steps: {final_losses}."
    )
    far = _SurfaceGrid.sample(surface, (4.3, 9.0), (-4.0, 4.5))
    near = _SurfaceGrid.sample(surface, (4.9, 5.65), (-2.75, -2.1), 241)
    show = partial(_show_cliff, descents, far, near)
    return _animated_figure(
        "13-cliff", "A cliff, and what clipping does there", caption, numbers, show, n_steps, figsize=(9.6, 4.0)
    )


def _show_cliff(
    descents: Mapping[str, Descent], far: _SurfaceGrid, near: _SurfaceGrid, figure: "Figure"
) -> Callable[[int], None]:
    far_axes, near_axes, loss_axes = figure.subplots(1, 3)
    start = descents["no clipping"].points[0, 0]
    for axes, grid, title in ((far_axes, far, "all paths"), (near_axes, near, "close to the wall")):
        grid.draw(axes, np.linspace(0, 0.45, 19), ("w", "b"))
        axes.set_title(title)
        axes.plot(*start, "o", color="black", markersize=6)
    n_steps = len(descents["no clipping"].grad_norms)
    loss_axes.set(xlabel="step", title="loss", xlim=(0, n_steps), ylim=(-0.02, 0.5))
    return _draw_trails(figure, [far_axes, near_axes], loss_axes, descents)


# Recurrent gradients


def recurrence_figure(seed: int, n_times: int = 100, n_units: int = 32) -> FigureSpec:
    """Return the figure of how far back a final loss reaches in recurrent nets."""
    rng = generator(seed, "recurrence")
    rotation = random_orthogonal(rng, n_units)
    inputs = rng.normal(0, 0.1, (n_times, n_units))
    direction = np.ones(n_units) / n_units**0.5
    gradients: dict[str, FloatArray] = {}
    for radius in (0.9, 1.1, 2.0):
        gradients[f"linear, {radius:g}"] = recurrent_gradients(radius * rotation, inputs, direction, linear=True)
        gradients[f"tanh, {radius:g}"] = recurrent_gradients(radius * rotation, inputs, direction)
    for bias in (0.0, 1.0, 3.0):
        # A new generator each time: the three LSTMs have the same weights.
        lstm_rng = generator(seed, "recurrence", 1)
        gradients[f"LSTM, forget bias {bias:g}"] = lstm_gradients(lstm_rng, inputs, direction, forget_bias=bias)
    norms = {name: np.linalg.norm(gradient, axis=1) for name, gradient in gradients.items()}
    farthest = {name: float(norm[-1]) for name, norm in norms.items()}
    caption = (
        f"Norm of the gradient of a final loss by the state at each distance back. A linear net whose weights have "
        f"all eigenvalues at a radius r gives r to the power of the distance, a straight line: "
        f"{farthest['linear, 0.9']:.1e} after {n_times} steps at 0.9, {farthest['linear, 1.1']:.1e} at 1.1, "
        f"{farthest['linear, 2']:.1e} at 2. With tanh, whose slope is never above 1, it is smaller: at 1.1 "
        f"{farthest['tanh, 1.1']:.1e} is left, at 2 it still explodes, to {farthest['tanh, 2']:.1e}. An LSTM alone is "
        f"no cure: with a forget bias of 0 its gate keeps half of the cell and "
        f"{farthest['LSTM, forget bias 0']:.0e} is left; with 1, {farthest['LSTM, forget bias 1']:.0e}; with 3, "
        f"{farthest['LSTM, forget bias 3']:.2f}. Clipping helps against gradients that explode, not against those "
        "that vanish."
    )
    return FigureSpec(
        name="13-recurrent-gradients",
        title="Gradients that vanish and explode",
        caption=caption,
        numbers={f"{name}, {n_times} steps back": norm for name, norm in farthest.items()},
        draw=partial(_draw_recurrence, norms),
        figsize=(7.2, 4.4),
    )


def _draw_recurrence(norms: Mapping[str, FloatArray], figure: "Figure") -> None:
    radius_colors = dict(zip(("0.9", "1.1", "2"), COLORS, strict=False))
    bias_colors = {"0": "#bbbbbb", "1": "#777777", "3": "#000000"}
    axes = figure.add_subplot()
    for name, norm in norms.items():
        # Names are "linear, 0.9", "tanh, 0.9" and "LSTM, forget bias 0".
        value = name.split(" ")[-1]
        if name.startswith("LSTM"):
            axes.semilogy(norm, color=bias_colors[value], linewidth=1.3, label=name)
        else:
            style = "--" if name.startswith("linear") else "-"
            label = name.replace(", ", ", radius ")
            axes.semilogy(norm, style, color=radius_colors[value], linewidth=1.3, label=label)
    axes.axhline(1, color="black", linewidth=0.6)
    n_steps = max(len(norm) for norm in norms.values()) - 1
    axes.set(xlabel="steps back from the end", ylabel="gradient norm", ylim=(1e-16, 1e16), xlim=(0, n_steps))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")


# AutoClip


def autoclip_figure(seed: int) -> FigureSpec:
    """Return the figure of AutoClip's limit at several percentiles, over the same gradient norms."""
    norms = training_norms(seed)
    limits = {percentile: autoclip_max_norms(norms, percentile) for percentile in PERCENTILES}
    clipped = {percentile: float((norms > limit).mean()) for percentile, limit in limits.items()}
    numbers = {f"p = {p}: limit at the end": float(limit[-1]) for p, limit in limits.items()}
    numbers |= {f"p = {p}: fraction of steps clipped": fraction for p, fraction in clipped.items()}
    percentages = ", ".join(f"{p}: {100 * fraction:.0f} %" for p, fraction in clipped.items())
    caption = (
        f"Gradient norms (dots) of a small training run of {len(norms)} steps, most near {np.median(norms):.2f}, a few "
        f"up to {norms.max():.1f} where a label is an outlier; and the limit that AutoClip would set at each step, the "
        f"p-th percentile of all norms so far. It settles after some tens of norms, and no outlier moves it much, "
        f"except at 0 (the smallest so far: every step but a new smallest is clipped) and 100 (the largest so far: "
        f"none is). Percentage of steps clipped, by p: {percentages}. If all norms came from one distribution, "
        f"it would be 100 minus p. At p = 10 most steps are clipped: it sets how long steps are, and does not only "
        f"guard against outliers."
    )
    return FigureSpec(
        name="14-autoclip",
        title="How AutoClip's limit follows the norms",
        caption=caption,
        numbers=numbers,
        draw=partial(_draw_autoclip, norms, limits),
    )


def _draw_autoclip(norms: FloatArray, limits: Mapping[int, FloatArray], figure: "Figure") -> None:
    from matplotlib import colormaps

    axes = figure.add_subplot()
    axes.semilogy(norms, ".", color="#999999", markersize=2.5, label="norm")
    for index, (percentile, limit) in enumerate(limits.items()):
        color = colormaps["plasma"](0.9 * index / (len(limits) - 1))
        axes.semilogy(limit, color=color, linewidth=1.3, label=f"p = {percentile}")
    axes.set(xlabel="step", ylabel="gradient norm", xlim=(0, len(norms)))
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
