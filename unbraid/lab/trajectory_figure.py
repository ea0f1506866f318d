"""Trajectories as a picture: a column for each clipper, and gradient norm against smoothness beside them."""

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from unbraid.lab.trajectory import Column, Correlation, Trajectory
from unbraid.lab.trajectory_run import Course

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b")
LIMIT, FRAME = "#ff7f0e", "#dddddd"
ROWS: dict[Column, str] = {
    "step_size": "step size",
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "smoothness": "smoothness",
}
"""From top to bottom, as in the figure of the AutoClip paper."""


def draw(figure: "Figure", course: Course) -> None:
    """Draw into an empty figure of `size_of`; all arms share their axes, so that they can be compared by eye."""
    left, right = figure.subfigures(1, 2, width_ratios=[1.45 * len(course.arms), 1.5], squeeze=False)[0]
    panels = left.subplots(len(ROWS), len(course.arms), sharex=True, sharey="row", squeeze=False)
    for row, (name, title) in enumerate(ROWS.items()):
        panels[row, 0].set_ylabel(title)
        for column, arm in enumerate(course.arms):
            _draw_series(panels[row, column], arm, name, COLORS[column % len(COLORS)])
    for column, arm in enumerate(course.arms):
        panels[0, column].set_title(f"{_named(arm)}\n{_counts(arm)}", fontsize="medium")
        panels[-1, column].set(xlabel="step", xlim=(0, course.n_steps))
    left.align_ylabels()
    below = right.subplots(len(course.arms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, arm in zip(below, course.arms, strict=True):
        _draw_scatter(axes, arm, course)
    below[-1].set_xlabel("gradient norm")


def size_of(course: Course) -> tuple[float, float]:
    """Of the figure, in inches."""
    return 3.2 * len(course.arms) + 3.4, 7.0


def _draw_series(axes: "Axes", arm: Trajectory, name: Column, color: str) -> None:
    step, values = arm.column("step"), arm.column(name)
    if name != "loss":
        _log_scale(axes, "y")
        values = np.where(values > 0, values, np.nan)
    known = np.isfinite(values)
    style = {"marker": ".", "markersize": 3} if name == "smoothness" else {}
    axes.plot(step[known], values[known], color=color, linewidth=0.8, **style)  # type: ignore[arg-type]
    if name == "grad_norm":
        limit = arm.column("max_norm")
        there = np.isfinite(limit)
        if there.any():
            axes.plot(step[there], limit[there], color=LIMIT, linewidth=1.6, label="clipped to")
            axes.legend(framealpha=0.9, edgecolor="none", fontsize="small", loc="upper right")
    axes.grid(color=FRAME, linewidth=0.5)


def _draw_scatter(axes: "Axes", arm: Trajectory, course: Course) -> None:
    norm, smooth, step = arm.column("grad_norm"), arm.column("smoothness"), arm.column("step")
    known = np.isfinite(smooth) & (norm > 0) & (smooth > 0)
    dots = axes.scatter(
        norm[known], smooth[known], c=step[known], cmap="viridis", s=14, vmin=0, vmax=course.n_steps, linewidths=0
    )
    _log_scale(axes, "x")
    _log_scale(axes, "y")
    axes.set_ylabel("smoothness")
    axes.set_title(f"{_named(arm)}\n{_words(arm.correlation('grad_norm'))}", fontsize="medium")
    axes.grid(color=FRAME, linewidth=0.5)
    axes.figure.colorbar(dots, ax=axes, label="step", pad=0.02)


def _log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """With plain numbers at 1, 2 and 5, as a few octaves are more usual here than many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _named(arm: Trajectory) -> str:
    return {"none": "no clipping", "autoclip": "AutoClip", "recipe": "the recipe's clipping"}.get(arm.clip, arm.clip)


def _counts(arm: Trajectory) -> str:
    return f"{arm.clipped} of {arm.trained} steps clipped"


def _words(found: Correlation) -> str:
    told = "no correlation" if math.isnan(found.value) else f"r = {found.value:.2f}"
    return f"{told} ({found.n_points} points)"
