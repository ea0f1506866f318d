"""A run directory that is read while it is being written."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unbraid.io import finite_or_none
from unbraid.run_directory import RunDirectory
from unbraid.type_aliases import Row
from unbraid.web.downsample import Buckets, Downsampled, downsample_steps
from unbraid.web.jsonl_tail import JsonlTail, parse_row
from unbraid.web.payloads import VALIDATION_COLUMNS
from unbraid.web.step_columns import COLUMNS, step_columns

EXACT_STEPS = 2000
"""Windows of at most this many steps are read from the file again if a bucket holds more than one step."""

MAX_EVENTS = 2000
MAX_VALIDATIONS = 5000
"""Of more than twice as many validations, every second one is dropped, so that the curve keeps its shape."""


class FollowedRun:
    """Steps, validations and events of a run directory, in bounded memory.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self._steps_file = JsonlTail(self.directory.steps)
        self._validation_file = JsonlTail(self.directory.validation)
        self._events_file = JsonlTail(self.directory.events)
        self._clear_steps()
        self._clear_validations()
        self._clear_events()

    def _clear_steps(self) -> None:
        self.buckets = Buckets(len(COLUMNS))
        self.n_steps = 0
        self.last_row: Row = {}
        self.last_sampled: Row = {}  # the last row that has blocks

    def _clear_validations(self) -> None:
        self.validations: list[Row] = []
        self.n_validations = 0

    def _clear_events(self) -> None:
        self.events: list[Row] = []
        self.n_events = 0

    @property
    def unread_bytes(self) -> int:
        """Bytes of the steps that are still to be read."""
        return self._steps_file.unread_bytes

    @property
    def n_torn(self) -> int:
        """Number of lines that could not be read."""
        return self._steps_file.n_torn + self._validation_file.n_torn + self._events_file.n_torn

    @property
    def first_step(self) -> int:
        """Number of the first step; 0 if there is none."""
        return int(self.buckets.steps[0]) if self.buckets.n_buckets else 0

    @property
    def last_step(self) -> int:
        """Number of the last step; 0 if there is none."""
        return int(self.last_row.get("step", 0))

    def read_more(self) -> bool:
        """Read the next part of each file; return whether anything changed."""
        files = (self._steps_file, self._validation_file, self._events_file)
        before = [file.offset for file in files]
        was_rewritten = False

        if self._steps_file.reset_if_rewritten():
            was_rewritten = True
            self._clear_steps()
        self._add_steps(*self._steps_file.read_rows())

        if self._validation_file.reset_if_rewritten():
            was_rewritten = True
            self._clear_validations()
        self._add_validations(self._validation_file.read_rows()[0])

        if self._events_file.reset_if_rewritten():
            was_rewritten = True
            self._clear_events()
        rows, _ = self._events_file.read_rows()
        self.events = [*self.events, *rows][-MAX_EVENTS:]
        self.n_events += len(rows)

        return was_rewritten or before != [file.offset for file in files]

    def _add_steps(self, rows: list[Row], offsets: list[int]) -> None:
        if not rows:
            return
        numbers = np.array([row["step"] for row in rows], np.int64)
        self.buckets.append(numbers, np.array(offsets, np.int64), step_columns(rows))
        self.n_steps += len(rows)
        self.last_row = rows[-1]
        self.last_sampled = next((row for row in reversed(rows) if row.get("blocks")), self.last_sampled)

    def _add_validations(self, rows: list[Row]) -> None:
        self.validations += [{name: finite_or_none(row.get(name)) for name in VALIDATION_COLUMNS} for row in rows]
        self.n_validations += len(rows)
        if len(self.validations) > 2 * MAX_VALIDATIONS:
            self.validations = self.validations[::2]

    def downsample(self, first: int, last: int, max_buckets: int) -> Downsampled:
        """Return the steps from ``first`` to ``last`` in at most ``max_buckets`` buckets.

        Windows of up to `EXACT_STEPS` steps are exact, whatever the length of the run.
        """
        if self.buckets.width == 1 or last - first > EXACT_STEPS:
            return self.buckets.downsample(first, last, max_buckets)
        rows = list(self._rows_between(first, last))
        return downsample_steps([row["step"] for row in rows], step_columns(rows), max_buckets=max_buckets)

    def _rows_between(self, first: int, last: int) -> Iterator[Row]:
        with self.directory.steps.open("rb") as file:
            file.seek(self.buckets.offset_before(first))
            # Stop where the buckets end: the run may have written more since.
            while file.tell() < self._steps_file.offset:
                line = file.readline()
                if not line:  # the file has just been truncated
                    return
                row = parse_row(line)
                if row is None or row["step"] < first:
                    continue
                if row["step"] > last:
                    return
                yield row
