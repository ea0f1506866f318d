"""fit: a generator of records; validation and saving at their intervals."""

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, Literal, NamedTuple

from unbraid import dist
from unbraid.data.loader import Loaded
from unbraid.data.mixing import AudioFault
from unbraid.errors import TrainingStopped
from unbraid.records import Event, RunDirectory, StepRecord, ValidationRecord, append_record
from unbraid.train.checkpoint import first_nonfinite, save_checkpoint
from unbraid.train.state import FaultWindow, TrainState, set_learning_rate
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
    """Means over the validation examples of all ranks, and what was wrong with files on this one."""

    loss: float
    si_sdr: float
    si_sdri: float
    n_items: int
    faults: tuple[AudioFault, ...] = ()


Validate = Callable[[TrainState], Scores]
Told = StepRecord | ValidationRecord | Event


@dataclass
class StopRequest:
    """Set by SIGTERM or Ctrl-C: the step at hand is finished, a checkpoint written, and the run ends on every rank.

    Attributes:
        signal: What this process received; 0 for nothing. Only the handler writes it: it may strike at any instant,
            also while the ranks agree.
        agreed: What the ranks have agreed to stop for; 0 for nothing.
    """

    signal: int = 0
    agreed: int = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest`; a second Ctrl-C is not held back any more."""
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
class Job:
    """What `fit` needs beside the state: where to write, how often, and what a checkpoint says of the run.

    Attributes:
        run: The run directory.
        train: Budget and rules.
        validate: How often.
        save: How often, how many.
        recipe: The resolved recipe, for the checkpoint.
        choices: What "auto" chose, for the checkpoint.
        n_files: Files in the training split, which the budget for bad ones is a share of.
        events: Written, and not yet yielded.
        refused: Files that the disk has refused, and that was said.
    """

    run: RunDirectory
    train: TrainSettings
    validate: ValidateSettings
    save: SaveSettings
    recipe: dict[str, Any]
    choices: dict[str, Any]
    n_files: int = 0
    events: list[Event] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)


def fit(
    state: TrainState, loaded: Iterable[Loaded], validate: Validate, job: Job, stop: StopRequest | None = None
) -> Iterator[Told]:
    """Train until the budget is spent, yielding each record after it was written.

    Args:
        state: Where to begin; changed in place.
        loaded: Batches of this rank from step ``state.step`` on, ``accumulate`` a step, without end.
        validate: Scores the model.
        job: Where and how often.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step and each validation, and events as they come.

    Raises:
        TrainingStopped: If a stop rule ended the run, after a checkpoint that can be gone on from; or if the last
            checkpoint could not be written.
    """
    stop = stop or StopRequest()
    source, began = iter(loaded), perf_counter() - state.elapsed_seconds
    done, saved = _agree_on_end(state, job, stop), True
    if done and not stop.agreed and state.step > state.validated_step:  # stopped between its last step and this
        yield _validated(state, validate, job)
        saved = _save(state, job)
    while not done:
        set_learning_rate(state, state.schedule.factor(state.step + 1, _progress(state, job.train)))
        record, faults = _step(state, source, job, began)
        yield record
        _set_aside(state, faults, job)
        _tell_of_fault(record, job)
        if (reason := _stop_rule(state, record, job)) is not None:
            state.faults, state.bad_files = FaultWindow(), {}  # whoever goes on has mended something
            _save(state, job)
            yield from _take(job.events)
            raise TrainingStopped(reason)
        done, saved = _agree_on_end(state, job, stop), False
        best = False
        if not stop.agreed and (done or _due(state.step, job.validate.every_steps)):
            validation = _validated(state, validate, job)
            best = validation.best
            yield validation
        if done or best or _due(state.step, job.save.every_steps):
            saved = _save(state, job)
        yield from _take(job.events)
    if not saved:
        raise TrainingStopped(
            f"The checkpoint of step {state.step}, the last, could not be written to {job.run.checkpoints}: make room, "
            "and go on from the one before with --resume."
        )


def _take(events: list[Event]) -> Iterator[Event]:
    while events:
        yield events.pop(0)


def _step(
    state: TrainState, source: Iterator[Loaded], job: Job, began: float
) -> tuple[StepRecord, tuple[AudioFault, ...]]:
    waited = perf_counter()
    parts = list(itertools.islice(source, job.train.accumulate))
    data_seconds = perf_counter() - waited
    record = train_step(state, [part.batch.to(state.device) for part in parts])
    rate = record.examples_per_second * record.seconds / (record.seconds + data_seconds)
    state.elapsed_seconds = perf_counter() - began
    elapsed = state.elapsed_seconds
    record = replace(record, data_seconds=data_seconds, examples_per_second=rate, elapsed_seconds=elapsed)
    if dist.is_main():
        _append(job.run.steps, record, job)
    return record, tuple(fault for part in parts for fault in part.faults)


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _progress(state: TrainState, train: TrainSettings) -> float:
    """The share of the budget that is spent; on every rank what the main one's clock says."""
    by_steps = state.step / train.max_steps if train.max_steps else 0.0
    by_time = state.elapsed_seconds / (60 * train.max_minutes) if train.max_minutes else 0.0
    return max(by_steps, by_time)


def _agree_on_end(state: TrainState, job: Job, stop: StopRequest) -> bool:
    """Whether the run ends here, by its budget or by a signal to any rank: the same on all, in one small collective."""
    if dist.world_size() > 1:
        clock = state.elapsed_seconds if dist.is_main() else 0.0
        signal_number, state.elapsed_seconds = dist.max_over_ranks([float(stop.signal), clock], state.device)
        stop.agreed = int(signal_number)
    else:
        stop.agreed = stop.signal
    return bool(stop.agreed) or _progress(state, job.train) >= 1


def _append(path: Path, record: Told, job: Job) -> None:
    """Write a record; a disk that refuses is told of, and does not end the run."""
    try:
        append_record(path, record)
    except OSError as error:
        if path not in job.refused:
            job.refused.add(path)
            job.events.append(Event("LOG_FAILED", record.step, dist.rank(), f"{path} could not be written ({error})."))


def _tell(event: Event, job: Job) -> None:
    _append(job.run.events, event, job)
    job.events.append(event)


def _set_aside(state: TrainState, faults: Sequence[AudioFault], job: Job) -> None:
    """Name each bad file once, whichever rank met it; an excerpt that is merely silent is not worth an event."""
    new = [fault for fault in faults if not fault.in_excerpt_only and fault.path not in state.bad_files]
    for rank, fault in dist.gather(new, state.device):
        if fault.path not in state.bad_files:
            state.bad_files[fault.path] = fault.code
            if dist.is_main():
                _tell(Event(fault.code, state.step, rank, fault.message, (fault.path,)), job)


def _tell_of_fault(record: StepRecord, job: Job) -> None:
    if record.outcome in ("trained", "all_easy") or not (record.bad_items or dist.is_main()):
        return
    message = f"Step {record.step} was left out ({record.outcome.replace('_', ' ')}); weights are as before."
    files = tuple(dict.fromkeys(file for item in record.bad_items for file in item.files))
    items = [[item.purpose, item.epoch, item.index] for item in record.bad_items]
    evidence = {"loss": record.loss, "grad_norm": record.grad_norm, "items": items}
    code = f"STEP_SKIPPED_{record.outcome.upper()}"
    _tell(Event(code, record.step, dist.rank(), message, files, evidence), job)


def _stop_rule(state: TrainState, record: StepRecord, job: Job) -> str | None:
    """Why the run must end now; the same on every rank, as all of it was agreed on."""
    budget = max(5, 0.01 * job.n_files)
    if len(state.bad_files) > budget:
        listed = ", ".join(f"{path} ({code})" for path, code in state.bad_files.items())
        return f"More than {budget:g} bad files: {listed}. Mend them, or name them under data.exclude."
    if (verdict := state.faults.verdict()) is not None:
        by_scale = record.outcome == "loss_scale"
        advice = 'set train.precision = "bf16"' if by_scale else f"{job.run.events} names the files behind it"
        return f"Stopped at step {state.step}: {verdict}, the last by {record.outcome.replace('_', ' ')}; {advice}."
    if job.train.on_bad_example == "stop" and record.outcome not in ("trained", "all_easy", "loss_scale"):
        reason = record.outcome.replace("_", " ")
        return f'Stopped at step {state.step} by {reason}, as train.on_bad_example = "stop" asks.'
    return None


def _validated(state: TrainState, validate: Validate, job: Job) -> ValidationRecord:
    started = perf_counter()
    scores = validate(state)
    _set_aside(state, scores.faults, job)
    usable = math.isfinite(scores.loss)
    best = usable and scores.loss < state.best_loss
    if best:
        state.best_loss, state.best_step = scores.loss, state.step
    if usable:
        state.schedule.observe(scores.loss)
    state.validated_step = state.step
    progress = min(1.0, _progress(state, job.train))
    record = ValidationRecord(
        step=state.step,
        loss=scores.loss,
        si_sdr=scores.si_sdr,
        si_sdri=scores.si_sdri,
        n_items=scores.n_items,
        best=best,
        lr=state.optimizer.param_groups[0]["initial_lr"] * state.schedule.factor(state.step, progress),
        elapsed_seconds=state.elapsed_seconds,
        seconds=perf_counter() - started,
    )
    if dist.is_main():
        _append(job.run.validation, record, job)
    return record


def _save(state: TrainState, job: Job) -> bool:
    """Write a checkpoint, after the ranks have made sure that they hold the same weights; False where a disk refused.

    Raises:
        TrainingStopped: If ranks differ, or the model is not finite: such a model is never saved.
    """
    if (name := dist.first_difference(state.bare_model)) is not None:
        raise TrainingStopped(f"At step {state.step} the processes do not hold the same weights (first in {name}).")
    if (name := first_nonfinite(state.bare_model.state_dict())) is not None:
        raise TrainingStopped(
            f"At step {state.step} the model is not finite (first in {name}); checkpoints before it are whole, "
            "and --resume takes them."
        )
    if not dist.is_main():
        return True
    try:
        best = state.best_step == state.step
        content = state.state_dict()
        save_checkpoint(job.run, content, recipe=job.recipe, choices=job.choices, best=best, keep=job.save.keep)
    except OSError as error:
        message = f"The checkpoint of step {state.step} could not be written ({error}); older ones are whole."
        _tell(Event("CHECKPOINT_FAILED", state.step, dist.rank(), message), job)
        return False
    return True
