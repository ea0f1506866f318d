"""A grid of runs: the same weights and batches for all arms, gone on with, and no arm ends the others' race."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from unbraid.config.recipe import load_recipe
from unbraid.errors import CheckpointError, RecipeError, TrainingStopped, UserError
from unbraid.lab.sweep import (
    ENDED,
    Arm,
    Interrupted,
    arms_from_options,
    final_loss,
    plan_runs,
    run_sweep,
    summarise_run,
    unfinished_lines,
)
from unbraid.records import TIMING_FIELDS, read_rows, read_steps
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest

PLAIN = Arm("plain", ())
SHORT = ["train.max_steps=4", "validate.every_steps=0", "save.every_steps=0", "validate.n_items=1", "data.batch_size=2"]


def recorded(cell):
    """Everything written of a run's steps but what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_rows(cell.directory.steps)[0]]


def go(cells, stop=None):
    return list(run_sweep(cells, stop=stop or StopRequest()))


def test_over_is_multiplied_out_and_names_folders_that_can_be_read():
    arms = arms_from_options(["optim.name=sgd,adam", "clip.name=none,fixed"])

    assert [arm.name for arm in arms] == [
        "optim.name=sgd,clip.name=none",
        "optim.name=sgd,clip.name=fixed",
        "optim.name=adam,clip.name=none",
        "optim.name=adam,clip.name=fixed",
    ]
    assert arms[2].overrides == ("optim.name=adam", "clip.name=none")


def test_a_comma_within_brackets_does_not_part_values():
    (one, two) = arms_from_options(["data.gains_db=[-5, 0],[0, 0]"])

    assert one.overrides == ("data.gains_db=[-5, 0]",)
    assert two.overrides == ("data.gains_db=[0, 0]",)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (["optim.name"], "must look like"),
        (["optim.name="], "must look like"),
        (["lr=1,2"], "must look like"),
        (["optim.lr=1e-3,0.001"], "twice"),
        (["optim.name=sgd,adam,sgd"], "twice"),
        (["optim.lr=1", "optim.lr=2"], "given twice"),
        (["data.seed=1,2"], "--seeds"),
        ([], "something to compare"),
    ],
)
def test_what_over_does_not_take_is_said_in_one_sentence(over, said):
    with pytest.raises(RecipeError, match=said):
        arms_from_options(over)


def test_no_seeds_an_unknown_part_and_a_seed_of_ones_own_are_refused_before_anything_runs(recipe_file, tmp_path):
    file, out = recipe_file(), tmp_path / "out"
    with pytest.raises(RecipeError, match="--seeds 0 must be 1 or more"):
        plan_runs(file, [PLAIN], seeds=0, out=out)
    with pytest.raises(RecipeError, match=r"optim.name=sdg.*'sdg' is not one of.*Did you mean 'sgd'"):
        plan_runs(file, [PLAIN, *arms_from_options(["optim.name=sdg"])], seeds=1, out=out)
    with pytest.raises(RecipeError, match="--seeds"):
        plan_runs(file, [PLAIN], seeds=1, out=out, overrides=["data.seed=3"])
    assert not out.exists()


