"""A learning-rate range test as a figure, as summary_sentences and as a file of range_test_json."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import FigureSpec, write_figure
from unbraid.io import to_json_row, write_json
from unbraid.lab.lr_range import LrGrid, RangeTest, format_lr
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS, NORM, RATIO, BEST, GRID = "#1f77b4", "#555555", "#9467bd", "#d62728", "#2ca02c"
SMOOTHED = "smoothed, capped at where it began"
OFF = {
    "sgd": "too low: it was by a factor of 3 to 17 in half of the cases on which the rule was chosen",
    "schedule_free": "too low: it was by a factor of 5 in the only case measured",
    "autoclip": "too high: it was by a factor of 6 in the only case measured",
}
"""How far the suggestion was found to lie from the best rate of a grid, by optimizer or clipper; see `suggest`."""


def lr_range_figure(test: RangeTest, grid: LrGrid | None = None) -> FigureSpec:
    """The figure: loss over learning rate, with the grid's if there is one; gradient norm and size of updates below.

    Args:
        test: With at least one step.
        grid: Of the same experiment.
    """
    told = range_test_json(test, grid)
    known = {name: told[name] for name in ("suggestion", "grid_best") if told.get(name) is not None}
    return FigureSpec(
        "lr-range",
        f"Learning-rate range test of {test.name}, {test.optimizer}",
        " ".join(summary_sentences(test, grid)),
        known,
        lambda figure: _draw(figure, test, grid),
        figsize=(6.8, 6.0),
    )


def summary_sentences(test: RangeTest, grid: LrGrid | None = None) -> list[str]:
    """What came of it, in sentences."""
    said = [test.stop_reason, test.reason]
    if grid is not None:
        said.append(_of_grid(grid, test.suggestion))
    if test.suggestion is not None:
        for part, known in OFF.items():
            if part in (test.optimizer, test.clipper):
                said.append(f"With {part} it may be {known}; see what --grid says.")
        said.append(
            "It is a rate for the first steps from these weights; a long run wants it lowered by its [schedule], and a "
            "larger model often wants less."
        )
    return said


def _of_grid(grid: LrGrid, suggestion: float | None) -> str:
    best, each = grid.best, f"{grid.n_steps} steps with each of {len(grid.lrs)} rates"
    if best is None or suggestion is None:
        return f"Grid, {each}: " + ("none ended with a finite loss." if best is None else f"best is {format_lr(best)}.")
    apart = max(best / suggestion, suggestion / best)
    loss = float(grid.losses[list(grid.lrs).index(best)])
    at_edge = best in (grid.lrs[0], grid.lrs[-1])
    edge = " (at the edge of the grid, so that the best may lie beyond it)" if at_edge else ""
    return (
        f"Grid, {each}: {format_lr(best)} ends lowest, at {loss:.3g}{edge}; the suggestion is a factor of {apart:.1f} "
        "off."
    )


def range_test_json(test: RangeTest, grid: LrGrid | None = None) -> dict[str, Any]:
    """All of it as JSON knows it: what is not finite is null."""
    names = ("lrs", "losses", "smoothed_capped", "grad_norms", "update_ratios")
    told: dict[str, Any] = {
        "name": test.name,
        "optimizer": test.optimizer,
        "clipper": test.clipper,
        "suggestion": test.suggestion,
    }
    told |= {"reason": test.reason, "stop_reason": test.stop_reason}
    told |= {name: getattr(test, name).tolist() for name in names}
    if grid is not None:
        told |= {"grid_lrs": grid.lrs.tolist(), "grid_losses": grid.losses.tolist(), "grid_best": grid.best}
        told |= {"grid_steps": grid.n_steps, "grid_items": grid.n_items}
    return to_json_row(told)


def write_lr_range(out: Path, test: RangeTest, grid: LrGrid | None = None) -> Path:
    """Write ``lr-range.png`` and ``lr-range.json``, each whole or not at all.

    Args:
        out: A folder, made where it is missing.
        test: With at least one step.
        grid: Of the same experiment.

    Returns:
        The figure.

    Raises:
        OSError: If the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "lr-range.json", range_test_json(test, grid))
    return write_figure(lr_range_figure(test, grid), out)


def _draw(figure: "Figure", test: RangeTest, grid: LrGrid | None) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_loss(above, test, grid)
    _draw_norms(below, test)
    for axes in (above, below):
        if test.suggestion is not None:
            axes.axvline(test.suggestion, color=BEST, linewidth=1.0, linestyle="--")
    figure.suptitle(f"{test.name}, {test.optimizer}: learning rate grown from step to step", fontsize="medium")


def _draw_loss(axes: "Axes", test: RangeTest, grid: LrGrid | None) -> None:
    axes.semilogx(test.lrs, test.losses, color=LOSS, alpha=0.4, linewidth=0.7, label="loss of each step")
    axes.semilogx(test.lrs, test.smoothed_capped, color=LOSS, linewidth=2.0, label=SMOOTHED)
    if test.suggestion is not None:
        level = float(np.interp(test.suggestion, test.lrs, test.smoothed_capped))
        axes.plot(test.suggestion, level, "o", color=BEST, label=f"suggestion: {format_lr(test.suggestion)}", zorder=5)
    if grid is not None:
        label = f"grid: after {grid.n_steps} steps with it alone"
        axes.plot(grid.lrs, grid.losses, "s--", color=GRID, markersize=4, linewidth=0.8, label=label)
    shown = np.concatenate([test.losses, *([grid.losses] if grid is not None else [])])
    low, high = _limits(shown[np.isfinite(shown)], test)
    axes.set_ylim(low, high)
    axes.set(ylabel="loss")
    axes.legend(frameon=False, fontsize="small")


def _limits(shown: FloatArray, test: RangeTest) -> tuple[float | None, float | None]:
    """From the lowest to not much above where it began: what is lost may be higher by any power of ten."""
    if not len(shown):
        return None, None
    top = float(test.losses[np.isfinite(test.losses)][:5].max(initial=float(shown.min())))
    room = max(float(top - shown.min()), 1e-12)
    return float(shown.min()) - 0.1 * room, min(float(shown.max()), top + room) + 0.1 * room


def _draw_norms(axes: "Axes", test: RangeTest) -> None:
    axes.loglog(test.lrs, _positive(test.grad_norms), color=NORM, linewidth=1.0)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("gradient norm", color=NORM)
    beside = axes.twinx()
    beside.loglog(test.lrs, _positive(test.update_ratios), color=RATIO, linewidth=1.0)
    beside.set_ylabel("update over weights", color=RATIO)


def _positive(values: FloatArray) -> FloatArray:
    return np.where(values > 0, values, np.nan)
