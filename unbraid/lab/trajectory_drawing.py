"""Trajectories as a picture: a column for each clipper, and gradient norm against smoothness beside them."""

import math
from typing import TYPE_CHECKING

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
    n_arms = len(course.arms)
    grid = figure.add_gridspec(len(ROWS), n_arms + 1, width_ratios=[*[1.0] * n_arms, 0.9])
    for row, (name, title) in enumerate(ROWS.items()):
        first: Axes | None = None
        for column, arm in enumerate(course.arms):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            first = first or axes
            _draw_series(axes, arm, name, COLORS[column % len(COLORS)])
            axes.set_xlim(0, course.n_steps)
            axes.tick_params(labelbottom=row == len(ROWS) - 1, labelleft=column == 0)
            if column == 0:
                axes.set_ylabel(title)
            if row == 0:
                axes.set_title(f"{_named(arm)}: {_counts(arm)}", fontsize="medium")
            if row == len(ROWS) - 1:
                axes.set_xlabel("step")
    shared: Axes | None = None
    cuts = np.linspace(0, len(ROWS), n_arms + 1).round().astype(int)
    for place, arm in enumerate(course.arms):
        axes = figure.add_subplot(grid[cuts[place] : cuts[place + 1], n_arms], sharex=shared, sharey=shared)
        shared = shared or axes
        _draw_scatter(axes, arm, course)


def size_of(course: Course) -> tuple[float, float]:
    """Of the figure, in inches."""
    return 3.6 * len(course.arms) + 3.6, 7.6


def _draw_series(axes: "Axes", arm: Trajectory, name: Column, color: str) -> None:
    step, values = arm.column("step"), arm.column(name)
    if name != "loss":
        axes.set_yscale("log")
        values = np.where(values > 0, values, np.nan)
    known = np.isfinite(values)
    style = {"marker": ".", "markersize": 3} if name == "smoothness" else {}
    axes.plot(step[known], values[known], color=color, linewidth=0.8, **style)  # type: ignore[arg-type]
    if name == "grad_norm":
        limit = arm.column("limit")
        there = np.isfinite(limit)
        if there.any():
            axes.plot(step[there], limit[there], color=LIMIT, linewidth=1.6, label="clipped to")
            axes.legend(frameon=False, fontsize="small", loc="upper right")
    axes.grid(color=FRAME, linewidth=0.5)


def _draw_scatter(axes: "Axes", arm: Trajectory, course: Course) -> None:
    norm, smooth, step = arm.column("grad_norm"), arm.column("smoothness"), arm.column("step")
    known = np.isfinite(smooth) & (norm > 0) & (smooth > 0)
    dots = axes.scatter(
        norm[known], smooth[known], c=step[known], cmap="viridis", s=14, vmin=0, vmax=course.n_steps, linewidths=0
    )
    axes.set(xscale="log", yscale="log", xlabel="gradient norm", ylabel="smoothness")
    axes.set_title(f"{_named(arm)}: {_words(arm.correlation('grad_norm'))}", fontsize="medium")
    axes.grid(color=FRAME, linewidth=0.5)
    axes.figure.colorbar(dots, ax=axes, label="step", pad=0.02)


def _named(arm: Trajectory) -> str:
    return {"none": "no clipping", "autoclip": "AutoClip", "recipe": "the recipe's clipping"}.get(arm.clip, arm.clip)


def _counts(arm: Trajectory) -> str:
    return f"{arm.clipped} of {arm.trained} steps clipped"


def _words(found: Correlation) -> str:
    told = "no correlation" if math.isnan(found.value) else f"r = {found.value:.2f}"
    return f"{told} ({found.n_points} points)"
