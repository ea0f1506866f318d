import ast
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unbraid
from unbraid.records import (
    EVENT_CODES,
    SKIPPED_OUTCOMES,
    Event,
    ItemId,
    StepRecord,
    ValidationRecord,
    append_record,
    read_rows,
    read_steps,
    read_validation,
    skip_code,
)

STEP = StepRecord(
    step=1, epoch=0, outcome="trained", loss=-3.5, grad_norm=1.25, max_norm=5.0, lr=1e-3, loss_scale=1.0,
    n_trained=2, n_filtered=1, n_bad=0,
)  # fmt: skip
ANY_FLOAT = st.one_of(st.none(), st.floats())


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def same(one, other):
    """Equal, with NaN equal to NaN."""
    return repr(one) == repr(other)


@given(ANY_FLOAT, ANY_FLOAT, ANY_FLOAT)
def test_a_step_reads_back_equal_whatever_its_numbers(loss, grad_norm, limit):
    record = replace(STEP, loss=loss, grad_norm=grad_norm, max_norm=limit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        append_record(path, record)
        back = read_steps(path)

    assert same(back, [record])


def test_bad_items_read_back_equal(tmp_path):
    items = (ItemId("train", 3, 17, ("a.wav", "b.wav")), ItemId("train", 3, 18))
    record = replace(STEP, outcome="nonfinite_loss", n_bad=2, bad_items=items)
    append_record(tmp_path / "steps.jsonl", record)

    assert read_steps(tmp_path / "steps.jsonl") == [record]


def test_a_validation_reads_back_equal(tmp_path):
    record = ValidationRecord(step=5, loss=math.nan, si_sdr=3.0, si_sdri=-math.inf, n_items=10, best=False, lr=1e-3)
    append_record(tmp_path / "validation.jsonl", record)

    assert same(read_validation(tmp_path / "validation.jsonl"), [record])


def test_orders_and_items_of_a_validation_read_back_equal_and_are_empty_in_an_old_row(tmp_path):
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


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_nonfinite_number_is_written_as_null_and_text(tmp_path, value, text):
    append_record(tmp_path / "steps.jsonl", replace(STEP, loss=value))

    row = strict_json((tmp_path / "steps.jsonl").read_text())

    assert (row["loss"], row["loss_text"]) == (None, text)


def test_nonfinite_evidence_is_written_as_null_and_text(tmp_path):
    evidence = {"loss": math.nan, "norms": [1.0, math.inf], "layer": {"max": -math.inf}}
    append_record(tmp_path / "events.jsonl", Event("STEP_SKIPPED_NONFINITE_LOSS", 1, 0, "left out", evidence=evidence))

    row = strict_json((tmp_path / "events.jsonl").read_text())

    assert row["evidence"] == {
        "loss": None, "loss_text": "nan", "norms": [1.0, None], "layer": {"max": None, "max_text": "-inf"},
    }  # fmt: skip


def test_each_record_is_one_line_whatever_its_text_contains(tmp_path):
    path = tmp_path / "events.jsonl"
    for name in ("a\nb.wav", "\u2028\u00e9.wav", '<img src=x onerror=alert(1)>"'):
        append_record(path, Event("AUDIO_NONFINITE", 1, 0, name, (name,)))

    rows, n_torn = read_rows(path)

    assert [row["message"] for row in rows] == ["a\nb.wav", "\u2028\u00e9.wav", '<img src=x onerror=alert(1)>"']
    assert n_torn == 0
    assert path.read_bytes().count(b"\n") == 3


@given(st.data())
def test_a_torn_line_is_counted_and_the_others_are_read(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        for step in (1, 2, 3):
            append_record(path, replace(STEP, step=step))
        first, second, third = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(first + second + third[: data.draw(st.integers(1, len(third) - 2))])
        rows, n_torn = read_rows(path)

    assert [row["step"] for row in rows] == [1, 2]
    assert n_torn == 1


def test_every_outcome_but_a_filtered_batch_has_an_event_code_of_its_own():
    skipped = {code for code in EVENT_CODES if code.startswith("STEP_SKIPPED_")}

    assert {skip_code(outcome) for outcome in SKIPPED_OUTCOMES if outcome != "all_filtered"} == skipped


def test_every_event_code_is_written_somewhere_and_none_is_missing_from_the_list():
    sources = [path for path in Path(unbraid.__file__).parent.rglob("*.py") if path.name != "records.py"]
    constants = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    calls = {
        call.args[0].value
        for path in sources
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in ("emit", "Event", "AudioFault")
    }
    written = {code for code in EVENT_CODES if not code.startswith("STEP_SKIPPED_")}

    assert written <= constants
    assert len(calls) > 15
    assert calls <= set(EVENT_CODES)


def test_reading_records_and_audio_needs_no_torch():
    code = "import sys, unbraid.records, unbraid.run_directory, unbraid.audio; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
