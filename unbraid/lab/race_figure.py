"""Figure of a race: loss, gradient norm and SI-SDRi of each arm over the steps, with a band over its seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.figures import FigureSpec
from unbraid.lab.sweep import RunEnd, SweepRun
from unbraid.plot_data import running_mean
from unbraid.records import read_steps, read_validation
from unbraid.type_aliases import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[FloatArray, FloatArray]
"""Steps and values."""

Curves = Mapping[str, Sequence[Curve]]
"""The curve of each seed, by arm."""

LINE_STYLES = ("-", "--", ":", "-.")


def read_curves(runs: Sequence[SweepRun]) -> tuple[Curves, Curves, Curves]:
    """Return the curves of training loss, gradient norm and validation SI-SDRi from the records of runs."""
    losses: dict[str, list[Curve]] = {}
    norms: dict[str, list[Curve]] = {}
    scores: dict[str, list[Curve]] = {}
    for run in runs:
        arm = run.arm.name
        trained = [record for record in read_steps(run.directory.steps) if record.trained]
        validations = read_validation(run.directory.validation)
        losses.setdefault(arm, []).append(_curve([(row.step, row.loss) for row in trained]))
        norms.setdefault(arm, []).append(_curve([(row.step, row.grad_norm) for row in trained]))
        scores.setdefault(arm, []).append(_curve([(row.step, row.si_sdri) for row in validations]))
    return losses, norms, scores


def _curve(points: Sequence[tuple[int, float | None]]) -> Curve:
    known = [(step, value) for step, value in points if value is not None]
    table = np.array(known, np.float64).reshape(-1, 2)  # reshape: also with no points at all
    return table[:, 0], table[:, 1]


def race_figure(ended: Sequence[tuple[SweepRun, RunEnd]], verdict: str) -> FigureSpec:
    """Return the figure of a race that has ended."""
    losses, norms, scores = read_curves([run for run, _ in ended])
    n_seeds = len({run.seed for run, _ in ended})
    seeds = f"mean over {n_seeds} seeds, with a band from the lowest to the highest" if n_seeds > 1 else "one seed"
    caption = (
        "Training loss and gradient norm before clipping, smoothed over a fiftieth of the run, and SI-SDRi of the "
        f"validations: {seeds}. All arms of a seed draw weights and mixtures from it: if model and data are equal, "
        f"they start from the same weights and see the same mixtures in the same order. {verdict}"
    )
    numbers = {
        arm: float(np.mean([values[-1] for _, values in curves if len(values)] or [np.nan]))
        for arm, curves in scores.items()
    }
    draw = partial(draw_race, losses, norms, scores, subtitle=seeds)
    return FigureSpec("race", "A race from the same weights", caption, numbers, draw, figsize=(12.0, 4.4))


def draw_race(losses: Curves, norms: Curves, scores: Curves, figure: "Figure", *, subtitle: str = "") -> None:
    """Draw losses, norms and SI-SDRi side by side."""
    from matplotlib import colormaps

    left, middle, right = figure.subplots(1, 3)
    arms = list(losses)
    for index, arm in enumerate(arms):
        color = colormaps["tab10"](index) if len(arms) <= 10 else colormaps["turbo"](index / (len(arms) - 1))
        # Later arms are thinner and dashed, so that arms with equal curves all stay visible.
        thinness = index / max(1, len(arms) - 1)
        style: dict[str, Any] = {
            "color": color,
            "linestyle": LINE_STYLES[index % 4],
            "linewidth": 2.6 - 1.6 * thinness,
        }
        _draw_band(left, _smooth(losses[arm]), style | {"label": arm})
        _draw_band(middle, _smooth(norms[arm]), style)
        validations = [curve for curve in scores[arm] if len(curve[0])]
        _draw_band(right, validations, style | {"marker": "o", "markersize": 5 - 2 * thinness})

    # One diverging arm must not squeeze all others: limit the axis to the percentiles of all losses.
    known = [values for curves in losses.values() for _, values in curves if len(values)]
    if known:
        low, high = np.percentile(np.concatenate(known), [0.2, 99])
        left.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    figure.suptitle(subtitle, fontsize="small")
    left.set(xlabel="step", title="training loss")
    middle.set(xlabel="step", title="gradient norm before clipping", yscale="log")
    right.set(xlabel="step", ylabel="dB", title="validation SI-SDRi")
    right.axhline(0, color="black", linewidth=0.6)
    n_columns = max(1, min(4, 130 // (max(map(len, arms)) + 6)))  # as many names as fit side by side
    figure.legend(loc="outside lower center", ncols=n_columns, frameon=False, fontsize="small")


def _smooth(curves: Sequence[Curve]) -> list[Curve]:
    return [(steps, running_mean(values, max(1, len(values) // 50))) for steps, values in curves if len(steps)]


def _draw_band(axes: "Axes", curves: Sequence[Curve], style: Mapping[str, Any]) -> None:
    """Draw the mean over seeds, and a band from the lowest to the highest."""
    if not curves:
        axes.plot([], [], **style)  # for the legend
        return
    # One row per seed on the union of their steps; NaN where a seed has no value, as after an early end.
    steps = np.unique(np.concatenate([at for at, _ in curves]))
    values = np.full((len(curves), len(steps)), np.nan)
    for row, (at, curve) in enumerate(curves):
        values[row, np.searchsorted(steps, at)] = curve
    is_known = np.isfinite(values)
    mean = np.nansum(values, 0) / np.maximum(is_known.sum(0), 1)
    axes.plot(steps, mean, **style)
    if len(curves) > 1:
        # Not nanmin and nanmax: they warn of steps without any value.
        low = np.where(is_known, values, np.inf).min(0)
        high = np.where(is_known, values, -np.inf).max(0)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
