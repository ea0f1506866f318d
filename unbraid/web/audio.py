"""What of a run can be heard: validation examples of its checkpoints, and the worst of its last evaluation."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from unbraid.audio import SUFFIXES, Audio, probe_audio, read_audio
from unbraid.errors import AudioError
from unbraid.records import RunDirectory
from unbraid.spectrogram import spectrogram_db
from unbraid.web.chart_payloads import finite

N_WORST = 10
PICTURE_HEIGHT, PICTURE_WIDTH = 128, 360
RANGE_DB = 70.0
WINDOW_SECONDS = 0.032
LONGEST_SECONDS = 30.0
"""Of longer sounds the picture shows the beginning."""


def examples(run: Path) -> dict[str, Any]:
    """The validation examples of a run.

    Returns:
        ``steps``, those that estimates were kept of; and ``items``, each with its index, the sounds that are the same
        all along, and for each step its estimates and scores. Sounds are paths relative to the run directory.
    """
    folder = RunDirectory(run).audio
    named = [(re.fullmatch(r"step-(\d+)", path.parent.name), path) for path in folder.glob("step-*/scores.json")]
    found = dict(sorted((int(match[1]), path) for match, path in named if match))
    steps, scored = list(found), {step: _scores(path) for step, path in found.items()}
    of_step, fixed = {step: _Names(run, path.parent) for step, path in found.items()}, _Names(run, folder)
    indices = sorted({index for found in scored.values() for index in found})
    items = []
    for index in indices:
        heard = {step: scored[step][index] for step in steps if index in scored[step]}
        items.append(
            {
                "index": index,
                "files": _texts(next(iter(heard.values())).get("files")),
                **{kind: fixed.of(index, kind) for kind in ("mixture", "reference")},
                "at": [
                    {
                        "step": step,
                        "si_sdri": finite(score.get("si_sdri")),
                        "estimate": of_step[step].of(index, "estimate"),
                    }
                    for step, score in heard.items()
                ],
            }
        )
    return {"steps": steps, "items": items}


def _scores(path: Path) -> dict[int, Mapping[str, Any]]:
    try:
        items = json.loads(path.read_bytes())["items"]
        return {int(item["index"]): item for item in items}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


class _Names:
    """The sounds in a folder, listed once: files such as ``000-estimate-1.wav``.

    Args:
        run: The run directory, which names are relative to.
        folder: In it.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.kept: dict[tuple[int, str], list[tuple[int, str]]] = {}
        for path in folder.iterdir() if folder.is_dir() else ():
            found = re.fullmatch(r"(\d+)-(mixture|reference|estimate)(?:-(\d+))?", path.stem)
            if found and path.suffix.lower() in SUFFIXES:
                place = int(found[1]), found[2]
                self.kept.setdefault(place, []).append((int(found[3] or 0), path.relative_to(run).as_posix()))

    def of(self, index: int, kind: str) -> list[str]:
        """Those of one example and kind, by their number."""
        return [name for _, name in sorted(self.kept.get((index, kind), []))]


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def worst_of_evaluation(run: Path, n_most: int = N_WORST) -> list[dict[str, Any]]:
    """The mixtures of the last evaluation with the least improvement, with their sounds where those were saved."""
    try:
        with (run / "evaluation.csv").open(encoding="utf-8", newline="") as file:
            rows = [(score, row) for row in csv.DictReader(file) if (score := _number(row.get("si_sdri"))) is not None]
    except (OSError, ValueError, csv.Error):
        return []
    names, found = _Names(run, run / "evaluation-audio"), []
    for score, row in sorted(rows, key=lambda pair: pair[0])[:n_most]:
        index = int(_number(row.get("index")) or 0)
        files = (row.get("files") or "").split(" + ")
        at = [{"step": None, "si_sdri": score, "estimate": names.of(index, "estimate")}]
        fixed = {kind: names.of(index, kind) for kind in ("mixture", "reference")}
        found.append({"index": index, "files": files, **fixed, "at": at})
    return found


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def all_sounds(items: list[dict[str, Any]]) -> Iterator[str]:
    """Every sound of some items once."""
    seen = set()
    for item in items:
        for name in (*item["mixture"], *item["reference"], *(name for at in item["at"] for name in at["estimate"])):
            if name not in seen:
                seen.add(name)
                yield name


def sound_file(run: Path, name: str) -> Path:
    """The file of a sound of a run, which lies in one of its folders of sound and nowhere else.

    Raises:
        AudioError: If it does not.
    """
    parts = Path(name).parts
    path = run / name
    allowed = parts[:1] in (("audio",), ("evaluation-audio",)) and ".." not in parts and not Path(name).is_absolute()
    if not allowed or path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise AudioError(f"{name} is no sound of this run.")
    if not path.resolve().is_relative_to(run.resolve()):  # a link that leads out
        raise AudioError(f"{name} leads out of the run directory.")
    return path


def picture(path: Path, like: Path | None = None) -> bytes:
    """A spectrogram, WebP: time to the right, frequency up, the loudest 70 dB from dark to light.

    Args:
        path: The sound.
        like: A sound whose loudest point is the loudest of the picture, so that two can be compared; itself if None.

    Raises:
        AudioError: If it cannot be read.
    """
    level = _level(path)
    top = level.max() if like is None else _level(like).max()
    brightness = np.clip((level - top + RANGE_DB) / RANGE_DB, 0, 1)
    image = Image.fromarray((255 * brightness[::-1]).astype(np.uint8))
    coloured = image.resize((PICTURE_WIDTH, PICTURE_HEIGHT), Image.Resampling.BILINEAR)
    pixels = _colours()[np.asarray(coloured)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=60, method=4)
    return file.getvalue()


def _level(path: Path) -> npt.NDArray[np.float64]:
    rate = probe_audio(path).sample_rate
    signal = np.nan_to_num(read_audio(path, 0.0, LONGEST_SECONDS)[0].mean(0))
    n_fft = max(32, 2 ** round(math.log2(WINDOW_SECONDS * rate)))
    hop = min(max(1, len(signal) // PICTURE_WIDTH, n_fft // 8), n_fft // 2)  # so that no sample is passed over
    level = spectrogram_db(signal, n_fft, hop)
    starts = np.unique(np.linspace(0, level.shape[1], PICTURE_WIDTH, endpoint=False).astype(int))
    return np.maximum.reduceat(level, starts, axis=1)


_STOPS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)
"""Eight points of matplotlib's inferno (CC0), between which the others lie."""


def _colours() -> npt.NDArray[np.uint8]:
    """``(256, 3)``."""
    at, stops = np.linspace(0, len(_STOPS) - 1, 256), np.array(_STOPS, float)
    return np.stack([np.interp(at, np.arange(len(stops)), channel) for channel in stops.T], 1).astype(np.uint8)


def as_mp3(audio: Audio, rate: int) -> bytes:
    """A sound small enough for a letter, at 16 kHz at most.

    One that comes near full scale is made softer, as coding adds to its peaks.

    Args:
        audio: ``(channel, time)``; the first two channels are kept.
        rate: In Hz.
    """
    import soundfile
    import soxr

    heard = np.nan_to_num(audio[:2].T)
    fitting = min((known for known in _MP3_RATES if known >= rate), default=_MP3_RATES[-1])
    heard = heard if fitting == rate else soxr.resample(heard, rate, fitting)
    softer = min(1.0, 0.8 / max(float(np.abs(heard).max(initial=0.0)), 1e-9))
    file = io.BytesIO()
    soundfile.write(file, softer * heard, fitting, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.7)
    return file.getvalue()


_MP3_RATES = (8000, 11025, 12000, 16000)
