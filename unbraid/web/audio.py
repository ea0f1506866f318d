"""The audio of a run: validation examples of its checkpoints, the worst of its last evaluation, and spectrograms."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from unbraid.audio import SUFFIXES, probe_audio, read_audio
from unbraid.errors import AudioError
from unbraid.io import finite_or_none
from unbraid.run_directory import RunDirectory
from unbraid.spectrogram import spectrogram_db
from unbraid.type_aliases import AudioArray

MAX_EVALUATION_EXAMPLES = 10
IMAGE_HEIGHT = 128
IMAGE_WIDTH = 360
RANGE_DB = 70.0
WINDOW_SECONDS = 0.032
MAX_SPECTROGRAM_SECONDS = 30.0
"""Of longer recordings, the spectrogram shows the beginning."""

MP3_RATES_HZ = (8000, 11025, 12000, 16000)


# ---- Finding audio files


def validation_examples(run: Path) -> list[dict[str, Any]]:
    """Return the validation examples of a run whose audio was saved.

    Returns:
        For each example its ``index``, the ``files`` it was mixed from, its ``mixture`` and ``references``, and in
        ``estimates`` one entry per checkpoint: ``step``, ``si_sdri`` in dB and ``audio``. Audio files are paths
        relative to the run directory.
    """
    folder = RunDirectory(run).audio
    scores_by_step: dict[int, dict[int, Mapping[str, Any]]] = {}
    for path in folder.glob("step-*/scores.json"):
        match = re.fullmatch(r"step-(\d+)", path.parent.name)
        if match:
            scores_by_step[int(match[1])] = _read_scores(path)

    # Mixtures and references are the same at every checkpoint and lie one level above the estimates.
    common = _list_audio(run, folder)
    examples: dict[int, dict[str, Any]] = {}
    for step, scores in sorted(scores_by_step.items()):
        estimates = _list_audio(run, folder / f"step-{step:06d}")
        for index, score in sorted(scores.items()):
            if index not in examples:
                files = score.get("files")
                examples[index] = {
                    "index": index,
                    "files": [str(file) for file in files] if isinstance(files, list) else [],
                    "mixture": common.get((index, "mixture"), []),
                    "references": common.get((index, "reference"), []),
                    "estimates": [],
                }
            examples[index]["estimates"].append(
                {
                    "step": step,
                    "si_sdri": finite_or_none(score.get("si_sdri")),
                    "audio": estimates.get((index, "estimate"), []),
                }
            )
    return [examples[index] for index in sorted(examples)]


def _read_scores(path: Path) -> dict[int, Mapping[str, Any]]:
    try:
        items = json.loads(path.read_bytes())["items"]
        return {int(item["index"]): item for item in items}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _list_audio(run: Path, folder: Path) -> dict[tuple[int, str], list[str]]:
    """Return the audio in a folder, in files such as ``000-estimate-1.wav``, by example index and kind.

    Args:
        run: The run directory; names are relative to it.
        folder: A folder in it.
    """
    numbered: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"(\d+)-(mixture|reference|estimate)(?:-(\d+))?", path.stem)
        if match and path.suffix.lower() in SUFFIXES:
            name = path.relative_to(run).as_posix()
            numbered.setdefault((int(match[1]), match[2]), []).append((int(match[3] or 0), name))
    return {key: [name for _, name in sorted(names)] for key, names in numbered.items()}


def evaluation_examples(run: Path, max_examples: int = MAX_EVALUATION_EXAMPLES) -> list[dict[str, Any]]:
    """Return the mixtures with the least improvement in the last evaluation, worst first, with audio if saved.

    Returns:
        Examples as in `validation_examples`, with one entry in ``estimates`` whose ``step`` is None.
    """
    rows = []
    try:
        with (run / "evaluation.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                si_sdri = _float_or_none(row.get("si_sdri"))
                if si_sdri is not None:
                    rows.append((si_sdri, row))
    except (OSError, ValueError, csv.Error):
        return []
    rows.sort(key=lambda pair: pair[0])

    audio = _list_audio(run, run / "evaluation-audio")
    examples = []
    for si_sdri, row in rows[:max_examples]:
        index = int(_float_or_none(row.get("index")) or 0)
        estimate = {"step": None, "si_sdri": si_sdri, "audio": audio.get((index, "estimate"), [])}
        examples.append(
            {
                "index": index,
                "files": (row.get("files") or "").split(" + "),
                "mixture": audio.get((index, "mixture"), []),
                "references": audio.get((index, "reference"), []),
                "estimates": [estimate],
            }
        )
    return examples


def _float_or_none(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return finite_or_none(value)


def audio_names(examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the name of every audio file of some examples, each once."""
    seen = set()
    for example in examples:
        names = [*example["mixture"], *example["references"]]
        for estimate in example["estimates"]:
            names += estimate["audio"]
        for name in names:
            if name not in seen:
                seen.add(name)
                yield name


