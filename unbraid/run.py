"""Run a recipe in a run directory: lock it, start or resume, train, and record the environment."""

import os
import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch

import unbraid
from unbraid import dist
from unbraid.build import Corpus, build_corpus, build_model, build_state, choose_device, load_initial_weights
from unbraid.compilation import compile_model
from unbraid.config.auto import resolve_auto
from unbraid.config.recipe import Component, Recipe, differences, recipe_table, to_toml
from unbraid.config.registry import find_component
from unbraid.data.dataset import MixtureDataset
from unbraid.data.folders import files_passed_over
from unbraid.data.leakage import compare_splits
from unbraid.data.loader import LoadedBatch, StepSampler, ValidationSampler, batches
from unbraid.data.tracks import Track
from unbraid.errors import CheckpointError, DataError, UserError
from unbraid.io import write_atomically, write_json
from unbraid.records import Event, EventCode, append_record
from unbraid.run_directory import RunDirectory, run_directory_lock
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    repair_checkpoints,
    truncate_logs,
)
from unbraid.train.event_log import EventLog, Record
from unbraid.train.loggers import LOGGERS, Logger, forward_to_loggers, open_loggers
from unbraid.train.loop import fit
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
    "data.worker_timeout_seconds",
    "data.exclude",
)
"""Keys that may differ from the original recipe when a run is resumed."""

_RECORDED_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
"""The only environment variables written to environment.json; others may hold secrets."""


def train(
    recipe: Recipe, run: RunDirectory, *, resume: bool = False, stop: StopRequest | None = None
) -> Iterator[Record]:
    """Train by a recipe, in a run directory.

    Args:
        recipe: The model, the data and how to train.
        run: The directory to write to; it is locked while the run lasts.
        resume: Continue from the newest undamaged checkpoint in the directory.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step and validation, and events, after they were written.

    Raises:
        UserError: If the recipe, data or run directory cannot be used, or a stop rule ended the run.
    """
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Only the main process writes to the run directory, so only it takes the lock.
    with dist.process_group(device), run_directory_lock(run) if dist.is_main() else nullcontext():
        yield from _train(recipe, run, device, resume=resume, stop=stop)


def _train(
    recipe: Recipe, run: RunDirectory, device: torch.device, *, resume: bool, stop: StopRequest | None
) -> Iterator[Record]:
    # A logger, a checkpoint or a recipe that is refused must be refused before anything is written.
    logger_types = {
        name: find_component("train.also_log", Component(name), LOGGERS, recipe.folder)
        for name in recipe.train.also_log
    }
    checkpoint, events = _find_start(recipe, run, resume=resume)
    loggers = _open_loggers(logger_types, recipe, run)
    yield from forward_to_loggers(_train_from(checkpoint, events, recipe, run, device, stop), loggers, EventLog(run))


