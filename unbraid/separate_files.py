"""Separate audio files with a trained model, at any sample rate and channel count."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from unbraid.audio import SUFFIXES, first_bad_sample, read_audio, write_audio
from unbraid.build import load_model
from unbraid.errors import AudioError, UserError
from unbraid.inference import separate_audio


def separate_files(files: Sequence[Path], model: Path, out: Path, *, trust: bool = False) -> Iterator[Path]:
    """Separate audio files with a trained model.

    Args:
        files: Audio files, or folders of them.
        model: A run directory or a checkpoint.
        out: Folder for ``NAME.source-N.wav``; files from a folder keep their subfolders.
        trust: Whether code that the checkpoint names may run.

    Yields:
        The path of each file written.

    Raises:
        UserError: If a file is missing, two inputs have the same output, or the checkpoint cannot be used; nothing was
            written then. Also if audio cannot be read or separated; files written before it remain.
    """
    # Find every problem with the paths before writing anything.
    outputs = _output_stems(files, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be used as the output folder ({error.strerror}).") from error

    network, recipe = load_model(model, trust=trust)
    for stem, path in outputs.items():
        # Audio that the model cannot take.
        audio, rate = read_audio(path)
        if audio.shape[-1] == 0:
            raise AudioError(f"{path} has no samples; there is nothing to separate.")
        bad_sample = first_bad_sample(audio)
        if bad_sample is not None:
            raise AudioError(
                f"{path} has NaN or infinite samples, the first at index {bad_sample}; repair or remove it."
            )
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
        for n, source in enumerate(sources, 1):
            yield write_audio(stem.with_name(f"{stem.name}.source-{n}.wav"), source, rate)


def _output_stems(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the input file for each output path without its ending, ``out/NAME``."""
    inputs: dict[Path, Path] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file} does not exist.")
        # A folder stands for all audio files below it, and its subfolders appear in the output.
        paths = [file]
        root = file.parent
        if file.is_dir():
            paths = sorted(path for path in file.rglob("*") if path.suffix.lower() in SUFFIXES)
            root = file
            if not paths:
                raise UserError(f"{file} contains no audio files.")
        for path in paths:
            stem = (out / path.relative_to(root)).with_suffix("")
            if stem in inputs:
                raise UserError(f"{inputs[stem]} and {path} would both be written to {stem}.source-1.wav; rename one.")
            inputs[stem] = path
    return inputs
