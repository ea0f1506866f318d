import json
import math
from dataclasses import replace

import pytest

from unbraid.io import to_json_row
from unbraid.records import Event, StepRecord, append_record, read_rows, read_steps
from unbraid.schema_version import SCHEMA_VERSION, steps_schema_version, upgrade_row

STEP = StepRecord(
    step=1, epoch=0, outcome="trained", loss=-3.5, grad_norm=1.25, max_norm=5.0, lr=1e-3, loss_scale=1.0,
    n_trained=2, n_filtered=1, n_bad=0,
)  # fmt: skip
VERSION_2_STEP = {
    "step": 7, "outcome": "loss_scale", "loss": None, "loss_text": "nan", "limit": None, "limit_text": "inf",
    "norm_after": 1.5, "n_easy": 3, "n_trained": 1, "n_bad": 0, "epoch": 0, "grad_norm": 2.0, "lr": 1e-3,
    "loss_scale": 1024.0,
    "items": [
        {
            "item": {"purpose": "train", "epoch": 0, "index": 4, "files": ["a.wav"]}, "loss": -1.0, "weight": 1.0,
            "order": [1, 0], "levels_db": [-20.0, -22.0], "likeness": 0.25, "residual_db": -3.0, "beside_db": -40.0,
            "source_levels_db": [-21.0, -23.0],
        }
    ],
}  # fmt: skip


def test_a_step_of_version_2_is_read_under_todays_names(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps(VERSION_2_STEP) + "\n")

    [row], _ = read_rows(path)
    [step] = read_steps(path)

    assert row["max_norm_text"] == "inf"
    assert not {"limit", "limit_text", "norm_after", "n_easy"} & set(row)
    assert (step.outcome, step.max_norm, step.clipped_grad_norm, step.n_filtered) == ("fp16_overflow", math.inf, 1.5, 3)
    assert math.isnan(step.loss)
    [item] = step.items
    assert (item.estimate_levels_db, item.similarity, item.source_residual_db) == ((-20.0, -22.0), 0.25, -40.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("STEP_SKIPPED_LOSS_SCALE", "STEP_SKIPPED_FP16_OVERFLOW"),
        ("CHECKPOINT_PASSED_OVER", "CHECKPOINT_SKIPPED"),
        ("RUN_BEGUN_AGAIN", "RUN_RESTARTED"),
        ("CHOSEN", "AUTO_CHOSEN"),
    ],
)
def test_an_event_of_version_2_is_read_under_its_new_code(old, new):
    row = {"code": old, "step": 3, "message": "why"}

    assert upgrade_row(row) == {"code": new, "step": 3, "message": "why"}


def test_rows_of_today_are_read_unchanged(tmp_path):
    step = to_json_row(replace(STEP, outcome="fp16_overflow", max_norm=math.inf))
    event = to_json_row(Event("AUDIO_NONFINITE", 1, 0, "bad.wav"))

    assert upgrade_row(dict(step)) == step
    assert upgrade_row(dict(event)) == event


def test_the_schema_version_of_a_run_is_that_of_its_first_step(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(json.dumps(VERSION_2_STEP) + "\n")
    append_record(old, STEP)
    append_record(new, STEP)

    assert steps_schema_version(old) == 2
    assert steps_schema_version(new) == SCHEMA_VERSION
    assert steps_schema_version(tmp_path / "missing.jsonl") == SCHEMA_VERSION
