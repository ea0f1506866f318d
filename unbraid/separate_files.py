"""Separate audio files with a trained model, at any sample rate and channel count."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from unbraid.audio import SUFFIXES, first_bad_sample, read_audio, write_audio
from unbraid.build import load_model
from unbraid.config.recipe import Recipe
from unbraid.errors import AudioError, UserError
from unbraid.inference import separate_audio


@dataclass(frozen=True)
class AudioInputs:
    """The files to separate, and what was passed over in folders.

    Attributes:
        paths: Input file by output path without its ending, ``OUT/NAME``.
        passed_over: Number of files by reason, such as ``hidden``.
    """

    paths: dict[Path, Path]
    passed_over: dict[str, int]


@dataclass(frozen=True)
class SeparatedFile:
    """One input file, and what became of it.

    Attributes:
        path: The input.
        outputs: Files written, one for each source; empty if there was a problem.
        problem: Why it could not be separated, in a sentence; else empty.
    """

    path: Path
    outputs: tuple[Path, ...] = ()
    problem: str = ""


def find_inputs(files: Sequence[Path], out: Path) -> AudioInputs:
    """List the audio files to separate.

    A folder stands for all audio files below it. Hidden files (such as the ``._NAME`` that macOS leaves on other disks)
    and what an earlier run wrote are passed over there; a file that is named itself is always taken.

    Args:
        files: Audio files, or folders of them.
        out: Folder for ``NAME.source-N.wav``; files from a folder keep their subfolders.

    Raises:
        UserError: If a file is missing, a folder has no audio, or two inputs have the same output.
    """
    paths: dict[Path, Path] = {}
    passed_over: dict[str, int] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file} does not exist.")
        root = file.parent
        candidates = [file]
        if file.is_dir():
            root = file
            candidates = []
            for path in sorted(path for path in file.rglob("*") if path.suffix.lower() in SUFFIXES):
                reason = _reason_to_pass_over(path, root, out)
                if reason:
                    passed_over[reason] = passed_over.get(reason, 0) + 1
                else:
                    candidates.append(path)
            if not candidates:
                raise UserError(f"{file} contains no audio files to separate.")
        for path in candidates:
            stem = (out / path.relative_to(root)).with_suffix("")
            if stem in paths:
                raise UserError(f"{paths[stem]} and {path} would both be written to {stem}.source-1.wav; rename one.")
            paths[stem] = path
    return AudioInputs(paths, passed_over)


def _reason_to_pass_over(path: Path, root: Path, out: Path) -> str:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return "hidden"
    if not path.is_file():
        return "not a regular file"
    # The output folder may be the input folder, or lie in it.
    is_output_name = re.fullmatch(r"(.+)\.source-\d+", path.stem)
    lies_in_out = path.resolve().is_relative_to(out.resolve()) and out.resolve() != root.resolve()
    has_mixture = is_output_name and any(path.with_name(is_output_name[1] + suffix).exists() for suffix in SUFFIXES)
    return "written by an earlier run" if lies_in_out or has_mixture else ""


def separate_files(inputs: AudioInputs, model: Path, out: Path, *, trust: bool = False) -> Iterator[SeparatedFile]:
    """Separate audio files with a trained model. A file that cannot be separated does not stop the others.

    Args:
        inputs: From `find_inputs`.
        model: A run directory or a checkpoint.
        out: The output folder given to `find_inputs`.
        trust: Whether code that the checkpoint names may run.

    Yields:
        Each input with the files that were written, or with the problem.

    Raises:
        UserError: If the output folder or the checkpoint cannot be used; nothing was written then.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be used as the output folder ({error.strerror}).") from error
    network, recipe = load_model(model, trust=trust)
    for stem, path in inputs.paths.items():
        try:
            yield SeparatedFile(path, tuple(_separate_file(path, stem, network, recipe)))
        except AudioError as error:
            yield SeparatedFile(path, problem=str(error))


def _separate_file(path: Path, stem: Path, network: nn.Module, recipe: Recipe) -> list[Path]:
    audio, rate = read_audio(path)
    if audio.shape[-1] == 0:
        raise AudioError(f"{path} has no samples; there is nothing to separate.")
    bad_sample = first_bad_sample(audio)
    if bad_sample is not None:
        raise AudioError(f"{path} has NaN or infinite samples, the first at index {bad_sample}; repair or remove it.")
    n_channels = getattr(network, "n_channels", 1)
    if n_channels not in (1, len(audio)):
        raise AudioError(f"{path} has {len(audio)} channel(s); this model takes {n_channels} at once.")
    sources = separate_audio(
        network,
        audio,
        rate,
        model_rate=recipe.data.sample_rate,
        match_level=recipe.loss_is_scale_invariant,
        fixed_order=recipe.assign == "fixed",
        silent_below_db=recipe.silent_below_db,
    )
    return [
        write_audio(stem.with_name(f"{stem.name}.source-{n}.wav"), source, rate) for n, source in enumerate(sources, 1)
    ]
