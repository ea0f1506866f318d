"""Records and events on their way to disk and screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbraid import dist
from unbraid.records import Event, EventCode, StepRecord, ValidationRecord, append_record
from unbraid.run_directory import RunDirectory

Record = StepRecord | ValidationRecord | Event
"""What a run yields."""


class EventLog:
    """Where a run writes what it has to say.

    Args:
        run: Where they are written.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.untold: list[Event] = []
        self.refused: set[Path] = set()

    def append(self, path: Path, record: Record) -> None:
        """Write a record; a disk that refuses is told of once, and does not end the run."""
        try:
            append_record(path, record)
        except OSError as error:
            if path not in self.refused:
                self.refused.add(path)
                message = f"{path} could not be written ({error})."
                self.untold.append(Event("LOG_FAILED", record.step, dist.rank(), message))

    def tell(
        self,
        code: EventCode,
        step: int,
        message: str,
        *,
        rank: int | None = None,
        files: Sequence[str] = (),
        **evidence: Any,
    ) -> None:
        """Write an event, and keep it for whoever listens."""
        event = Event(code, step, dist.rank() if rank is None else rank, message, tuple(files), evidence)
        self.append(self.run.events, event)
        self.untold.append(event)

    def take(self) -> list[Event]:
        """What was not listened to yet."""
        taken, self.untold = self.untold, []
        return taken
