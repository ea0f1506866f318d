"""fit: a generator of records; validation and saving at their intervals."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from unbraid import dist
from unbraid.data.mixing import AudioFault
from unbraid.errors import TrainingStopped, UserError
from unbraid.fault_advice import ADVICE
from unbraid.records import Event, StepRecord, ValidationRecord
from unbraid.signals import SIGNALS, StopRequest
from unbraid.train.batch_source import BatchSource, Load
from unbraid.train.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint, truncate_logs
from unbraid.train.event_log import EventLog, Record
from unbraid.train.events import Observer
from unbraid.train.settings import Job, TrainSettings
from unbraid.train.state import FaultWindow, TrainState, evaluation_weights, first_nonfinite, set_learning_rate
from unbraid.train.step import LaunchedStep, finish, launch
from unbraid.train.stragglers import Pace
from unbraid.train.validation_audio import AudioExample, remove_later_audio


class ValidationScores(NamedTuple):
    """Means over the validation examples of all ranks; on this one what was wrong with files, and sound.

    `orders` and `item_si_sdri`, of each example on all ranks, are as `ValidationRecord` has them.
    """

    loss: float
    si_sdr: float
    si_sdri: float
    n_items: int
    faults: tuple[AudioFault, ...] = ()
    sounds: tuple[AudioExample, ...] = ()
    orders: tuple[tuple[int, ...], ...] = ()
    item_si_sdri: tuple[float | None, ...] = ()


Validate = Callable[[TrainState], ValidationScores]


def fit(
    state: TrainState,
    load: Load,
    validate: Validate,
    job: Job,
    stop: StopRequest | None = None,
) -> Iterator[Record]:
    """Train until the budget is spent, yielding each record after it was written.

    Args:
        state: Where to begin; changed in place.
        load: From a number of steps done to batches of this rank from there on, ``accumulate`` a step, without end.
        validate: ValidationScores the model.
        job: Where and how often.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step and each validation, and events as they come.

    Raises:
        TrainingStopped: If a stop rule ended the run, after a checkpoint that can be gone on from; or if the last
            checkpoint could not be written.
    """
    course = _Course(state, load, validate, job, stop or StopRequest())
    try:
        yield from course.run()
    except UserError:
        yield from course.log.take()
        raise
    except Exception as error:  # of somebody's own model or loss: told, and what was done is saved
        yield from course.saved_from(error)
        raise
    finally:
        course.source.close()  # or data workers would be waited for as long as they live on


class _Course:
    """One training under way: what lies between its steps and does not outlive the process."""

    MAX_RETURNS = 3

    def __init__(
        self,
        state: TrainState,
        load: Load,
        validate: Validate,
        job: Job,
        stop: StopRequest,
    ) -> None:
        self.state, self.load, self.validate, self.job, self.stop = state, load, validate, job, stop
        self.source = BatchSource(load, job.train.accumulate)
        self.log = EventLog(job.run)
        self.observer = Observer(state, job, self.log)
        self.began = perf_counter() - state.elapsed_seconds
        self.done = self.saved = self.went_back = False
        self.concluded = 0.0  # when the step before was
        self.busy_seconds = (0.0, 0.0)  # of the last step: data, forward
        self.n_returns = 0
        self.reason = ""  # why the run has to stop

    def run(self) -> Iterator[Record]:
        state, job = self.state, self.job
        self.done, self.saved = self._over_before_it_began(), True
        if self.done and not self.stop.agreed and state.step > state.validated_step:
            yield self._validated()  # stopped between its last step and this
            self.saved = self._save()
        under_way: list[_UnderWay] = []
        while not self.done:
            under_way.append(self._launch())
            due = self._due(state.step)
            while under_way and (due or state.is_behind or len(under_way) > self._ahead):
                yield from self._conclude(under_way.pop(0))
                due = due or self.done or bool(self.reason)
                if self.went_back:
                    under_way.clear()
                    self.went_back = due = False
            if self.reason:
                state.faults, state.bad_files = FaultWindow(), {}  # whoever goes on has mended something
                self._save()
                yield from self.log.take()
                raise TrainingStopped(self.reason)
            if not due:
                continue
            if _every(job.train.compare_every_steps, state.step):
                self._compare()
            self._go_back_if_spoilt(state.step)  # what is not finite is neither validated nor saved
            if self.went_back:
                self.went_back = False
                continue
            best = False
            if not self.stop.agreed and (self.done or _every(job.validate.every_steps, state.step)):
                validation = self._validated()
                best = validation.best
                yield validation
            if self.done or best or _every(job.save.every_steps, state.step):
                self.saved = self._save()
            yield from self.log.take()
        if not self.saved:
            raise TrainingStopped(
                f"The checkpoint of step {state.step}, the last, could not be written to {job.run.checkpoints}: make "
                "room, and go on from the one before with --resume."
            )

    def saved_from(self, error: Exception) -> list[Event]:
        """Save what was done before something broke that is not ours to mend; several processes cannot agree on it."""
        state = self.state
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        saved = dist.world_size() == 1 and not self.saved and self._save()
        message = f"After step {state.step} the model or the loss raised {said}."
        message += " The checkpoint of that step is written: mend it, and go on with --resume." if saved else ""
        self.log.tell("STEP_RAISED", state.step, message)
        return self.log.take()

    @property
    def _ahead(self) -> int:
        """How many steps are launched before the first of them is looked at: an accelerator has always work then."""
        return 1 if self.state.device.type == "cuda" and self.state.on_bad_example == "skip" else 0

    def _due(self, step: int) -> bool:
        """Whether something is to be done with the weights after this step, so that it has to be finished first."""
        job = self.job
        intervals = [job.validate.every_steps, job.save.every_steps]
        intervals += [job.train.compare_every_steps] if dist.world_size() > 1 else []
        return _progress(self.state, job.train) >= 1 or any(_every(interval, step) for interval in intervals)

    def _launch(self) -> "_UnderWay":
        state = self.state
        set_learning_rate(state, state.schedule.factor(state.step + 1, _progress(state, self.job.train)))
        waited = perf_counter()
        parts = self.source.next_micro_batches(state.step, self.log)
        data_seconds = perf_counter() - waited
        faults = tuple(fault for part in parts for fault in part.faults)
        moved = [part.batch.to(state.device) for part in parts]
        launched = launch(state, moved, notes=self._notes(faults))
        return _UnderWay(launched, faults, data_seconds)

    def _notes(self, faults: Sequence[AudioFault]) -> list[float]:
        """What this rank tells the others with each step: signals, the main clock, new bad files, its busy seconds."""
        signals = [float(self.stop.signal == number) for number in SIGNALS]
        clock = perf_counter() - self.began if dist.is_main() else 0.0
        seconds = [0.0] * (len(Pace.SECTIONS) * dist.world_size())
        first = len(Pace.SECTIONS) * dist.rank()
        seconds[first : first + len(Pace.SECTIONS)] = self.busy_seconds
        return [*signals, clock, float(bool(self.observer.new(faults))), *seconds]

    def _conclude(self, under_way: "_UnderWay") -> Iterator[Record]:
        """Hear what became of a step, write it down, and act on it; the same on every rank."""
        state, job = self.state, self.job
        record, notes = finish(state, under_way.launched)
        self.busy_seconds = (under_way.data_seconds, under_way.launched.attempt.busy.seconds())
        signals, clock, n_new_faults = notes[: len(SIGNALS)], notes[len(SIGNALS)], notes[len(SIGNALS) + 1]
        told = next((int(number) for number, n in zip(SIGNALS, signals, strict=True) if n), 0)
        self.stop.agreed = told if dist.world_size() > 1 else self.stop.signal
        state.elapsed_seconds = clock if dist.world_size() > 1 else perf_counter() - self.began
        record = replace(self._timed(record, under_way), elapsed_seconds=state.elapsed_seconds)
        if dist.is_main():
            self.log.append(job.run.steps, record)
        yield record
        if n_new_faults:
            self.observer.report_bad_files(under_way.faults)
        self.observer.tell_of_memory(record)
        self.observer.tell_of_fault(record, under_way.launched)
        self.observer.tell_of_health(record, notes[len(SIGNALS) + 2 :])
        self.saved, self.done = False, bool(self.stop.agreed) or _progress(state, job.train) >= 1
        if record.outcome in ("nonfinite_loss", "nonfinite_gradient"):
            self._go_back_if_spoilt(record.step)
        self.reason = self.reason or self._stop_rule(record) or ""
        yield from self.log.take()

    def _timed(self, record: StepRecord, under_way: "_UnderWay") -> StepRecord:
        """The record with the wall time that this step took, also where others were launched before its end."""
        now, waited = perf_counter(), under_way.data_seconds
        total = now - max(under_way.launched.started - waited, self.concluded)
        self.concluded = now
        rate = record.examples_per_second * record.seconds / total
        return replace(record, seconds=max(total - waited, 0.0), data_seconds=waited, examples_per_second=rate)

    def _over_before_it_began(self) -> bool:
        """Whether there is nothing to do, by the budget or by a signal to any rank; the same on all."""
        self.stop.agreed = int(dist.max_over_ranks([float(self.stop.signal)], self.state.device)[0])
        return bool(self.stop.agreed) or _progress(self.state, self.job.train) >= 1

    def _stop_rule(self, record: StepRecord) -> str | None:
        """Why the run must end now; the same on every rank, as all of it was agreed on."""
        state, job = self.state, self.job
        budget = max(5, 0.01 * job.n_files)
        if len(state.bad_files) > budget:
            listed = ", ".join(f"{path} ({code})" for path, code in state.bad_files.items())
            return f"More than {budget:g} bad files: {listed}. Mend them, or name them under data.exclude."
        reason = record.outcome.replace("_", " ")
        blamed = f" {self.observer.verdict}".rstrip()
        if (fault := state.faults.verdict()) is not None:
            advice, key = ADVICE.get(record.outcome, ADVICE["nonfinite_loss"])
            of_files = record.outcome not in ("fp16_overflow", "out_of_memory")
            files = f" {job.run.events} names the files behind it." if of_files else ""
            return f"Stopped at step {record.step}: {fault}, the last by {reason}. {advice} [{key}]{files}{blamed}"
        if job.train.on_bad_example == "stop" and record.outcome not in ("trained", "all_filtered", "fp16_overflow"):
            return (
                f'Stopped at step {record.step} by {reason}, as train.on_bad_example = "stop" asks; --resume goes on '
                f"after it.{blamed}"
            )
        return None

    def _go_back_if_spoilt(self, step: int) -> None:
        """Where weights or optimizer state are not finite, on any rank, all go back to the last good checkpoint.

        Raises:
            TrainingStopped: If there is none, or that has been done too often.
        """
        state, run = self.state, self.job.run
        name = first_nonfinite(state)
        if not dist.any_rank(name is not None, state.device):
            return
        (rank, where), *_ = dist.gather([name] if name else [], state.device)
        self.n_returns += 1
        found = newest_checkpoint(run)[0] if dist.is_main() else None
        path = dist.from_main_process(found.path if found else None)
        if path is None or self.n_returns > self.MAX_RETURNS:
            raise TrainingStopped(
                f"At step {step} the model is not finite (first in {where}, on process {rank}), and "
                + ("there is no checkpoint to go back to" if path is None else "going back did not help")
                + ": begin again with a lower optim.lr, in another --run."
            )
        checkpoint = found or read_checkpoint(path)
        state.load_state_dict(checkpoint.state)
        if dist.is_main():
            truncate_logs(run, checkpoint.log_bytes | {run.events.name: run.events.stat().st_size})
            remove_later_audio(run.audio, state.step)
            message = f"The model was not finite at step {step} (first in {where}); went back to {path.name}, from "
            message += "where its steps are done again."
            self.log.tell("WEIGHTS_NONFINITE", step, message, rank=rank)
        self.source = BatchSource(self.load, self.job.train.accumulate)
        self.done, self.saved, self.went_back = False, True, True

    def _compare(self) -> None:
        """Make sure that all ranks hold the same weights.

        Raises:
            TrainingStopped: If they do not.
        """
        if (name := dist.first_difference(self.state.unwrapped_model)) is not None:
            if dist.is_main():
                message = f"The processes do not hold the same weights (first in {name})."
                self.log.tell("RANKS_DIFFER", self.state.step, message, first=name)
            raise TrainingStopped(
                f"At step {self.state.step} the processes do not hold the same weights (first in {name}); --resume "
                "goes on from the last checkpoint, at which they did."
            )

    def _validated(self) -> ValidationRecord:
        state, job = self.state, self.job
        started = perf_counter()
        with evaluation_weights(state):
            scores = self.validate(state)
        if dist.any_rank(bool(self.observer.new(scores.faults)), state.device):
            self.observer.report_bad_files(scores.faults)
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
            orders=scores.orders,
            item_si_sdri=scores.item_si_sdri,
        )
        if dist.is_main():
            self.log.append(job.run.validation, record)
        self.observer.keep_sounds(scores.sounds)
        return record

    def _save(self) -> bool:
        """Write a checkpoint, after the ranks have made sure that they hold the same weights; False if a disk refused.

        Raises:
            TrainingStopped: If ranks differ, or the model is not finite: such a model is never saved.
        """
        state, job = self.state, self.job
        self._compare()
        name = first_nonfinite(state)
        if dist.any_rank(name is not None, state.device):
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
            self.log.tell("CHECKPOINT_FAILED", state.step, message)
            return False
        return True


class _UnderWay(NamedTuple):
    """A step that was launched, and what its data brought along."""

    launched: LaunchedStep
    faults: tuple[AudioFault, ...]
    data_seconds: float


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _progress(state: TrainState, train: TrainSettings) -> float:
    """The share of the budget that is spent; on every rank what the main one's clock says."""
    by_steps = state.step / train.max_steps if train.max_steps else 0.0
    by_time = state.elapsed_seconds / (60 * train.max_minutes) if train.max_minutes else 0.0
    return max(by_steps, by_time)
