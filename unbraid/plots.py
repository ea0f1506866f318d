"""A run in one picture: curves of its records, spectrograms of its sound."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unbraid.audio import Audio, read_audio
from unbraid.errors import UserError
from unbraid.records import RunDirectory, StepRecord, read_steps, read_validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    axes.semilogy(at, [r.limit for r in steps], color=LIMIT, label="limit")
    share = np.mean([r.clipped for r in steps]) if steps else 0.0
    axes.set(title=f"Gradient norm: {share:.0%} of the steps clipped", xlabel="step")
    axes.legend(frameon=False)


def running_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Mean of each value and up to ``width - 1`` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_spectrograms(figure: Any, sounds: Sequence[tuple[str, Audio, int]]) -> None:
    n_sources = (len(sounds) - 1) // 2
    grid = figure.add_gridspec(2, n_sources + 1)
    places = [grid[:, 0], *(grid[row, 1 + column] for row in (0, 1) for column in range(n_sources))]
    for (title, audio, rate), place in zip(sounds, places, strict=True):
        axes = figure.add_subplot(place)
        level = spectrogram_db(audio[0])
        extent = (0, audio.shape[-1] / rate, 0, rate / 2000)
        axes.imshow(level, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=level.max() - 70)
        axes.set(title=title, xlabel="s", ylabel="kHz")


def spectrogram_db(signal: npt.NDArray[np.float32], n_fft: int = 256, hop_length: int = 64) -> npt.NDArray[np.float64]:
    """Power of Hann-windowed frames in dB, ``(freq, frame)``."""
    padded = np.pad(signal.astype(np.float64), (0, max(0, n_fft - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length] * np.hanning(n_fft)
    return 10 * np.log10(np.abs(np.fft.rfft(frames, axis=-1).T) ** 2 + 1e-12)
