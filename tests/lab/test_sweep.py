"""Sweeps: the same weights and batches for all arms, interruption and resumption, and arms that diverge."""

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
    END_FILE,
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


def step_rows(run):
    """The rows of a run's steps without timings."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_rows(run.directory.steps)[0]]


def train_all(runs, stop=None):
    return list(run_sweep(runs, stop=stop or StopRequest()))


def test_over_options_are_multiplied_and_name_the_arms():
    arms = arms_from_options(["optim.name=sgd,adam", "clip.name=none,fixed"])

    assert [arm.name for arm in arms] == [
        "optim.name=sgd,clip.name=none",
        "optim.name=sgd,clip.name=fixed",
        "optim.name=adam,clip.name=none",
        "optim.name=adam,clip.name=fixed",
    ]
    assert arms[2].overrides == ("optim.name=adam", "clip.name=none")


def test_a_comma_within_brackets_does_not_separate_values():
    first, second = arms_from_options(["data.gains_db=[-5, 0],[0, 0]"])

    assert first.overrides == ("data.gains_db=[-5, 0]",)
    assert second.overrides == ("data.gains_db=[0, 0]",)


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_bad_over_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(RecipeError, match=message):
        arms_from_options(options)


def test_bad_seeds_and_unknown_components_are_refused_before_anything_runs(recipe_file, tmp_path):
    file = recipe_file()
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="--seeds 0 must be 1 or more"):
        plan_runs(file, [PLAIN], seeds=0, out=out)
    with pytest.raises(RecipeError, match=r"optim.name=sdg.*'sdg' is unknown.*Did you mean 'sgd'"):
        plan_runs(file, [PLAIN, *arms_from_options(["optim.name=sdg"])], seeds=1, out=out)
    with pytest.raises(RecipeError, match="--seeds"):
        plan_runs(file, [PLAIN], seeds=1, out=out, overrides=["data.seed=3"])
    assert not out.exists()


def test_missing_data_leave_no_folder_behind(recipe_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        plan_runs(recipe_file(), [PLAIN], seeds=1, out=out, overrides=[f"data.path={tmp_path / 'nowhere'}"])
    assert not out.exists()


def test_equal_arms_have_equal_records_and_others_start_alike(recipe_file, tmp_path):
    arms = [Arm("first", ()), Arm("equal", ()), Arm("sgd", ("optim.name=sgd",))]
    runs = plan_runs(recipe_file(), arms, seeds=2, out=tmp_path, overrides=SHORT)
    train_all(runs)
    first, equal, sgd, other_seed, *_ = (step_rows(run) for run in runs)

    assert first == equal
    assert sgd[0]["loss"] == first[0]["loss"]  # the same weights, the same batch
    assert sgd[0]["grad_norm"] == first[0]["grad_norm"]
    assert sgd[-1]["loss"] != first[-1]["loss"]
    assert other_seed[0]["loss"] != first[0]["loss"]


class StopAt(StopRequest):
    """As if a signal came while a step was under way."""

    def __init__(self, run, step):
        super().__init__()
        self.run = run
        self.step = step

    def __getattribute__(self, name):
        if name == "signal":
            path = object.__getattribute__(self, "run").directory.steps
            if path.exists() and len(read_rows(path)[0]) >= object.__getattribute__(self, "step"):
                return int(signal.SIGTERM)
        return object.__getattribute__(self, name)


def test_an_interrupted_sweep_resumes_to_the_same_records(recipe_file, tmp_path):
    file = recipe_file()
    arms = [PLAIN, Arm("sgd", ("optim.name=sgd",))]
    uninterrupted = plan_runs(file, arms, seeds=1, out=tmp_path / "uninterrupted", overrides=SHORT)
    train_all(uninterrupted)
    interrupted = plan_runs(file, arms, seeds=1, out=tmp_path / "interrupted", overrides=SHORT)
    with pytest.raises(Interrupted) as stopped:
        train_all(interrupted, StopAt(interrupted[1], 2))
    ended_at = (interrupted[0].directory.path / END_FILE).stat().st_mtime_ns
    assert stopped.value.number == signal.SIGTERM
    assert (interrupted[0].directory.path / END_FILE).exists()
    assert not (interrupted[1].directory.path / END_FILE).exists()
    assert 0 < len(step_rows(interrupted[1])) < 4

    ended = train_all(interrupted)

    assert [end.how for _, end in ended] == ["finished", "finished"]
    assert (interrupted[0].directory.path / END_FILE).stat().st_mtime_ns == ended_at  # not trained again
    assert [step_rows(run) for run in interrupted] == [step_rows(run) for run in uninterrupted]


def test_an_arm_that_diverges_is_a_result_and_the_sweep_continues(recipe_file, tmp_path):
    arms = [Arm("wild", ("optim.name=sgd", "optim.lr=1e30", "clip.name=none")), PLAIN]
    overrides = ["train.max_steps=60", *SHORT[1:]]
    runs = plan_runs(recipe_file(), arms, seeds=1, out=tmp_path, overrides=overrides)
    (wild, wild_end), (plain, plain_end) = train_all(runs)

    assert wild_end.how == "diverged"
    assert 0 < wild_end.step < 60
    assert wild_end.reason
    assert plain_end.how == "finished"
    assert summarise_run(wild, wild_end).n_skipped > 0
    assert summarise_run(wild, wild_end).si_sdri is None
    assert summarise_run(plain, plain_end).si_sdri is not None
    (line,) = unfinished_lines([(wild, wild_end), (plain, plain_end)])
    assert str(wild.directory.path) in line
    assert [end for _, end in train_all(runs)] == [wild_end, plain_end]


def test_a_full_disk_is_no_result_and_the_run_resumes_later(recipe_file, tmp_path, monkeypatch):
    (run,) = plan_runs(recipe_file(), [PLAIN], seeds=1, out=tmp_path, overrides=SHORT)

    def raise_disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("unbraid.train.loop.save_checkpoint", raise_disk_full)
        with pytest.raises(TrainingStopped, match="Free some disk space"):
            train_all([run])
    assert not (run.directory.path / END_FILE).exists()

    assert train_all([run])[0][1].how == "finished"


def test_another_recipe_in_the_same_folder_is_refused(recipe_file, tmp_path):
    file = recipe_file()
    train_all(plan_runs(file, [PLAIN], seeds=1, out=tmp_path, overrides=SHORT))

    with pytest.raises(CheckpointError, match=r"optim.lr was 0.001, is 0.01"):
        plan_runs(file, [PLAIN], seeds=1, out=tmp_path, overrides=[*SHORT, "optim.lr=1e-2"])


def test_a_start_from_a_run_that_has_continued_since_is_refused(recipe_file, tmp_path):
    file = recipe_file()
    base = RunDirectory(tmp_path / "base")
    list(train(load_recipe(file, SHORT), base))
    init = f"model.init={base.checkpoints / 'last'}"
    train_all(plan_runs(file, [PLAIN], seeds=1, out=tmp_path / "sweep", overrides=[*SHORT, init]))
    list(train(load_recipe(file, [*SHORT, "train.max_steps=9", "save.keep=9"]), base, resume=True))

    with pytest.raises(CheckpointError, match=r"model\.init was .*, is "):
        plan_runs(file, [PLAIN], seeds=1, out=tmp_path / "sweep", overrides=[*SHORT, init])


def test_the_final_loss_is_the_mean_over_the_last_tenth_of_the_steps(recipe_file, tmp_path):
    (run,) = plan_runs(recipe_file(), [PLAIN], seeds=1, out=tmp_path, overrides=["train.max_steps=20", *SHORT[1:]])
    ((_, end),) = train_all([run])
    losses = [record.loss for record in read_steps(run.directory.steps)]

    assert summarise_run(run, end).loss == pytest.approx(sum(losses[-2:]) / 2)
    assert final_loss([]) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_race_stopped_by_a_signal_says_how_to_resume_and_does(recipe_file, tmp_path, number):
    out = tmp_path / "race"
    numbers = tmp_path / "race.json"
    words = ["lab", "race", str(recipe_file()), "--over", "optim.name=adam,sgd", "--seeds", "1", "-o", str(out)]
    words += ["--steps", "60", "--json", str(numbers), "--set", "validate.every_steps=0", "--set", "save.every_steps=0"]
    command = [sys.executable, "-m", "unbraid", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = out / "optim.name=adam" / "seed-0" / "steps.jsonl"
    while not steps.exists() or len(read_rows(steps)[0]) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]

    assert process.returncode == 128 + number, printed
    assert "To resume:" in printed
    assert "Traceback" not in printed
    assert not numbers.exists()

    resumed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert [run["ended"]["how"] for run in json.loads(numbers.read_text())["runs"]] == ["finished", "finished"]
    assert "is ahead" in resumed.stdout
    assert "dashboard" in resumed.stdout
