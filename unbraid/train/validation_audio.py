"""Save validation examples as audio: mixture and references once, the estimates of each validation with its scores."""

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
"""How many validations keep their audio: the first, the newest, and others evenly between them."""

SCORES = "scores.json"
"""Written last: a folder that has it is complete."""


@dataclass(frozen=True)
class AudioExample:
    """One validation example as audio.

    Attributes:
        index: Index of the example in the validation set.
        sample_rate: In Hz.
        mixture: ``(channel, time)``.
        references: The sources it was mixed from, ``(source, channel, time)``.
        estimates: In the order of the references, ``(source, channel, time)``.
        si_sdr: Of each estimate, in dB; NaN if the reference is silent.
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
        """Whether all estimates are finite: no audio file can hold NaN."""
        return bool(np.isfinite(self.estimates).all())


@dataclass(frozen=True)
class AudioOptions:
    """How a model's outputs become audio.

    Attributes:
        sample_rate: In Hz.
        match_level: Whether to set the level of the estimates by the mixture, because the loss ignores level.
        silent_below_db: As in `unbraid.inference.at_mixture_level`.
    """

    sample_rate: int
    match_level: bool = False
    silent_below_db: float | None = None

    def make_example(self, index: int, mixture: Tensor, references: Tensor, estimates: Tensor) -> AudioExample:
        """Return one example without scores.

        Args:
            index: Of the example.
            mixture: ``(channel, time)``, on any device.
            references: ``(source, channel, time)``.
            estimates: ``(source, channel, time)``.
        """
        mixture_array = _to_numpy(mixture)
        estimate_array = _to_numpy(estimates)
        # The levels are a least-squares fit, which fails on NaN.
        if self.match_level and np.isfinite(estimate_array).all():
            estimate_array = at_mixture_level(estimate_array, mixture_array, silent_below_db=self.silent_below_db)
        return AudioExample(index, self.sample_rate, mixture_array, _to_numpy(references), estimate_array)


def _to_numpy(tensor: Tensor) -> AudioArray:
    return tensor.detach().float().cpu().numpy()


def audio_examples(
    audio_options: AudioOptions,
    batch: Batch,
    estimates: Tensor,
    indices: Sequence[int],
    *,
    scores: tuple[Tensor, Tensor],
) -> list[AudioExample]:
    """Return some examples of a batch, with their scores.

    Args:
        audio_options: How they become audio.
        batch: With the items of its examples.
        estimates: In the order of the sources, ``(batch, source, channel, time)``.
        indices: Of the examples in the batch.
        scores: SI-SDR in dB, ``(batch, source, channel)``, and its mean improvement, ``(batch,)``.
    """
    si_sdr, si_sdri = scores
    source_si_sdr = si_sdr.where(is_active(batch.sources), torch.nan).nanmean(-1).tolist()
    examples = []
    for index in indices:
        item = batch.items[index]
        example = audio_options.make_example(item.index, batch.mixture[index], batch.sources[index], estimates[index])
        examples.append(
            replace(example, si_sdr=tuple(source_si_sdr[index]), si_sdri=float(si_sdri[index]), files=item.files)
        )
    return examples


def write_mixture_and_references(folder: Path, example: AudioExample) -> None:
    """Write ``NNN-mixture.wav`` and ``NNN-reference-K.wav``.

    Raises:
        AudioError: As `write_audio`.
    """
    for name, audio in _named_inputs(example):
        write_audio(folder / name, audio, example.sample_rate)


def write_estimates(folder: Path, example: AudioExample) -> None:
    """Write ``NNN-estimate-K.wav``.

    Raises:
        AudioError: As `write_audio`.
    """
    for n, audio in enumerate(example.estimates, 1):
        write_audio(folder / f"{example.index:03d}-estimate-{n}.wav", audio, example.sample_rate)


def save_audio_examples(folder: Path, step: int, examples: Sequence[AudioExample]) -> None:
    """Write the audio of one validation; a folder with ``scores.json`` in it is complete.

    Mixtures and references go into the folder itself, once; estimates and scores into a subfolder for the step, which
    replaces one of the same step. At most `MAX_FOLDERS` subfolders stay. Examples with nonfinite estimates are skipped.

    Args:
        folder: ``audio`` in the run directory.
        step: The step after which the validation was made.
        examples: In any order.

    Raises:
        AudioError: If a file cannot be written; then nothing of the step's folder stays.
        OSError: As above.
    """
    examples = sorted((example for example in examples if example.finite), key=lambda example: example.index)
    if not examples:
        return
    for example in examples:
        _write_inputs_once(folder, example)
    step_folder = folder / f"step-{step:06d}"
    shutil.rmtree(step_folder, ignore_errors=True)
    try:
        for example in examples:
            write_estimates(step_folder, example)
        fields = ("index", "si_sdri", "si_sdr", "files")
        items = [{name: getattr(example, name) for name in fields} for example in examples]
        scores = {"step": step, "sample_rate": examples[0].sample_rate, "items": items}
        # Last, because a folder without scores counts as incomplete.
        write_json(step_folder / SCORES, to_json_row(scores))
    except (AudioError, OSError):
        shutil.rmtree(step_folder, ignore_errors=True)
        raise
    _remove_surplus(folder)


def remove_later_audio(folder: Path, step: int) -> None:
    """Remove the audio of validations after a step: a run that continues from there makes it again."""
    for path in _step_folders(folder):
        if _step_of(path) > step:
            shutil.rmtree(path, ignore_errors=True)


def _named_inputs(example: AudioExample) -> Iterator[tuple[str, AudioArray]]:
    yield f"{example.index:03d}-mixture.wav", example.mixture
    yield from ((f"{example.index:03d}-reference-{n}.wav", audio) for n, audio in enumerate(example.references, 1))


def _write_inputs_once(folder: Path, example: AudioExample) -> None:
    """Write mixture and references unless already present. If others are, all older estimates belong to those."""
    for name, audio in _named_inputs(example):
        path = folder / name
        if path.exists():
            if _contains(path, audio):
                continue
            remove_later_audio(folder, -1)  # later than step -1: all of them
        write_audio(path, audio, example.sample_rate)


def _contains(path: Path, audio: AudioArray) -> bool:
    try:
        return np.array_equal(read_audio(path)[0], audio)
    except AudioError:
        return False


def _remove_surplus(folder: Path) -> None:
    """Remove incomplete folders, and complete ones beyond `MAX_FOLDERS`, those nearest to their neighbours first."""
    complete = []
    for path in _step_folders(folder):
        if (path / SCORES).exists():
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    steps_to_keep = spread([_step_of(path) for path in complete], MAX_FOLDERS)
    for path in complete:
        if _step_of(path) not in steps_to_keep:
            shutil.rmtree(path, ignore_errors=True)


def spread(steps: Sequence[int], n_max: int) -> list[int]:
    """Return at most ``n_max`` of the steps: the first, the last, and the most evenly spread between them.

    Called after each new step on what it returned before, it leaves no gap twice as wide as an even one.

    Args:
        steps: In ascending order.
        n_max: At least 2.
    """
    kept = list(steps)
    while len(kept) > n_max:
        # removing a step leaves the gap between its two neighbours
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def _step_folders(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])
