"""A file of JSON lines that is followed while it grows, and a run directory as such files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.records import RunDirectory, upgrade_row
from unbraid.web.chart_payloads import SCORES, finite
from unbraid.web.downsample import Buckets, Thinned, of_each_step
from unbraid.web.step_columns import COLUMNS, columns

Row = dict[str, Any]
AT_A_TIME = 2**20
"""Bytes read at once: some tens of milliseconds of work, so that a page never waits long for an answer."""

MARK = 64
"""Bytes before the place reached that are compared, to see that the file is still the one that was read."""

LONGEST = 16 * 2**20
"""Bytes of a line at most; what goes on without an end beyond that is no record."""

EXACT_STEPS = 2000
"""Windows of so many steps are read again from the file where buckets hold more than one step each."""

EVENTS_KEPT, VALIDATIONS_KEPT = 2000, 5000


class Lines:
    """The rows of a file of JSON lines, each read once, as they come.

    A file that was cut back and written again (a run that went back to a checkpoint) is noticed, and read anew.

    Args:
        path: The file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.n_torn, self._before = path, 0, 0, b""
        self._waits_at = -1  # the size at which the last line was not whole

    @property
    def size(self) -> int:
        """Bytes in the file."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def unread(self) -> int:
        """Bytes still to be read; a last line that is not whole waits for its end."""
        size = self.size
        return 0 if size == self._waits_at else max(0, size - self.offset)

    def was_cut(self) -> bool:
        """Whether what was read is no longer there; then everything begins anew."""
        if self.size >= self.offset and self._mark(self.offset) == self._before:
            return False
        self.offset, self.n_torn, self._before, self._waits_at = 0, 0, b"", -1
        return True

    def next(self, n_bytes: int = AT_A_TIME) -> tuple[list[Row], list[int]]:
        """The next rows, and where the line of each begins; none where nothing new is complete."""
        begin = self.offset
        if not self.unread:
            return [], []
        with self.path.open("rb") as file:
            file.seek(begin)
            block = file.read(n_bytes)
            if not block.endswith(b"\n"):
                block += file.readline(LONGEST)
        whole = block[: block.rfind(b"\n") + 1] or (block if len(block) >= LONGEST else b"")
        self._waits_at = begin + len(block) if len(whole) < len(block) < LONGEST else -1
        self.offset += len(whole)
        self._before = self._mark(self.offset)
        rows, places = [], []
        for line in whole.splitlines(keepends=True):
            row = _parsed(line)
            if row is None:
                self.n_torn += 1
            else:
                rows.append(row)
                places.append(begin)
            begin += len(line)
        return rows, places

    def _mark(self, offset: int) -> bytes:
        if not offset:
            return b""
        with self.path.open("rb") as file:
            file.seek(max(0, offset - MARK))
            return file.read(min(MARK, offset))


def _parsed(line: bytes) -> Row | None:
    """A row that says which step it is of, or None; what is not finite in it is None."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    row = upgrade_row(row) if isinstance(row, dict) else None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**52 else None


class Followed:
    """A run directory, read as it grows.

    Args:
        path: Its folder.
    """

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(path)
        self.files = {name: Lines(getattr(self.run, name)) for name in ("steps", "validation", "events")}
        self._forget("steps", "validation", "events")

    def _forget(self, *names: str) -> None:
        if "steps" in names:
            self.buckets, self.n_steps = Buckets(len(COLUMNS)), 0
            self.last_row: Row = {}
            self.last_sampled: Row = {}  # of the steps that were looked at closely
        if "validation" in names:
            self.validations: list[Row] = []
            self.n_validations = 0
        if "events" in names:
            self.events: list[Row] = []
            self.n_events = 0

    @property
    def unread_bytes(self) -> int:
        """What of the steps is still to be read."""
        return self.files["steps"].unread

    @property
    def n_torn(self) -> int:
        """Lines that could not be read."""
        return sum(file.n_torn for file in self.files.values())

    @property
    def first_step(self) -> int:
        """The number of the first step that is there; 0 where there is none."""
        return int(self.buckets.steps[0]) if self.buckets.n else 0

    @property
    def last_step(self) -> int:
        """The number of the last step; 0 where there is none."""
        return int(self.last_row.get("step", 0))

    def advance(self) -> bool:
        """Read some more of each file; whether there was any."""
        changed = False
        for name, file in self.files.items():
            before = file.offset
            if file.was_cut():
                self._forget(name)
                changed = True
            rows, places = file.next()
            if rows:
                getattr(self, f"_add_{name}")(rows, places)
            changed = changed or file.offset != before
        return changed

    def _add_steps(self, rows: list[Row], places: list[int]) -> None:
        numbers = np.array([row["step"] for row in rows], np.int64)
        self.buckets.append(numbers, np.array(places, np.int64), columns(rows))
        self.n_steps += len(rows)
        self.last_row = rows[-1]
        self.last_sampled = next((row for row in reversed(rows) if row.get("blocks")), self.last_sampled)

    def _add_validation(self, rows: list[Row], places: list[int]) -> None:
        kept = [{name: finite(row.get(name)) for name in SCORES} for row in rows]
        self.validations += kept
        if len(self.validations) > 2 * VALIDATIONS_KEPT:
            self.validations = self.validations[::2]
        self.n_validations += len(rows)

    def _add_events(self, rows: list[Row], places: list[int]) -> None:
        self.events = [*self.events, *rows][-EVENTS_KEPT:]
        self.n_events += len(rows)

    def thinned(self, first: int, last: int, n_most: int) -> Thinned:
        """Steps from one to another in at most so many buckets, as finely as a window of that size can be shown."""
        if self.buckets.width == 1 or last - first > EXACT_STEPS:
            return self.buckets.thinned(first, last, n_most)
        rows = list(self._rows_between(first, last))
        return of_each_step([row["step"] for row in rows], columns(rows), n_most=n_most)

    def _rows_between(self, first: int, last: int) -> Iterator[Row]:
        with self.run.steps.open("rb") as file:
            file.seek(self.buckets.offset_before(first))
            end = self.files["steps"].offset
            while file.tell() < end and (line := file.readline()):
                row = _parsed(line)
                if row is None or row["step"] < first:
                    continue
                if row["step"] > last:
                    return
                yield row


def runs_in(paths: list[Path], *, depth: int = 3) -> list[Path]:
    """The run directories among some folders and below them, in the order given and by name; links are not followed."""
    found: dict[Path, None] = {}
    for path in paths:
        for run in _runs_below(path, depth):
            found[run] = None
    return list(found)


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    run = RunDirectory(path)
    if run.steps.exists() or run.recipe.exists():
        yield path
        return
    if depth == 0 or not path.is_dir():
        return
    try:
        below = sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in below:
        yield from _runs_below(Path(name), depth - 1)
