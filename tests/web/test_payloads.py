"""What the page is sent about a run agrees with the run's files."""

import json
import os
import time

import numpy as np
import pytest
from runs import add_steps, write_run

from unbraid.records import FAULT_OUTCOMES, SKIPPED_OUTCOMES
from unbraid.web.downsample import downsample_steps
from unbraid.web.payloads import (
    NO_IMPROVEMENT,
    _read_pointer,
    chart,
    diagnosis,
    flatten,
    overview,
    rounded,
    run_details,
    update_improvement,
    validation_chart,
)
from unbraid.web.step_columns import step_columns


def set_age(path, seconds):
    """Make the logs look as if they were last written some seconds ago."""
    then = time.time() - seconds
    for log in ("steps", "validation", "events"):
        os.utime(path / f"{log}.jsonl", (then, then))


@pytest.mark.parametrize(
    ("max_steps", "seconds", "state"), [(400, 0, "finished"), (1000, 0, "running"), (1000, 3600, "idle")]
)
def test_the_state_of_a_run(tmp_path, max_steps, seconds, state):
    path = write_run(tmp_path / "run", max_steps=max_steps)
    set_age(path, seconds)

    entry = overview(path)

    assert entry["state"] == state
    assert (entry["step"], entry["max_steps"]) == (400, max_steps)


def test_the_last_and_the_best_improvement():
    rows = [{"si_sdri": 1.0}, {"si_sdri": 3.0}, {"si_sdri": None}, {"si_sdri": 2.0}, {"si_sdri": float("inf")}]

    improvement = update_improvement(NO_IMPROVEMENT, rows)

    assert improvement == {"si_sdri": 2.0, "best_si_sdri": 3.0}
    assert update_improvement(improvement, [{"si_sdri": None}]) == improvement
    assert update_improvement(NO_IMPROVEMENT, []) == {"si_sdri": None, "best_si_sdri": None}


def test_a_run_of_slow_steps_is_not_idle_within_one(tmp_path):
    path = write_run(tmp_path / "run", max_steps=1000)
    with (path / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 401, "outcome": "trained", "seconds": 100.0, "data_seconds": 0.0}) + "\n")
    set_age(path, 300)

    assert overview(path)["state"] == "running"


def test_a_run_without_steps_is_empty_and_its_bad_recipe_is_reported(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.toml").write_text("[train\n")

    entry = overview(empty)

    assert entry["state"] == "empty"
    assert entry["problem"].startswith("recipe.toml cannot be read")
    assert diagnosis(empty)["problem"] != ""
    assert run_details(empty)["recipe"] == {}


def test_a_recipe_is_flattened_to_dotted_keys():
    table = {"optim": {"lr": 1e-3}, "filter": [{"name": "threshold"}], "data": {"gains_db": [-5, 0], "path": "here"}}

    assert flatten(table) == {
        "optim.lr": "0.001",
        "filter.0.name": "threshold",
        "data.gains_db": "[-5, 0]",
        "data.path": "here",
    }


def test_an_incident_names_its_files(tmp_path):
    path = write_run(tmp_path / "run")
    folder = path / "incidents" / "step-000007-rank-0"
    folder.mkdir(parents=True)
    items = [{"files": ["a.wav", "b.wav"]}]
    incident = {"step": 7, "outcome": "nonfinite_loss", "verdict": "Example 1.", "items": items}
    (folder / "incident.json").write_text(json.dumps(incident))
    (path / "incidents" / "step-000009-rank-0").mkdir()  # left by a full disk

    first, second = run_details(path)["incidents"]

    assert first["files"] == ["a.wav", "b.wav"]
    assert first["command"].endswith("step-000007-rank-0")
    assert (second["step"], second["files"]) == (None, [])


def test_values_keep_five_digits_and_nonfinite_ones_become_none():
    values = np.array([1234567.0, 0.000123456789, 0.0, np.nan, np.inf, -3.14159265])

    assert rounded(values) == [1234600.0, 0.00012346, 0.0, None, None, -3.1416]


def test_a_long_last_line_does_not_hide_the_step(tmp_path):
    path = write_run(tmp_path / "run", n_steps=400)
    blocks = {f"a.long.name.of.a.block.{n}": {"grad_norm": 1.0, "update_ratio": 1e-3} for n in range(64)}
    with (path / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 401, "outcome": "trained", "blocks": blocks}) + "\n")

    assert overview(path)["step"] == 401
    add_steps(path, 402, 1)
    assert overview(path)["step"] == 402


def test_a_validating_run_is_not_idle(tmp_path):
    path = write_run(
        tmp_path / "run", max_steps=1000, change=lambda run: run.recipe.update(validate={"every_steps": 200})
    )
    set_age(path, 600)

    assert overview(path)["state"] == "running"


def test_a_chart_counts_skipped_steps_by_reason_and_says_which_are_faults():
    rows = [
        {"step": 1, "outcome": "trained", "loss": 1.0, "n_bad": 1},
        {"step": 2, "outcome": "nonfinite_loss"},
        {"step": 3, "outcome": "all_filtered"},
        {"step": 4, "outcome": "trained", "loss": 3.0, "n_bad": 0},
    ]

    payload = chart(downsample_steps([1, 2, 3, 4], step_columns(rows), max_buckets=2))

    assert payload["n_steps"] == [2, 2]
    assert payload["mean"]["loss"] == [1.0, 3.0]
    assert payload["flags"] == {"rescued": [1, 0], "nonfinite_loss": [1, 0], "all_filtered": [0, 1]}
    assert [flag["name"] for flag in payload["flag_names"]] == ["rescued", *SKIPPED_OUTCOMES]
    assert {flag["name"] for flag in payload["flag_names"] if flag["is_fault"]} == set(FAULT_OUTCOMES)


@pytest.mark.parametrize(("n_rows", "steps"), [(0, []), (3, [0, 1, 2]), (7, [0, 2, 4, 6]), (8, [0, 2, 4, 6, 7])])
def test_of_many_validations_every_nth_and_the_last_are_shown(n_rows, steps):
    rows = [{"step": step, "loss": -1.0} for step in range(n_rows)]

    assert validation_chart(rows, max_rows=4)["step"] == steps


@pytest.mark.parametrize("attack", ["link", "text", "long", "pipe"])
def test_a_pointer_shows_the_name_of_a_checkpoint_and_no_other_contents(tmp_path, attack):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "secret").write_text("step-1 is not all that is in here: hunter2")
    (checkpoints / "last").write_text("step-000007\n")
    best = checkpoints / "best"
    if attack == "link":
        best.symlink_to(tmp_path / "secret")
    elif attack == "pipe":
        os.mkfifo(best)
    else:
        best.write_text("hunter2" if attack == "text" else "step-1" + "0" * 200)

    assert _read_pointer(checkpoints / "last") == "step-000007"
    assert _read_pointer(best) == ""
