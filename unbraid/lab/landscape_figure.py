"""Figures of loss landscapes: curves, contours and surfaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import FigureSpec
from unbraid.lab.landscape import Interpolation, PathSlice, RandomSlices, loss_barrier
from unbraid.lab.weight_directions import random_walk_variance_ratios
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK_COLOR = "#d62728"
LINE_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
CURVE_SIZE = (6.4, 4.0)
CONTOUR_SIZE = (6.4, 5.0)
SURFACE_SIZE = (6.4, 5.4)


def random_slice_figures(slices: RandomSlices, losses: FloatArray, *, name: str, unit: str) -> list[FigureSpec]:
    """Return curves, contours and a surface of the loss around a model.

    Args:
        slices: Points at which the losses were computed.
        losses: Loss at each point, ``(point,)``.
        name: Name of the model, for titles.
        unit: Label of the loss, such as ``"loss (dB)"``.
    """
    lines, grid = slices.split(losses)
    offsets = slices.offsets
    middle = len(offsets) // 2
    model_loss = float(grid[middle, middle])
    rises = [float(line[[0, -1]].mean()) - model_loss for line in lines]
    n_lower = int((grid < model_loss).sum())
    row, column = np.unravel_index(_inf_for_nonfinite(grid).argmin(), grid.shape)
    lowest = float(grid[row, column])

    # A comparison with NaN is False, so "0 points lower" would be a false claim about a non-finite model.
    numbers = {"loss": model_loss, "lowest on the grid": lowest}
    numbers["points lower than the model"] = float(n_lower) if np.isfinite(model_loss) else float("nan")
    numbers |= {f"line {index}: mean rise at both ends": rise for index, rise in enumerate(rises, start=1)}

    lines_caption = (
        f"The loss along {len(lines)} random directions in which each filter has the norm of the model's own filter. "
        f"At {offsets[-1]:g} each filter has moved by that multiple of its own norm. At the model the loss is "
        f"{_format_loss(model_loss)}{_describe_rises(rises)}."
    )
    if not np.isfinite(model_loss):
        comparison = "At the model itself (the middle) the loss is not finite, so no point is called lower or higher."
    elif n_lower == 0:
        comparison = f"None of the {grid.size} points is lower than the model (cross)."
    else:
        comparison = (
            f"{n_lower} of {grid.size} points are lower than the model (cross); the lowest, {_format_loss(lowest)}, is "
            f"at ({offsets[column]:.2g}, {offsets[row]:.2g})."
        )
    grid_caption = (
        "The loss over two random directions in which each filter has the norm of the model's own filter. "
        f"{comparison} {_describe_nonfinite(grid)}This is a slice along two of very many directions: a loss that is "
        "smooth here may be rough elsewhere."
    )

    surface = LossSurface(
        offsets,
        offsets,
        grid,
        unit,
        ("first direction (multiples of each filter's norm)", "second direction"),
        np.zeros((1, 2)),
        np.array([model_loss]),
    )
    title = f"The loss around {name}"
    return [
        FigureSpec(
            "around-lines",
            f"{title}, along lines",
            lines_caption,
            numbers,
            partial(_draw_lines, offsets, lines, unit),
            CURVE_SIZE,
        ),
        FigureSpec("around-contour", title, grid_caption, numbers, surface.draw_contour, CONTOUR_SIZE),
        FigureSpec(
            "around-surface", f"{title}, as a surface", grid_caption, numbers, surface.draw_surface, SURFACE_SIZE
        ),
    ]


def _describe_rises(rises: Sequence[float]) -> str:
    """Return the end of a sentence about the rise at the ends of the lines, as far as it is known."""
    # A range over NaN would be NaN, so only finite rises count, and the caption says how many.
    finite = [rise for rise in rises if np.isfinite(rise)]
    if not finite:
        return "; no line has a finite rise at its ends"
    excluded = f" ({len(finite)} lines; those of the others are not finite)" if len(finite) < len(rises) else ""
    return (
        f"; the mean of a line's two ends differs from it by {min(finite):+.2f} to {max(finite):+.2f}{excluded}, "
        "depending on the direction"
    )


def interpolation_figure(
    interpolation: Interpolation, losses: FloatArray, *, names: tuple[str, str], unit: str
) -> FigureSpec:
    """Return the curve of the loss from one model to another, with the barrier.

    Args:
        interpolation: Points at which the losses were computed.
        losses: ``(point,)``.
        names: Names of both models.
        unit: Label of the loss.
    """
    positions = interpolation.positions
    height, highest = loss_barrier(positions, losses)
    first_loss = float(losses[positions == 0][0])
    second_loss = float(losses[positions == 1][0])
    lowest = int(_inf_for_nonfinite(losses).argmin())
    n_inside = int(((positions > 0) & (positions < 1)).sum())

    # Rounding alone gives a barrier of about 1e-7 of the losses: that is none.
    if not np.isfinite(height):
        barrier = "some points between them have no finite loss, so the barrier has no height"
    elif height <= 1e-6 * (abs(first_loss) + abs(second_loss)):
        barrier = f"at none of the {n_inside} points between does it rise above the straight line (dashed): no barrier"
    else:
        barrier = (
            f"at the {n_inside} points between, it rises at most {height:.2f} above the straight line (dashed), at "
            f"position {highest:.2f}"
        )
    caption = (
        f"The loss on the straight line through two models. At 0 is {names[0]}, {_format_loss(first_loss)}; at 1 is "
        f"{names[1]}, {_format_loss(second_loss)}; {barrier}. The lowest point is {_format_loss(losses[lowest])}, at "
        f"position {positions[lowest]:.2f}. Two runs from different starts may differ only in the order of their "
        "units, and still have a barrier."
    )
    numbers = {
        "loss of the first": first_loss,
        "loss of the other": second_loss,
        "barrier": height,
        "barrier at": highest,
        "lowest": float(losses[lowest]),
        "lowest at": float(positions[lowest]),
    }
    draw = partial(_draw_interpolation, positions, losses, unit)
    return FigureSpec("between", f"The loss from {names[0]} to {names[1]}", caption, numbers, draw, CURVE_SIZE)


def path_figures(path: PathSlice, losses: FloatArray, *, name: str, unit: str) -> list[FigureSpec]:
    """Return contours and a surface of the loss in the plane of a training path, with the path.

    Args:
        path: Points at which the losses were computed.
        losses: Loss at each point, ``(point,)``.
        name: Name of the run, for titles.
        unit: Label of the loss.
    """
    checkpoint_losses, grid = path.split(losses)
    plane = path.plane
    lowest = float(_inf_for_nonfinite(grid).min())
    farthest = int(plane.distances.argmax())
    length = np.linalg.norm(plane.coordinates[0])
    # Percentages of the path, and of a random walk for comparison: even a walk without aim seems to have two axes.
    ratios = 100 * plane.variance_ratios
    random_walk = 100 * random_walk_variance_ratios(len(path.steps))

    numbers = {
        "share of the first axis": float(plane.variance_ratios[0]),
        "share of the second axis": float(plane.variance_ratios[1]),
        "both on a random walk": float(random_walk[:2].sum() / 100),
        "largest distance from the plane": float(plane.distances.max()),
        "lowest on the grid": lowest,
    }
    numbers |= {f"loss at step {step}": float(loss) for step, loss in zip(path.steps, checkpoint_losses, strict=True)}
    caption = (
        f"The loss in the plane through the last checkpoint along the two principal axes of the training path, with "
        f"{len(path.steps)} checkpoints from step {path.steps[0]} (dot) to {path.steps[-1]} (star). The axes hold "
        f"{ratios[0]:.0f} % and {ratios[1]:.0f} % of the path's variance; a random walk of as many points would show "
        f"{random_walk[0]:.0f} % and {random_walk[1]:.0f} %. The loss is {_format_loss(checkpoint_losses[0])} at the "
        f"first checkpoint and {_format_loss(checkpoint_losses[-1])} at the last; the lowest on the grid is "
        f"{_format_loss(lowest)}. The path is drawn as its projection: that of step {path.steps[farthest]} is "
        f"{plane.distances[farthest]:.2g} away from the checkpoint, and the first and last are {length:.2g} apart. "
        f"{_describe_nonfinite(grid)}"
    )
    surface_caption = (
        f"{caption}On the surface each checkpoint has the height of its own loss, above or below that of its "
        "projection."
    )
    # The axes' labels carry their shares: without them a flat second axis looks as important as the first.
    labels = (f"first axis ({ratios[0]:.0f} % of the variance)", f"second axis ({ratios[1]:.0f} %)")
    surface = LossSurface(path.x, path.y, grid, unit, labels, plane.coordinates, checkpoint_losses)
    title = f"The path of {name}"
    return [
        FigureSpec("path-contour", title, caption.strip(), numbers, surface.draw_contour, CONTOUR_SIZE),
        FigureSpec(
            "path-surface", f"{title}, on the surface", surface_caption, numbers, surface.draw_surface, SURFACE_SIZE
        ),
    ]


def _inf_for_nonfinite(losses: FloatArray) -> FloatArray:
    """Return the losses with infinity for NaN and -inf; unlike nanargmin, argmin then works if none is finite."""
    return np.where(np.isfinite(losses), losses, np.inf)


def _format_loss(loss: float) -> str:
    return f"{loss:.2f}" if np.isfinite(loss) else "not finite"


def _describe_nonfinite(grid: FloatArray) -> str:
    n_nonfinite = int((~np.isfinite(grid)).sum())
    return f"At {n_nonfinite} of {grid.size} points the loss is not finite; they stay white. " if n_nonfinite else ""


@dataclass(frozen=True)
class LossSurface:
    """Losses over two axes, with marks on them; it draws itself from above and from the side.

    Attributes:
        x: ``(column,)``.
        y: ``(row,)``.
        losses: ``(row, column)``.
        unit: Label of the loss.
        labels: Labels of both axes.
        marks: Positions of a model, or of the points of a path, ``(mark, 2)``.
        heights: Loss of each mark, ``(mark,)``.
    """

    x: FloatArray
    y: FloatArray
    losses: FloatArray
    unit: str
    labels: tuple[str, str]
    marks: FloatArray
    heights: FloatArray

    def levels(self) -> FloatArray:
        """Return round, even contour levels up to the 95th percentile: a few huge losses must not flatten the rest."""
        from matplotlib.ticker import MaxNLocator

        finite = self.losses[np.isfinite(self.losses)]
        if not finite.size:
            finite = np.zeros(1)
        low = float(finite.min())
        high = float(np.quantile(finite, 0.95))
        if high <= low:
            high = low + 1e-6 * max(1.0, abs(low))  # contourf needs levels that increase
        return np.asarray(MaxNLocator(24, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), dtype=np.float64)

    def draw_contour(self, figure: "Figure") -> None:
        """Draw the losses as contours."""
        axes = figure.add_subplot()
        levels = self.levels()
        losses = np.ma.masked_invalid(self.losses)
        filled = axes.contourf(self.x, self.y, losses, levels=levels, cmap="viridis", extend="max")
        axes.contour(
            self.x, self.y, losses, levels=levels[::2], colors="white", linewidths=0.5, linestyles="solid", alpha=0.7
        )
        figure.colorbar(filled, ax=axes, label=self.unit, ticks=levels[::4])
        _draw_marks(axes, self.marks.T)
        x_label, y_label = self.labels
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(self.x[0], self.x[-1]), ylim=(self.y[0], self.y[-1]))

    def draw_surface(self, figure: "Figure") -> None:
        """Draw the losses as a surface."""
        from matplotlib.ticker import MaxNLocator

        axes: Any = figure.add_subplot(projection="3d", computed_zorder=False)  # matplotlib's 3-D axes are untyped
        across, up = np.meshgrid(self.x, self.y)
        # plot_surface leaves NaN out, but infinity would stretch the axis.
        losses = np.where(np.isfinite(self.losses), self.losses, np.nan)
        mesh = {"rstride": 1, "cstride": 1, "linewidth": 0.15, "edgecolor": "#00000040"}
        axes.plot_surface(across, up, losses, cmap="viridis", zorder=1, **mesh)
        # Above the surface in drawing order, or the surface would hide the path.
        _draw_marks(axes, np.vstack([self.marks.T, self.heights]), zorder=5)
        for label, axis in zip((*self.labels, self.unit), (axes.xaxis, axes.yaxis, axes.zaxis), strict=True):
            axis.set_label_text(label)
            axis.labelpad = 8
            axis.set_major_locator(MaxNLocator(5))
        axes.view_init(elev=32, azim=-60)
        axes.set_box_aspect(None, zoom=0.88)


def _draw_lines(offsets: FloatArray, lines: FloatArray, unit: str, figure: "Figure") -> None:
    axes = figure.add_subplot()
    for index, (line, color) in enumerate(zip(lines, LINE_COLORS, strict=True), start=1):
        axes.plot(offsets, line, ".-", color=color, linewidth=1.2, markersize=4, label=f"direction {index}")
    model_loss = lines[0, len(offsets) // 2]
    axes.plot(0, model_loss, "+", color=MARK_COLOR, markersize=12, markeredgewidth=2, zorder=5, label="the model")
    axes.set(xlabel="distance (multiples of each filter's norm)", ylabel=unit)
    axes.legend(frameon=False, fontsize="small")


def _draw_interpolation(positions: FloatArray, losses: FloatArray, unit: str, figure: "Figure") -> None:
    axes = figure.add_subplot()
    ends = losses[(positions == 0) | (positions == 1)]
    axes.plot([0, 1], ends, "--", color="#777777", linewidth=1)
    axes.plot(positions, losses, ".-", color=LINE_COLORS[0], linewidth=1.2, markersize=5)
    axes.plot([0, 1], ends, "o", color=MARK_COLOR, markersize=7, zorder=5)
    axes.set(xlabel="position between the models", ylabel=unit)


def _draw_marks(axes: "Axes", marks: FloatArray, **style: Any) -> None:
    """Draw a cross for one point, or a path from a dot to a star for several; marks are ``(2 or 3, point)``."""
    if marks.shape[1] == 1:
        axes.plot(*marks, "+", color=MARK_COLOR, markersize=12, markeredgewidth=2, **style)
        return
    axes.plot(*marks, ".-", color=MARK_COLOR, linewidth=1.4, markersize=6, **style)
    axes.plot(*marks[:, :1], "o", color=MARK_COLOR, markeredgecolor="white", markersize=9, **style)
    axes.plot(*marks[:, -1:], "*", color=MARK_COLOR, markeredgecolor="white", markersize=16, **style)
