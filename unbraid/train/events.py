"""What goes wrong in a run, told by code with the files behind it, and kept where it can be run again."""

from collections.abc import Sequence

from unbraid import dist
from unbraid.data.mixing import AudioFault
from unbraid.errors import AudioError
from unbraid.records import Event, EventCode, StepRecord, skip_code
from unbraid.train.event_log import EventLog
from unbraid.train.incident import has_custom_code, join_batches, make_incident, write_incident
from unbraid.train.settings import Job
from unbraid.train.state import TrainState
from unbraid.train.step import LaunchedStep
from unbraid.train.stragglers import DeadOutputs, Pace
from unbraid.train.validation_audio import AudioExample, save_audio_examples


class Observer:
    """Looks at each step that is finished, and says what there is to say; on every rank alike where ranks must meet.

    Args:
        state: In training.
        job: Of the run.
        log: Where events go.
    """

    def __init__(self, state: TrainState, job: Job, log: EventLog) -> None:
        self.state, self.job, self.log = state, job, log
        self.pace, self.dead_outputs = Pace(dist.world_size()), DeadOutputs()
        self.n_pieces_told = state.n_pieces
        self.verdict = ""  # what is to blame for the last fault
        self.unheard: set[str] = set()  # why sound was not kept

    def new(self, faults: Sequence[AudioFault]) -> list[AudioFault]:
        """Those of files that were not named before."""
        known = self.state.bad_files
        return [fault for fault in faults if not fault.in_excerpt_only and fault.path not in known]

    def report_bad_files(self, faults: Sequence[AudioFault]) -> None:
        """Name each bad file once, whichever rank met it; an excerpt that is merely silent is not worth an event."""
        state = self.state
        for rank, fault in dist.gather(self.new(faults), state.device):
            if fault.path not in state.bad_files:
                state.bad_files[fault.path] = fault.code
                if dist.is_main():
                    self.log.tell(fault.code, state.step, fault.message, rank=rank, files=[fault.path])

    def tell_of_memory(self, record: StepRecord) -> None:
        """Say that batches are cut into more pieces than before."""
        if self.state.n_pieces > self.n_pieces_told and dist.is_main():
            message = f"Memory ran out; from now on each batch goes through the model in {self.state.n_pieces} pieces."
            self.log.tell("OUT_OF_MEMORY", record.step, message)
        self.n_pieces_told = self.state.n_pieces

    def tell_of_fault(self, record: StepRecord, launched: LaunchedStep) -> None:
        """Name the examples behind a step that was left out or rescued, and keep them for a replay."""
        rescued = record.n_bad > 0 and record.outcome in ("trained", "all_filtered")
        if record.outcome in ("trained", "all_filtered") and not rescued:
            return
        self.verdict = ""
        mine = [self._fault(record, launched, rescued=rescued)] if self._is_concerned(record) else []
        everyone = [event for _, event in dist.gather(mine, self.state.device)]
        if not everyone and dist.is_main():  # nobody knows whose examples they are
            mine = everyone = [self._fault(record, launched, rescued=rescued)]
        for event in mine:
            self.log.append(self.job.run.events, event)
        self.log.untold += everyone if dist.is_main() else mine

    def _is_concerned(self, record: StepRecord) -> bool:
        """Whether this rank has something to tell of a fault: its own examples, or what is nobody's."""
        return bool(record.bad_items) or (dist.is_main() and record.outcome == "fp16_overflow")

    def _fault(self, record: StepRecord, launched: LaunchedStep, *, rescued: bool) -> Event:
        outcome, files = record.outcome.replace("_", " "), list[str]()
        message = f"Step {record.step} was left out ({outcome}); weights are as before."
        if rescued:
            message = f"Step {record.step} was done without {record.n_bad} of its examples."
        elif record.outcome == "fp16_overflow":
            message = (
                f"Step {record.step} was left out: fp16 overflowed at a loss scale of {record.loss_scale:g}; halved."
            )
        blames_weights = False
        if record.outcome != "fp16_overflow" or self.state.faults.verdict() is not None:
            self.verdict, blames_weights = self._keep_for_replay(record, launched)
            message += f" {self.verdict}" if self.verdict else ""
        if not blames_weights:
            files = list(dict.fromkeys(file for item in record.bad_items for file in item.files))
        evidence = {
            "loss": record.loss,
            "norm": record.grad_norm,
            "items": [[item.purpose, item.epoch, item.index] for item in record.bad_items],
        }
        code: EventCode = "STEP_RESCUED" if rescued else skip_code(record.outcome)
        return Event(code, record.step, dist.rank(), message, tuple(files), evidence)

    def _keep_for_replay(self, record: StepRecord, launched: LaunchedStep) -> tuple[str, bool]:
        """Find out what is to blame for this rank's share of a bad step, and keep it for a replay if there is room.

        Returns:
            A sentence or two, and whether the weights are to blame.
        """
        state, run = self.state, self.job.run
        incident, verdict = make_incident(state, record, join_batches(launched.parts), self.job.recipe)
        sentence = "" if verdict.kind == "none" else verdict.sentence()
        if len(list(run.incidents.glob("step-*"))) >= self.job.save.incidents:
            return sentence, verdict.kind == "weights"
        try:
            path = write_incident(run.incidents, incident)
        except OSError as error:
            self.log.tell("INCIDENT_FAILED", record.step, f"The bad step could not be kept for a replay ({error}).")
            return sentence, verdict.kind == "weights"
        trust = " --trust" if has_custom_code(self.job.recipe) else ""
        return f"{sentence} To run it again: unbraid replay {path}{trust}".strip(), verdict.kind == "weights"

    def tell_of_health(self, record: StepRecord, seconds: Sequence[float]) -> None:
        """Name a process that the others wait for, and outputs that are dead.

        Args:
            record: Of the step.
            seconds: As `Pace` takes them.
        """
        slow = self.pace.add(seconds)
        if not dist.is_main():
            return
        if slow is not None:
            message = (
                f"The others wait for process {slow.rank}: its {slow.section} takes {slow.factor:.1f} times as long as "
                "the middle one's."
            )
            self.log.tell("SLOW_RANK", record.step, message, rank=slow.rank, section=slow.section, factor=slow.factor)
        for output in self.dead_outputs.add(record.items):
            message = (
                f"Output {output + 1} of the model is silent whatever the mixture. SI-SDR has no gradient there, so it "
                "will stay so: begin again with another data.seed or a lower optim.lr, or take a loss that minds level."
            )
            self.log.tell("OUTPUT_DEAD", record.step, message, output=output)

    def keep_sounds(self, sounds: Sequence[AudioExample]) -> None:
        """Write the first validation examples of all ranks to hear; a refusal is told of once, and costs no run."""
        if not self.job.validate.save_audio:
            return
        everyone = [sound for _, sound in dist.gather(sounds, self.state.device)]
        if not dist.is_main():
            return
        if spoilt := [sound.index for sound in everyone if not sound.finite]:
            self._tell_unheard("not finite", f"estimates of validation example {spoilt[0]} are not finite")
        try:
            save_audio_examples(self.job.run.audio, self.state.step, everyone)
        except (AudioError, OSError) as error:
            self._tell_unheard("not written", str(error).rstrip("."))

    def _tell_unheard(self, kind: str, why: str) -> None:
        if kind not in self.unheard:
            self.unheard.add(kind)
            message = (
                f"The audio of the validation after step {self.state.step} was not saved: {why}. The run continues."
            )
            self.log.tell("AUDIO_NOT_SAVED", self.state.step, message)
