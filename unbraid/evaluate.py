"""A model over mixtures it has not seen: a row of metrics for each, means with their standard errors, audio saved."""

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
from unbraid.data.loader import LoadedBatch, collate
from unbraid.data.mixing import AudioFault
from unbraid.dsp import SILENCE
from unbraid.errors import UserError
from unbraid.inference import separate
from unbraid.losses.pit import evaluation_loss, match_to_targets
from unbraid.metrics import sdr, si_sdr
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
        standard_error: Of the mean, over mixtures.
        n_items: Mixtures with a value.
    """

    mean: float
    standard_error: float
    n_items: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_checkpoint` found, and where it wrote it; the worst rows that were asked for, worst first."""

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
    """Score a checkpoint on mixtures made as in its training, of speakers it has not seen.

    Args:
        checkpoint: A run directory or a checkpoint.
        data: Speaker folder or manifest; that of the training where None.
        split: Whose speakers: ``test``, ``valid``, or ``train`` to see what was learnt by heart.
        n_items: How many mixtures.
        seconds: Length of each; that of the training where None.
        save_audio: Of how many the audio is written, into a folder beside the table.
        save_worst: Of how many it is written there too, those whose SI-SDR was improved least.
        out: Table to write; ``evaluation.csv`` in the run directory where None.
        trust: Whether code that the checkpoint names may run.
        progress: Called with how many are done, of how many.

    Raises:
        UserError: If checkpoint, data or table cannot be used.
    """
    folder = find_checkpoint(checkpoint)
    table = out or (folder.parent.parent if folder.parent.name == "checkpoints" else folder) / "evaluation.csv"
    check_table_path(table)
    model, recipe = load_model(folder, trust=trust)
    changes: dict[str, Any] = {"path": data.absolute()} if data else {}
    changes |= {"excerpt_seconds": seconds} if seconds else {}
    recipe = replace(recipe, data=replace(recipe.data, **changes))
    tracks, noise = list_tracks(recipe, trust=trust)
    dataset = make_dataset(tracks, recipe.data, split, noises=noise)
    audio = table.with_suffix("").parent / f"{table.stem}-audio" if save_audio or save_worst else None
    if audio:
        _remove_audio(audio)
    rows: list[Row] = []
    bad_files: dict[str, str] = {}
    for row, faults in evaluate(model, dataset, recipe, n_items=n_items, save_audio=save_audio, folder=audio):
        bad_files |= {fault.path: fault.message for fault in faults if not fault.in_excerpt_only}
        rows.append(row)
        if progress is not None:
            progress(len(rows), n_items)
    write_table(table, rows)
    worst = worst_rows(rows)[:save_worst]
    if audio:
        for row in worst:
            ordered, loaded = _separated(model, dataset, recipe, row["index"])  # made again: nobody keeps all of them
            _save_audio(audio, ordered, loaded.batch, recipe)
    return Evaluation(rows, summarise(rows), table, audio, recipe, bad_files, worst)


def worst_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that have an SI-SDR improvement, the smallest first."""
    return sorted((row for row in rows if row["si_sdri"] is not None), key=lambda row: row["si_sdri"])


def evaluate(
    model: nn.Module,
    dataset: MixtureDataset,
    recipe: Recipe,
    *,
    n_items: int,
    save_audio: int = 0,
    folder: Path | None = None,
) -> Iterator[tuple[Row, tuple[AudioFault, ...]]]:
    """Separate and score mixtures, one row each, in order.

    Every estimate is held against its source, in the order that gives the best SI-SDR unless the recipe's is fixed. The
    mean over a mixture's sources
    stands under the metric's name, each source's value behind it as ``si_sdr_1`` and so on. A value that means
    nothing (a silent source) is None, never 0.

    Args:
        model: A separator at the data's rate.
        dataset: Mixtures of unseen sources.
        recipe: What the model was trained by.
        n_items: How many mixtures.
        save_audio: Of how many of them the audio is written: mixture, estimates, references.
        folder: Where to; needed with ``save_audio``.

    Yields:
        A row with ``index``, the metrics, and ``files``; and what was wrong with files drawn before these.
    """
    for index in range(n_items):
        ordered, loaded = _separated(model, dataset, recipe, index)
        batch = loaded.batch
        row = {"index": index} | _scores(ordered, batch) | {"files": " + ".join(batch.items[0].files)}
        yield row, loaded.faults
        if index < save_audio and folder is not None:
            _save_audio(folder, ordered, batch, recipe)


def _separated(model: nn.Module, dataset: MixtureDataset, recipe: Recipe, index: int) -> tuple[Tensor, LoadedBatch]:
    """Estimates of one mixture in the order of its sources, ``(1, source, channel, time)``, and the batch of it."""
    loaded = collate([dataset[Key(0, index)]])
    estimate = separate(model, loaded.batch.mixture).cpu()
    sources = loaded.batch.sources
    return match_to_targets(estimate, sources, evaluation_loss(recipe.assign), assign=recipe.assign), loaded


def _scores(ordered: Tensor, batch: Batch) -> Row:
    unprocessed = batch.mixture[:, None].expand_as(batch.sources).contiguous()
    after = {"si_sdr": si_sdr(ordered, batch.sources), "sdr": sdr(ordered, batch.sources)}
    before = {"si_sdr": si_sdr(unprocessed, batch.sources), "sdr": sdr(unprocessed, batch.sources)}
    silent = batch.sources.square().mean(-1) <= SILENCE
    row: Row = {}
    for name in METRICS:
        plain = name.removesuffix("i")
        values = after[plain] - before[plain] if name.endswith("i") else after[plain]
        per_source = torch.where(silent, torch.nan, values).mean(-1)[0].tolist()
        known = [value for value in per_source if math.isfinite(value)]
        row[name] = round(sum(known) / len(known), 4) if known else None
        row |= {f"{name}_{n}": round(v, 4) if math.isfinite(v) else None for n, v in enumerate(per_source, 1)}
    return row


def _save_audio(folder: Path, ordered: Tensor, batch: Batch, recipe: Recipe) -> None:
    sound = recipe.audio_options.make_example(batch.items[0].index, batch.mixture[0], batch.sources[0], ordered[0])
    write_mixture_and_references(folder, sound)
    write_estimates(folder, sound)


def _remove_audio(folder: Path) -> None:
    """Remove what an evaluation before this wrote: what was another checkpoint's must not be taken for this one's."""
    for path in folder.glob("*.wav"):
        if re.fullmatch(r"\d{3,}-(mixture|(estimate|reference)-\d+)", path.stem):
            path.unlink()


def summarise(rows: Sequence[Row]) -> dict[str, Summary]:
    """Mean and standard error of each metric."""
    summaries = {}
    for name in METRICS:
        values = np.array([row[name] for row in rows if row[name] is not None], dtype=np.float64)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        summaries[name] = Summary(float(values.mean()) if len(values) else math.nan, error, len(values))
    return summaries


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as ``.csv`` or ``.parquet``.

    Raises:
        OSError: If the disk refuses.
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
    """Refuse a table that could not be written, before the work of filling it.

    Raises:
        UserError: If it cannot be written, the suffix is another, or Parquet is asked for and pyarrow is not there.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(TABLE_SUFFIXES)}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the table to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
