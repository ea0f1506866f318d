"""A run as pictures: all of it in one, with its sound; or a figure for each curve of its records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unbraid.audio import read_audio
from unbraid.errors import UserError
from unbraid.health.series import Series, read_series
from unbraid.plot_data import bin_starts, running_mean, shares, thin
from unbraid.records import StepRecord, read_steps, read_validation
from unbraid.run_directory import RunDirectory
from unbraid.spectrogram import spectrogram_db
from unbraid.type_aliases import AudioArray, FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS, NORM, LIMIT, VALID = "#1f77b4", "#555555", "#d62728", "#2ca02c"


def check_matplotlib() -> None:
    """Refuse, before any work, to draw without matplotlib.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('The picture needs matplotlib: pip install "unbraid[demo]".') from None


def draw_run(run: RunDirectory, audio: Path, index: int, out: Path) -> Path:
    """Draw loss, gradient norm and validation above, one example's mixture, estimates and references below.

    Args:
        run: A run directory.
        audio: Folder that an evaluation saved audio to.
        index: Which of its examples.
        out: PNG to write.
    """
    from matplotlib.figure import Figure

    sounds = [(title, *read_audio(path)) for title, path in _sounds(audio, index)]
    steps = [record for record in read_steps(run.steps) if record.trained]
    validation = read_validation(run.validation)
    figure = Figure(figsize=(14, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1), squeeze=False)[:, 0]
    loss_axes, norm_axes, valid_axes = (above.add_subplot(1, 3, place) for place in (1, 2, 3))
    _draw_loss(loss_axes, steps)
    _draw_norm(norm_axes, steps)
    valid_axes.plot([v.step for v in validation], [v.si_sdri for v in validation], "o-", color=VALID)
    valid_axes.axhline(0, color="black", linewidth=0.6)
    valid_axes.set(title="SI-SDR improvement on unseen talkers (valid)", xlabel="step", ylabel="dB")
    below.suptitle("One test mixture: estimates above, what they should be below (over 70 dB)")
    _draw_spectrograms(below, sounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def _sounds(audio: Path, index: int) -> list[tuple[str, Path]]:
    mixture = audio / f"{index:03d}-mixture.wav"
    others = [sorted(audio.glob(f"{index:03d}-{kind}-*.wav")) for kind in ("estimate", "reference")]
    return [(path.stem[4:].replace("-", " "), path) for path in (mixture, *others[0], *others[1])]


def _draw_loss(axes: "Axes", steps: Sequence[StepRecord]) -> None:
    at, loss = np.array([r.step for r in steps]), np.array([r.loss for r in steps], dtype=float)
    axes.plot(at, loss, color=LOSS, alpha=0.2, linewidth=0.6)
    axes.plot(at, running_mean(loss, 100), color=LOSS, label="mean of 100 steps")
    if len(loss):
        low, high = np.percentile(loss, [0.5, 99.5])
        axes.set_ylim(low - 2, high + 2)
    axes.set(title="Training loss", xlabel="step")
    axes.legend(frameon=False)


def _draw_norm(axes: "Axes", steps: Sequence[StepRecord]) -> None:
    at = [r.step for r in steps]
    axes.semilogy(at, [r.grad_norm for r in steps], color=NORM, alpha=0.5, linewidth=0.6, label="before clipping")
    axes.semilogy(at, [r.max_norm for r in steps], color=LIMIT, label="max_norm")
    share = np.mean([r.clipped for r in steps]) if steps else 0.0
    axes.set(title=f"Gradient norm: {share:.0%} of the steps clipped", xlabel="step")
    axes.legend(frameon=False)


def _draw_spectrograms(figure: Any, sounds: Sequence[tuple[str, AudioArray, int]]) -> None:
    n_sources = (len(sounds) - 1) // 2
    grid = figure.add_gridspec(2, n_sources + 1)
    places = [grid[:, 0], *(grid[row, 1 + column] for row in (0, 1) for column in range(n_sources))]
    for (title, audio, rate), place in zip(sounds, places, strict=True):
        axes = figure.add_subplot(place)
        level = spectrogram_db(audio[0])
        extent = (0, audio.shape[-1] / rate, 0, rate / 2000)
        axes.imshow(level, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=level.max() - 70)
        axes.set(title=title, xlabel="s", ylabel="kHz")


def draw_plots(run: RunDirectory, out: Path) -> list[Path]:
    """Draw each curve of a run as a PNG of its own; what the run has nothing of is left out.

    A step that was left out is a mark with its reason, and in no mean.

    Args:
        run: A run directory, during the run or after it.
        out: Folder for them.

    Returns:
        The files written.

    Raises:
        UserError: If there is nothing to draw, or matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    curves = read_series(run.path)
    if not len(curves):
        raise UserError(f"{run.path} has no steps yet; there is nothing to draw.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        if draw(figure, curves):
            handles, labels = figure.axes[0].get_legend_handles_labels()
            if labels:
                figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
            figure.savefig(out / f"{name}.png", dpi=200)
            written.append(out / f"{name}.png")
    return written


def _plot_loss(figure: "Figure", curves: Series) -> bool:
    axes, (step, loss) = figure.add_subplot(), curves.trained_values("loss")
    at, validated = _validated(curves, "loss")
    _draw_noisy(axes, step, loss, LOSS, "training, ")
    if len(at):
        axes.plot(at, validated, "o-", color=VALID, markersize=3, label="validation")
    seen = [*(np.percentile(loss, [0.5, 99.5]) if len(loss) else ()), *validated]
    if seen:
        room = 0.05 * (max(seen) - min(seen)) + 1e-9
        axes.set_ylim(min(seen) - 3 * room, max(seen) + room)
    _mark_left_out(axes, curves)
    axes.set(xlabel="step", ylabel="loss")
    return bool(len(step) or len(at) or curves.skipped)


def _plot_valid(figure: "Figure", curves: Series) -> bool:
    axes, (at, gain) = figure.add_subplot(), _validated(curves, "si_sdri")
    axes.plot(at, gain, "o-", color=VALID, markersize=3)
    best_at, best = _validated(curves, "si_sdri", of=curves.validation["best"] == 1)
    if len(best):
        label = f"lowest loss: {best[-1]:.2f} dB at step {best_at[-1]:.0f}"
        axes.plot(best_at[-1:], best[-1:], "*", color=LIMIT, markersize=10, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="step", ylabel="SI-SDR improvement in dB, validation")
    return len(at) > 0


def _validated(curves: Series, name: str, *, of: npt.NDArray[np.bool_] | None = None) -> tuple[FloatArray, FloatArray]:
    """Step and value of the validations, or of some of them, whose value is finite, each ``(n,)``."""
    values = curves.validation[name]
    known = np.isfinite(values) if of is None else np.isfinite(values) & of
    return curves.validation["step"][known], values[known]


def _plot_norm(figure: "Figure", curves: Series) -> bool:
    axes, (step, norm) = figure.add_subplot(), curves.trained_values("grad_norm")
    step, norm = step[norm > 0], norm[norm > 0]
    if not len(step):
        return False
    axes.semilogy(*thin(step, norm), color=NORM, alpha=0.6, linewidth=0.6, label="before clipping")
    at, limit = curves.trained_values("max_norm")
    if len(at):
        axes.semilogy(*thin(at, limit), color=LIMIT, linewidth=1.2, label="max_norm")
    _mark_left_out(axes, curves)
    axes.set(xlabel="step", ylabel="gradient norm")
    return True


def _plot_shares(figure: "Figure", curves: Series) -> bool:
    axes, step = figure.add_subplot(), curves.steps["step"]
    starts = bin_starts(len(step), 60)
    edges = [*step[starts], step[-1] + 1]
    clipped = shares(curves.steps["clipped"] == 1, curves.trained, starts)
    axes.stairs(100 * clipped, edges, baseline=None, color=LOSS, linewidth=1.2, label="clipped, of those trained")
    for place, (reason, marked) in enumerate(curves.skipped.items()):
        share, color = 100 * shares(marked, np.ones_like(marked), starts), _color_of(reason, place)
        axes.stairs(share, edges, baseline=None, color=color, linewidth=1.2, label=f"left out: {_words(reason)}")
    axes.set(xlabel="step", ylabel="share of steps in %", ylim=(-2, 102))
    return True


def _plot_lr(figure: "Figure", curves: Series) -> bool:
    axes, lr = figure.add_subplot(), curves.steps["lr"]
    known = np.isfinite(lr)
    axes.plot(*thin(curves.steps["step"][known], lr[known]), color=LOSS)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    return bool(known.any())


def _plot_ratios(figure: "Figure", curves: Series) -> bool:
    from matplotlib import colormaps

    axes, n_blocks = figure.add_subplot(), len(curves.sampled.blocks)
    ratios = np.where(
        curves.sampled.update_ratios > 0, curves.sampled.update_ratios, np.nan
    )  # 0 in a step that was left out
    named = {*np.linspace(0, n_blocks - 1, min(n_blocks, 9)).astype(int).tolist()}
    for place, name in enumerate(curves.sampled.blocks):
        known = np.isfinite(ratios[:, place])
        color, label = colormaps["viridis"](place / max(1, n_blocks - 1)), name if place in named else None
        axes.semilogy(*thin(curves.sampled.step[known], ratios[known, place]), ".-", color=color, label=label, **THIN)
    if not np.isfinite(ratios).any():
        return False
    axes.axhline(1e-3, color="black", linewidth=0.6, linestyle="--")
    axes.set(xlabel="step", ylabel="update over weights, by block")
    return True


def _plot_pace(figure: "Figure", curves: Series) -> bool:
    above, below = figure.subplots(2, 1, sharex=True)
    step, rate = curves.trained_values("examples_per_second")
    _draw_noisy(above, step, rate, LOSS)
    above.set(ylabel="examples a second")
    above.set_ylim(bottom=0)
    waited, busy = curves.steps["data_seconds"], curves.steps["seconds"]
    known = np.isfinite(waited + busy) & (waited + busy > 0)
    share = 100 * waited[known] / (waited + busy)[known]
    _draw_noisy(below, curves.steps["step"][known], share, LOSS)
    below.set(xlabel="step", ylabel="% of the time\nwaiting for data")
    below.set_ylim(bottom=0)
    return bool(len(step) and known.any())


PLOTS: dict[str, Callable[["Figure", Series], bool]] = {
    "loss": _plot_loss,
    "valid_si_sdri": _plot_valid,
    "gradient_norm": _plot_norm,
    "clipped_and_left_out": _plot_shares,
    "learning_rate": _plot_lr,
    "update_ratio": _plot_ratios,
    "pace": _plot_pace,
}
"""Each draws into an empty figure, and says whether there was something to draw."""

SKIP_COLORS = ("#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
THIN: dict[str, Any] = {"linewidth": 0.8, "markersize": 2}


def _draw_noisy(axes: "Axes", step: FloatArray, values: FloatArray, color: str, name: str = "") -> None:
    """Every value faintly, and their running mean."""
    if not len(step):
        return
    width = max(1, min(100, len(step) // 5))
    axes.plot(*thin(step, values), color=color, alpha=0.25, linewidth=0.6)
    label = f"{name}mean of {width} steps" if width > 1 else f"{name}each step"
    axes.plot(*thin(step, running_mean(values, width)), color=color, linewidth=1.2, label=label)


def _mark_left_out(axes: "Axes", curves: Series, n_most: int = 1500) -> None:
    """A row of marks at the foot of the figure for each reason."""
    first, last = curves.steps["step"][[0, -1]]
    for place, (reason, marked) in enumerate(curves.skipped.items()):
        steps = curves.steps["step"][marked]
        column = ((steps - first) / max(1, last - first) * n_most).astype(int)
        seen = steps[np.unique(column, return_index=True)[1]]
        label = f"left out: {_words(reason)} ({len(steps)})"
        color, height = _color_of(reason, place), np.full(len(seen), 0.03 + 0.045 * place)
        axes.plot(seen, height, "|", color=color, label=label, transform=axes.get_xaxis_transform())


def _color_of(reason: str, place: int) -> str:
    """Grey for what is no fault."""
    return "#777777" if reason == "all_filtered" else SKIP_COLORS[place % len(SKIP_COLORS)]


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")
