"""Reading a file of JSON lines while another process appends to it."""

import json
from pathlib import Path

from unbraid.schema_version import upgrade_row
from unbraid.type_aliases import Row

READ_BYTES = 2**20
"""Bytes read at once: some tens of milliseconds of work, so that requests never wait long for the lock."""

CHECK_BYTES = 64
"""Bytes before the current offset that are compared, to notice that the file was rewritten."""

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is no record; it is skipped instead of being held in memory."""


class JsonlTail:
    """The rows of a growing file of JSON lines, each read once.

    A resumed run truncates its files to the last checkpoint and writes on from there. `reset_if_rewritten` notices it.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.offset = 0
        self.n_torn = 0
        self._bytes_before_offset = b""
        self._size_when_incomplete = -1  # file size at which its last line had no end yet

    @property
    def size(self) -> int:
        """The file's size in bytes; 0 if it does not exist."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def unread_bytes(self) -> int:
        """Bytes not read yet; 0 while the file ends in an incomplete line that has not grown."""
        size = self.size
        # Without this, a killed run's torn last line would be read again on every tick.
        return 0 if size == self._size_when_incomplete else max(0, size - self.offset)

    def reset_if_rewritten(self) -> bool:
        """Start again from the beginning if what was read is no longer in the file; return whether it was so."""
        # The size is not enough: the file may have grown past the old offset again.
        if self.size >= self.offset and self._read_before(self.offset) == self._bytes_before_offset:
            return False
        self._reset()
        return True

    def read_rows(self, n_bytes: int = READ_BYTES) -> tuple[list[Row], list[int]]:
        """Return the next complete rows and the byte offset of each one's line."""
        if not self.unread_bytes:
            return [], []

        # Read whole lines: at least n_bytes, up to the end of the line there.
        line_offset = self.offset
        with self.path.open("rb") as file:
            file.seek(self.offset)
            block = file.read(n_bytes)
            if not block.endswith(b"\n"):
                block += file.readline(MAX_LINE_BYTES)
        complete = block[: block.rfind(b"\n") + 1]
        if not complete and len(block) >= MAX_LINE_BYTES:
            complete = block
        is_incomplete = len(complete) < len(block) < MAX_LINE_BYTES
        self._size_when_incomplete = self.offset + len(block) if is_incomplete else -1
        self.offset += len(complete)
        self._bytes_before_offset = self._read_before(self.offset)

        rows: list[Row] = []
        offsets: list[int] = []
        for line in complete.splitlines(keepends=True):
            row = parse_row(line)
            if row is None:
                self.n_torn += 1
            else:
                rows.append(row)
                offsets.append(line_offset)
            line_offset += len(line)
        return rows, offsets

    def _read_before(self, offset: int) -> bytes:
        if not offset:
            return b""
        with self.path.open("rb") as file:
            file.seek(max(0, offset - CHECK_BYTES))
            return file.read(min(CHECK_BYTES, offset))


def parse_row(line: bytes) -> Row | None:
    """Return a line's row with NaN and Infinity as None, or None if it is not an object with a valid ``step``."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    row = upgrade_row(row)
    step = row.get("step")
    # bool is a subclass of int, and JavaScript's numbers are exact only below 2**53.
    is_valid = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**52
    return row if is_valid else None
