import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.io import (
    append_row,
    atomic_replace,
    finite_or_none,
    json_line_blocks,
    read_json_lines,
    write_atomically,
    write_json,
)


def test_writing_replaces_the_whole_file(tmp_path):
    path = tmp_path / "last"
    write_atomically(path, "old, and longer\n")
    write_atomically(path, "n\u00e9w\n")

    assert path.read_text(encoding="utf-8") == "n\u00e9w\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_text_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "last"
    write_atomically(path, "old")

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_replacement_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def interrupted():
        with atomic_replace(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x.txt"]


def test_a_json_file_reads_back_equal_and_a_nan_is_refused_before_the_file_changes(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"loss": [1.5, None], "name": "n\u00e9w"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": math.nan})

    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": [1.5, None], "name": "n\u00e9w"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1.0", None, [1.0]])
def test_nonfinite_numbers_become_none(value):
    assert finite_or_none(value) is None


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300))
def test_a_finite_number_stays_as_it_is(value):
    assert finite_or_none(value) == value


def test_a_line_that_a_full_disk_cuts_short_is_removed_again(tmp_path, monkeypatch):
    path = tmp_path / "steps.jsonl"
    append_row(path, {"step": 1})

    class FullDisk:
        """A file that takes only the first four bytes of each write."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def truncate(self, end):
            self.file.truncate(end)

        def write(self, line):
            return self.file.write(line[:4])

    whole_open = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **options: FullDisk(whole_open(*args, **options)))
    with pytest.raises(OSError, match="No space left"):
        append_row(path, {"step": 2})
    monkeypatch.undo()

    assert path.read_text() == '{"step": 1}\n'


def test_reading_can_start_at_any_byte_and_stop_after_any_number_of_lines(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 101)))
    size = path.stat().st_size

    assert [row["step"] for row in read_json_lines(path, first=3)[0]] == [1, 2, 3]
    assert [row["step"] for row in read_json_lines(path, first=2, begin=size // 2)[0]] == [52, 53]
    assert [[row["step"] for row in rows] for rows, _ in json_line_blocks(path, first=5, size=2)] == [
        [1, 2],
        [3, 4],
        [5],
    ]
    assert [row for rows, _ in json_line_blocks(path, size=7) for row in rows] == read_json_lines(path)[0]


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"5", b"null", b"[]", b'"x"', b"NaN", b"\0" * 16]))))
def test_rows_are_always_objects_whatever_bytes_the_file_contains(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        path.write_bytes(b"\n".join(lines) + b'\n{"step": 7}\n')
        rows, _ = read_json_lines(path)

    assert all(isinstance(row, dict) for row in rows)
    assert rows[-1] == {"step": 7}


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_json_lines(tmp_path / "steps.jsonl") == ([], 0)
