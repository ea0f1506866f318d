"""Evaluate a model on unseen mixtures: a row of metrics for each, means with standard errors, and saved audio."""

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.build import list_tracks, load_model
from unbraid.config.recipe import Recipe
from unbraid.data.batch import Batch
from unbraid.data.dataset import Key, MixtureDataset, make_dataset
from unbraid.data.excerpt import AudioFault
from unbraid.data.loader import LoadedBatch, collate
from unbraid.dsp import SILENCE
from unbraid.errors import UserError
from unbraid.inference import separate
from unbraid.losses.pit import evaluation_loss, match_to_targets
from unbraid.metrics import can_improve, sdr, si_sdr
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import find_checkpoint
from unbraid.train.validation_audio import write_estimates, write_mixture_and_references
from unbraid.type_aliases import Row

METRICS = ("si_sdr", "si_sdri", "sdr", "sdri")
TABLE_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Summary:
    """Mean of one metric over the mixtures that have a value.

    Attributes:
        mean: In dB; NaN where no mixture has a value.
        standard_error: Standard error of the mean, over mixtures; NaN for fewer than two.
        n_items: Number of mixtures that have a value.
    """

    mean: float
    standard_error: float
    n_items: int


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_checkpoint`.

    Attributes:
        rows: Metrics of each mixture, in order.
        summaries: Mean of each metric.
        table: File that the rows were written to.
        audio: Folder of the audio; None if none was saved.
        recipe: Recipe of the model, with the data that it was evaluated on.
        bad_files: Message by path, for each file that was skipped.
        worst: Rows with the smallest SI-SDR improvement, smallest first; as many as ``save_worst``.
    """

    rows: list[Row]
    summaries: dict[str, Summary]
    table: Path
    audio: Path | None
    recipe: Recipe
    bad_files: dict[str, str]
    worst: Sequence[Row] = ()


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data: Path | None = None,
    split: str = "test",
    n_items: int = 200,
    seconds: float | None = None,
    save_audio: int = 0,
    save_worst: int = 0,
    out: Path | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on mixtures made as in its training, of speakers that it has not seen.

    The metrics are written to a table, and audio to a folder next to it.

    Args:
        checkpoint: A run directory or a checkpoint.
        data: Speaker folder or manifest; None for that of the training. All speakers of other data than the
            training's are mixed, unless they are divided into splits.
        split: Speakers to mix: ``test``, ``valid``, or ``train`` to measure the fit to the training data.
        n_items: Number of mixtures.
        seconds: Length of a mixture; None for that of the training.
        save_audio: Write audio of this many mixtures, from the first on.
        save_worst: Also write audio of this many mixtures, those with the smallest SI-SDR improvement.
        out: Table to write; None for ``evaluation.csv`` in the run directory.
        trust: Whether code that the checkpoint names may run.
        progress: Called with the number of mixtures done and their total.

    Raises:
        UserError: If checkpoint, data or table cannot be used.
    """
    if data is not None and RunDirectory(data).steps.exists():
        raise UserError(
            f"{data} is a run, and evaluate takes one run and its data. To compare runs, evaluate each on the same "
            "data with its own -o TABLE, or open both with unbraid dashboard."
        )
    # A table that cannot be written is refused first, before minutes of work.
    folder = find_checkpoint(checkpoint)
    table = out or (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / "evaluation.csv"
    check_table_path(table)

    # The model, and mixtures made by its recipe.
    model, recipe = load_model(folder, trust=trust)
    trained_on = recipe.data.path
    is_other_data = data is not None and (trained_on is None or data.resolve() != trained_on.resolve())
    changes: dict[str, Any] = {"path": data.absolute()} if data else {}
    changes |= {"excerpt_seconds": seconds} if seconds else {}
    recipe = replace(recipe, data=replace(recipe.data, **changes))
    # The training data, named or not, are divided as in training: else speakers trained on would be in the test. Of
    # other data everything is there to be evaluated on.
    tracks, noise = list_tracks(recipe, trust=trust, all_in=split if is_other_data else "")
    dataset = make_dataset(tracks, recipe.data, split, noises=noise)

    # Evaluate, collecting the files that could not be used.
    audio = table.with_suffix("").parent / f"{table.stem}-audio" if save_audio or save_worst else None
    if audio:
        _remove_audio(audio)
    rows: list[Row] = []
    bad_files: dict[str, str] = {}
    for row, faults in evaluate(model, dataset, recipe, n_items=n_items, save_audio=save_audio, audio_folder=audio):
        bad_files |= {fault.path: fault.message for fault in faults if not fault.in_excerpt_only}
        rows.append(row)
        if progress is not None:
            progress(len(rows), n_items)
    write_table(table, rows)

    # Save audio of the worst mixtures. They are separated again, since their audio was not kept in memory.
    worst = worst_rows(rows)[:save_worst]
    if audio:
        for row in worst:
            estimate, loaded = _separate_item(model, dataset, recipe, row["index"])
            _save_audio(audio, estimate, loaded.batch, recipe)
    return Evaluation(rows, summarise(rows), table, audio, recipe, bad_files, worst)


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have an SI-SDR improvement, smallest first."""
    return sorted((row for row in rows if row["si_sdri"] is not None), key=lambda row: row["si_sdri"])


def evaluate(
    model: nn.Module,
    dataset: MixtureDataset,
    recipe: Recipe,
    *,
    n_items: int,
    save_audio: int = 0,
    audio_folder: Path | None = None,
) -> Iterator[tuple[Row, tuple[AudioFault, ...]]]:
    """Separate mixtures and yield a row of metrics for each, in order.

    Each estimate is compared with its source, in the order that gives the best SI-SDR, unless the recipe fixes the
    order. The mean over a mixture's sources has the metric's name, and the value of each source follows as ``si_sdr_1``
    and so on. A value that is undefined, such as that of a silent source, or the improvement of a source that is alone
    in its mixture, is None, never 0.

    Args:
        model: A separator at the sample rate of the data.
        dataset: Mixtures of unseen sources.
        recipe: Recipe of the model.
        n_items: Number of mixtures.
        save_audio: Write mixture, estimates and references of this many mixtures, from the first on.
        audio_folder: Folder for the audio; needed with ``save_audio``.

    Yields:
        A row with ``index``, the metrics and ``files``; and the faults of files that were drawn first and replaced.
    """
    for index in range(n_items):
        estimate, loaded = _separate_item(model, dataset, recipe, index)
        batch = loaded.batch
        row = {"index": index} | _metrics(estimate, batch) | {"files": " + ".join(batch.items[0].files)}
        yield row, loaded.faults
        if index < save_audio and audio_folder is not None:
            _save_audio(audio_folder, estimate, batch, recipe)


def _separate_item(model: nn.Module, dataset: MixtureDataset, recipe: Recipe, index: int) -> tuple[Tensor, LoadedBatch]:
    """Return a mixture's estimates in the order of its sources, ``(1, source, channel, time)``, and its batch."""
    loaded = collate([dataset[Key(0, index)]])
    estimate = separate(model, loaded.batch.mixture).cpu()
    sources = loaded.batch.sources
    return match_to_targets(estimate, sources, evaluation_loss(recipe.assign), assign=recipe.assign), loaded


def _metrics(estimate: Tensor, batch: Batch) -> Row:
    # An improvement (the trailing "i") is measured against the unprocessed mixture as the estimate of every source.
    unprocessed = batch.mixture[:, None].expand_as(batch.sources).contiguous()
    after = {"si_sdr": si_sdr(estimate, batch.sources), "sdr": sdr(estimate, batch.sources)}
    before = {"si_sdr": si_sdr(unprocessed, batch.sources), "sdr": sdr(unprocessed, batch.sources)}
    silent = batch.sources.square().mean(-1) <= SILENCE
    row: Row = {}
    for name in METRICS:
        metric = name.removesuffix("i")
        values = after[metric]
        if name.endswith("i"):
            values = torch.where(can_improve(before[metric]), values - before[metric], torch.nan)
        # NaN in one channel makes the value of the source undefined.
        per_source = torch.where(silent, torch.nan, values).mean(-1)[0].tolist()
        defined = [value for value in per_source if math.isfinite(value)]
        row[name] = round(sum(defined) / len(defined), 4) if defined else None
        row |= {f"{name}_{n}": round(v, 4) if math.isfinite(v) else None for n, v in enumerate(per_source, 1)}
    return row


def _save_audio(folder: Path, estimate: Tensor, batch: Batch, recipe: Recipe) -> None:
    example = recipe.audio_options.make_example(batch.items[0].index, batch.mixture[0], batch.sources[0], estimate[0])
    write_mixture_and_references(folder, example)
    write_estimates(folder, example)


def _remove_audio(folder: Path) -> None:
    """Remove the audio of an earlier evaluation, which may be of another checkpoint."""
    for path in folder.glob("*.wav"):
        if re.fullmatch(r"\d{3,}-(mixture|(estimate|reference)-\d+)", path.stem):
            path.unlink()


def summarise(rows: Sequence[Row]) -> dict[str, Summary]:
    """Return mean and standard error of each metric, over the rows in which it is defined."""
    summaries = {}
    for name in METRICS:
        values = np.array([row[name] for row in rows if row[name] is not None], dtype=np.float64)
        # The standard deviation of a sample (ddof=1) needs at least two values.
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        summaries[name] = Summary(float(values.mean()) if len(values) else math.nan, error, len(values))
    return summaries


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as ``.csv`` or ``.parquet``.

    Raises:
        OSError: If the file cannot be written.
    """
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def check_table_path(path: Path) -> None:
    """Raise unless a table can be written to a path, before the work of filling it.

    Raises:
        UserError: If the file cannot be written, its suffix is unknown, or it is Parquet and pyarrow is not installed.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(TABLE_SUFFIXES)}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the table to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opening for append shows whether it can be written, and leaves an existing table as it is.
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from error
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(f'{path} needs pyarrow: pip install "unbraid[parquet]", or write a .csv.') from None
