"""The chapter's plates about surfaces: optimizers raced, the cliff, recurrent gradients, how AutoClip's limit moves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import AnimationSpec, FigureSpec
from unbraid.seeding import generator
from unbraid.textbook.surfaces import (
    GRID,
    Dents,
    Descent,
    FedBack,
    Loss,
    Quadratic,
    Racer,
    autoclip_limits,
    clip_by,
    clippings,
    descend,
    evaluate,
    grid,
    lstm_gradients,
    orthogonal,
    race,
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
    """Experiments 12, 13 and 14, in order; each is computed here, and drawn when its ``draw`` is called."""
    return [valley(), spiky(seed), cliff(), recurrence(seed), autoclip(seed)]


@dataclass(frozen=True)
class _Ground:
    """A surface on a grid.

    Attributes:
        x: ``(x,)``.
        y: ``(y,)``.
        losses: ``(y, x)``.
    """

    x: FloatArray
    y: FloatArray
    losses: FloatArray

    @classmethod
    def of(cls, loss: Loss, across: tuple[float, float], up: tuple[float, float], n_points: int = 181) -> "_Ground":
        x, y, points = grid(across, up, n_points)
        return cls(x, y, evaluate(loss, points))

    def draw(self, axes: "Axes", levels: FloatArray, labels: tuple[str, str] = ("x", "y")) -> None:
        axes.contourf(self.x, self.y, self.losses, levels=levels, cmap="Blues_r", extend="both", alpha=0.6)
        axes.set(xlim=(self.x[0], self.x[-1]), ylim=(self.y[0], self.y[-1]), xlabel=labels[0], ylabel=labels[1])


def valley() -> FigureSpec:
    """Optimizers on a long valley a hundred times as steep across as along."""
    loss, n_steps = Quadratic.turned((0.08, 8.0), 30, (1.0, 0.5)), 150
    found = race(loss, [[-4.0, 2.0]], n_steps)
    outcomes = {name: float(racer.descent.outcome[0]) for name, racer in found.items()}
    first, last = min(outcomes, key=outcomes.__getitem__), max(outcomes, key=outcomes.__getitem__)
    kept = max(abs(1 - found["SGD"].lr * 0.08), abs(1 - found["SGD"].lr * 8))
    caption = (
        f"A valley 100 times as steep across as along (curvatures 8 and 0.08), and {n_steps} steps from one start "
        f"(dot) towards its lowest point (star). {_each_at_its_best(found)} Plain SGD must keep below 2/8 = 0.25, or "
        f"it climbs the walls; at {found['SGD'].lr:g} it keeps {100 * kept:.1f} % of the distance along the valley in "
        f"each step, whatever it does. {first} ends lowest, at {outcomes[first]:.1e}; {last} highest, at "
        f"{outcomes[last]:.1e}. AdamW is Adam that also shrinks the weights a little, and here 0 is not where the "
        f"valley is lowest. {_ABOUT_MUON}"
    )
    levels = np.geomspace(0.01, 60, 14)
    ground = _Ground.of(loss, (-6.0, 4.0), (-5.0, 4.0))
    show = partial(_show_race, found, ground, levels, loss.lowest, "log")
    return _moving(
        "12-race-narrow-valley", "Six optimizers in a narrow valley", caption, _of_race(found), show, n_steps
    )


def spiky(seed: int, n_starts: int = 40) -> FigureSpec:
    """Optimizers on a bowl full of dents: from one start in the figure, from many in the numbers."""
    loss, n_steps = Dents.drawn(seed), 150
    ground = _Ground.of(loss, (-4.2, 4.2), (-4.2, 4.2), 301)
    row, column = np.unravel_index(ground.losses.argmin(), ground.losses.shape)
    lowest, at = float(ground.losses.min()), np.array([ground.x[column], ground.y[row]])
    starts = np.vstack([[-3.5, 3.0], generator(seed, "starts").uniform(-4, 4, (n_starts - 1, 2))])
    found = race(loss, starts, n_steps)
    shares = {name: float((racer.descent.outcome < lowest + 0.05).mean()) for name, racer in found.items()}
    numbers = {**_of_race(found), "lowest": lowest, **{f"{name}: share at the lowest": s for name, s in shares.items()}}
    reached = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    caption = (
        f"A bowl with {len(loss.depths)} dents, of which the star marks the deepest ({lowest:.2f}). "
        f"{_each_at_its_best(found, ', in the median over all starts')} The figure shows one start, and that is an "
        f"anecdote: of {n_starts} starts, so many end within 0.05 of the deepest point in {n_steps} steps: {reached}. "
        f"Small steps stop in the first dent that holds them; larger ones, and momentum, run over dents, but too "
        f"large a one rests in none. {_ABOUT_MUON}"
    )
    levels = np.linspace(lowest, 6, 22)
    show = partial(_show_race, found, ground, levels, at, "linear")
    return _moving("12-race-spiky-surface", "Six optimizers on a spiky surface", caption, numbers, show, n_steps)


_ABOUT_MUON = (
    "Muon is made for matrices and sees the two weights as a matrix of one row: what is left of it are steps of "
    "momentum that are all of one length, so it cannot settle unless the learning rate falls."
)


def _each_at_its_best(found: Mapping[str, Racer], over: str = "") -> str:
    rates = ", ".join(f"{name} {racer.lr:g}" for name, racer in found.items())
    return (
        f"Each has its own best learning rate of {len(GRID)} from {GRID[0]:g} to {GRID[-1]:g}, judged by the mean "
        f"loss of the last tenth of the steps{over}: {rates}."
    )


def _of_race(found: Mapping[str, Racer]) -> dict[str, float]:
    numbers = {f"{name}: learning rate": racer.lr for name, racer in found.items()}
    return numbers | {f"{name}: loss at the end": float(r.descent.outcome[0]) for name, r in found.items()}


def _show_race(
    found: Mapping[str, Racer], ground: _Ground, levels: FloatArray, lowest: FloatArray, scale: str, figure: "Figure"
) -> Callable[[int], None]:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    ground.draw(left, levels)
    left.plot(*found["SGD"].descent.points[0, 0], "o", color="black", markersize=6)
    left.plot(*lowest, "*", color="gold", markeredgecolor="black", markersize=13, zorder=5)
    paths = {f"{name} at {racer.lr:g}": racer.descent for name, racer in found.items()}
    curves = np.stack([descent.losses[:, 0] for descent in paths.values()])
    right.set(xlabel="step", title="loss", xlim=(0, curves.shape[1] - 1), yscale=scale)
    bottom = max(curves.min() / 2, 1e-7) if scale == "log" else curves.min() - 0.1
    right.set_ylim(bottom, curves.max() * 1.5 if scale == "log" else np.percentile(curves, 99.5) + 0.3)
    return _trails(figure, left, right, paths)


def _trails(
    figure: "Figure", ground: "Axes", beside: "Axes", paths: Mapping[str, Descent], *others: "Axes"
) -> Callable[[int], None]:
    """Paths on the surface, their heads, and their losses; returns what lets them grow to a step."""
    drawn: list[tuple[Any, FloatArray]] = []
    for color, (name, descent) in zip(COLORS, paths.items(), strict=False):
        points, losses = descent.points[:, 0], descent.losses[:, 0]
        for axes in (ground, *others):
            (line,) = axes.plot([], [], "-", color=color, linewidth=1.1, alpha=0.9, animated=True)
            (head,) = axes.plot(
                [], [], "o", color=color, markeredgecolor="white", markersize=7, animated=True, zorder=6
            )
            drawn += [(line, points), (head, points)]
        (curve,) = beside.plot([], [], color=color, linewidth=1.2, label=name, animated=True)
        drawn.append((curve, np.stack([np.arange(len(losses)), losses], axis=1)))
    n_columns = 4 if len(paths) == 4 else 3
    figure.legend(loc="outside lower center", ncols=n_columns, frameon=False, fontsize="small")

    def to(step: int) -> None:
        for artist, track in drawn:
            first = step if artist.get_marker() == "o" else 0
            artist.set_data(track[first : step + 1, 0], track[first : step + 1, 1])

    return to


def _moving(
    name: str,
    title: str,
    caption: str,
    numbers: Mapping[str, float],
    show: "Callable[[Figure], Callable[[int], None]]",
    n_steps: int,
) -> FigureSpec:
    """A plate whose still figure is the last frame of its animation."""

    def draw(figure: "Figure") -> None:
        show(figure)(n_steps)

    def draw_moving(figure: "Figure") -> Callable[[int], None]:
        to = show(figure)
        return lambda frame: to(round(frame * n_steps / (N_FRAMES - 1)))

    return FigureSpec(
        name, title, caption, numbers, draw, figsize=(7.2, 4.2), animation=AnimationSpec(N_FRAMES, draw_moving)
    )


def cliff() -> FigureSpec:
    """Descent at a wall, not clipped and clipped in three ways."""
    loss, start, lr, n_steps, most = FedBack(), (5.5, -2.2), 0.3, 80, 0.1
    found = {
        name: descend(loss, [start], OPTIMIZERS["sgd"], lr, n_steps, clip=partial(clip_by, clipper))
        for name, clipper in clippings(most, most, 10.0).items()
    }
    longest = {
        name: float(np.linalg.norm(np.diff(run.points[:, 0], axis=0), axis=1).max()) for name, run in found.items()
    }
    numbers = {f"{name}: longest step": step for name, step in longest.items()}
    numbers |= {f"{name}: largest gradient norm": float(run.norms.max()) for name, run in found.items()}
    numbers |= {f"{name}: loss at the end": float(run.outcome[0]) for name, run in found.items()}
    free, x_free = found["no clipping"], found["no clipping"].points[-1, 0]
    ends = ", ".join(f"{name} {run.outcome[0]:.3f}" for name, run in found.items())
    caption = (
        f"The loss of one neuron fed back to itself {loss.n_times} times, by its weight w and bias b (Pascanu et al. "
        f"2013). Low ground runs along the foot of a wall. SGD at a learning rate of {lr:g} comes from the dot. Not "
        f"clipped, it meets a gradient of {free.norms.max():.0f}, goes {longest['no clipping']:.1f} in one step and "
        f"ends far off at w = {x_free[0]:.1f}, b = {x_free[1]:.1f} (left), on a plain where nothing calls it back. "
        f"Clipped to {most:g}, it takes no step above {longest['fixed norm']:.2f} and stays at the wall (middle), "
        f"although it meets gradients of {found['fixed norm'].norms.max():.0f}. By value each weight is cut by "
        f"itself, which turns the step: up to {longest['by value']:.3f}. AutoClip's limit is the 10th percentile of "
        f"norms so far: steps of at most {longest['AutoClip']:.3f}. Clipping keeps the place; to come to rest there, "
        f"and not to swing across the wall, the learning rate would have to fall. Mean loss over the last "
        f"{max(1, (n_steps + 1) // 10)} steps: {ends}."
    )
    grounds = (_Ground.of(loss, (4.3, 9.0), (-4.0, 4.5)), _Ground.of(loss, (4.9, 5.65), (-2.75, -2.1), 241))
    show = partial(_show_cliff, found, grounds)
    plate = _moving("13-cliff", "A cliff, and what clipping does there", caption, numbers, show, n_steps)
    return FigureSpec(**{**vars(plate), "figsize": (9.6, 4.0)})


def _show_cliff(
    found: Mapping[str, Descent], grounds: tuple[_Ground, _Ground], figure: "Figure"
) -> Callable[[int], None]:
    far, near, beside = figure.subplots(1, 3)
    for axes, ground, title in ((far, grounds[0], "where each goes"), (near, grounds[1], "close to the wall")):
        ground.draw(axes, np.linspace(0, 0.45, 19), ("w", "b"))
        axes.set_title(title)
        axes.plot(*found["no clipping"].points[0, 0], "o", color="black", markersize=6)
    beside.set(xlabel="step", title="loss", xlim=(0, found["no clipping"].norms.shape[0]), ylim=(-0.02, 0.5))
    return _trails(figure, far, beside, found, near)


def recurrence(seed: int, n_times: int = 100, n_units: int = 32) -> FigureSpec:
    """How far back a loss at the end is felt in recurrent nets."""
    rng = generator(seed, "recurrence")
    turn, inputs = orthogonal(rng, n_units), rng.normal(0, 0.1, (n_times, n_units))
    direction = np.ones(n_units) / n_units**0.5
    curves: dict[str, FloatArray] = {}
    for radius in (0.9, 1.1, 2.0):
        curves[f"linear, {radius:g}"] = recurrent_gradients(radius * turn, inputs, direction, linear=True)
        curves[f"tanh, {radius:g}"] = recurrent_gradients(radius * turn, inputs, direction)
    for bias in (0.0, 1.0, 3.0):
        curves[f"LSTM, forget bias {bias:g}"] = lstm_gradients(
            generator(seed, "recurrence", 1), inputs, direction, forget_bias=bias
        )
    norms = {name: np.linalg.norm(curve, axis=1) for name, curve in curves.items()}
    numbers = {f"{name}, {n_times} steps back": float(norm[-1]) for name, norm in norms.items()}
    end = {name: norm[-1] for name, norm in norms.items()}
    caption = (
        f"Norm of the gradient of a loss at the end by the state so many steps before. A linear net whose weights have "
        f"all eigenvalues at a radius r gives r to the power of the distance, a straight line: "
        f"{end['linear, 0.9']:.1e} after {n_times} steps at 0.9, {end['linear, 1.1']:.1e} at 1.1, "
        f"{end['linear, 2']:.1e} at 2. With tanh the slope, never above 1, takes some off: at 1.1 "
        f"{end['tanh, 1.1']:.1e} are left, at 2 it still explodes, to {end['tanh, 2']:.1e}. An LSTM is no cure by "
        f"itself: with a forget bias of 0 its gate keeps half of the cell and {end['LSTM, forget bias 0']:.0e} is "
        f"left; with 1, {end['LSTM, forget bias 1']:.0e}; with 3, {end['LSTM, forget bias 3']:.2f}. Clipping helps "
        f"against what explodes, not against what vanishes."
    )
    draw = partial(_draw_recurrence, norms)
    return FigureSpec(
        "13-recurrent-gradients", "Gradients that vanish and explode", caption, numbers, draw, figsize=(7.2, 4.4)
    )


def _draw_recurrence(norms: Mapping[str, FloatArray], figure: "Figure") -> None:
    axes, colors = figure.add_subplot(), dict(zip(("0.9", "1.1", "2"), COLORS, strict=False))
    for name, norm in norms.items():
        kind, last = name.split(", ")[0], name.split(" ")[-1]
        shade = {"0": "#bbbbbb", "1": "#777777", "3": "#000000"}
        color = shade[last] if kind == "LSTM" else colors[last]
        label = name if kind == "LSTM" else name.replace(", ", ", radius ")
        axes.semilogy(norm, "--" if kind == "linear" else "-", color=color, linewidth=1.3, label=label)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set(xlabel="steps back from the end", ylabel="gradient norm", ylim=(1e-16, 1e16), xlim=(0, len(norm) - 1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")


def autoclip(seed: int) -> FigureSpec:
    """AutoClip's limit for several percentiles, over the same norms."""
    norms = training_norms(seed)
    limits = {percentile: autoclip_limits(norms, percentile) for percentile in PERCENTILES}
    shares = {percentile: float((norms > limit).mean()) for percentile, limit in limits.items()}
    numbers = {f"p = {p}: limit at the end": float(limit[-1]) for p, limit in limits.items()}
    numbers |= {f"p = {p}: share of steps clipped": share for p, share in shares.items()}
    told = ", ".join(f"{p}: {100 * share:.0f} %" for p, share in shares.items())
    caption = (
        f"Gradient norms (dots) of a small training of {len(norms)} steps, most near {np.median(norms):.2f}, a few up "
        f"to {norms.max():.1f} where a label is far off; and the limit that AutoClip would set in each step, the p-th "
        f"percentile of all norms so far. It settles once some tens of norms are known, and no norm far off moves it "
        f"much, except at 0 (the smallest so far: every step but a new smallest is cut) and 100 (the largest so far: "
        f"none is). Share of steps clipped, by p: {told}. Were the norms all alike in kind, "
        f"it would be 100 less p. With p at 10 most steps are cut: it sets how long steps are, and is no guard against "
        f"outliers alone."
    )
    return FigureSpec(
        "14-autoclip",
        "How AutoClip's limit follows the norms",
        caption,
        numbers,
        partial(_draw_autoclip, norms, limits),
    )


def _draw_autoclip(norms: FloatArray, limits: Mapping[int, FloatArray], figure: "Figure") -> None:
    from matplotlib import colormaps

    axes = figure.add_subplot()
    axes.semilogy(norms, ".", color="#999999", markersize=2.5, label="norm")
    for place, (percentile, limit) in enumerate(limits.items()):
        color = colormaps["plasma"](0.9 * place / (len(limits) - 1))
        axes.semilogy(limit, color=color, linewidth=1.3, label=f"p = {percentile}")
    axes.set(xlabel="step", ylabel="gradient norm", xlim=(0, len(norms)))
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
