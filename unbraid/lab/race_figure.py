"""The figure of a race: loss, gradient norm and SI-SDRi of each arm over the steps, with a band over its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

Curves = Mapping[str, Sequence[tuple[FloatArray, FloatArray]]]
"""By arm: for each seed steps and values."""

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class RaceCurves:
    """What is drawn of a race: training loss and gradient norm of the steps trained, SI-SDRi of the validations."""

    losses: Curves
    norms: Curves
    scores: Curves


def read_curves(cells: Sequence[tuple[SweepRun, RunEnd]]) -> RaceCurves:
    """The curves of some runs, by their records."""
    losses, norms, scores = (dict[str, list[tuple[FloatArray, FloatArray]]]() for _ in range(3))
    for cell, _ in cells:
        trained = [record for record in read_steps(cell.directory.steps) if record.trained]
        rows = {
            "loss": [(r.step, r.loss) for r in trained if r.loss is not None],
            "norm": [(r.step, r.grad_norm) for r in trained if r.grad_norm is not None],
            "score": [(r.step, r.si_sdri) for r in read_validation(cell.directory.validation) if r.si_sdri is not None],
        }
        for found, some in zip((losses, norms, scores), rows.values(), strict=True):
            table = np.array(some, np.float64).reshape(-1, 2)
            found.setdefault(cell.arm.name, []).append((table[:, 0], table[:, 1]))
    return RaceCurves(losses, norms, scores)


def race_figure(ended: Sequence[tuple[SweepRun, RunEnd]], verdict: str) -> FigureSpec:
    """The figure of a race that was run."""
    courses = read_curves(ended)
    n_seeds = len({cell.seed for cell, _ in ended})
    about = f"the mean over {n_seeds} seeds, and a band from the lowest to the highest" if n_seeds > 1 else "one seed"
    caption = (
        "Training loss and gradient norm before clipping, smoothed over a fiftieth of the run, and SI-SDRi of the "
        f"validations: {about}. All arms of a seed draw weights and mixtures from it: where model and data are the "
        f"same, they begin alike and see the same in the same order. {verdict}"
    )
    numbers = {
        arm: float(np.mean([v[-1] for _, v in of_arm if len(v)] or [np.nan])) for arm, of_arm in courses.scores.items()
    }
    draw = partial(draw_race, courses, about=about)
    return FigureSpec("race", "A race from the same weights", caption, numbers, draw, figsize=(12.0, 4.4))


def draw_race(courses: RaceCurves, figure: "Figure", *, about: str = "") -> None:
    """Losses, norms, SI-SDRi; of arms that go the same way the thinner, dashed one lies on top."""
    from matplotlib import colormaps

    left, middle, right = figure.subplots(1, 3)
    arms = list(courses.losses)
    palette = colormaps["tab10"] if len(arms) <= 10 else colormaps["turbo"]
    for place, arm in enumerate(arms):
        color = palette(place) if len(arms) <= 10 else palette(place / (len(arms) - 1))
        thin = place / max(1, len(arms) - 1)
        style: dict[str, Any] = {"color": color, "linestyle": DASHES[place % 4], "linewidth": 2.6 - 1.6 * thin}
        _band(left, _smoothed(courses.losses[arm]), style | {"label": arm})
        _band(middle, _smoothed(courses.norms[arm]), style)
        scores = [one for one in courses.scores[arm] if len(one[0])]
        _band(right, scores, style | {"marker": "o", "markersize": 5 - 2 * thin})
    finite = [values for of_arm in courses.losses.values() for _, values in of_arm if len(values)]
    if finite:
        low, high = np.percentile(np.concatenate(finite), [0.2, 99])
        left.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    figure.suptitle(about, fontsize="small")
    left.set(xlabel="step", title="training loss")
    middle.set(xlabel="step", title="gradient norm before clipping", yscale="log")
    right.set(xlabel="step", ylabel="dB", title="valid SI-SDRi")
    right.axhline(0, color="black", linewidth=0.6)
    columns = max(1, min(4, 130 // (max(map(len, arms)) + 6)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _smoothed(curves: Sequence[tuple[FloatArray, FloatArray]]) -> list[tuple[FloatArray, FloatArray]]:
    return [(at, running_mean(values, max(1, len(values) // 50))) for at, values in curves if len(at)]


def _band(axes: "Axes", curves: Sequence[tuple[FloatArray, FloatArray]], style: Mapping[str, Any]) -> None:
    """The mean over seeds, from lowest to highest around it; where one ended early its last steps are drawn alone."""
    if not curves:
        axes.plot([], [], **style)
        return
    steps = sorted({int(step) for at, _ in curves for step in at})
    values = np.full((len(curves), len(steps)), np.nan)
    place = {step: column for column, step in enumerate(steps)}
    for row, (at, found) in enumerate(curves):
        values[row, [place[int(step)] for step in at]] = found
    known = np.isfinite(values).sum(0)
    mean = np.nansum(values, 0) / np.maximum(known, 1)
    filled = [np.where(np.isfinite(values), values, other).T for other in (np.inf, -np.inf)]
    low, high = filled[0].min(1), filled[1].max(1)
    axes.plot(steps, mean, **style)
    if len(curves) > 1:
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
