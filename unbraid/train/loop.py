"""fit: a generator of records; validation and saving at their intervals."""

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from types import FrameType
from typing import Any, Literal, NamedTuple

from unbraid import dist
from unbraid.data.loader import Loaded
from unbraid.data.mixing import AudioFault
from unbraid.errors import CheckpointError, TrainingStopped
from unbraid.records import Event, RunDirectory, StepRecord, ValidationRecord, append_record
from unbraid.train.checkpoint import first_nonfinite, save_checkpoint
from unbraid.train.state import TrainState, set_learning_rate
from unbraid.train.step import train_step


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The table ``[train]`` of a recipe.

    Attributes:
        max_steps: Ends the run; 0 for no such end.
        max_minutes: Ends the run, over all its resumptions; 0 for no such end.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        compile: ``auto``, ``on`` or ``off``.
        accumulate: Micro-batches that a step's examples are split into, to save memory; the result is the same.
        on_bad_example: ``skip`` leaves the step out, ``stop`` ends the run.
        loss_upper_limit: A loss beyond this, by absolute value, is a fault as NaN is.
    """

    max_steps: int = 0
    max_minutes: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    accumulate: int = 1
    on_bad_example: Literal["skip", "stop"] = "skip"
    loss_upper_limit: float = 999999.0


@dataclass(frozen=True, kw_only=True)
class ValidateSettings:
    """The table ``[validate]`` of a recipe.

    Attributes:
        every_steps: How often; 0 only at the end.
        n_items: How many mixtures.
    """

    every_steps: int = 1000
    n_items: int = 100


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """The table ``[save]`` of a recipe.

    Attributes:
        every_steps: How often; 0 only at the end.
        keep: How many of the newest checkpoints stay; the best stays beside them.
    """

    every_steps: int = 1000
    keep: int = 2


class Scores(NamedTuple):
    """Means over the validation examples of all ranks."""

    loss: float
    si_sdr: float
    si_sdri: float
    n_items: int


Validate = Callable[[TrainState], Scores]


@dataclass
class StopRequest:
    """Set by SIGTERM or Ctrl-C: the step at hand is finished, a checkpoint written, and the run ends."""

    signal: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest`; the second one of a kind is not held back any more."""
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {int(number): signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Fit:
    """What `fit` needs beside the state: where to write, how often, and what a checkpoint says of the run.

    Attributes:
        run: The run directory.
        train: Budget and rules.
        validate: How often.
        save: How often, how many.
        recipe: The resolved recipe, for the checkpoint.
        choices: What "auto" chose, for the checkpoint.
        n_files: Files in the training split, which the budget for bad ones is a share of.
    """

    run: RunDirectory
    train: TrainSettings
    validate: ValidateSettings
    save: SaveSettings
    recipe: dict[str, Any]
    choices: dict[str, Any]
    n_files: int = 0


def fit(
    state: TrainState, loaded: Iterable[Loaded], validate: Validate, job: Fit, stop: StopRequest | None = None
) -> Iterator[StepRecord | ValidationRecord]:
    """Train until the budget is spent, yielding each record after it was written.

    Args:
        state: Where to begin; changed in place.
        loaded: Batches of this rank from step ``state.step`` on, ``accumulate`` a step, without end.
        validate: Scores the model.
        job: Where and how often.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step, and for each validation.

    Raises:
        TrainingStopped: If a stop rule ended the run. A checkpoint of the state is written first where it is sound.
    """
    stop = stop or StopRequest()
    source, began = iter(loaded), perf_counter() - state.elapsed_seconds
    unsaved = unvalidated = False
    while not _spent(state, job.train, stop):
        set_learning_rate(state, state.schedule.factor(state.step + 1, _progress(state, job.train)))
        record = _step(state, source, job, began)
        yield record
        if (reason := _stop_rule(state, record, job)) is not None:
            save(state, job)
            raise TrainingStopped(reason)
        unsaved = unvalidated = True
        if _due(state.step, job.validate.every_steps):
            validation = _validated(state, validate, job)
            unvalidated = False
            yield validation
        if _due(state.step, job.save.every_steps) or (not unvalidated and validation.best):
            save(state, job)
            unsaved = False
    if unvalidated and not stop.signal:
        yield _validated(state, validate, job)
        unsaved = True
    if unsaved:
        save(state, job)


def _step(state: TrainState, source: Iterator[Loaded], job: Fit, began: float) -> StepRecord:
    waited = perf_counter()
    parts = list(itertools.islice(source, job.train.accumulate))
    data_seconds = perf_counter() - waited
    record = train_step(state, [part.batch.to(state.device) for part in parts])
    rate = record.examples_per_second * record.seconds / (record.seconds + data_seconds)
    state.elapsed_seconds = perf_counter() - began
    elapsed = state.elapsed_seconds
    record = replace(record, data_seconds=data_seconds, examples_per_second=rate, elapsed_seconds=elapsed)
    if dist.is_main():
        append_record(job.run.steps, record)
    set_aside(state, [fault for part in parts for fault in part.faults], job)
    _tell_of_fault(record, job)
    return record


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _progress(state: TrainState, train: TrainSettings) -> float:
    by_steps = state.step / train.max_steps if train.max_steps else 0.0
    by_time = state.elapsed_seconds / (60 * train.max_minutes) if train.max_minutes else 0.0
    return max(by_steps, dist.from_main(by_time, state.device) if train.max_minutes else 0.0)


def _spent(state: TrainState, train: TrainSettings, stop: StopRequest) -> bool:
    """Whether budget or a signal ends the run; the ranks agree, so that none waits for another."""
    return dist.any_rank(bool(stop.signal) or _progress(state, train) >= 1, state.device)


def set_aside(state: TrainState, faults: list[AudioFault], job: Fit) -> None:
    """Record each bad file once; an excerpt that is merely silent is not worth an event."""
    for fault in faults:
        if fault.in_excerpt_only or fault.path in state.bad_files:
            continue
        state.bad_files[fault.path] = fault.code
        append_record(job.run.events, Event(fault.code, state.step, dist.rank(), fault.message, (fault.path,)))


def _tell_of_fault(record: StepRecord, job: Fit) -> None:
    if record.trained or not (record.bad_items or dist.is_main()):
        return
    message = f"Step {record.step} was left out ({record.outcome.replace('_', ' ')}); weights are as before."
    files = tuple(dict.fromkeys(file for item in record.bad_items for file in item.files))
    items = [[item.purpose, item.epoch, item.index] for item in record.bad_items]
    evidence = {"loss": record.loss, "grad_norm": record.grad_norm, "items": items}
    code = f"STEP_SKIPPED_{record.outcome.upper()}"
    append_record(job.run.events, Event(code, record.step, dist.rank(), message, files, evidence))


def _stop_rule(state: TrainState, record: StepRecord, job: Fit) -> str | None:
    """Why the run must end now, the same on every rank."""
    budget = max(5, 0.01 * job.n_files)
    over_budget = dist.any_rank(len(state.bad_files) > budget, state.device)
    if over_budget:
        listed = ", ".join(f"{path} ({code})" for path, code in state.bad_files.items())
        return (
            f"More than {budget:g} bad files on a rank: {listed or 'see events.jsonl'}. "
            "Mend them, or name them under data.exclude."
        )
    if (verdict := state.faults.verdict()) is not None:
        advice = (
            'set train.precision = "bf16"'
            if record.outcome == "loss_scale"
            else "see events.jsonl for the files behind it"
        )
        return f"Stopped at step {state.step}: {verdict}, the last by {record.outcome.replace('_', ' ')}; {advice}."
    if job.train.on_bad_example == "stop" and record.outcome not in ("trained", "all_easy", "loss_scale"):
        reason = record.outcome.replace("_", " ")
        return f'Stopped at step {state.step} by {reason}, as train.on_bad_example = "stop" asks.'
    return None


def _validated(state: TrainState, validate: Validate, job: Fit) -> ValidationRecord:
    started = perf_counter()
    scores = validate(state)
    usable = math.isfinite(scores.loss)
    best = usable and scores.loss < state.best_loss
    if best:
        state.best_loss, state.best_step = scores.loss, state.step
    if usable:
        state.schedule.observe(scores.loss)
    progress = _progress(state, job.train)
    record = ValidationRecord(
        step=state.step,
        loss=scores.loss,
        si_sdr=scores.si_sdr,
        si_sdri=scores.si_sdri,
        n_items=scores.n_items,
        best=best,
        lr=state.optimizer.param_groups[0]["initial_lr"] * state.schedule.factor(state.step, min(1.0, progress)),
        elapsed_seconds=state.elapsed_seconds,
        seconds=perf_counter() - started,
    )
    if dist.is_main():
        append_record(job.run.validation, record)
    return record


def save(state: TrainState, job: Fit) -> None:
    """Write a checkpoint, after the ranks have made sure that they hold the same weights.

    A disk that refuses is reported and does not end the run. A model that is not finite is never saved.

    Raises:
        TrainingStopped: If ranks differ, or the model is not finite.
    """
    if (name := dist.first_difference(state.bare_model)) is not None:
        raise TrainingStopped(f"At step {state.step} the processes do not hold the same weights (first in {name}).")
    if (name := first_nonfinite(state.bare_model.state_dict())) is not None:
        raise TrainingStopped(
            f"At step {state.step} the model is not finite (first in {name}); checkpoints before it are whole, "
            "and --resume takes them."
        )
    if dist.is_main():
        _write(state, job)


def _write(state: TrainState, job: Fit) -> None:
    try:
        save_checkpoint(
            job.run,
            state.state_dict(),
            recipe=job.recipe,
            choices=job.choices,
            best=state.best_step == state.step,
            keep=job.save.keep,
        )
    except (OSError, CheckpointError) as error:
        message = f"The checkpoint of step {state.step} could not be written ({error}); older ones are whole."
        with contextlib.suppress(OSError):
            append_record(job.run.events, Event("CHECKPOINT_FAILED", state.step, dist.rank(), message))