def _find_start(
    recipe: Recipe, run: RunDirectory, *, resume: bool
) -> tuple[Checkpoint | None, list[tuple[EventCode, str]]]:
    """Find the checkpoint to start from, and check that no earlier run is overwritten or continued differently.

    Returns:
        The checkpoint, or None to start at step 0; and (code, message) of the events to record.

    Raises:
        CheckpointError: If the directory does not fit ``resume``, or the recipe differs where it may not.
    """
    # A new run needs a directory without an earlier run.
    if not resume:
        if (run.steps.exists() and run.steps.stat().st_size) or any(run.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"{run.path} already holds a run: resume it with --resume, or start another one with --run DIR."
            )
        return None, []
    if not run.path.exists() or not run.recipe.exists():
        raise CheckpointError(f"{run.path} holds no run to resume; omit --resume to start one.")

    # The main process verifies the checkpoints; the others read the one it chose.
    checkpoint, skipped = newest_checkpoint(run) if dist.is_main() else (None, [])
    events: list[tuple[EventCode, str]] = [("CHECKPOINT_SKIPPED", message) for message in skipped]
    path = dist.from_main_process(checkpoint.path if checkpoint else None)
    if checkpoint is None and path is not None:
        checkpoint = read_checkpoint(path)
    if checkpoint is None:
        if any(run.checkpoints.glob("step-*")):
            raise CheckpointError(f"{run.path} has no undamaged checkpoint ({' '.join(skipped)}); start a new run.")
        return None, [*events, ("RUN_RESTARTED", f"{run.path} had no checkpoint yet; the run starts from step 0.")]

    # The rest of the run must be trained by the same recipe, except for keys that do not change its result.
    changes = {
        key: f"{key} was {before!r}, is {after!r}"
        for key, (before, after) in differences(checkpoint.recipe, recipe_table(recipe)).items()
    }
    refused = [change for key, change in changes.items() if not key.startswith(_MAY_CHANGE)]
    if refused:
        raise CheckpointError(
            f"{run.path} was started with another recipe: {'; '.join(refused)}. Restore the old values; or start a new "
            f"run from its weights, with --set model.init={run.path} and another --run."
        )
    events += [("RECIPE_CHANGED", f"On resuming, {change}.") for change in changes.values()]
    return checkpoint, events


def _open_loggers(
    logger_types: dict[str, Callable[..., Logger]], recipe: Recipe, run: RunDirectory
) -> dict[str, Logger]:
    """Open the loggers on the main process; raise the same error on all processes if one cannot be opened."""
    loggers: dict[str, Logger] = {}
    message = None
    if dist.is_main():
        try:
            loggers = open_loggers(logger_types, run, recipe_table(recipe))
        except UserError as error:
            message = str(error)
    if logger_types:
        # Without this the other processes would wait for the main process until the group times out.
        message = dist.from_main_process(message)
    if message is not None:
        raise UserError(message)
    return loggers


