"""Learning-rate range test as a figure, as sentences and as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unbraid.figures import FigureSpec, write_figure
from unbraid.io import to_json_row, write_json
from unbraid.lab.lr_range import LrGrid, RangeTest, format_lr
from unbraid.type_aliases import FloatArray, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_COLOR = "#1f77b4"
NORM_COLOR = "#555555"
RATIO_COLOR = "#9467bd"
SUGGESTION_COLOR = "#d62728"
GRID_COLOR = "#2ca02c"
SMOOTHED_LABEL = "smoothed, capped at the start"
KNOWN_BIAS = {
    "sgd": "too low: it was by a factor of 3 to 17 in half of the cases on which the rule was chosen",
    "schedule_free": "too low: it was by a factor of 5 in the only case measured",
    "autoclip": "too high: it was by a factor of 6 in the only case measured",
}
"""Measured error of the suggestion against the best rate of a grid, by optimizer or clipper; see `suggest_lr`."""


def lr_range_figure(test: RangeTest, grid: LrGrid | None = None) -> FigureSpec:
    """Return the figure of a test: loss over learning rate, with gradient norm and size of updates below.

    Args:
        test: A test of at least one step.
        grid: Grid of the same experiment, to show with the loss.
    """
    numbers = {}
    if test.suggestion is not None:
        numbers["suggestion"] = test.suggestion
    if grid is not None and grid.best is not None:
        numbers["grid_best"] = grid.best
    return FigureSpec(
        "lr-range",
        f"Learning-rate range test of {test.name}, {test.optimizer}",
        " ".join(summary_sentences(test, grid)),
        numbers,
        lambda figure: _draw(figure, test, grid),
        figsize=(6.8, 6.0),
    )


def summary_sentences(test: RangeTest, grid: LrGrid | None = None) -> list[str]:
    """Return the result of a test in sentences."""
    sentences = [test.stop_reason, test.reason]
    if grid is not None:
        sentences.append(_grid_sentence(grid, test.suggestion))
    if test.suggestion is not None:
        for component, bias in KNOWN_BIAS.items():
            if component in (test.optimizer, test.clipper):
                sentences.append(f"With {component} it may be {bias}; --grid checks it.")
        sentences.append(
            "This rate suits the first steps from these weights; a long run needs a [schedule] that lowers it, and a "
            "larger model often needs a lower one."
        )
    return sentences


def _grid_sentence(grid: LrGrid, suggestion: float | None) -> str:
    best = grid.best
    prefix = f"Grid of {len(grid.lrs)} rates, {grid.n_steps} steps with each"
    if best is None:
        return f"{prefix}: none ended with a finite loss."
    if suggestion is None:
        return f"{prefix}: the best is {format_lr(best)}."
    # The same factor whether the suggestion is too high or too low.
    error = max(best / suggestion, suggestion / best)
    loss = float(grid.losses[list(grid.lrs).index(best)])
    at_edge = best in (grid.lrs[0], grid.lrs[-1])
    edge = " (at the edge of the grid, so the best rate may lie beyond it)" if at_edge else ""
    return (
        f"{prefix}: {format_lr(best)} ends lowest, at {loss:.3g}{edge}; the suggestion is off by a factor of "
        f"{error:.1f}."
    )


def range_test_json(test: RangeTest, grid: LrGrid | None = None) -> Row:
    """Return all results as JSON values; numbers that are not finite become null."""
    row = {
        "name": test.name,
        "optimizer": test.optimizer,
        "clipper": test.clipper,
        "suggestion": test.suggestion,
        "reason": test.reason,
        "stop_reason": test.stop_reason,
        "lrs": test.lrs.tolist(),
        "losses": test.losses.tolist(),
        "smoothed_capped": test.smoothed_capped.tolist(),
        "grad_norms": test.grad_norms.tolist(),
        "update_ratios": test.update_ratios.tolist(),
    }
    if grid is not None:
        row |= {
            "grid_lrs": grid.lrs.tolist(),
            "grid_losses": grid.losses.tolist(),
            "grid_best": grid.best,
            "grid_steps": grid.n_steps,
            "grid_items": grid.n_items,
        }
    return to_json_row(row)


def write_lr_range(out: Path, test: RangeTest, grid: LrGrid | None = None) -> Path:
    """Write ``lr-range.png`` and ``lr-range.json``, each atomically.

    Args:
        out: Folder; it is created.
        test: A test of at least one step.
        grid: Grid of the same experiment.

    Returns:
        The path of the figure.

    Raises:
        OSError: If the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "lr-range.json", range_test_json(test, grid))
    return write_figure(lr_range_figure(test, grid), out)


def _draw(figure: "Figure", test: RangeTest, grid: LrGrid | None) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_losses(top, test, grid)
    _draw_norms(bottom, test)
    if test.suggestion is not None:
        for axes in (top, bottom):
            axes.axvline(test.suggestion, color=SUGGESTION_COLOR, linewidth=1.0, linestyle="--")
    figure.suptitle(f"{test.name}, {test.optimizer}: learning rate grown from step to step", fontsize="medium")


def _draw_losses(axes: "Axes", test: RangeTest, grid: LrGrid | None) -> None:
    axes.semilogx(test.lrs, test.losses, color=LOSS_COLOR, alpha=0.4, linewidth=0.7, label="loss of each step")
    axes.semilogx(test.lrs, test.smoothed_capped, color=LOSS_COLOR, linewidth=2.0, label=SMOOTHED_LABEL)
    if test.suggestion is not None:
        loss = float(np.interp(test.suggestion, test.lrs, test.smoothed_capped))
        label = f"suggestion: {format_lr(test.suggestion)}"
        axes.plot(test.suggestion, loss, "o", color=SUGGESTION_COLOR, label=label, zorder=5)
    shown = test.losses
    if grid is not None:
        label = f"grid: after {grid.n_steps} steps with one rate"
        axes.plot(grid.lrs, grid.losses, "s--", color=GRID_COLOR, markersize=4, linewidth=0.8, label=label)
        shown = np.concatenate([shown, grid.losses])

    # From the lowest loss to a little above the start: a loss that diverged may be higher by any power of ten.
    shown = shown[np.isfinite(shown)]
    if len(shown):
        low = float(shown.min())
        start = float(test.losses[np.isfinite(test.losses)][:5].max(initial=low))
        height = max(start - low, 1e-12)
        axes.set_ylim(low - 0.1 * height, min(float(shown.max()), start + height) + 0.1 * height)
    axes.set(ylabel="loss")
    axes.legend(frameon=False, fontsize="small")


def _draw_norms(axes: "Axes", test: RangeTest) -> None:
    axes.loglog(test.lrs, _nan_unless_positive(test.grad_norms), color=NORM_COLOR, linewidth=1.0)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("gradient norm", color=NORM_COLOR)
    # Norms and ratios differ by orders of magnitude: each has its own axis.
    right = axes.twinx()
    right.loglog(test.lrs, _nan_unless_positive(test.update_ratios), color=RATIO_COLOR, linewidth=1.0)
    right.set_ylabel("update over weights", color=RATIO_COLOR)


def _nan_unless_positive(values: FloatArray) -> FloatArray:
    return np.where(values > 0, values, np.nan)  # a logarithmic axis cannot show 0
