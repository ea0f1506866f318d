import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import CheckpointError
from unbraid.records import (
    Event,
    ItemId,
    RunDirectory,
    StepRecord,
    ValidationRecord,
    append_record,
    owned,
    read_rows,
    read_steps,
    read_validation,
    row_blocks,
)

STEP = StepRecord(
    step=1, epoch=0, outcome="trained", loss=-3.5, grad_norm=1.25, max_norm=5.0, lr=1e-3, loss_scale=1.0,
    n_trained=2, n_filtered=1, n_bad=0,
)  # fmt: skip
ANY_FLOAT = st.one_of(st.none(), st.floats())


def same(one, other):
    """Equal, with NaN equal to NaN."""
    return repr(one) == repr(other)


@given(ANY_FLOAT, ANY_FLOAT, ANY_FLOAT)
def test_a_step_comes_back_as_it_was_whatever_its_numbers(loss, grad_norm, limit):
    record = replace(STEP, loss=loss, grad_norm=grad_norm, max_norm=limit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        append_record(path, record)
        back = read_steps(path)

    assert same(back, [record])


def test_the_examples_behind_a_fault_come_back_as_they_were(tmp_path):
    items = (ItemId("train", 3, 17, ("a.wav", "b.wav")), ItemId("train", 3, 18))
    record = replace(STEP, outcome="nonfinite_loss", n_bad=2, bad_items=items)
    append_record(tmp_path / "steps.jsonl", record)

    assert read_steps(tmp_path / "steps.jsonl") == [record]


def test_a_validation_comes_back_as_it_was(tmp_path):
    record = ValidationRecord(step=5, loss=math.nan, si_sdr=3.0, si_sdri=-math.inf, n_items=10, best=False, lr=1e-3)
    append_record(tmp_path / "validation.jsonl", record)

    assert same(read_validation(tmp_path / "validation.jsonl"), [record])


def test_orders_and_items_of_a_validation_come_back_and_an_old_row_has_none(tmp_path):
    record = ValidationRecord(
        step=5, loss=-3.0, si_sdr=3.0, si_sdri=2.0, n_items=2, best=True, lr=1e-3, orders=((1, 0), (0, 1)),
        item_si_sdri=(4.125, None),
    )  # fmt: skip
    append_record(tmp_path / "validation.jsonl", record)
    row = strict_json((tmp_path / "validation.jsonl").read_text())
    del row["orders"], row["item_si_sdri"]
    (tmp_path / "old.jsonl").write_text(json.dumps(row))

    assert read_validation(tmp_path / "validation.jsonl") == [record]
    assert read_validation(tmp_path / "old.jsonl") == [replace(record, orders=(), item_si_sdri=())]


def test_some_lines_can_be_read_from_the_beginning_or_from_any_byte_on(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 101)))
    size = path.stat().st_size

    assert [row["step"] for row in read_rows(path, first=3)[0]] == [1, 2, 3]
    assert [row["step"] for row in read_rows(path, first=2, begin=size // 2)[0]] == [52, 53]
    assert [[row["step"] for row in rows] for rows, _ in row_blocks(path, first=5, size=2)] == [[1, 2], [3, 4], [5]]
    assert [row for rows, _ in row_blocks(path, size=7) for row in rows] == read_rows(path)[0]


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_number_that_is_not_finite_is_null_with_its_text_beside_it(tmp_path, value, text):
    append_record(tmp_path / "steps.jsonl", replace(STEP, loss=value))

    row = strict_json((tmp_path / "steps.jsonl").read_text())

    assert (row["loss"], row["loss_text"]) == (None, text)


def test_evidence_that_is_not_finite_keeps_its_text_too(tmp_path):
    evidence = {"loss": math.nan, "norms": [1.0, math.inf], "layer": {"max": -math.inf}}
    append_record(tmp_path / "events.jsonl", Event("STEP_SKIPPED", 1, 0, "left out", evidence=evidence))

    row = strict_json((tmp_path / "events.jsonl").read_text())

    assert row["evidence"] == {
        "loss": None, "loss_text": "nan", "norms": [1.0, None], "layer": {"max": None, "max_text": "-inf"},
    }  # fmt: skip


def test_each_record_is_one_line_whatever_its_text_says(tmp_path):
    path = tmp_path / "events.jsonl"
    for name in ("a\nb.wav", "\u2028\u00e9.wav", '<img src=x onerror=alert(1)>"'):
        append_record(path, Event("AUDIO_NONFINITE", 1, 0, name, (name,)))

    rows, n_torn = read_rows(path)

    assert [row["message"] for row in rows] == ["a\nb.wav", "\u2028\u00e9.wav", '<img src=x onerror=alert(1)>"']
    assert n_torn == 0
    assert path.read_bytes().count(b"\n") == 3


@given(st.data())
def test_a_line_torn_anywhere_is_counted_and_costs_no_other(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        for step in (1, 2, 3):
            append_record(path, replace(STEP, step=step))
        first, second, third = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(first + second + third[: data.draw(st.integers(1, len(third) - 2))])
        rows, n_torn = read_rows(path)

    assert [row["step"] for row in rows] == [1, 2]
    assert n_torn == 1


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"5", b"null", b"[]", b'"x"', b"NaN", b"\0" * 16]))))
def test_rows_are_always_objects_whatever_bytes_the_file_holds(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        path.write_bytes(b"\n".join(lines) + b'\n{"step": 7}\n')
        rows, _ = read_rows(path)

    assert all(isinstance(row, dict) for row in rows)
    assert rows[-1] == {"step": 7}


def test_a_file_that_does_not_exist_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "steps.jsonl") == ([], 0)


def test_a_second_owner_is_refused_with_the_firsts_process(tmp_path):
    with (
        owned(RunDirectory(tmp_path)),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
        owned(RunDirectory(tmp_path)),
    ):
        pytest.fail("two owners at once")


def test_a_second_process_is_refused_too(tmp_path):
    code = "import sys, pathlib, unbraid.records as r\nwith r.owned(r.RunDirectory(pathlib.Path(sys.argv[1]))): pass"

    with owned(RunDirectory(tmp_path)):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert f"process {os.getpid()}" in done.stderr


def test_a_run_directory_is_free_again_after_its_owner_failed(tmp_path):
    run = RunDirectory(tmp_path / "new")
    with pytest.raises(KeyError), owned(run):
        raise KeyError

    with owned(run):
        assert run.lock.exists()


def test_a_killed_owner_leaves_the_run_directory_free(tmp_path):
    code = (
        "import os, sys, pathlib, unbraid.records as r\n"
        "with r.owned(r.RunDirectory(pathlib.Path(sys.argv[1]))): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -9

    with owned(RunDirectory(tmp_path)):
        assert (tmp_path / "lock").read_text().strip() == str(os.getpid())


def test_reading_records_and_audio_needs_no_torch():
    code = "import sys, unbraid.records, unbraid.audio; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
