"""Batches that go on when a data worker dies, and do not when something else is wrong."""

import itertools

import pytest

from unbraid.errors import TrainingStopped
from unbraid.records import read_rows
from unbraid.run_directory import RunDirectory
from unbraid.train.batch_source import BatchSource
from unbraid.train.event_log import EventLog


def loads(*errors):
    """Return numbers from a start on, whose first loaders end with these errors after two."""
    left = list(errors)

    def load(first):
        error = left.pop(0) if left else None
        for number in itertools.count(first):
            if error is not None and number == first + 2:
                raise error
            yield number

    return load


DEATHS = [RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly"), EOFError(), ConnectionResetError("gone")]


def test_the_batches_after_a_worker_death_are_the_same(tmp_path):
    source, log = BatchSource(loads(*DEATHS), 1), EventLog(RunDirectory(tmp_path))

    assert [source.next_micro_batches(step, log)[0] for step in range(8)] == list(range(8))
    assert [event.code for event in log.drain()] == ["DATA_WORKER_LOST"] * 3
    assert [row["step"] for row in read_rows(tmp_path / "events.jsonl")[0]] == [3, 5, 7]


def test_after_too_many_deaths_the_run_ends_with_advice(tmp_path):
    source, log = BatchSource(loads(*DEATHS, *DEATHS), 1), EventLog(RunDirectory(tmp_path))

    with pytest.raises(TrainingStopped, match=r"failed 4 times.*Lower data\.workers"):
        list(map(source.next_micro_batches, range(20), itertools.repeat(log)))


@pytest.mark.parametrize("error", [OSError("Input/output error"), RuntimeError("Caught ValueError"), KeyError("x")])
def test_an_error_that_is_no_worker_death_is_raised_unchanged(tmp_path, error):
    source, log = BatchSource(loads(error), 1), EventLog(RunDirectory(tmp_path))
    source.next_micro_batches(0, log)
    source.next_micro_batches(1, log)

    with pytest.raises(type(error)):
        source.next_micro_batches(2, log)
    assert log.drain() == []
