"""Losses over points in the space of weights as plates: curves, contours and surfaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import FigureSpec
from unbraid.lab.landscape import Around, Between, OfPath, barrier
from unbraid.lab.weight_directions import Floats, random_walk_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL, PATH, LINES = "#d62728", "#d62728", ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
_CURVE, _CONTOUR, _SURFACE = (6.4, 4.0), (6.4, 5.0), (6.4, 5.4)


def plates_around(found: Around, losses: Floats, *, name: str, unit: str) -> list[FigureSpec]:
    """Curves, contours and surface around a model.

    Args:
        found: Where the losses were taken.
        losses: Of its chart, ``(point,)``.
        name: The model's, for titles.
        unit: Of the loss, such as ``"loss (dB)"``.
    """
    lines, grid = found.split(losses)
    middle = len(found.offsets) // 2
    here, reach = float(grid[middle, middle]), float(found.offsets[-1])
    n_lower, at = int((grid < here).sum()), np.unravel_index(np.nanargmin(_finite(grid)), grid.shape)
    lowest = float(grid[at])
    rises = [float(line[[0, -1]].mean()) - here for line in lines]
    numbers = {"loss": here, "lowest on the grid": lowest}
    numbers |= {"points lower than the model": float(n_lower) if np.isfinite(here) else float("nan")}
    numbers |= {f"line {place + 1}: mean rise at both ends": rise for place, rise in enumerate(rises)}
    about_lines = (
        f"The loss along {len(lines)} random directions of which each filter is as long as the model's own: at "
        f"{reach:g} it has been moved by that much of its own length. At the model it is {_value(here)}"
        f"{_about_rises(rises)}."
    )
    place = f"({found.offsets[at[1]]:.2g}, {found.offsets[at[0]]:.2g})"
    lower = (
        f"{n_lower} of {grid.size} points lie lower than the model (cross), the lowest, {_value(lowest)}, at {place}."
    )
    if not np.isfinite(here):
        lower = "At the model itself (the middle) the loss is not finite, so no point can be called lower or higher."
    elif n_lower == 0:
        lower = f"None of the {grid.size} points lies lower than the model (cross)."
    about_grid = (
        f"The loss over two random directions of which each filter is as long as the model's own. {lower} "
        f"{_lost(grid)}It is a slice through two directions of very many: what is smooth here may be rough elsewhere."
    )
    field = Field(
        found.offsets,
        found.offsets,
        grid,
        unit,
        ("first direction (lengths of each filter)", "second direction"),
        np.zeros((1, 2)),
        np.array([here]),
    )
    title = f"The loss around {name}"
    curves = partial(_draw_lines, found.offsets, lines, unit)
    return [
        FigureSpec("around-lines", f"{title}, along lines", about_lines, numbers, curves, _CURVE),
        FigureSpec("around-contour", title, about_grid, numbers, field.draw_contour, _CONTOUR),
        FigureSpec("around-surface", f"{title}, as a surface", about_grid, numbers, field.draw_surface, _SURFACE),
    ]


def _about_rises(rises: Sequence[float]) -> str:
    """How the ends of lines lie to the model, as far as that is known."""
    known = [rise for rise in rises if np.isfinite(rise)]
    if not known:
        return ", and at no line's two ends can a rise be told"
    lost = f" (of {len(known)} lines: those of the others are not finite)" if len(known) < len(rises) else ""
    return (
        f"; the mean of a line's two ends lies {min(known):+.2f} to {max(known):+.2f} from that{lost}: so far "
        "directions differ"
    )


def plate_between(found: Between, losses: Floats, *, names: tuple[str, str], unit: str) -> FigureSpec:
    """The curve from one model to another, with the barrier.

    Args:
        found: Where the losses were taken.
        losses: ``(point,)``.
        names: Of both.
        unit: Of the loss.
    """
    height, at = barrier(found.at, losses)
    ends = {n: float(losses[np.flatnonzero(found.at == place)[0]]) for place, n in enumerate(("first", "other"))}
    lowest = int(np.nanargmin(_finite(losses)))
    numbers = {f"loss of the {n}": value for n, value in ends.items()}
    numbers |= {
        "barrier": height,
        "barrier at": at,
        "lowest": float(losses[lowest]),
        "lowest at": float(found.at[lowest]),
    }
    n_inside = int(((found.at > 0) & (found.at < 1)).sum())
    told = (
        f"at the {n_inside} points between, it rises at most {height:.2f} above the straight line (dashed), at "
        f"{at:.2f} of the way"
    )
    if not np.isfinite(height):
        told = "on the way there are points without a finite loss, so there is no height of a barrier"
    elif height <= 1e-6 * (abs(ends["first"]) + abs(ends["other"])):
        told = (
            f"at none of the {n_inside} points between does it rise above the straight line (dashed): no barrier seen"
        )
    caption = (
        f"The loss on the straight line through two models. At 0 is {names[0]}, {_value(ends['first'])}; at 1 is "
        f"{names[1]}, {_value(ends['other'])}; {told}. The lowest point is {_value(losses[lowest])}, at "
        f"{found.at[lowest]:.2f}. Two runs from different starts may differ in no more than the order of their units, "
        "and have a barrier all the same."
    )
    title = f"The loss from {names[0]} to {names[1]}"
    return FigureSpec("between", title, caption, numbers, partial(_draw_between, found.at, losses, unit), _CURVE)


def plates_of_path(found: OfPath, losses: Floats, *, name: str, unit: str) -> list[FigureSpec]:
    """Contours and surface in the plane of a run's path, with the path.

    Args:
        found: Where the losses were taken.
        losses: Of its chart, ``(point,)``.
        name: The run's, for titles.
        unit: Of the loss.
    """
    own, grid = found.split(losses)
    shares, walk = found.plane.shares, random_walk_shares(len(found.steps))
    length, far = np.linalg.norm(found.plane.path[0]), int(found.plane.distances.argmax())
    numbers = {"share of the first axis": float(shares[0]), "share of the second axis": float(shares[1])}
    numbers |= {
        "both on a random walk": float(walk[:2].sum()),
        "largest distance from the plane": float(found.plane.distances.max()),
    }
    numbers |= {"lowest on the grid": float(_finite(grid).min())}
    numbers |= {f"loss at step {step}": float(loss) for step, loss in zip(found.steps, own, strict=True)}
    caption = (
        f"The plane through the last checkpoint, along the two principal axes of the path of {len(found.steps)}, from "
        f"step {found.steps[0]} (dot) to {found.steps[-1]} (star), and the loss in it. Its axes hold "
        f"{100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the path's variance; a random walk of so many points "
        f"would show {100 * walk[0]:.0f} % and {100 * walk[1]:.0f} %. The checkpoints' own losses are "
        f"{_value(own[0])} at first and {_value(own[-1])} at last; the lowest of the grid is "
        f"{_value(_finite(grid).min())}. What is drawn is their shadow: that of step {found.steps[far]} lies "
        f"{found.plane.distances[far]:.2g} off, where the first and last are {length:.2g} apart. {_lost(grid)}"
    )
    beside = "On the surface each checkpoint stands at the height of its own loss, above or below its shadow's."
    labels = (f"first axis ({100 * shares[0]:.0f} % of the variance)", f"second axis ({100 * shares[1]:.0f} %)")
    field = Field(found.x, found.y, grid, unit, labels, found.plane.path, own)
    title = f"The path of {name}"
    return [
        FigureSpec("path-contour", title, caption.strip(), numbers, field.draw_contour, _CONTOUR),
        FigureSpec(
            "path-surface", f"{title}, on the surface", f"{caption}{beside}", numbers, field.draw_surface, _SURFACE
        ),
    ]


def _finite(losses: Floats) -> Floats:
    """The losses, with infinity in place of what is not finite; all may be."""
    return np.where(np.isfinite(losses), losses, np.inf)


def _value(loss: float) -> str:
    return f"{loss:.2f}" if np.isfinite(loss) else "not finite"


def _lost(grid: Floats) -> str:
    n_lost = int((~np.isfinite(grid)).sum())
    return f"At {n_lost} of {grid.size} points the loss is not finite; they are left white. " if n_lost else ""


@dataclass(frozen=True)
class Field:
    """Losses over two axes, and what is marked on them.

    Attributes:
        x: ``(column,)``.
        y: ``(row,)``.
        losses: ``(row, column)``.
        unit: Of the loss.
        labels: Of both axes.
        marks: A model, or the points of a path, ``(mark, 2)``.
        heights: Their own losses, ``(mark,)``.
    """

    x: Floats
    y: Floats
    losses: Floats
    unit: str
    labels: tuple[str, str]
    marks: Floats
    heights: Floats

    def levels(self) -> Floats:
        """Heights of contours: round and even, up to where all but the highest twentieth of the losses lie."""
        from matplotlib.ticker import MaxNLocator

        held = self.losses[np.isfinite(self.losses)] if np.isfinite(self.losses).any() else np.zeros(1)
        low, high = float(held.min()), float(np.quantile(held, 0.95))
        high = high if high > low else low + 1e-6 * max(1.0, abs(low))
        return np.asarray(MaxNLocator(24, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), dtype=np.float64)

    def draw_contour(self, figure: "Figure") -> None:
        """From above."""
        axes, levels, shown = figure.add_subplot(), self.levels(), np.ma.masked_invalid(self.losses)
        filled = axes.contourf(self.x, self.y, shown, levels=levels, cmap="viridis", extend="max")
        axes.contour(
            self.x, self.y, shown, levels=levels[::2], colors="white", linewidths=0.5, linestyles="solid", alpha=0.7
        )
        figure.colorbar(filled, ax=axes, label=self.unit, ticks=levels[::4])
        _draw_marks(axes, self.marks.T)
        x, y = self.labels
        axes.set(xlabel=x, ylabel=y, xlim=(self.x[0], self.x[-1]), ylim=(self.y[0], self.y[-1]))

    def draw_surface(self, figure: "Figure") -> None:
        """From the side."""
        axes: Any = figure.add_subplot(projection="3d", computed_zorder=False)  # matplotlib leaves its methods untyped
        across, up = np.meshgrid(self.x, self.y)
        shown = np.where(np.isfinite(self.losses), self.losses, np.nan)
        lines = {"rstride": 1, "cstride": 1, "linewidth": 0.15, "edgecolor": "#00000040"}
        axes.plot_surface(across, up, shown, cmap="viridis", zorder=1, **lines)
        _draw_marks(axes, np.vstack([self.marks.T, self.heights]), zorder=5)
        for label, axis in zip((*self.labels, self.unit), (axes.xaxis, axes.yaxis, axes.zaxis), strict=True):
            axis.set_label_text(label)
            axis.labelpad = 8
            axis.set_major_locator(_few_ticks())
        axes.view_init(elev=32, azim=-60)
        axes.set_box_aspect(None, zoom=0.88)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)


def _draw_lines(offsets: Floats, lines: Floats, unit: str, figure: "Figure") -> None:
    axes = figure.add_subplot()
    for place, (line, color) in enumerate(zip(lines, LINES, strict=True)):
        axes.plot(offsets, line, ".-", color=color, linewidth=1.2, markersize=4, label=f"direction {place + 1}")
    axes.plot(
        0, lines[0, len(offsets) // 2], "+", color=MODEL, markersize=12, markeredgewidth=2, zorder=5, label="the model"
    )
    axes.set(xlabel="how far (lengths of each filter)", ylabel=unit)
    axes.legend(frameon=False, fontsize="small")


def _draw_between(at: Floats, losses: Floats, unit: str, figure: "Figure") -> None:
    axes = figure.add_subplot()
    ends = losses[(at == 0) | (at == 1)]
    axes.plot([0, 1], ends, "--", color="#777777", linewidth=1)
    axes.plot(at, losses, ".-", color=LINES[0], linewidth=1.2, markersize=5)
    axes.plot([0, 1], ends, "o", color=MODEL, markersize=7, zorder=5)
    axes.set(xlabel="of the way", ylabel=unit)


def _draw_marks(axes: "Axes", marks: Floats, **style: Any) -> None:
    """A cross for one point; a path from a dot to a star for several; ``(2 or 3, point)``."""
    if marks.shape[1] == 1:
        axes.plot(*marks, "+", color=MODEL, markersize=12, markeredgewidth=2, **style)
        return
    axes.plot(*marks, ".-", color=PATH, linewidth=1.4, markersize=6, **style)
    axes.plot(*marks[:, :1], "o", color=PATH, markeredgecolor="white", markersize=9, **style)
    axes.plot(*marks[:, -1:], "*", color=PATH, markeredgecolor="white", markersize=16, **style)
