"""Each line of a growing file is read once, and torn, endless and rewritten lines are handled."""

import json

import pytest

from unbraid.web import jsonl_tail
from unbraid.web.jsonl_tail import JsonlTail


def lines(first, last):
    return "".join(json.dumps({"step": step}) + "\n" for step in range(first, last + 1))


@pytest.fixture
def tail(tmp_path):
    return JsonlTail(tmp_path / "steps.jsonl")


def append(tail, text):
    with tail.path.open("a") as file:
        file.write(text)


def read_steps(tail, **options):
    """Read until nothing new is complete."""
    steps = []
    while tail.unread_bytes:
        rows, _ = tail.read_rows(**options)
        steps += [row["step"] for row in rows]
    return steps


def test_a_file_that_does_not_exist_yet_is_empty(tail):
    assert tail.read_rows() == ([], [])
    assert not tail.reset_if_rewritten()


def test_each_line_is_read_once(tail):
    append(tail, lines(1, 10))
    assert read_steps(tail) == list(range(1, 11))
    append(tail, lines(11, 12))

    assert read_steps(tail) == [11, 12]
    assert read_steps(tail) == []


def test_offsets_point_at_the_lines(tail):
    append(tail, lines(8, 12))

    rows, offsets = tail.read_rows()

    with tail.path.open("rb") as file:
        for row, offset in zip(rows, offsets, strict=True):
            file.seek(offset)
            assert json.loads(file.readline()) == row


def test_an_incomplete_line_is_read_when_it_is_complete(tail):
    append(tail, '{"step": 1}\n{"ste')
    assert read_steps(tail) == [1]
    assert tail.unread_bytes == 0

    append(tail, 'p": 2}\n')

    assert read_steps(tail) == [2]
    assert tail.n_torn == 0


def test_a_torn_line_is_counted_and_skipped(tail):
    append(tail, lines(1, 10) + '{"step": 11, "lo\n' + lines(11, 12))

    assert read_steps(tail) == list(range(1, 13))
    assert tail.n_torn == 1


def test_a_line_without_an_end_is_skipped(tail, monkeypatch):
    monkeypatch.setattr(jsonl_tail, "MAX_LINE_BYTES", 5000)
    append(tail, lines(1, 10) + "\0" * 12_000 + "\n" + lines(11, 15))

    assert read_steps(tail, n_bytes=1000) == list(range(1, 16))
    assert tail.n_torn >= 1


@pytest.mark.parametrize("last", [30, 160])
def test_a_rewritten_file_is_read_from_the_beginning(tail, last):
    append(tail, lines(1, 100))
    read_steps(tail)
    tail.path.write_text(
        lines(1, 20) + lines(22, last + 1)
    )  # in one case longer than before, so that the size is no sign

    assert tail.reset_if_rewritten()
    assert read_steps(tail) == [*range(1, 21), *range(22, last + 2)]


@pytest.mark.parametrize(
    "line", ['{"step": true}', '{"step": null}', '{"step": -1}', f'{{"step": {2**70}}}', '["step"]', "7", "[" * 9000]
)
def test_rows_without_a_valid_step_count_as_torn(tail, line):
    append(tail, f"{line}\n")

    assert read_steps(tail) == []
    assert tail.n_torn == 1
