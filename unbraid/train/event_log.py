"""Write records and events to the run directory, and pass events on to the caller."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbraid import dist
from unbraid.records import Event, EventCode, StepRecord, ValidationRecord, append_record
from unbraid.run_directory import RunDirectory

Record = StepRecord | ValidationRecord | Event
"""A record that `fit` yields."""


class EventLog:
    """Append records to their files. A disk that refuses costs a message, not the run.

    Args:
        run: Where to write.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.pending: list[Event] = []  # written, but not yielded by the loop yet
        self.unwritable: set[Path] = set()

    def append(self, path: Path, record: Record) -> None:
        """Write a record. The first refusal of each file becomes an event."""
        try:
            append_record(path, record)
        except OSError as error:
            if path not in self.unwritable:
                self.unwritable.add(path)
                message = f"{path} could not be written ({error})."
                self.pending.append(Event("LOG_FAILED", record.step, dist.rank(), message))

    def emit(
        self,
        code: EventCode,
        step: int,
        message: str,
        *,
        rank: int | None = None,
        files: Sequence[str] = (),
        **evidence: Any,
    ) -> None:
        """Write an event, and keep it until `drain`."""
        event = Event(code, step, dist.rank() if rank is None else rank, message, tuple(files), evidence)
        self.append(self.run.events, event)
        self.pending.append(event)

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        events = self.pending
        self.pending = []
        return events
