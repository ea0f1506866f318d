"""Examples to hear: mixture, references and estimates as files; those of each validation beside their scores."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unbraid.audio import read_audio, write_audio
from unbraid.data.batch import Batch
from unbraid.errors import AudioError
from unbraid.inference import at_mixture_level
from unbraid.io import to_json_row, write_json
from unbraid.metrics import is_active
from unbraid.type_aliases import AudioArray

MAX_FOLDERS = 24
"""Of so many validations the sound stays: the first, the newest, and others evenly between."""

SCORES = "scores.json"
"""Written last: a folder that has it is whole."""


@dataclass(frozen=True)
class AudioExample:
    """One example to hear.

    Attributes:
        index: Its place among the examples.
        sample_rate: In Hz.
        mixture: ``(channel, time)``.
        references: What it was mixed from, ``(source, channel, time)``.
        estimates: In the order of the references, ``(source, channel, time)``.
        si_sdr: Of each estimate, in dB; NaN where the reference is silent.
        si_sdri: Mean improvement over the mixture, in dB.
        files: The recordings it was mixed from.
    """

    index: int
    sample_rate: int
    mixture: AudioArray
    references: AudioArray
    estimates: AudioArray
    si_sdr: tuple[float, ...] = ()
    si_sdri: float = math.nan
    files: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether there is nothing in the estimates that no file can hold."""
        return bool(np.isfinite(self.estimates).all())


@dataclass(frozen=True)
class AudioOptions:
    """How a model's outputs become sound.

    Attributes:
        sample_rate: In Hz.
        match_level: Whether the loss leaves their level open, so that it is taken from the mixture.
        silent_below_db: As `unbraid.inference.at_mixture_level` takes it.
    """

    sample_rate: int
    match_level: bool = False
    silent_below_db: float | None = None

    def sound(self, index: int, mixture: Tensor, references: Tensor, estimates: Tensor) -> AudioExample:
        """One example, from ``(channel, time)`` and twice ``(source, channel, time)``, on any device."""
        given, wanted, found = (tensor.detach().float().cpu().numpy() for tensor in (mixture, references, estimates))
        if self.match_level and np.isfinite(found).all():
            found = at_mixture_level(found, given, silent_below_db=self.silent_below_db)
        return AudioExample(index, self.sample_rate, given, wanted, found)


def audio_examples(
    audio_options: AudioOptions, batch: Batch, ordered: Tensor, places: Sequence[int], *, scores: tuple[Tensor, Tensor]
) -> list[AudioExample]:
    """Some examples of a batch, with their scores.

    Args:
        audio_options: How they become sound.
        batch: Of named examples.
        ordered: Estimates in the order of the sources, ``(batch, source, channel, time)``.
        places: Which ones.
        scores: SI-SDR in dB, ``(batch, source, channel)``, and its mean improvement, ``(batch,)``.
    """
    ratios, improvements = scores
    of_sources = ratios.where(is_active(batch.sources), torch.nan).nanmean(-1).tolist()
    found = []
    for place in places:
        sound = audio_options.sound(
            batch.items[place].index, batch.mixture[place], batch.sources[place], ordered[place]
        )
        scored = replace(sound, si_sdr=tuple(of_sources[place]), si_sdri=float(improvements[place]))
        found.append(replace(scored, files=batch.items[place].files))
    return found


def write_mixture_and_references(folder: Path, sound: AudioExample) -> None:
    """Write ``NNN-mixture.wav`` and ``NNN-reference-K.wav``.

    Raises:
        AudioError: As `write_audio`.
    """
    for name, audio in _given(sound):
        write_audio(folder / name, audio, sound.sample_rate)


def write_estimates(folder: Path, sound: AudioExample) -> None:
    """Write ``NNN-estimate-K.wav``.

    Raises:
        AudioError: As `write_audio`.
    """
    for n, audio in enumerate(sound.estimates, 1):
        write_audio(folder / f"{sound.index:03d}-estimate-{n}.wav", audio, sound.sample_rate)


def save_audio_examples(folder: Path, step: int, sounds: Sequence[AudioExample]) -> None:
    """Write the sound of one validation, so that a folder with ``scores.json`` in it is whole.

    What the estimates are made of lies in the folder itself, once; estimates and scores in a folder of the step, in the
    place of one from an earlier way past it. Of many such folders some go. An example with an estimate that is not
    finite is left out.

    Args:
        folder: ``audio`` in the run directory.
        step: The step after which they were made.
        sounds: In any order.

    Raises:
        AudioError: If a file cannot be written; of the step's folder nothing stays.
        OSError: As above.
    """
    sounds = sorted((sound for sound in sounds if sound.finite), key=lambda sound: sound.index)
    if not sounds:
        return
    for sound in sounds:
        _write_given_once(folder, sound)
    here = folder / f"step-{step:06d}"
    shutil.rmtree(here, ignore_errors=True)
    try:
        for sound in sounds:
            write_estimates(here, sound)
        said = ("index", "si_sdri", "si_sdr", "files")
        items = [{name: getattr(sound, name) for name in said} for sound in sounds]
        scores = {"step": step, "sample_rate": sounds[0].sample_rate, "items": items}
        write_json(here / SCORES, to_json_row(scores))
    except (AudioError, OSError):
        shutil.rmtree(here, ignore_errors=True)
        raise
    _make_room(folder)


def remove_later_audio(folder: Path, step: int) -> None:
    """Remove the sound of validations after a step: whoever goes on from there will make it again."""
    for path in _step_folders(folder):
        if _step_of(path) > step:
            shutil.rmtree(path, ignore_errors=True)


def _given(sound: AudioExample) -> Iterator[tuple[str, AudioArray]]:
    yield f"{sound.index:03d}-mixture.wav", sound.mixture
    yield from ((f"{sound.index:03d}-reference-{n}.wav", audio) for n, audio in enumerate(sound.references, 1))


def _write_given_once(folder: Path, sound: AudioExample) -> None:
    """Write mixture and references where they are not there; where others are, older estimates belong to those."""
    for name, audio in _given(sound):
        path = folder / name
        if path.exists():
            if _holds(path, audio):
                continue
            remove_later_audio(folder, -1)
        write_audio(path, audio, sound.sample_rate)


def _holds(path: Path, audio: AudioArray) -> bool:
    try:
        return np.array_equal(read_audio(path)[0], audio)
    except AudioError:
        return False


def _make_room(folder: Path) -> None:
    """Remove what was left half-written, and the folders that are nearest to their neighbours beyond `MAX_FOLDERS`."""
    whole = []
    for path in _step_folders(folder):
        if (path / SCORES).exists():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    kept = spread([_step_of(path) for path in whole], MAX_FOLDERS)
    for path in whole:
        if _step_of(path) not in kept:
            shutil.rmtree(path, ignore_errors=True)


def spread(steps: Sequence[int], n_kept: int) -> list[int]:
    """So many of the steps at most: the first, the last, and between them what lies most evenly.

    Called after each new step with what it left before, it leaves no gap twice as wide as an even one.

    Args:
        steps: In ascending order.
        n_kept: At least 2.
    """
    kept = list(steps)
    while len(kept) > n_kept:
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def _step_folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])