def test_data_that_are_not_there_leave_no_folder_behind(recipe_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        plan_runs(recipe_file(), [PLAIN], seeds=1, out=out, overrides=[f"data.path={tmp_path / 'nowhere'}"])
    assert not out.exists()


def test_arms_that_are_the_same_have_the_same_records_and_others_begin_alike(recipe_file, tmp_path):
    arms = [Arm("one", ()), Arm("two", ()), Arm("three", ("optim.name=sgd",))]
    cells = plan_runs(recipe_file(), arms, seeds=2, out=tmp_path, overrides=SHORT)
    go(cells)
    one, two, three, other_seed, *_ = (recorded(cell) for cell in cells)

    assert one == two
    assert three[0]["loss"] == one[0]["loss"]  # the same weights, the same batch
    assert three[0]["grad_norm"] == one[0]["grad_norm"]
    assert three[-1]["loss"] != one[-1]["loss"]
    assert other_seed[0]["loss"] != one[0]["loss"]


class StopAt(StopRequest):
    """As if a signal came while a step was under way."""

    def __init__(self, cell, step):
        super().__init__()
        self.cell, self.step = cell, step

    def __getattribute__(self, name):
        if name == "signal":
            path = object.__getattribute__(self, "cell").directory.steps
            if path.exists() and len(read_rows(path)[0]) >= object.__getattribute__(self, "step"):
                return int(signal.SIGTERM)
        return object.__getattribute__(self, name)


def test_a_grid_stopped_and_gone_on_with_is_as_one_never_stopped(recipe_file, tmp_path):
    file, arms = recipe_file(), [PLAIN, Arm("sgd", ("optim.name=sgd",))]
    whole = plan_runs(file, arms, seeds=1, out=tmp_path / "whole", overrides=SHORT)
    go(whole)
    parted = plan_runs(file, arms, seeds=1, out=tmp_path / "parted", overrides=SHORT)
    with pytest.raises(Interrupted) as stopped:
        go(parted, StopAt(parted[1], 2))
    first = (parted[0].directory.path / ENDED).stat().st_mtime_ns
    assert stopped.value.number == signal.SIGTERM
    assert (parted[0].directory.path / ENDED).exists()
    assert not (parted[1].directory.path / ENDED).exists()
    assert 0 < len(recorded(parted[1])) < 4

    ended = go(parted)

    assert [how.how for _, how in ended] == ["finished", "finished"]
    assert (parted[0].directory.path / ENDED).stat().st_mtime_ns == first  # not done again
    assert [recorded(cell) for cell in parted] == [recorded(cell) for cell in whole]


def test_an_arm_that_diverges_is_a_result_and_the_race_goes_on(recipe_file, tmp_path):
    arms = [Arm("wild", ("optim.name=sgd", "optim.lr=1e30", "clip.name=none")), PLAIN]
    overrides = ["train.max_steps=60", *SHORT[1:]]
    cells = plan_runs(recipe_file(), arms, seeds=1, out=tmp_path, overrides=overrides)
    (wild, how), (plain, other) = go(cells)

    assert how.how == "diverged"
    assert 0 < how.step < 60
    assert how.reason
    assert other.how == "finished"
    assert summarise_run(wild, how).left_out > 0
    assert summarise_run(wild, how).si_sdri is None
    assert summarise_run(plain, other).si_sdri is not None
    (told,) = unfinished_lines([(wild, how), (plain, other)])
    assert str(wild.directory.path) in told
    again = go(cells)
    assert [one for _, one in again] == [how, other]


def test_a_full_disk_is_no_outcome_and_the_run_is_gone_on_with(recipe_file, tmp_path, monkeypatch):
    (cell,) = plan_runs(recipe_file(), [PLAIN], seeds=1, out=tmp_path, overrides=SHORT)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("unbraid.train.loop.save_checkpoint", full)
        with pytest.raises(TrainingStopped, match="make room"):
            go([cell])
    assert not (cell.directory.path / ENDED).exists()

    assert go([cell])[0][1].how == "finished"


def test_another_recipe_in_the_same_folder_is_refused(recipe_file, tmp_path):
    file = recipe_file()
    go(plan_runs(file, [PLAIN], seeds=1, out=tmp_path, overrides=SHORT))

    with pytest.raises(CheckpointError, match=r"optim.lr was 0.001, is 0.01"):
        plan_runs(file, [PLAIN], seeds=1, out=tmp_path, overrides=[*SHORT, "optim.lr=1e-2"])


def test_arms_from_a_run_that_went_on_meanwhile_are_refused(recipe_file, tmp_path):
    file, base = recipe_file(), RunDirectory(tmp_path / "base")
    list(train(load_recipe(file, SHORT), base))
    init = f"model.init={base.checkpoints / 'last'}"
    go(plan_runs(file, [PLAIN], seeds=1, out=tmp_path / "grid", overrides=[*SHORT, init]))
    list(train(load_recipe(file, [*SHORT, "train.max_steps=9", "save.keep=9"]), base, resume=True))

    with pytest.raises(CheckpointError, match=r"model\.init was .*, is "):
        plan_runs(file, [PLAIN], seeds=1, out=tmp_path / "grid", overrides=[*SHORT, init])


def test_the_final_loss_is_that_of_the_last_tenth_without_steps_left_out(recipe_file, tmp_path):
    (cell,) = plan_runs(recipe_file(), [PLAIN], seeds=1, out=tmp_path, overrides=["train.max_steps=20", *SHORT[1:]])
    ((_, how),) = go([cell])
    losses = [record.loss for record in read_steps(cell.directory.steps)]

    assert summarise_run(cell, how).loss == pytest.approx(sum(losses[-2:]) / 2)
    assert final_loss([]) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_race_says_how_to_go_on_and_the_same_command_does(recipe_file, tmp_path, number):
    out, found = tmp_path / "race", tmp_path / "race.json"
    words = ["lab", "race", str(recipe_file()), "--over", "optim.name=adam,sgd", "--seeds", "1", "-o", str(out)]
    words += ["--steps", "60", "--json", str(found), "--set", "validate.every_steps=0", "--set", "save.every_steps=0"]
    command = [sys.executable, "-m", "unbraid", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = out / "optim.name=adam" / "seed-0" / "steps.jsonl"
    while not steps.exists() or len(read_rows(steps)[0]) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]

    assert process.returncode == 128 + number, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert not found.exists()

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [one["ended"]["how"] for one in json.loads(found.read_text())["runs"]] == ["finished", "finished"]
    assert "Ahead is" in ended.stdout
    assert "dashboard" in ended.stdout
