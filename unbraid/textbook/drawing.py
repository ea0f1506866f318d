"""Drawing shared by the figures of the line: points, lines, the loss as contours, and paths on it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from unbraid.textbook.line import B_RANGE, M_RANGE, TRUE_B, TRUE_M, Grid, Points, Problem
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Colours mean the same in every figure of the chapter.
DATA = "#777777"
TRUTH = "#2ca02c"
START = "#ff7f0e"
BEST = "#1f77b4"
PATH = "#d62728"

X_RANGE = np.array([-1.2, 3.2])
"""Both ends of the x axis."""
LRS = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0001)
"""Learning rates that the chapter compares."""


def draw_points(axes: "Axes", points: Points) -> None:
    """Draw the data as dots."""
    axes.plot(points.x, points.y, ".", color=DATA, markersize=5, label="data")
    axes.set(xlabel="x", ylabel="y", xlim=tuple(X_RANGE))


def draw_line(axes: "Axes", line: Iterable[float], color: str, label: str | None = None, **style: Any) -> "Line2D":
    """Draw a line over the whole width, and return the artist so that an animation can move it."""
    artist: Line2D = axes.plot(X_RANGE, line_ends(line), color=color, label=label, **style)[0]
    return artist


def line_ends(line: Iterable[float]) -> FloatArray:
    """Return a line's y at both ends of the x axis, ``(2,)``."""
    m, b = map(float, line)
    return m * X_RANGE + b


def draw_truth(axes: "Axes") -> None:
    """Draw the line that the data were made from."""
    draw_line(axes, (TRUE_M, TRUE_B), TRUTH, "truth", linestyle="--", linewidth=1.2)


def draw_contour(axes: "Axes", grid: Grid, problem: Problem) -> None:
    """Draw the loss as contours and its minimum as a cross."""
    excess = (grid.losses - grid.losses.min()).numpy().T
    # Geometric levels, so that the flat region around the minimum has contours too.
    levels = np.geomspace(0.004, 0.9, 12) * excess.max()
    axes.contour(grid.m, grid.b, excess, levels=levels, cmap="viridis", linewidths=0.7)
    axes.plot(*problem.best.tolist(), "+", color="black", markersize=9, markeredgewidth=1.5, zorder=5)
    axes.set(xlabel="m", ylabel="b", xlim=M_RANGE, ylim=B_RANGE)


def drawable_path(path: Tensor) -> FloatArray:
    """Return a path ``(step, 2)`` as ``(2, step)``, with points far outside the figure moved nearer.

    Matplotlib cannot draw coordinates such as 1e200. The points keep their direction from the origin.
    """
    size = path.abs().amax(1, keepdim=True).clamp(min=1e3)
    return (path / size * 1e3).numpy().T


def lr_key(lr: float) -> str:
    """Return a learning rate as part of a number's name: ``lr_0_01`` for 0.01."""
    return f"lr_{lr:g}".replace(".", "_")


def equation(line: Iterable[float]) -> str:
    """Return a line as text such as ``y = 1.94 x + 1.17``."""
    m, b = map(float, line)
    return f"y = {round(m, 2) + 0.0:.2f} x {'-' if b < 0 else '+'} {abs(b):.2f}"  # + 0.0: no -0.00


def finite_numbers(**numbers: float | Tensor) -> dict[str, float]:
    """Return numbers by name as floats, without those that are not finite."""
    floats = {name: float(number) for name, number in numbers.items()}
    return {name: number for name, number in floats.items() if np.isfinite(number)}
