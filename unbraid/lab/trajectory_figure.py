"""Figure of trajectories: a column for each clipper, and gradient norm against smoothness at the right."""

import math
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from unbraid.figures import FigureSpec
from unbraid.lab.trajectory import Column, Correlation, Trajectory, TrajectoryComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b")
MAX_NORM_COLOR = "#ff7f0e"
GRID_COLOR = "#dddddd"
ROWS: dict[Column, str] = {
    "step_size": "step size",
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "smoothness": "smoothness",
}
"""Panels from top to bottom, as in the figure of the AutoClip paper."""


def trajectory_figure(comparison: TrajectoryComparison) -> FigureSpec:
    """Return the figure of a comparison."""
    return FigureSpec(
        name="trajectory",
        title=f"Trajectories of {comparison.name}",
        caption=" ".join(comparison.summary_lines()),
        numbers={f"{arm.clip}: correlation": arm.correlation("grad_norm").r for arm in comparison.arms},
        draw=partial(_draw, comparison),
        figsize=(3.2 * len(comparison.arms) + 3.4, 7.0),
    )


def _draw(comparison: TrajectoryComparison, figure: "Figure") -> None:
    """Draw all arms on shared axes, so that they can be compared by eye."""
    n_arms = len(comparison.arms)
    left, right = figure.subfigures(1, 2, width_ratios=[1.45 * n_arms, 1.5], squeeze=False)[0]

    # Left: one column for each arm, one row for each series.
    panels = left.subplots(len(ROWS), n_arms, sharex=True, sharey="row", squeeze=False)
    for row, (name, title) in enumerate(ROWS.items()):
        panels[row, 0].set_ylabel(title)
        for column, arm in enumerate(comparison.arms):
            _draw_series(panels[row, column], arm, name, COLORS[column % len(COLORS)])
    for column, arm in enumerate(comparison.arms):
        counts = f"{arm.n_clipped} of {arm.n_trained} steps clipped"
        panels[0, column].set_title(f"{_clipper_title(arm)}\n{counts}", fontsize="medium")
        panels[-1, column].set(xlabel="step", xlim=(0, comparison.n_steps))
    left.align_ylabels()

    # Right: gradient norm against smoothness, one panel for each arm.
    scatter_axes = right.subplots(n_arms, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, arm in zip(scatter_axes, comparison.arms, strict=True):
        _draw_scatter(axes, arm, comparison.n_steps)
    scatter_axes[-1].set_xlabel("gradient norm")


def _draw_series(axes: "Axes", arm: Trajectory, name: Column, color: str) -> None:
    step = arm.column("step")
    values = arm.column(name)
    if name != "loss":
        _log_scale(axes, "y")
        values = np.where(values > 0, values, np.nan)
    # Smoothness is measured in few steps only: mark them, and join them by lines.
    is_finite = np.isfinite(values)
    markers = {"marker": ".", "markersize": 3} if name == "smoothness" else {}
    axes.plot(step[is_finite], values[is_finite], color=color, linewidth=0.8, **markers)  # type: ignore[arg-type]
    if name == "grad_norm":
        max_norm = arm.column("max_norm")
        has_limit = np.isfinite(max_norm)
        if has_limit.any():
            axes.plot(step[has_limit], max_norm[has_limit], color=MAX_NORM_COLOR, linewidth=1.6, label="clipped to")
            axes.legend(framealpha=0.9, edgecolor="none", fontsize="small", loc="upper right")
    axes.grid(color=GRID_COLOR, linewidth=0.5)


def _draw_scatter(axes: "Axes", arm: Trajectory, n_steps: int) -> None:
    norm = arm.column("grad_norm")
    smoothness = arm.column("smoothness")
    step = arm.column("step")
    drawable = np.isfinite(smoothness) & (norm > 0) & (smoothness > 0)
    dots = axes.scatter(
        norm[drawable],
        smoothness[drawable],
        c=step[drawable],
        cmap="viridis",
        s=14,
        vmin=0,
        vmax=n_steps,
        linewidths=0,
    )
    _log_scale(axes, "x")
    _log_scale(axes, "y")
    axes.set_ylabel("smoothness")
    axes.set_title(f"{_clipper_title(arm)}\n{_correlation_text(arm.correlation('grad_norm'))}", fontsize="medium")
    axes.grid(color=GRID_COLOR, linewidth=0.5)
    axes.figure.colorbar(dots, ax=axes, label="step", pad=0.02)


def _log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Set a log scale with ticks at 1, 2 and 5, because the values span a few octaves and seldom many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _clipper_title(arm: Trajectory) -> str:
    titles = {"none": "no clipping", "autoclip": "AutoClip", "recipe": "the recipe's clipping"}
    return titles.get(arm.clip, arm.clip)


def _correlation_text(correlation: Correlation) -> str:
    text = "no correlation" if math.isnan(correlation.r) else f"r = {correlation.r:.2f}"
    return f"{text} ({correlation.n_points} points)"
