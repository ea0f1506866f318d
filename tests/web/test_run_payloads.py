"""What is said of a run beside its curves is true of its files."""

import json
import os
import time

import numpy as np
import pytest
from runs import add_steps, write_run

from unbraid.web.chart_payloads import plain
from unbraid.web.run_payloads import about, flat, gains, judged, overview


def age(path, seconds):
    then = time.time() - seconds
    for log in ("steps", "validation", "events"):
        os.utime(path / f"{log}.jsonl", (then, then))


@pytest.mark.parametrize(
    ("max_steps", "seconds", "state"), [(400, 0, "finished"), (1000, 0, "running"), (1000, 3600, "still")]
)
def test_the_state_of_a_run(tmp_path, max_steps, seconds, state):
    path = write_run(tmp_path / "run", max_steps=max_steps)
    age(path, seconds)

    found = overview(path)

    assert found["state"] == state
    assert (found["step"], found["max_steps"]) == (400, max_steps)


def test_the_last_and_the_best_improvement():
    rows = [{"si_sdri": 1.0}, {"si_sdri": 3.0}, {"si_sdri": None}, {"si_sdri": 2.0}, {"si_sdri": float("inf")}]

    assert gains(rows) == {"si_sdri": 2.0, "best_si_sdri": 3.0}
    assert gains([]) == {"si_sdri": None, "best_si_sdri": None}


def test_a_run_of_slow_steps_does_not_stand_still_within_one(tmp_path):
    path = write_run(tmp_path / "run", max_steps=1000)
    with (path / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 401, "outcome": "trained", "seconds": 100.0, "data_seconds": 0.0}) + "\n")
    age(path, 300)

    assert overview(path)["state"] == "running"


def test_an_empty_and_a_broken_run_say_so(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.toml").write_text("[train\n")

    found = overview(empty)

    assert found["state"] == "empty"
    assert found["problem"].startswith("recipe.toml cannot be read")
    assert judged(empty)["problem"] != ""
    assert about(empty)["recipe"] == {}


def test_the_recipe_is_told_key_by_key():
    table = {"optim": {"lr": 1e-3}, "filter": [{"name": "threshold"}], "data": {"gains_db": [-5, 0], "path": "here"}}

    assert flat(table) == {
        "optim.lr": "0.001",
        "filter.0.name": "threshold",
        "data.gains_db": "[-5, 0]",
        "data.path": "here",
    }


def test_an_incident_names_its_files(tmp_path):
    path = write_run(tmp_path / "run")
    folder = path / "incidents" / "step-000007-rank-0"
    folder.mkdir(parents=True)
    said = {"step": 7, "outcome": "nonfinite_loss", "verdict": "Example 1.", "items": [{"files": ["a.wav", "b.wav"]}]}
    (folder / "incident.json").write_text(json.dumps(said))
    (path / "incidents" / "step-000009-rank-0").mkdir()  # left by a full disk

    first, second = about(path)["incidents"]

    assert first["files"] == ["a.wav", "b.wav"]
    assert first["command"].endswith("step-000007-rank-0")
    assert (second["step"], second["files"]) == (None, [])


def test_five_digits_are_kept_and_what_is_not_finite_is_null():
    values = np.array([1234567.0, 0.000123456789, 0.0, np.nan, np.inf, -3.14159265])

    assert plain(values) == [1234600.0, 0.00012346, 0.0, None, None, -3.1416]


def test_a_long_line_at_the_end_does_not_hide_the_run(tmp_path):
    path = write_run(tmp_path / "run", n_steps=400)
    blocks = {f"a.long.name.of.a.block.{n}": {"grad_norm": 1.0, "update_ratio": 1e-3} for n in range(64)}
    with (path / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 401, "outcome": "trained", "blocks": blocks}) + "\n")

    assert overview(path)["step"] == 401
    add_steps(path, 402, 1)
    assert overview(path)["step"] == 402


def test_a_run_that_validates_does_not_stand_still(tmp_path):
    path = write_run(
        tmp_path / "run", max_steps=1000, change=lambda run: run.recipe.update(validate={"every_steps": 200})
    )
    age(path, 600)

    assert overview(path)["state"] == "running"
