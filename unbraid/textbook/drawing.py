"""What several plates of the line draw alike: points, lines, the loss as contours, a path on them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from unbraid.textbook.line import B_RANGE, M_RANGE, TRUE_B, TRUE_M, Grid, Points, Problem
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

DATA, TRUTH, START, BEST, PATH = "#777777", "#2ca02c", "#ff7f0e", "#1f77b4", "#d62728"
X_RANGE = np.array([-1.2, 3.2])
RATES = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0001)


def draw_points(axes: "Axes", points: Points) -> None:
    """The data as dots."""
    axes.plot(points.x, points.y, ".", color=DATA, markersize=5, label="data")
    axes.set(xlabel="x", ylabel="y", xlim=tuple(X_RANGE))


def draw_line(axes: "Axes", line: Iterable[float], color: str, label: str | None = None, **style: Any) -> "Line2D":
    """One line over the whole width, to be moved by `move_line`."""
    artist: Line2D = axes.plot(X_RANGE, heights(line), color=color, label=label, **style)[0]
    return artist


def heights(line: Iterable[float]) -> FloatArray:
    """A line's y at both ends of the figure, ``(2,)``."""
    m, b = map(float, line)
    return m * X_RANGE + b


def draw_truth(axes: "Axes") -> None:
    """The line that the data were made from."""
    draw_line(axes, (TRUE_M, TRUE_B), TRUTH, "truth", linestyle="--", linewidth=1.2)


def draw_contour(axes: "Axes", grid: Grid, problem: Problem) -> None:
    """The loss as contours, closer together towards the minimum, and the minimum as a cross."""
    excess = (grid.losses - grid.losses.min()).numpy().T
    levels = np.geomspace(0.004, 0.9, 12) * excess.max()
    axes.contour(grid.m, grid.b, excess, levels=levels, cmap="viridis", linewidths=0.7)
    axes.plot(*problem.best.tolist(), "+", color="black", markersize=9, markeredgewidth=1.5, zorder=5)
    axes.set(xlabel="m", ylabel="b", xlim=M_RANGE, ylim=B_RANGE)


def drawable(path: Tensor) -> FloatArray:
    """A path ``(step, 2)`` to draw, as ``(2, step)``: what is far outside is brought nearer, in its direction."""
    size = path.abs().amax(1, keepdim=True).clamp(min=1e3)
    return (path / size * 1e3).numpy().T


def rate_name(lr: float) -> str:
    """A learning rate as part of a number's name: 0.01 is ``lr_0_01``."""
    return f"lr_{lr:g}".replace(".", "_")


def equation(line: Iterable[float]) -> str:
    """As in ``y = 1.94 x + 1.17``."""
    m, b = map(float, line)
    return f"y = {round(m, 2) + 0.0:.2f} x {'-' if b < 0 else '+'} {abs(b):.2f}"  # + 0.0: no -0.00


def finite(**numbers: float | Tensor) -> dict[str, float]:
    """Numbers by name as floats, without those that are not finite."""
    plain = {name: float(number) for name, number in numbers.items()}
    return {name: number for name, number in plain.items() if np.isfinite(number)}
