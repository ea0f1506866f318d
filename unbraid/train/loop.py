"""fit: train until the budget is spent, as a generator of records; validate and save at their intervals."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import NamedTuple

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.data.excerpt import AudioFault
from unbraid.errors import DataError, TrainingStopped, UserError
from unbraid.fault_advice import ADVICE, ALL_BAD_ADVICE
from unbraid.records import FAULT_OUTCOMES, Event, EventCode, StepRecord, ValidationRecord
from unbraid.signals import StopRequest
from unbraid.train.batch_source import BatchSource, Load
from unbraid.train.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint, truncate_logs
from unbraid.train.event_log import EventLog, Record
from unbraid.train.event_reporter import EventReporter
from unbraid.train.settings import Job, TrainSettings
from unbraid.train.state import FaultWindow, TrainState, evaluation_weights, first_nonfinite, set_learning_rate
from unbraid.train.step import LaunchedStep, finish, launch
from unbraid.train.step_notes import StepNotes
from unbraid.train.validation_audio import AudioExample, remove_later_audio


class ValidationScores(NamedTuple):
    """Means over the validation examples of all ranks; `faults` and `audio` are those of this rank.

    `orders` and `item_si_sdri` are of each example on all ranks, as in `ValidationRecord`.
    """

    loss: float
    si_sdr: float
    si_sdri: float
    n_items: int
    faults: tuple[AudioFault, ...] = ()
    audio: tuple[AudioExample, ...] = ()
    orders: tuple[tuple[int, ...], ...] = ()
    item_si_sdri: tuple[float | None, ...] = ()
    n_undefined: int = 0


Validate = Callable[[TrainState], ValidationScores]


def fit(
    state: TrainState, load: Load, validate: Validate, job: Job, stop: StopRequest | None = None
) -> Iterator[Record]:
    """Train until the budget is spent, yielding each record after it was written.

    Args:
        state: Where to begin; changed in place.
        load: Called with the number of finished steps; returns an endless iterator over this rank's batches from
            there on, ``accumulate`` per step.
        validate: Evaluates the model on the validation set.
        job: Where to write, and how often to validate and save.
        stop: Ends the run early, with a checkpoint.

    Yields:
        A record for each step and each validation, and events as they occur.

    Raises:
        TrainingStopped: If a stop rule ended the run, after a checkpoint to resume from; or if the last checkpoint
            could not be written.
    """
    loop = _Loop(state, load, validate, job, stop or StopRequest())
    try:
        yield from loop.run()
    except UserError as error:
        # A run that is ended on purpose has its checkpoint. One whose data became unusable has not.
        yield from loop.save_after(error) if isinstance(error, DataError) else loop.log.drain()
        raise
    except Exception as error:  # raised by the user's own model or loss: save what was trained before it
        yield from loop.save_after(error)
        raise
    finally:
        loop.source.close()  # otherwise the data workers would keep the process alive


@dataclass
class _StepInFlight:
    """A step's batches on the device, and the step itself once it is launched."""

    batches: list[Batch]
    faults: tuple[AudioFault, ...]
    data_seconds: float
    launched: LaunchedStep = field(init=False)
    started: float = 0.0


