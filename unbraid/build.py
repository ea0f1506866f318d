"""Model, data and training state of a recipe put together; a run from its start, or its resumption, to its end."""

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unbraid
from unbraid import dist
from unbraid.compilation import compile_model
from unbraid.config.auto import choose
from unbraid.config.recipe import Component, Recipe, differences, recipe_from_table, recipe_table, to_toml
from unbraid.config.registry import build_component, build_loss, find_component
from unbraid.data import DATASETS
from unbraid.data.dataset import MixtureDataset, mixtures
from unbraid.data.folders import noises
from unbraid.data.leakage import overlap
from unbraid.data.loader import LoadedBatch, StepSampler, batches
from unbraid.data.tracks import Track, with_splits
from unbraid.errors import CheckpointError, DataError, RecipeError, UserError
from unbraid.io import write_atomically
from unbraid.losses import loss_inputs
from unbraid.models import MODELS
from unbraid.records import Event, RunDirectory, append_record, owned
from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.robust.precision import Precision
from unbraid.seeding import seeded_torch
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_partial_checkpoints,
    truncate_logs,
)
from unbraid.train.ema import EMA
from unbraid.train.event_log import EventLog, Record
from unbraid.train.loggers import LOGGERS, Logger, forward_to_loggers, open_loggers
from unbraid.train.loop import fit
from unbraid.train.optim import OPTIMIZERS, SCHEDULES
from unbraid.train.settings import Job
from unbraid.train.state import TrainState
from unbraid.train.validate import make_validator
from unbraid.train.validation_audio import remove_later_audio

_MAY_CHANGE = (
    "train.max_steps",
    "train.max_minutes",
    "train.precision",
    "train.compile",
    "train.accumulate",
    "train.on_bad_example",
    "train.loss_upper_limit",
    "train.compare_every_steps",
    "train.also_log",
    "validate.save_audio",
    "save.",
    "data.workers",
    "data.exclude",
)
"""Keys that a resumed run may give other values than it began with."""

_RECORDED_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")


def build_model(recipe: Recipe, *, trust: bool = True) -> nn.Module:
    """The recipe's model with its initial weights, drawn from the recipe's seed."""
    options = {key: value for key, value in recipe.model.options.items() if key != "init"}
    folder = recipe.folder if trust else None
    parameters = inspect.signature(find_component("model", recipe.model, MODELS, folder)).parameters
    for name, value in {"n_sources": recipe.data.n_sources, "sample_rate": recipe.data.sample_rate}.items():
        if name in parameters:
            options.setdefault(name, value)
    with seeded_torch(recipe.data.seed, "initial weights"):
        return build_component("model", Component(recipe.model.name, options), MODELS, folder)


