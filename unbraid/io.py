"""Atomic files, JSON files and JSON lines."""

import errno
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unbraid.type_aliases import Row

LINE_BYTES = 2000
"""Upper estimate of the length of an average line of ``steps.jsonl``. Sampled steps are longer, but they are rare."""


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces the file only if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file. A reader, or a crash, sees the old text or the new text and nothing in between."""
    with atomic_replace(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # Without fsync a power cut can leave the new name with no contents.
        os.fsync(file.fileno())


def write_json(path: Path, table: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file.
        table: What to write.
        indent: Spaces per level; None puts everything on one line, for long lists of numbers.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold; see `to_json_row` and `finite_or_none`.
    """
    write_atomically(path, json.dumps(table, indent=indent, allow_nan=False) + "\n")


def finite_or_none(value: Any) -> float | None:
    """Return a finite number unchanged, and None for NaN, infinity or anything that is not a number."""
    if not isinstance(value, (int, float)):
        return None
    # A Python int can exceed the range of a float, where math.isfinite raises OverflowError.
    return value if -sys.float_info.max <= value <= sys.float_info.max else None


def to_json_row(record: Any) -> Row:
    """Return a dataclass instance or a mapping as a dict that is valid JSON, nested values included.

    A number that is not finite becomes null; its text is stored next to it as ``NAME_text``. In a list it is only null.
    """
    values: Mapping[str, Any] = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    row: Row = {}
    for name, value in values.items():
        row[name] = _to_json_value(value)
        if isinstance(value, float) and not math.isfinite(value):
            row[f"{name}_text"] = str(value)
    return row


def _to_json_value(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return to_json_row(value)
    if isinstance(value, (list, tuple)):
        return [_to_json_value(element) for element in value]
    return value


def append_row(path: Path, row: Row) -> None:
    """Append one JSON object as one line, in a single write. If the disk is full, nothing of the line remains.

    Raises:
        OSError: If the line cannot be written.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        # An unbuffered write to a full disk may write a part of the line without raising.
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_json_lines(
    path: Path, last: int | None = None, *, first: int | None = None, begin: int = 0
) -> tuple[list[Row], int]:
    """Read the JSON objects of a file of JSON lines.

    A line that cannot be parsed, such as the torn last line of a killed run, is counted and not raised.

    Args:
        path: The file; a missing file counts as empty.
        last: Read at most about this many lines, from the end, at a cost that does not grow with the file; None reads
            all.
        first: Read at most this many lines; None reads all.
        begin: Byte offset to start at; the rest of the line at that offset is passed over.

    Returns:
        The rows, and the number of lines that could not be read.
    """
    rows: list[Row] = []
    n_torn = 0
    if not path.exists():
        return rows, n_torn
    if last is not None:
        begin = max(begin, path.stat().st_size - last * LINE_BYTES)
    for block, n_torn_in_block in json_line_blocks(path, first=first, last=last, begin=begin):
        rows += block
        n_torn += n_torn_in_block
    return rows, n_torn


def json_line_blocks(
    path: Path, *, first: int | None = None, last: int | None = None, begin: int = 0, size: int = 4096
) -> Iterator[tuple[list[Row], int]]:
    """Yield the rows of up to ``size`` lines at a time with their number of unreadable lines, as `read_json_lines`."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(begin)
        if begin:
            file.readline()  # the rest of the line that `begin` points into
        lines: Iterator[bytes] = islice(file, first)
        if last is not None:
            lines = iter(deque(lines, last))
        while block := list(islice(lines, size)):
            parsed = [_parse_line(line) for line in block]
            rows = [row for row in parsed if isinstance(row, dict)]
            yield rows, len(parsed) - len(rows)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # deeply nested brackets raise RecursionError
        return None