def _train_from(
    checkpoint: Checkpoint | None,
    events: list[tuple[EventCode, str]],
    recipe: Recipe,
    run: RunDirectory,
    device: torch.device,
    stop: StopRequest | None,
) -> Generator[Record, None, None]:
    """Build everything, open the run directory and train to the end."""
    # 1. Data and model. A resumed run takes its weights from its own checkpoint, so model.init may be gone by then.
    corpus = build_corpus(recipe)
    _try_mixtures(corpus.valid, recipe.validate.n_items, device)
    model = build_model(recipe).to(device)
    if checkpoint is None:
        load_initial_weights(model, recipe)

    # A resumed run has said it already.
    if checkpoint is None:
        folders = [path for path in (recipe.data.path, recipe.data.noise) if path is not None]
        sentences = [sentence for sentence in map(files_passed_over, folders) if sentence]
        events = [*events, *(("DATA_PASSED_OVER", sentence) for sentence in sentences)]

    # 2. Settle "auto". The main process decides: ranks that differ in precision or compiling would hang or diverge.
    before = checkpoint.choices if checkpoint else None
    choices, reason = dist.from_main_process(resolve_auto(recipe, model, device, before=before))
    if reason:
        events = [*events, ("AUTO_CHOSEN", reason)]
    # Sums depend on the number of threads, so a resumed run keeps it. It is not set needlessly: torch's batched solver
    # may hang on the CPU once set_num_threads was called.
    if torch.get_num_threads() != choices["threads"]:
        torch.set_num_threads(choices["threads"])
    if choices["compile"]:
        compile_model(model, device)

    # 3. The training state, from the checkpoint if there is one.
    state = build_state(recipe, model, precision=choices["precision"])
    if checkpoint is not None:
        state.load_state_dict(checkpoint.state)

    # 4. The run directory.
    if dist.is_main():
        yield from _open_run_directory(recipe, run, corpus, state, checkpoint, events, choices, device)

    # 5. Train.
    def load(n_steps_done: int) -> Iterator[LoadedBatch]:
        keys = StepSampler(
            len(corpus.train),
            recipe.data.batch_size,
            first_step=n_steps_done,
            rank=dist.rank(),
            world_size=dist.world_size(),
            accumulate=recipe.train.accumulate,
        )
        return batches(
            corpus.train, keys, workers=recipe.data.workers, timeout_seconds=recipe.data.worker_timeout_seconds
        )

    validate = make_validator(
        corpus.valid,
        n_items=recipe.validate.n_items,
        batch_size=max(1, recipe.data.batch_size // (dist.world_size() * recipe.train.accumulate)),
        assign=recipe.assign,
        audio_options=recipe.audio_options,
        save_audio=recipe.validate.save_audio,
    )
    job = Job(
        run=run,
        train=recipe.train,
        validate=recipe.validate,
        save=recipe.save,
        recipe=recipe_table(recipe),
        choices=choices,
        n_files=len(corpus.train.tracks),
    )
    yield from fit(state, load, validate, job, stop)


def _try_mixtures(dataset: MixtureDataset, n_items: int, device: torch.device, *, max_seconds: float = 5.0) -> None:
    """Make the validation mixtures once before the first step, or as many of them as there is time for.

    A split with too few usable files would otherwise end the run at its first validation, hours later.

    Raises:
        DataError: If one cannot be made on any rank.
    """
    started = perf_counter()
    problem: list[str] = []
    for keys in ValidationSampler(n_items, 1, rank=dist.rank(), world_size=dist.world_size()):
        try:
            for key in keys:
                dataset[key]
        except DataError as error:
            problem = [str(error)]
            break
        if perf_counter() - started > max_seconds:
            break
    for _, message in dist.gather(problem, device):
        raise DataError(message)


def _open_run_directory(
    recipe: Recipe,
    run: RunDirectory,
    corpus: Corpus,
    state: TrainState,
    checkpoint: Checkpoint | None,
    events: list[tuple[EventCode, str]],
    choices: dict[str, Any],
    device: torch.device,
) -> list[Event]:
    """Write the files that a run directory starts with, and return the events recorded there."""
    # Remove what a resumed run will write again: log lines and audio of steps after its checkpoint.
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    truncate_logs(run, checkpoint.log_bytes if checkpoint else {})
    repair_checkpoints(run, checkpoint)
    remove_later_audio(run.audio, state.step)
    for log in run.logs:
        log.touch()

    # Describe the run.
    write_atomically(run.recipe, to_toml(recipe))
    loss_in_db = bool(getattr(state.loss, "in_db", False))
    write_json(run.environment, environment(choices, device, loss_in_db=loss_in_db))
    write_json(run.data, compare_splits(_used_tracks(corpus.train), _used_tracks(corpus.valid)))

    recorded = [Event(code, state.step, 0, message) for code, message in events]
    if checkpoint is not None:
        message = f"Resumed from {checkpoint.path.name}."
        recorded.append(Event("RUN_RESUMED", state.step, 0, message, evidence=choices))
    for event in recorded:
        append_record(run.events, event)
    return recorded


def _used_tracks(split: MixtureDataset) -> list[Track]:
    excluded = set(split.settings.exclude)
    return [track for track in split.tracks if str(track.path) not in excluded]


def environment(choices: dict[str, Any], device: torch.device, *, loss_in_db: bool) -> dict[str, Any]:
    """Return what environment.json records: versions, device, the choices of "auto", and a few variables.

    Args:
        choices: Precision, compiling and threads of the run.
        device: The device it trains on.
        loss_in_db: Whether the loss is in dB; readers of the run need it for the unit of its curves.
    """
    return {
        "unbraid": unbraid.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "world_size": dist.world_size(),
        "chosen": choices,
        "loss_in_db": loss_in_db,
        "settings": {name: os.environ[name] for name in _RECORDED_VARIABLES if name in os.environ},
    }
