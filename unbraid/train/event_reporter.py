"""Report what goes wrong in a run: events with the files behind them, and bundles to replay bad steps from."""

import math
from collections.abc import Sequence
from dataclasses import replace

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.data.excerpt import AudioFault
from unbraid.errors import AudioError
from unbraid.records import FAULT_OUTCOMES, Event, EventCode, StepRecord, skip_code
from unbraid.train.event_log import EventLog
from unbraid.train.incident import has_custom_code, join_batches, make_incident, write_incident
from unbraid.train.settings import Job
from unbraid.train.state import TrainState
from unbraid.train.step_notes import StepNotes
from unbraid.train.stragglers import StragglerDetector
from unbraid.train.validation_audio import AudioExample, save_audio_examples


class EventReporter:
    """Report the faults of finished steps. Some calls gather over the ranks, so every rank must make all of them.

    Attributes:
        last_diagnosis: What the last bad step was found to be caused by, in a sentence or two; empty if unknown.
        n_all_bad: How many steps in a row have been skipped because all of their examples are bad, on this rank.

    Args:
        state: In training.
        job: Of the run.
        log: Where events go.
    """

    def __init__(self, state: TrainState, job: Job, log: EventLog) -> None:
        self.state = state
        self.job = job
        self.log = log
        self.last_diagnosis = ""
        self.n_all_bad = 0
        self.stragglers = StragglerDetector(dist.world_size())
        self.n_pieces_reported = state.n_pieces
        self.audio_failures_reported: set[str] = set()

    def unreported(self, faults: Sequence[AudioFault]) -> list[AudioFault]:
        """Return the faults of files that were not reported before. A silent excerpt of a good file is no fault."""
        return [f for f in faults if not f.in_excerpt_only and f.path not in self.state.bad_files]

    def report_bad_files(self, faults: Sequence[AudioFault]) -> None:
        """Report each bad file once, whichever rank read it."""
        state = self.state
        for rank, fault in dist.gather(self.unreported(faults), state.device):
            if fault.path in state.bad_files:  # two ranks read the same file
                continue
            state.bad_files[fault.path] = fault.code
            if dist.is_main():
                self.log.emit(fault.code, state.step, fault.message, rank=rank, files=[fault.path])

    def report_out_of_memory(self, record: StepRecord) -> None:
        """Report that batches are cut into more pieces than before."""
        n_pieces = self.state.n_pieces
        if n_pieces > self.n_pieces_reported and dist.is_main():
            message = f"Memory ran out. From now on each batch goes through the model in {n_pieces} pieces."
            self.log.emit("OUT_OF_MEMORY", record.step, message)
        self.n_pieces_reported = n_pieces

    def report_bad_step(self, record: StepRecord, batches: Sequence[Batch]) -> None:
        """Report the examples behind a step that was skipped or rescued, and save them for a replay.

        Args:
            record: Of the step.
            batches: The step's micro-batches on this rank.
        """
        is_rescued = record.n_bad > 0 and record.outcome in ("trained", "all_filtered")
        self.n_all_bad = self.n_all_bad + 1 if _all_are_bad(record, batches) else 0
        if record.outcome in ("trained", "all_filtered") and not is_rescued:
            return
        if self.n_all_bad <= 1:  # later ones have the same cause, and are not diagnosed again
            self.last_diagnosis = ""
        # Each rank reports its own bad examples; an overflow belongs to no example, so the main process reports it.
        concerns_this_rank = bool(record.bad_items) or (dist.is_main() and record.outcome == "fp16_overflow")
        own_events = [self._bad_step_event(record, batches, is_rescued)] if concerns_this_rank else []
        all_events = [event for _, event in dist.gather(own_events, self.state.device)]
        if not all_events and dist.is_main():  # no rank knows which examples are bad
            own_events = [self._bad_step_event(record, batches, is_rescued)]
            all_events = own_events
        for event in own_events:
            self.log.append(self.job.run.events, event)
        self.log.pending += all_events if dist.is_main() else own_events

    def _bad_step_event(self, record: StepRecord, batches: Sequence[Batch], is_rescued: bool) -> Event:
        reason = record.outcome.replace("_", " ")
        if is_rescued:
            message = f"Step {record.step} was repeated without {record.n_bad} of its examples."
        elif record.outcome == "fp16_overflow":
            message = (
                f"Step {record.step} was skipped: fp16 overflowed at a loss scale of {record.loss_scale:g}, which is "
                "halved now."
            )
        else:
            message = f"Step {record.step} was skipped ({reason}). The weights are unchanged."

        # Overflows are normal until there are so many that they end the run. A clipper at fault needs no diagnosis.
        weights_are_bad = False
        clipper_is_bad = (
            record.outcome == "nonfinite_gradient"
            and math.isnan(record.max_norm or 0.0)
            and math.isfinite(record.grad_norm or 0.0)
        )
        if self.n_all_bad == 1:
            n_examples = len(record.bad_items)
            diagnosis, weights_are_bad = self._diagnose_and_save(record, batches, name_example=False)
            message += f" All {n_examples} examples are bad: the model or its settings are to blame, not the files."
            message = f"{message} {diagnosis}".rstrip()
            self.last_diagnosis = diagnosis
        elif self.n_all_bad:
            message = f"Step {record.step} was skipped ({reason}): all {len(record.bad_items)} examples again."
        elif clipper_is_bad:
            self.last_diagnosis = "The gradient is finite, but the largest norm that the clipper allows is NaN."
            message = f"{message} {self.last_diagnosis}"
        elif record.outcome in FAULT_OUTCOMES or is_rescued or self.state.faults.reason_to_stop() is not None:
            self.last_diagnosis, weights_are_bad = self._diagnose_and_save(record, batches)
            message = f"{message} {self.last_diagnosis}".rstrip()

        files: list[str] = []
        if not (weights_are_bad or clipper_is_bad or self.n_all_bad):  # else the files are innocent
            files = list(dict.fromkeys(file for item in record.bad_items for file in item.files))
        evidence = {
            "loss": record.loss,
            "norm": record.grad_norm,
            "items": [[item.purpose, item.epoch, item.index] for item in record.bad_items],
        }
        code: EventCode = "STEP_RESCUED" if is_rescued else skip_code(record.outcome)
        return Event(code, record.step, dist.rank(), message, tuple(files), evidence)

    def _diagnose_and_save(
        self, record: StepRecord, batches: Sequence[Batch], *, name_example: bool = True
    ) -> tuple[str, bool]:
        """Diagnose this rank's part of a bad step, and save it for a replay unless enough are saved already.

        Args:
            record: Of the step.
            batches: Its micro-batches on this rank.
            name_example: Whether the sentence names the first example with the fault.

        Returns:
            A sentence or two, and whether the weights are the cause.
        """
        run = self.job.run
        incident, diagnosis = make_incident(self.state, record, join_batches(batches), self.job.recipe)
        weights_are_bad = diagnosis.kind == "weights"
        if not name_example:
            diagnosis = replace(diagnosis, item=None)
        sentence = "" if diagnosis.kind == "none" else diagnosis.sentence()
        if len(list(run.incidents.glob("step-*"))) >= self.job.save.incidents:
            return sentence, weights_are_bad
        try:
            path = write_incident(run.incidents, incident)
        except OSError as error:
            message = f"The bad step could not be saved for a replay ({error})."
            self.log.emit("INCIDENT_FAILED", record.step, message)
            return sentence, weights_are_bad
        trust = " --trust" if has_custom_code(self.job.recipe) else ""
        return f"{sentence} To run it again: unbraid replay {path}{trust}".strip(), weights_are_bad

    def report_stragglers(self, record: StepRecord, notes: StepNotes) -> None:
        """Report a process that the others wait for."""
        straggler = self.stragglers.add(notes.busy_seconds)
        if straggler is None or not dist.is_main():
            return
        rank, section, factor = straggler
        message = (
            f"The other processes wait for process {rank}: its {section} takes {factor:.1f} times as long as that of "
            "the median process."
        )
        self.log.emit("SLOW_RANK", record.step, message, rank=rank, section=section, factor=factor)

    def save_validation_audio(self, examples: Sequence[AudioExample]) -> None:
        """Write the first validation examples of all ranks as audio. A failure is reported once and costs no run."""
        if not self.job.validate.save_audio:
            return
        all_examples = [example for _, example in dist.gather(examples, self.state.device)]
        if not dist.is_main():
            return
        nonfinite = [example.index for example in all_examples if not example.finite]
        if nonfinite:
            self._report_audio_failure("nonfinite", f"estimates of validation example {nonfinite[0]} are not finite")
        try:
            save_audio_examples(self.job.run.audio, self.state.step, all_examples)
        except (AudioError, OSError) as error:
            self._report_audio_failure("unwritable", str(error).rstrip("."))

    def _report_audio_failure(self, kind: str, reason: str) -> None:
        if kind in self.audio_failures_reported:
            return
        self.audio_failures_reported.add(kind)
        step = self.state.step
        message = f"The audio of the validation after step {step} was not saved: {reason}. The run continues."
        self.log.emit("AUDIO_NOT_SAVED", step, message)


def _all_are_bad(record: StepRecord, batches: Sequence[Batch]) -> bool:
    """Return whether a step was skipped because of the losses of all of this rank's examples, if there are several."""
    if record.outcome not in ("nonfinite_loss", "over_limit"):
        return False
    n_examples = sum(int((batch.weight > 0).sum()) for batch in batches)
    return len(record.bad_items) == n_examples > 1