def load_model(path: Path, *, trust: bool = False) -> tuple[nn.Module, Recipe]:
    """A trained model, and the recipe it was trained by, from a checkpoint or run directory.

    Args:
        path: As `find_checkpoint` takes it.
        trust: Whether code named by the checkpoint's recipe may run.

    Raises:
        CheckpointError: If there is none, or it is damaged.
        RecipeError: If its model is not one of ours and is not trusted.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    recipe = recipe_from_table(checkpoint.recipe, Path.cwd())
    model = build_model(recipe, trust=trust)
    load_weights(model, checkpoint)
    return model.to(choose_device()).eval(), recipe


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the weights of a checkpoint.

    Raises:
        CheckpointError: If they are another model's.
    """
    try:
        model.load_state_dict(checkpoint.state["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{checkpoint.path} holds weights of another model: {first[0].strip()}") from error


def choose_device() -> torch.device:
    """The process's own GPU, or the CPU.

    Raises:
        UserError: If there are more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if dist.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs for more processes: lower --nproc-per-node, or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return torch.device("cuda", dist.local_rank())


@dataclass(frozen=True)
class Corpus:
    """The mixtures to train on and to validate on."""

    train: MixtureDataset
    valid: MixtureDataset


def list_tracks(recipe: Recipe, *, trust: bool = True) -> tuple[list[Track], list[Track]]:
    """The recordings of a recipe's data set with their splits, and its noises.

    Raises:
        DataError: If they cannot be listed, or processes that train together see different ones.
        RecipeError: If the data set is somebody's own code and is not trusted.
    """
    data = recipe.data
    if data.path is None:
        raise RecipeError("[data] needs a path to a speaker folder or a CSV manifest: --set data.path=FOLDER.")
    tracks = find_component("data", Component(data.name), DATASETS, recipe.folder if trust else None)(data.path)
    found = with_splits(tracks, n_sources=data.n_sources), noises(data.noise) if data.noise else []
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    if dist.any_rank(digest != dist.from_main_process(digest), choose_device()):
        raise DataError(f"The processes see different files in {data.path}; every machine needs the same data.")
    return found


def build_corpus(recipe: Recipe, *, trust: bool = True) -> Corpus:
    """Training and validation mixtures, after every check that needs no audio."""
    tracks, noise = list_tracks(recipe, trust=trust)
    return Corpus(*(mixtures(tracks, recipe.data, purpose, noises=noise) for purpose in ("train", "valid")))


def build_state(recipe: Recipe, model: nn.Module, *, precision: str) -> TrainState:
    """The training state at step 0, around a model that lies on its device.

    Raises:
        RecipeError: If a part is refused, the model wants other mixtures, or a filter in dB meets a loss that is not.
    """
    if (n_channels := getattr(model, "n_channels", 1)) != 1:
        raise RecipeError(
            f"[model] {recipe.model.name} takes {n_channels} channels at once, and mixtures of {recipe.data.name} have "
            "one: set model.n_channels = 1."
        )
    loss = build_loss(recipe)
    filters = [build_component("filter", part, FILTERS, recipe.folder) for part in recipe.filters]
    for part, loss_filter in zip(recipe.filters, filters, strict=True):
        if hasattr(loss_filter, "observe") and not hasattr(loss_filter, "load_state_dict"):
            raise RecipeError(f"[[filter]] {part.name} has observe, and so needs state_dict and load_state_dict too.")
        if getattr(loss_filter, "needs_db", False) and not loss.in_db:
            raise RecipeError(f"[[filter]] {part.name} needs a loss in dB, which {recipe.loss.name} is not.")
    if recipe.optim.name == "schedule_free":
        if recipe.train.ema:
            raise RecipeError("train.ema and optim.name = 'schedule_free' both average weights; leave one of them out.")
        if recipe.schedule.name != "constant":
            raise RecipeError(
                f"optim.name = 'schedule_free' takes schedule.name = 'constant', not {recipe.schedule.name!r}."
            )
    if dist.world_size() > 1:
        _check_statistics(model)
        wanted = {name for term in loss.terms for name in loss_inputs(term.loss)}
        if hasattr(model, "embedding") and not wanted >= {"estimate", "embedding"}:
            raise RecipeError(
                f"[model] {recipe.model.name} returns sources and an embedding: on several processes the loss must "
                "want both, as a sum of two terms can; or train on one process."
            )
    return TrainState(
        model=dist.wrap(model),
        loss=loss,
        optimizer=build_component("optim", recipe.optim, OPTIMIZERS, recipe.folder, parameters=model.parameters()),
        clipper=build_component("clip", recipe.clip, CLIPPERS, recipe.folder),
        filters=filters,
        transforms=[build_component("transform", part, TRANSFORMS, recipe.folder) for part in recipe.transforms],
        ema=EMA(model, recipe.train.ema) if recipe.train.ema else None,
        on_bad_example=recipe.train.on_bad_example,
        precision=Precision(precision),
        schedule=build_component("schedule", recipe.schedule, SCHEDULES, recipe.folder),
        loss_upper_limit=recipe.train.loss_upper_limit,
        seed=recipe.data.seed,
        examples_per_rank=-(-recipe.data.batch_size // dist.world_size()) + recipe.train.accumulate,
    )


def _check_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RecipeError(
                f"[model] {name} is a {type(module).__name__}: its statistics would differ from process to process, or "
                "tie their examples together so that a bad one cannot be set aside; take a norm without, such as "
                "nn.GroupNorm, or train on one process."
            )


def train(
    recipe: Recipe, run: RunDirectory, *, resume: bool = False, stop: StopRequest | None = None
) -> Iterator[Record]:
    """Train by a recipe into a run directory.

    Args:
        recipe: What to do.
        run: Where to write; one owner at a time.
        resume: Go on from the newest whole checkpoint there.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step and validation, and events, after they were written.

    Raises:
        UserError: If recipe, data or run directory cannot be used, or a stop rule ended the run.
    """
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with dist.process_group(device):
        if not dist.is_main():
            yield from _train(recipe, run, device, resume=resume, stop=stop)
            return
        with owned(run):
            yield from _train(recipe, run, device, resume=resume, stop=stop)


def _train(
    recipe: Recipe, run: RunDirectory, device: torch.device, *, resume: bool, stop: StopRequest | None
) -> Iterator[Record]:
    makers = {
        name: find_component("train.also_log", Component(name), LOGGERS, recipe.folder)
        for name in recipe.train.also_log
    }
    checkpoint, notes = _starting_point(recipe, run, resume=resume)
    loggers = _open_loggers(makers, recipe, run)
    yield from forward_to_loggers(_go_on(recipe, run, device, checkpoint, notes, stop), loggers, EventLog(run))


def _open_loggers(makers: dict[str, Callable[..., Logger]], recipe: Recipe, run: RunDirectory) -> dict[str, Logger]:
    """The loggers of the main process; none on the others, which hear of it where one is refused."""
    loggers, refused = dict[str, Logger](), None
    if dist.is_main():
        try:
            loggers = open_loggers(makers, run, recipe_table(recipe))
        except UserError as error:
            refused = str(error)
    if makers and (refused := dist.from_main_process(refused)) is not None:
        raise UserError(refused)
    return loggers


def _go_on(
    recipe: Recipe,
    run: RunDirectory,
    device: torch.device,
    checkpoint: Checkpoint | None,
    notes: list[tuple[str, str]],
    stop: StopRequest | None,
) -> Generator[Record, None, None]:
    """From a checkpoint, or from the start, to the end."""
    corpus = build_corpus(recipe)
    model = build_model(recipe).to(device)
    if checkpoint is None and "init" in recipe.model.options:
        load_weights(model, read_checkpoint(find_checkpoint(Path(recipe.model.options["init"]))))
    before = checkpoint.choices if checkpoint else None
    choices, why = dist.from_main_process(choose(recipe, model, device, before=before))
    notes += [("CHOSEN", why)] if why else []
    if torch.get_num_threads() != choices["threads"]:
        torch.set_num_threads(choices["threads"])
    if choices["compile"]:
        compile_model(model, device)
    state = build_state(recipe, model, precision=choices["precision"])
    if checkpoint is not None:
        state.load_state_dict(checkpoint.state)
    table = recipe_table(recipe)
    job = Job(run, recipe.train, recipe.validate, recipe.save, table, choices, n_files=len(corpus.train.tracks))
    if dist.is_main():
        yield from _open_run(recipe, run, corpus, state, checkpoint, notes, choices, device)

    def load(n_steps_done: int) -> Iterator[LoadedBatch]:
        keys = StepSampler(
            len(corpus.train),
            recipe.data.batch_size,
            first_step=n_steps_done,
            rank=dist.rank(),
            world_size=dist.world_size(),
            accumulate=recipe.train.accumulate,
        )
        return batches(corpus.train, keys, workers=recipe.data.workers)

    validate = make_validator(
        corpus.valid,
        n_items=recipe.validate.n_items,
        batch_size=max(1, recipe.data.batch_size // (dist.world_size() * recipe.train.accumulate)),
        assign=recipe.assign,
        audio_options=recipe.audio_options,
        save_audio=recipe.validate.save_audio,
    )
    yield from fit(state, load, validate, job, stop)


def _starting_point(
    recipe: Recipe, run: RunDirectory, *, resume: bool
) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """The checkpoint to go on from, if any, once it is sure that nothing would be lost or mixed up.

    Returns:
        It, and codes and messages of the events to record about it.
    """
    if not resume:
        if (run.steps.exists() and run.steps.stat().st_size) or any(run.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"{run.path} holds a run already: --resume goes on with it, --run DIR begins another."
            )
        return None, []
    if not run.path.exists() or not run.recipe.exists():
        raise CheckpointError(f"{run.path} holds no run to go on with; leave --resume out to begin one.")
    found, passed_over = newest_checkpoint(run) if dist.is_main() else (None, [])
    notes = [("CHECKPOINT_PASSED_OVER", message) for message in passed_over]
    path = dist.from_main_process(found.path if found else None)
    checkpoint = found or (read_checkpoint(path) if path else None)
    if checkpoint is None:
        if any(run.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"{run.path} has no whole checkpoint left ({' '.join(passed_over)}); begin a new run."
            )
        return None, [*notes, ("RUN_BEGUN_AGAIN", f"{run.path} had no checkpoint yet; the run began again.")]
    changed = differences(checkpoint.recipe, recipe_table(recipe))
    told = {key: f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items()}
    if harmful := [words for key, words in told.items() if not key.startswith(_MAY_CHANGE)]:
        raise CheckpointError(
            f"{run.path} was begun by another recipe: {'; '.join(harmful)}. Take that back, or begin a new run."
        )
    return checkpoint, [*notes, *(("RECIPE_CHANGED", f"On resuming, {words}.") for words in told.values())]


def _open_run(
    recipe: Recipe,
    run: RunDirectory,
    corpus: Corpus,
    state: TrainState,
    checkpoint: Checkpoint | None,
    notes: list[tuple[str, str]],
    choices: dict[str, Any],
    device: torch.device,
) -> list[Event]:
    """Write what a run directory begins with; cut back what a resumed run will write again.

    Returns:
        What there is to tell of it.
    """
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    truncate_logs(run, checkpoint.log_bytes if checkpoint else {})
    remove_partial_checkpoints(run, checkpoint)
    remove_later_audio(run.audio, state.step)
    for log in run.logs:
        log.touch()
    write_atomically(run.recipe, to_toml(recipe))
    _write_json(run.environment, environment(choices, device, loss_in_db=bool(getattr(state.loss, "in_db", False))))
    _write_json(run.data, overlap(*(_not_excluded(split) for split in (corpus.train, corpus.valid))))
    events = [Event(code, state.step, 0, message) for code, message in notes]
    if checkpoint is not None:
        message = f"Went on from {checkpoint.path.name}."
        events.append(Event("RUN_RESUMED", state.step, 0, message, evidence=choices))
    for event in events:
        append_record(run.events, event)
    return events


def _not_excluded(split: MixtureDataset) -> list[Track]:
    excluded = set(split.settings.exclude)
    return [track for track in split.tracks if str(track.path) not in excluded]


def _write_json(path: Path, table: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(table, indent=1) + "\n")


def environment(choices: dict[str, Any], device: torch.device, *, loss_in_db: bool) -> dict[str, Any]:
    """Versions, device, threads, allow-listed settings and whether the loss is in dB; nothing else is recorded."""
    return {
        "unbraid": unbraid.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": dist.world_size(),
        "chosen": choices,
        "loss_in_db": loss_in_db,
        "settings": {name: os.environ[name] for name in _RECORDED_SETTINGS if name in os.environ},
    }
