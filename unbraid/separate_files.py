"""Files in, separated files out: any rate, any channel count, the length they came in."""

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
        out: Folder for ``NAME.source-N.wav``; of a folder's files its own folders are kept below.
        trust: Whether code that the checkpoint names may run.

    Yields:
        Each file written.

    Raises:
        UserError: If a file is missing, two would be written to one name, or the checkpoint cannot be used: before
            anything is written. If audio turns out to be unreadable, when its turn comes: what was written stays.
    """
    jobs = _jobs(files, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be the folder to write to ({error.strerror}).") from error
    network, recipe = load_model(model, trust=trust)
    for path, target in jobs:
        audio, rate = read_audio(path)
        if audio.shape[-1] == 0:
            raise AudioError(f"{path} has no samples; there is nothing to separate.")
        if (bad := first_bad_sample(audio)) is not None:
            raise AudioError(
                f"{path} has a sample that is not finite, the first at index {bad}; it cannot be separated."
            )
        if (n_channels := getattr(network, "n_channels", 1)) not in (1, len(audio)):
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
            yield write_audio(target.with_name(f"{target.name}.source-{n}.wav"), source, rate)


def _jobs(files: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """What to read, and the name to write to without its ending."""
    jobs: dict[Path, Path] = {}
    for given in files:
        if not given.exists():
            raise UserError(f"{given} does not exist.")
        inside = sorted(path for path in given.rglob("*") if path.suffix.lower() in SUFFIXES) if given.is_dir() else []
        if given.is_dir() and not inside:
            raise UserError(f"{given} holds no audio files.")
        for path in inside or [given]:
            target = (out / path.relative_to(given) if inside else out / path.name).with_suffix("")
            if target in jobs:
                raise UserError(
                    f"{jobs[target]} and {path} would both be written to {target}.source-1.wav; rename one."
                )
            jobs[target] = path
    return [(path, target) for target, path in jobs.items()]