def audio_path(run: Path, name: str) -> Path:
    """Return the path of one of a run's audio files, given its name relative to the run directory.

    Raises:
        AudioError: If there is no such file in the run's audio folders; links must not lead out of the run directory.
    """
    relative = Path(name)
    path = run / relative
    in_audio_folder = relative.parts[:1] in (("audio",), ("evaluation-audio",))
    # is_relative_to compares names only, so ".." is refused before; resolve() then follows links.
    if not in_audio_folder or ".." in relative.parts or path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise AudioError(f"{name} is not an audio file of this run.")
    if not path.resolve().is_relative_to(run.resolve()):
        raise AudioError(f"{name} links to a file outside the run directory.")
    return path


# ---- Spectrograms


def spectrogram_image(path: Path, reference: Path | None = None) -> bytes:
    """Return a spectrogram as WebP: time to the right, frequency up, 70 dB below the maximum from dark to light.

    Args:
        path: The recording.
        reference: A recording whose maximum is the brightest level, so that two can be compared; ``path`` if None.

    Raises:
        AudioError: If a file cannot be read.
    """
    level_db = _spectrogram_db(path)
    max_db = level_db.max() if reference is None else _spectrogram_db(reference).max()
    brightness = np.clip((level_db - max_db + RANGE_DB) / RANGE_DB, 0, 1)
    # Scale brightness first and colour it afterwards: mixing two colours gives a third that means another level.
    image = Image.fromarray((255 * brightness[::-1]).astype(np.uint8))
    image = image.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BILINEAR)
    pixels = _colour_map()[np.asarray(image)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=60, method=4)
    return file.getvalue()


def _spectrogram_db(path: Path) -> npt.NDArray[np.float64]:
    """Return the power of a recording in dB, ``(freq, column)``, with at most `IMAGE_WIDTH` columns."""
    sample_rate = probe_audio(path).sample_rate
    audio, _ = read_audio(path, 0.0, MAX_SPECTROGRAM_SECONDS)
    signal = np.nan_to_num(audio.mean(0))
    n_fft = max(32, 2 ** round(math.log2(WINDOW_SECONDS * sample_rate)))
    hop_length = max(1, len(signal) // IMAGE_WIDTH, n_fft // 8)
    hop_length = min(hop_length, n_fft // 2)  # a longer hop would skip samples, and with them short clicks
    level_db = spectrogram_db(signal, n_fft, hop_length)
    starts = np.unique(np.linspace(0, level_db.shape[1], IMAGE_WIDTH, endpoint=False).astype(int))
    return np.maximum.reduceat(level_db, starts, axis=1)


INFERNO = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)
"""Eight points of matplotlib's colour map inferno (CC0); the colours between them are interpolated."""


def _colour_map() -> npt.NDArray[np.uint8]:
    """Return the RGB colours from dark to light, ``(256, 3)``."""
    points = np.array(INFERNO, float)
    positions = np.linspace(0, len(points) - 1, 256)
    channels = [np.interp(positions, np.arange(len(points)), channel) for channel in points.T]
    return np.stack(channels, axis=1).astype(np.uint8)


# ---- Audio for the report


def encode_mp3(audio: AudioArray, sample_rate: int) -> bytes:
    """Return audio as MP3 at a low bit rate and at most 16 kHz, small enough for a mail attachment.

    Args:
        audio: ``(channel, time)`` in [-1, 1]; the first two channels are used. Louder audio is scaled down.
        sample_rate: In Hz.
    """
    import soundfile
    import soxr

    signal = np.nan_to_num(audio[:2].T)
    mp3_rate = min((rate for rate in MP3_RATES_HZ if rate >= sample_rate), default=MP3_RATES_HZ[-1])
    if mp3_rate != sample_rate:
        signal = soxr.resample(signal, sample_rate, mp3_rate)
    # Lossy coding raises peaks: a signal close to full scale would clip.
    peak = float(np.abs(signal).max(initial=0.0))
    gain = min(1.0, 0.8 / max(peak, 1e-9))
    file = io.BytesIO()
    soundfile.write(file, gain * signal, mp3_rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.7)
    return file.getvalue()
