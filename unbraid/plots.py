"""Figures of a run: one overview with the spectrograms of an example, or one figure for each curve of its records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unbraid.audio import read_audio
from unbraid.errors import UserError
from unbraid.health.series import Series, read_series
from unbraid.plot_data import bin_starts, running_mean, shares, thin
from unbraid.records import StepRecord, read_steps, read_validation
from unbraid.run_directory import RunDirectory
from unbraid.spectrogram import spectrogram_db
from unbraid.type_aliases import AudioArray, BoolArray, FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_COLOR = "#1f77b4"
NORM_COLOR = "#555555"
MAX_NORM_COLOR = "#d62728"
VALID_COLOR = "#2ca02c"
FILTERED_COLOR = "#777777"
FAULT_COLORS = ("#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
THIN_LINE: dict[str, Any] = {"linewidth": 0.8, "markersize": 2}


def check_matplotlib() -> None:
    """Raise a `UserError` if matplotlib is not installed; called before any work whose result is to be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('The figures need matplotlib: pip install "unbraid[demo]".') from None


def draw_run(run: RunDirectory, audio: Path, index: int, out: Path) -> Path:
    """Draw loss, gradient norm and validation of a run, and the spectrograms of one evaluated example below them.

    Args:
        run: The run directory.
        audio: Folder in which an evaluation saved audio.
        index: Index of the example.
        out: PNG file to write.

    Returns:
        The file written.
    """
    from matplotlib.figure import Figure

    # 1. Read the records and the audio: the mixture, its estimates and its references.
    steps = [record for record in read_steps(run.steps) if record.trained]
    validation = read_validation(run.validation)
    files = [audio / f"{index:03d}-mixture.wav"]
    for kind in ("estimate", "reference"):
        files += sorted(audio.glob(f"{index:03d}-{kind}-*.wav"))
    sounds = [(file.stem[4:].replace("-", " "), *read_audio(file)) for file in files]

    # 2. Draw the three curves above, and the spectrograms below.
    figure = Figure(figsize=(14, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1), squeeze=False)[:, 0]
    loss_axes, norm_axes, valid_axes = above.subplots(1, 3)
    _draw_loss(loss_axes, steps)
    _draw_norm(norm_axes, steps)
    valid_axes.plot(
        [record.step for record in validation], [record.si_sdri for record in validation], "o-", color=VALID_COLOR
    )
    valid_axes.axhline(0, color="black", linewidth=0.6)
    valid_axes.set(title="SI-SDR improvement on unseen speakers (validation)", xlabel="step", ylabel="dB")
    below.suptitle("One test mixture: estimates in the upper row, references in the lower row (range 70 dB)")
    _draw_spectrograms(below, sounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def _draw_loss(axes: "Axes", records: Sequence[StepRecord]) -> None:
    step = np.array([record.step for record in records])
    loss = np.array([record.loss for record in records], dtype=float)
    axes.plot(step, loss, color=LOSS_COLOR, alpha=0.2, linewidth=0.6)
    axes.plot(step, running_mean(loss, 100), color=LOSS_COLOR, label="mean of 100 steps")
    # The range ignores the most extreme percent, so that one spike does not flatten the curve.
    if len(loss):
        low, high = np.percentile(loss, [0.5, 99.5])
        axes.set_ylim(low - 2, high + 2)
    axes.set(title="Training loss", xlabel="step")
    axes.legend(frameon=False)


def _draw_norm(axes: "Axes", records: Sequence[StepRecord]) -> None:
    step = [record.step for record in records]
    norm = [record.grad_norm for record in records]
    axes.semilogy(step, norm, color=NORM_COLOR, alpha=0.5, linewidth=0.6, label="before clipping")
    axes.semilogy(step, [record.max_norm for record in records], color=MAX_NORM_COLOR, label="max_norm")
    share = np.mean([record.clipped for record in records]) if records else 0.0
    axes.set(title=f"Gradient norm: {share:.0%} of the steps clipped", xlabel="step")
    axes.legend(frameon=False)


def _draw_spectrograms(figure: Any, sounds: Sequence[tuple[str, AudioArray, int]]) -> None:
    n_sources = (len(sounds) - 1) // 2
    grid = figure.add_gridspec(2, n_sources + 1)
    # The mixture takes the whole first column; the estimates are right of it in row 0, the references in row 1.
    cells = [grid[:, 0], *(grid[row, 1 + column] for row in (0, 1) for column in range(n_sources))]
    for (title, audio, sample_rate), cell in zip(sounds, cells, strict=True):
        axes = figure.add_subplot(cell)
        level_db = spectrogram_db(audio[0])
        extent = (0, audio.shape[-1] / sample_rate, 0, sample_rate / 2000)  # seconds, kHz
        axes.imshow(level_db, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=level_db.max() - 70)
        axes.set(title=title, xlabel="s", ylabel="kHz")


def draw_plots(run: RunDirectory, out: Path) -> list[Path]:
    """Draw each curve of a run as a PNG; a curve without data is not drawn.

    A skipped step is shown as a mark with its reason, and is in no mean.

    Args:
        run: The run directory, during the run or after it.
        out: Folder to write to.

    Returns:
        The files written.

    Raises:
        UserError: If there is nothing to draw, or matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    series = read_series(run.path)
    if not len(series):
        raise UserError(f"{run.path} has no steps yet; there is nothing to draw.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        if plot(figure, series):
            handles, labels = figure.axes[0].get_legend_handles_labels()
            if labels:
                figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
            figure.savefig(out / f"{name}.png", dpi=200)
            written.append(out / f"{name}.png")
    return written


def _plot_loss(figure: "Figure", series: Series) -> bool:
    axes = figure.add_subplot()
    step, loss = series.trained_values("loss")
    valid_step, valid_loss = _validation_values(series, "loss")
    _draw_noisy(axes, step, loss, "training, ")
    if len(valid_step):
        axes.plot(valid_step, valid_loss, "o-", color=VALID_COLOR, markersize=3, label="validation")
    # Leave space at the foot for the marks of skipped steps.
    shown = [*(np.percentile(loss, [0.5, 99.5]) if len(loss) else ()), *valid_loss]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) + 1e-9
        axes.set_ylim(min(shown) - 3 * margin, max(shown) + margin)
    _mark_skipped(axes, series)
    axes.set(xlabel="step", ylabel="loss")
    return bool(len(step) or len(valid_step) or series.skipped)


def _plot_valid(figure: "Figure", series: Series) -> bool:
    axes = figure.add_subplot()
    step, si_sdri = _validation_values(series, "si_sdri")
    axes.plot(step, si_sdri, "o-", color=VALID_COLOR, markersize=3)
    best_step, best = _validation_values(series, "si_sdri", among=series.validation["best"] == 1)
    if len(best):
        label = f"lowest loss: {best[-1]:.2f} dB at step {best_step[-1]:.0f}"
        axes.plot(best_step[-1:], best[-1:], "*", color=MAX_NORM_COLOR, markersize=10, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="step", ylabel="SI-SDR improvement in dB, validation")
    return len(step) > 0


def _validation_values(series: Series, name: str, *, among: BoolArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Return step and value of the validations whose value is finite, each ``(n,)``; of a subset if a mask is given."""
    values = series.validation[name]
    mask = np.isfinite(values)
    if among is not None:
        mask &= among
    return series.validation["step"][mask], values[mask]


def _plot_norm(figure: "Figure", series: Series) -> bool:
    axes = figure.add_subplot()
    step, norm = series.trained_values("grad_norm")
    is_positive = norm > 0  # a logarithmic axis has no zero
    if not is_positive.any():
        return False
    axes.semilogy(
        *thin(step[is_positive], norm[is_positive]),
        color=NORM_COLOR,
        alpha=0.6,
        linewidth=0.6,
        label="before clipping",
    )
    step, max_norm = series.trained_values("max_norm")
    if len(step):
        axes.semilogy(*thin(step, max_norm), color=MAX_NORM_COLOR, linewidth=1.2, label="max_norm")
    _mark_skipped(axes, series)
    axes.set(xlabel="step", ylabel="gradient norm")
    return True


def _plot_shares(figure: "Figure", series: Series) -> bool:
    axes = figure.add_subplot()
    step = series.steps["step"]
    starts = bin_starts(len(step), 60)
    edges = [*step[starts], step[-1] + 1]
    clipped = shares(series.steps["clipped"] == 1, series.trained, starts)
    label = "clipped, of the trained steps"
    axes.stairs(100 * clipped, edges, baseline=None, color=LOSS_COLOR, linewidth=1.2, label=label)
    for index, (outcome, mask) in enumerate(series.skipped.items()):
        skipped = shares(mask, np.ones_like(mask), starts)
        label = f"skipped: {outcome.replace('_', ' ')}"
        axes.stairs(
            100 * skipped, edges, baseline=None, color=_outcome_color(outcome, index), linewidth=1.2, label=label
        )
    axes.set(xlabel="step", ylabel="share of steps in %", ylim=(-2, 102))
    return True


def _plot_lr(figure: "Figure", series: Series) -> bool:
    axes = figure.add_subplot()
    lr = series.steps["lr"]
    mask = np.isfinite(lr)
    axes.plot(*thin(series.steps["step"][mask], lr[mask]), color=LOSS_COLOR)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    return bool(mask.any())


def _plot_update_ratios(figure: "Figure", series: Series) -> bool:
    from matplotlib import colormaps

    axes = figure.add_subplot()
    sampled = series.sampled
    n_blocks = len(sampled.blocks)
    # The ratio of a skipped step is 0, which says nothing about the learning rate.
    ratios = np.where(sampled.update_ratios > 0, sampled.update_ratios, np.nan)
    if not np.isfinite(ratios).any():
        return False
    # A legend has space for about nine names; take them evenly from all blocks.
    in_legend = set(np.linspace(0, n_blocks - 1, min(n_blocks, 9)).astype(int).tolist())
    for index, name in enumerate(sampled.blocks):
        mask = np.isfinite(ratios[:, index])
        color = colormaps["viridis"](index / max(1, n_blocks - 1))
        label = name if index in in_legend else None
        axes.semilogy(*thin(sampled.step[mask], ratios[mask, index]), ".-", color=color, label=label, **THIN_LINE)
    axes.axhline(1e-3, color="black", linewidth=0.6, linestyle="--")
    axes.set(xlabel="step", ylabel="norm of update / norm of weights, by block")
    return True


def _plot_throughput(figure: "Figure", series: Series) -> bool:
    above, below = figure.subplots(2, 1, sharex=True)
    step, examples_per_second = series.trained_values("examples_per_second")
    _draw_noisy(above, step, examples_per_second)
    above.set(ylabel="examples per second")
    above.set_ylim(bottom=0)
    wait_seconds = series.steps["data_seconds"]
    total_seconds = wait_seconds + series.steps["seconds"]
    mask = np.isfinite(total_seconds) & (total_seconds > 0)
    wait_percent = 100 * wait_seconds[mask] / total_seconds[mask]
    _draw_noisy(below, series.steps["step"][mask], wait_percent)
    below.set(xlabel="step", ylabel="% of the time\nwaiting for data")
    below.set_ylim(bottom=0)
    return bool(len(step) and mask.any())


PLOTS: dict[str, Callable[["Figure", Series], bool]] = {
    "loss": _plot_loss,
    "valid_si_sdri": _plot_valid,
    "gradient_norm": _plot_norm,
    "clipped_and_skipped": _plot_shares,
    "learning_rate": _plot_lr,
    "update_ratio": _plot_update_ratios,
    "throughput": _plot_throughput,
}
"""By file name. Each plots into an empty figure, and returns False if there is nothing to plot."""


def _draw_noisy(axes: "Axes", step: FloatArray, values: FloatArray, prefix: str = "") -> None:
    """Draw every value faintly, and their running mean over it."""
    if not len(step):
        return
    width = max(1, min(100, len(step) // 5))
    axes.plot(*thin(step, values), color=LOSS_COLOR, alpha=0.25, linewidth=0.6)
    label = f"{prefix}mean of {width} steps" if width > 1 else f"{prefix}each step"
    axes.plot(*thin(step, running_mean(values, width)), color=LOSS_COLOR, linewidth=1.2, label=label)


def _mark_skipped(axes: "Axes", series: Series, n_columns: int = 1500) -> None:
    """Draw a row of marks at the foot of the figure for each outcome of skipped steps."""
    first_step, last_step = series.steps["step"][[0, -1]]
    for index, (outcome, mask) in enumerate(series.skipped.items()):
        steps = series.steps["step"][mask]
        # One mark per pixel column: a run can have a million skipped steps.
        columns = ((steps - first_step) / max(1, last_step - first_step) * n_columns).astype(int)
        marks = steps[np.unique(columns, return_index=True)[1]]
        axes.plot(
            marks,
            np.full(len(marks), 0.03 + 0.045 * index),
            "|",
            color=_outcome_color(outcome, index),
            label=f"skipped: {outcome.replace('_', ' ')} ({len(steps)})",
            transform=axes.get_xaxis_transform(),
        )


def _outcome_color(outcome: str, index: int) -> str:
    return FILTERED_COLOR if outcome == "all_filtered" else FAULT_COLORS[index % len(FAULT_COLORS)]