class _Loop:
    """One run of the loop: what lives between its steps, and ends with the process."""

    MAX_ROLLBACKS = 3
    """How often the run may go back to a checkpoint because its weights were not finite."""

    def __init__(self, state: TrainState, load: Load, validate: Validate, job: Job, stop: StopRequest) -> None:
        self.state = state
        self.load = load
        self.validate = validate
        self.job = job
        self.stop = stop
        self.source = BatchSource(load, job.train.accumulate)
        self.log = EventLog(job.run)
        self.reporter = EventReporter(state, job, self.log)
        self.in_flight: deque[_StepInFlight] = deque()  # launched, in order
        self.to_repeat: deque[_StepInFlight] = deque()  # to launch again, in order, because memory ran out
        self.started = perf_counter() - state.elapsed_seconds
        self.last_step_ended = 0.0
        self.busy_seconds = (0.0, 0.0)  # of the last finished step, for `StepNotes`
        self.n_rollbacks = 0
        self.is_saved = True  # whether the newest checkpoint holds the present state

    def run(self) -> Iterator[Record]:
        """Yield the records of the run."""
        state = self.state
        job = self.job

        # A resumed run may be over before its first step: by its budget, or by a signal to any rank.
        self.stop.agreed = int(dist.max_over_ranks([float(self.stop.signal)], state.device)[0])
        if not self.stop.agreed and self._is_over() and state.step > state.validated_step:
            yield self._validate_and_record()  # it was stopped between its last step and the last validation
            self.is_saved = self._save()

        while not self._is_over():
            # 1. Launch the next step, or one that is to be repeated with smaller pieces.
            step_in_flight = self.to_repeat.popleft() if self.to_repeat else self._load_next()
            self._launch(step_in_flight)

            # 2. Finish steps in their order. An accelerator keeps one step ahead of the host, unless something is to
            #    be done with the weights of exactly this step, or a step is to be repeated.
            is_due = self._is_due(state.step)
            reason_to_stop = ""
            must_repeat = False
            weights_were_reset = False
            while self.in_flight and (is_due or self.to_repeat or len(self.in_flight) > self.max_ahead):
                oldest = self.in_flight.popleft()
                finished = finish(state, oldest.launched)
                if finished is None:  # memory ran out: this step is launched again, and after it those that followed
                    self.to_repeat.extendleft(reversed([oldest, *self.in_flight]))
                    self.in_flight.clear()
                    must_repeat = True
                    break
                record, notes = self._complete(oldest, *finished)
                yield record
                self._report(record, oldest, notes)
                if record.outcome in ("nonfinite_loss", "nonfinite_gradient"):
                    weights_were_reset = self._roll_back_if_nonfinite(record.step)
                reason_to_stop = reason_to_stop or self._stop_rule(record)
                yield from self.log.drain()
                if weights_were_reset:
                    break
                is_due = is_due or bool(reason_to_stop) or self._is_over()

            # 3. Stop rules end the run with a checkpoint. Its fault counts are reset: a user who resumes from it has
            #    presumably fixed the cause.
            if reason_to_stop:
                state.faults = FaultWindow()
                state.bad_files = {}
                self._save()
                yield from self.log.drain()
                raise TrainingStopped(reason_to_stop)
            if must_repeat or weights_were_reset or not is_due:
                continue

            # 4. Check the weights before they are validated or saved.
            if _is_every(job.train.compare_every_steps, state.step):
                self._check_ranks_agree()
            if self._roll_back_if_nonfinite(state.step):
                continue

            # 5. Validate and save. A run that was asked to stop saves without a last validation.
            is_best = False
            is_over = self._is_over()
            if not self.stop.agreed and (is_over or _is_every(job.validate.every_steps, state.step)):
                validation = self._validate_and_record()
                is_best = validation.best
                yield validation
            if is_over or is_best or _is_every(job.save.every_steps, state.step):
                self.is_saved = self._save()
            yield from self.log.drain()

        if not self.is_saved:
            raise TrainingStopped(
                f"The last checkpoint, of step {state.step}, could not be written to {job.run.checkpoints}. Free some "
                "disk space, then continue from the checkpoint before it with --resume."
            )

    def save_after(self, error: Exception) -> list[Event]:
        """Save what was trained before the user's code or data failed. Several processes could not agree on that."""
        state = self.state
        # 1. A step that was launched ahead has changed the weights already: its record belongs to the checkpoint.
        if dist.world_size() == 1:
            while self.in_flight:
                step_in_flight = self.in_flight.popleft()
                finished = finish(state, step_in_flight.launched)
                if finished is None:  # memory ran out: neither this step nor later ones changed anything
                    self.in_flight.clear()
                else:
                    self._complete(step_in_flight, *finished)

        # 2. Save.
        first_line = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
        code: EventCode = "STEP_RAISED"
        message = f"After step {state.step} the model or the loss raised {type(error).__name__}: {first_line}."
        if isinstance(error, DataError):
            code = "DATA_UNUSABLE"
            message = f"After step {state.step} no usable audio was left: {first_line}."
        if dist.world_size() == 1 and not self.is_saved and self._save():
            message += " The checkpoint of that step is written. Fix the error, then continue with --resume."
        self.log.emit(code, state.step, message)
        return self.log.drain()

    @property
    def max_ahead(self) -> int:
        """Number of steps to keep queued on the device, so that it never runs out of work.

        "rescue" and "stop" need the outcome of a step before the next one is launched.
        """
        # On a CPU a launch does all the work itself: nothing would be gained by being ahead.
        return 1 if self.state.device.type == "cuda" and self.state.on_bad_example == "skip" else 0

    def _is_over(self) -> bool:
        """Return whether the budget is spent, or a signal was agreed on; the same on every rank."""
        return bool(self.stop.agreed) or _progress(self.state, self.job.train) >= 1

    def _is_due(self, step: int) -> bool:
        """Return whether the weights after this step are to be compared, validated or saved."""
        job = self.job
        intervals = [job.validate.every_steps, job.save.every_steps]
        if dist.world_size() > 1:
            intervals.append(job.train.compare_every_steps)
        return _progress(self.state, job.train) >= 1 or any(_is_every(interval, step) for interval in intervals)

    def _load_next(self) -> _StepInFlight:
        """Load the next step's batches, and start copying them to the device."""
        waiting_since = perf_counter()
        loaded = self.source.next_micro_batches(self.state.step, self.log)
        data_seconds = perf_counter() - waiting_since
        faults = tuple(fault for part in loaded for fault in part.faults)
        return _StepInFlight([part.batch.to(self.state.device) for part in loaded], faults, data_seconds)

    def _launch(self, step_in_flight: _StepInFlight) -> None:
        state = self.state
        # A repeated step gets its learning rate again: the one set last belongs to the step launched after it.
        set_learning_rate(state, state.schedule.factor(state.step + 1, _progress(state, self.job.train)))
        notes = StepNotes(
            signal=self.stop.signal,
            elapsed_seconds=perf_counter() - self.started,
            new_bad_files=bool(self.reporter.unreported(step_in_flight.faults)),
            busy_seconds=self.busy_seconds,
        )
        step_in_flight.launched = launch(state, step_in_flight.batches, notes=notes.pack())
        # The time of a repeated step counts from its first launch.
        step_in_flight.started = step_in_flight.started or step_in_flight.launched.started
        self.in_flight.append(step_in_flight)

    def _complete(
        self, step_in_flight: _StepInFlight, record: StepRecord, note_sums: list[float]
    ) -> tuple[StepRecord, StepNotes]:
        """Take up what the ranks agreed on, and write the record of a finished step with its times."""
        # 1. Several ranks agree on signal and clock, so that all of them stop after the same step.
        notes = StepNotes.unpack(note_sums)
        if dist.world_size() > 1:
            self.stop.agreed = notes.signal
            self.state.elapsed_seconds = notes.elapsed_seconds
        else:
            self.stop.agreed = self.stop.signal
            self.state.elapsed_seconds = perf_counter() - self.started

        # 2. With a step ahead, launches overlap: a step's time runs from the end of the step before it.
        now = perf_counter()
        waited = step_in_flight.data_seconds
        total_seconds = now - max(step_in_flight.started - waited, self.last_step_ended)
        self.last_step_ended = now
        n_examples = record.examples_per_second * record.seconds  # the step itself only knew its own time
        record = replace(
            record,
            seconds=max(total_seconds - waited, 0.0),
            data_seconds=waited,
            examples_per_second=n_examples / total_seconds,
            elapsed_seconds=self.state.elapsed_seconds,
        )
        self.busy_seconds = (waited, step_in_flight.launched.backward.busy.seconds())
        if dist.is_main():
            self.log.append(self.job.run.steps, record)
        self.is_saved = False
        return record, notes

    def _report(self, record: StepRecord, step_in_flight: _StepInFlight, notes: StepNotes) -> None:
        if notes.new_bad_files:
            self.reporter.report_bad_files(step_in_flight.faults)
        self.reporter.report_out_of_memory(record)
        self.reporter.report_bad_step(record, step_in_flight.batches)
        self.reporter.report_stragglers(record, notes)

    def _stop_rule(self, record: StepRecord) -> str:
        """Return why the run must end now, or an empty string; the same on every rank."""
        state = self.state
        job = self.job
        # 1. Too many bad files: the data set is broken, not a few of its files.
        n_allowed = max(5, 0.01 * job.n_files)
        if len(state.bad_files) > n_allowed:
            files = ", ".join(f"{path} ({code})" for path, code in state.bad_files.items())
            return f"More than {n_allowed:g} files are bad: {files}. Fix them, or list them under data.exclude."

        # 2. Too many faults.
        outcome = record.outcome.replace("_", " ")
        diagnosis = f" {self.reporter.last_diagnosis}".rstrip()
        reason = state.faults.reason_to_stop()
        if reason is not None:
            advice, key = ADVICE.get(record.outcome, ADVICE["nonfinite_loss"])
            names_files = record.outcome not in ("fp16_overflow", "out_of_memory")
            files = f" {job.run.events} lists the files involved." if names_files else ""
            if self.reporter.n_all_bad:
                advice, key = ALL_BAD_ADVICE
                files = ""
            cause = f"{reason}, the last one by {outcome}"
            return f"Stopped at step {record.step}: {cause}. {advice} [{key}]{files}{diagnosis}"

        # 3. Any fault, if the recipe says so.
        if job.train.on_bad_example == "stop" and record.outcome in FAULT_OUTCOMES:
            return (
                f'Stopped at step {record.step} by {outcome}, because train.on_bad_example = "stop". Continue after it '
                f"with --resume.{diagnosis}"
            )
        return ""

    def _roll_back_if_nonfinite(self, step: int) -> bool:
        """Go back to the last good checkpoint if `first_nonfinite` finds something on any rank.

        Returns:
            Whether all ranks went back.

        Raises:
            TrainingStopped: If there is no good checkpoint, or going back happened too often.
        """
        state = self.state
        run = self.job.run
        name = first_nonfinite(state)
        if not dist.any_rank(name is not None, state.device):
            return False

        # 1. Find the newest good checkpoint, the same for all ranks.
        (rank, tensor), *_ = dist.gather([name] if name else [], state.device)
        self.n_rollbacks += 1
        newest = newest_checkpoint(run)[0] if dist.is_main() else None
        path = dist.from_main_process(newest.path if newest else None)
        if path is None or self.n_rollbacks > self.MAX_ROLLBACKS:
            problem = "there is no checkpoint to go back to" if path is None else "going back did not help"
            raise TrainingStopped(
                f"At step {step} {tensor} is not finite (on process {rank}), and {problem}. Start "
                "again with a lower optim.lr, in another --run."
            )

        # 2. Load it, and drop the records and audio of the steps that will be done again. Events stay.
        checkpoint = newest or read_checkpoint(path)
        state.load_state_dict(checkpoint.state)
        if dist.is_main():
            truncate_logs(run, checkpoint.log_bytes | {run.events.name: run.events.stat().st_size})
            remove_later_audio(run.audio, state.step)
            message = (
                f"At step {step} {tensor} was not finite. The run went back to {path.name} and "
                "repeats the steps after it."
            )
            self.log.emit("WEIGHTS_NONFINITE", step, message, rank=rank)
        # The batches continue from the checkpoint's step as well; those that are loaded already are of later steps.
        self.in_flight.clear()
        self.to_repeat.clear()
        self.source.close()
        self.is_saved = True
        return True

    def _check_ranks_agree(self) -> None:
        """Compare the weights of all ranks bit for bit.

        Raises:
            TrainingStopped: If they differ.
        """
        name = dist.first_difference(self.state.unwrapped_model)
        if name is None:
            return
        if dist.is_main():
            message = f"The processes hold different weights (first in {name})."
            self.log.emit("RANKS_DIFFER", self.state.step, message, first=name)
        raise TrainingStopped(
            f"At step {self.state.step} the processes hold different weights (first in {name}). Continue with --resume "
            "from the last checkpoint, at which they agreed."
        )

    def _validate_and_record(self) -> ValidationRecord:
        state = self.state
        job = self.job
        started = perf_counter()
        with evaluation_weights(state):
            scores = self.validate(state)
        if dist.any_rank(bool(self.reporter.unreported(scores.faults)), state.device):
            self.reporter.report_bad_files(scores.faults)

        # NaN compares false with everything: without this check it could become the best.
        loss_is_finite = math.isfinite(scores.loss)
        is_best = loss_is_finite and scores.loss < state.best_loss
        if is_best:
            state.best_loss = scores.loss
            state.best_step = state.step
        if loss_is_finite:
            state.schedule.observe(scores.loss)
        state.validated_step = state.step
        progress = min(1.0, _progress(state, job.train))
        record = ValidationRecord(
            step=state.step,
            loss=scores.loss,
            si_sdr=scores.si_sdr,
            si_sdri=scores.si_sdri,
            n_items=scores.n_items,
            n_undefined=scores.n_undefined,
            best=is_best,
            lr=state.optimizer.param_groups[0]["initial_lr"] * state.schedule.factor(state.step, progress),
            elapsed_seconds=state.elapsed_seconds,
            seconds=perf_counter() - started,
            orders=scores.orders,
            item_si_sdri=scores.item_si_sdri,
        )
        if dist.is_main():
            self.log.append(job.run.validation, record)
        self.reporter.save_validation_audio(scores.audio)
        return record

    def _save(self) -> bool:
        """Write a checkpoint. Return False if the disk refused: the run continues then, and tries again later.

        Raises:
            TrainingStopped: If the ranks differ, or something is not finite: such a state is never saved.
        """
        state = self.state
        job = self.job
        self._check_ranks_agree()
        name = first_nonfinite(state)
        nonfinite = dist.gather([name] if name else [], state.device)
        if nonfinite:
            rank, tensor = nonfinite[0]
            raise TrainingStopped(
                f"At step {state.step} {tensor} is not finite (on process {rank}). Earlier "
                "checkpoints are intact: continue from them with --resume."
            )
        if not dist.is_main():
            return True
        # A full disk must not cost the run: older checkpoints stay until a newer one is complete.
        try:
            save_checkpoint(
                job.run,
                state.state_dict(),
                recipe=job.recipe,
                choices=job.choices,
                best=state.best_step == state.step,
                keep=job.save.keep,
            )
        except OSError as error:
            message = f"The checkpoint of step {state.step} could not be written ({error}). Older ones are intact."
            self.log.emit("CHECKPOINT_FAILED", state.step, message)
            return False
        return True


def _is_every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _progress(state: TrainState, train: TrainSettings) -> float:
    """Return the share of the budget that is spent; the main process's clock counts for every rank."""
    by_steps = state.step / train.max_steps if train.max_steps else 0.0
    by_time = state.elapsed_seconds / (60 * train.max_minutes) if train.max_minutes else 0.0
    return max(by_steps, by_time)
