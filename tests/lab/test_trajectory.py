"""Trajectories: correct measurements, training that measuring does not change, and stopping and resuming."""

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import assert_same

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import RecipeError, UserError
from unbraid.lab import trajectory_run
from unbraid.lab.experiment import experiment_from_recipe
from unbraid.lab.trajectory import (
    StepMeasurement,
    Trajectory,
    correlate,
    log_or_nan,
    measure_steps,
    recipe_with_clipper,
)
from unbraid.lab.trajectory_run import run_arms
from unbraid.signals import StopRequest
from unbraid.train.step import train_step

DROPOUT = ["model.name=blstm", "model.hidden=4", "model.n_layers=2", "model.dropout=0.5", "model.n_fft=32"]
DROPOUT += ["model.hop_length=16"]


@pytest.fixture
def make_experiment(recipe_file):
    """Return a factory of experiment experiments; it takes overrides of the recipe."""
    file = recipe_file()
    return lambda *overrides: experiment_from_recipe(load_recipe(file, overrides), "tiny")


@pytest.mark.parametrize("overrides", [[], DROPOUT], ids=["conv_tasnet", "dropout"])
def test_measuring_does_not_change_training_bit_for_bit(make_experiment, overrides):
    experiment = make_experiment(*overrides)
    torch.manual_seed(3)
    plain = experiment.new_state()
    batches = experiment.training_batches()
    records = [train_step(plain, next(batches)) for _ in range(4)]
    rng_state = torch.get_rng_state()
    states = [experiment.new_state(), experiment.new_state()]
    often = list(measure_steps(experiment, states[0], n_steps=4, every=1))
    never = list(measure_steps(experiment, states[1], n_steps=4, every=5))

    assert torch.equal(torch.get_rng_state(), rng_state)
    for state in states:
        assert_same(plain.state_dict() | {"progress": None}, state.state_dict() | {"progress": None})
    for steps in (often, never):
        assert [s.loss for s in steps] == [r.loss for r in records]
        assert [s.grad_norm for s in steps] == [r.grad_norm for r in records]
    assert all(s.smoothness > 0 for s in often)
    assert all(s.smoothness is None for s in never)


def test_step_size_is_the_distance_the_weights_moved(make_experiment):
    experiment = make_experiment(
        "optim.name=sgd", "optim.lr=1e-3", "optim.momentum=0", "clip.name=fixed", "clip.name=fixed", "clip.max_norm=0.5"
    )
    steps = list(measure_steps(experiment, experiment.new_state(), n_steps=3, every=2))

    for step in steps:
        assert step.step_size == pytest.approx(1e-3 * min(step.grad_norm, 0.5), rel=1e-3)
    assert [s.smoothness is not None for s in steps] == [False, True, False]


def test_schedule_runs_over_the_steps_of_the_experiment(make_experiment):
    experiment = make_experiment("optim.name=sgd", "optim.momentum=0", "schedule.name=cosine", "clip.name=fixed")
    steps = list(measure_steps(experiment, experiment.new_state(), n_steps=4, every=4))

    lrs = [s.step_size / min(s.grad_norm, s.max_norm) for s in steps]
    expected = [(1 + math.cos(math.pi * n_done / 4)) / 2 for n_done in range(4)]
    assert np.allclose(lrs, np.array(expected) * lrs[0], rtol=1e-2)


def test_arm_of_skipped_steps_ends_early_and_the_next_arm_runs(make_experiment, tmp_path):
    experiment = make_experiment("train.loss_upper_limit=1e-9")
    for _ in range(2):  # the second time there is nothing to do
        comparison = run_arms(experiment, tmp_path, n_steps=30, every=30)

        assert [len(arm.steps) for arm in comparison.arms] == [11, 11]
        assert {s.outcome for s in comparison.arms[0].steps} == {"over_limit"}
        assert all(s.step_size == 0 for s in comparison.arms[0].steps)
        assert "Training ended early: 11 of the last 11 steps were skipped." in comparison.summary_lines()[1]


def measurements(rows):
    """Return one trained step for each row of loss, gradient norm and smoothness."""
    return tuple(
        StepMeasurement(step, "trained", loss, norm, math.inf, 1.0, smooth)
        for step, (loss, norm, smooth) in enumerate(rows, start=1)
    )


def test_correlation_is_of_logarithms_where_both_are_finite():
    norms = np.array([1.0, 10.0, 100.0, 7.0, np.nan, 0.0])
    smooth = np.array([2.0, 200.0, 20000.0, np.nan, 5.0, 5.0])

    arm = Trajectory("none", measurements(zip(-norms, norms, smooth, strict=True)))
    result = arm.correlation("grad_norm")
    assert result.r == pytest.approx(1)
    assert result.n_points == 3
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert correlate(log_or_nan(norms), log_or_nan(1 / smooth)).r == pytest.approx(-1)
    assert math.isnan(correlate(norms[:2], smooth[:2]).r)
    assert math.isnan(correlate(np.ones(4), np.arange(1.0, 5.0)).r)


def test_loss_is_correlated_without_a_logarithm():
    arm = Trajectory("none", measurements([(-1.0, 1.0, 1.0), (-2.0, 1.0, 10.0), (-3.0, 1.0, 100.0)]))

    assert arm.correlation("loss").r == pytest.approx(-1)
    assert arm.correlation("loss").n_points == 3


def test_correlation_can_skip_the_first_steps():
    rows = [(1.0, 1e6, 1e-6), (1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (1.0, 3.0, 9.0), (1.0, 4.0, None)]
    arm = Trajectory("none", measurements(rows))

    assert arm.correlation("grad_norm").r < 0
    late = arm.correlation("grad_norm", first_step=2)
    assert late.r == pytest.approx(1)
    assert late.n_points == 3


def test_arms_start_alike_and_differ_only_in_clipping(make_experiment, tmp_path):
    experiment = make_experiment("optim.name=sgd", "optim.lr=1e-5")
    comparison = run_arms(experiment, tmp_path, clips=("none", "autoclip", "recipe", "none"), n_steps=6, every=3)
    none, auto, own = comparison.arms

    assert [arm.clip for arm in comparison.arms] == ["none", "autoclip", "recipe"]
    assert none.steps[0].loss == auto.steps[0].loss == own.steps[0].loss
    assert all(s.max_norm == math.inf for s in none.steps)
    assert all(s.max_norm == 5.0 for s in own.steps)
    assert none.n_clipped == 0
    assert auto.n_clipped == sum(s.grad_norm > s.max_norm for s in auto.steps) > 0
    assert auto.steps[5].max_norm == pytest.approx(np.percentile(auto.column("grad_norm"), 10))


def test_95_percent_interval_covers_the_true_correlation_in_95_percent():
    true_r = 0.6
    rng = np.random.default_rng(0)
    samples = rng.multivariate_normal([0, 0], [[1, true_r], [true_r, 1]], (2000, 20))
    correlations = [correlate(sample[:, 0], sample[:, 1]) for sample in samples]
    coverage = np.mean([c.low < true_r < c.high for c in correlations])

    assert coverage == pytest.approx(0.95, abs=0.02)


def test_step_counts_as_clipped_by_its_norm_after_transforms(make_experiment, tmp_path):
    experiment = make_experiment(
        "optim.name=sgd",
        "optim.lr=1e-5",
        'transform=[{name="value", max_value=1e-6}]',
        "clip.name=fixed",
        "clip.max_norm=0.5",
    )
    (own,) = run_arms(experiment, tmp_path, clips=("recipe",), n_steps=3, every=3).arms

    assert min(s.grad_norm for s in own.steps) > 0.5
    assert own.n_clipped == 0


def test_arm_with_other_starting_weights_is_not_resumed(make_experiment, tmp_path):
    experiment = make_experiment("optim.name=sgd")
    run_arms(experiment, tmp_path, clips=("none",), n_steps=2, every=2)
    elsewhere = replace(experiment, weights={name: weight + 1 for name, weight in experiment.weights.items()})

    with pytest.raises(UserError, match="other starting weights"):
        run_arms(elsewhere, tmp_path, clips=("none", "autoclip"), n_steps=2, every=2)


def test_recipe_options_are_kept_for_its_own_clipper(make_experiment):
    recipe = make_experiment("clip.name=autoclip", "clip.percentile=50").recipe

    assert recipe_with_clipper(recipe, "autoclip").clip.options == {"percentile": 50}
    assert recipe_with_clipper(recipe, "none").clip.options == {}
    assert recipe_with_clipper(recipe, "recipe") == recipe
    with pytest.raises(RecipeError, match=r"'autoclop' is unknown.*Did you mean 'autoclip'"):
        recipe_with_clipper(recipe, "autoclop")


def test_resumed_run_equals_an_uninterrupted_one(make_experiment, tmp_path):
    experiment = make_experiment(*DROPOUT)
    stop = StopRequest()

    def interrupt(_done, text):
        if text.startswith("autoclip: step 3"):
            stop.signal = signal.SIGINT

    stopped = run_arms(experiment, tmp_path / "stopped", n_steps=6, every=2, stop=stop, progress=interrupt)
    whole = run_arms(experiment, tmp_path / "whole", n_steps=6, every=2)
    texts = []
    resumed = run_arms(
        experiment, tmp_path / "stopped", n_steps=6, every=2, progress=lambda _done, text: texts.append(text)
    )

    assert [len(arm.steps) for arm in stopped.arms] == [6, 3]
    assert resumed == whole
    assert [text.split(",")[0] for text in texts] == ["autoclip: step 4", "autoclip: step 5", "autoclip: step 6"]


def test_folder_of_another_experiment_is_refused_and_unchanged(make_experiment, tmp_path):
    run_arms(make_experiment(), tmp_path, clips=("none",), n_steps=2, every=1)
    for experiment, every in ((make_experiment("optim.lr=1e-4"), 1), (make_experiment(), 2)):
        with pytest.raises(UserError, match="Choose another --out"):
            run_arms(experiment, tmp_path, clips=("none",), n_steps=2, every=every)

    assert len(run_arms(make_experiment(), tmp_path, clips=("none",), n_steps=2, every=1).arms[0].steps) == 2


def run_command(recipe_file, out, *options):
    return cli.main(["lab", "trajectory", str(recipe_file()), "-o", str(out), *options])


def test_command_writes_figure_and_numbers(recipe_file, tmp_path, capsys):
    numbers = tmp_path / "deep" / "numbers.json"
    assert run_command(recipe_file, tmp_path / "out", "--steps", "8", "--every", "2", "--json", str(numbers)) == 0

    written = json.loads(numbers.read_text(), parse_constant=pytest.fail)
    assert [arm["clip"] for arm in written["arms"]] == ["none", "autoclip"]
    for arm in written["arms"]:
        assert len(arm["loss"]) == len(arm["grad_norm"]) == len(arm["step_size"]) == 8
        assert list(arm["smoothness"]) == ["2", "4", "6", "8"]
        assert arm["correlations"]["gradient norm with smoothness"]["points"] == 4
    assert set(written["arms"][0]["max_norm"]) == {None}
    assert (tmp_path / "out" / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(numbers) in printed
    assert "8 of 8 steps, 0 clipped, 0 skipped" in printed
    assert "over 4 points" in printed


def test_ctrl_c_draws_the_steps_so_far_and_the_same_command_resumes(recipe_file, tmp_path, monkeypatch, capsys):
    def interrupted(experiment, state, **options):
        for measurement in measure_steps(experiment, state, **options):
            if measurement.step == 5 and state.clipper.__class__.__name__ == "NoClip":
                os.kill(os.getpid(), signal.SIGINT)
            yield measurement

    monkeypatch.setattr(trajectory_run, "measure_steps", interrupted)
    options = ("--steps", "7", "--every", "1")
    assert run_command(recipe_file, tmp_path / "out", *options) == 130
    printed = capsys.readouterr().out
    assert "none: 5 of 7 steps" in printed
    assert "Stopped by signal 2. To resume: " in printed
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["none", "trajectory.json", "trajectory.png"]

    monkeypatch.undo()
    assert run_command(recipe_file, tmp_path / "out", *options) == 0
    assert "none: 7 of 7 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip", "autoclop"], "is unknown. Choose one of autoclip, fixed, none, zclip. Did you mean 'autoclip'?"),
        (["--every", "9", "--steps", "8"], "--every 9 is more than --steps 8"),
        (["--steps", "0"], "argument --steps: 0 must be above 0"),
        (["--set", "optim.lr=fast"], "optim.lr"),
        (["--set", "data.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_of_error_before_any_work(recipe_file, tmp_path, capsys, options, message):
    try:
        status = run_command(recipe_file, tmp_path / "out", *options)
    except SystemExit as exit_info:
        status = exit_info.code

    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_a_file_is_refused_before_any_work(recipe_file, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(SystemExit) as exit_info:
        run_command(recipe_file, tmp_path / "out", "--steps", "100000")

    assert exit_info.value.code == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_without_matplotlib_nothing_is_trained(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert run_command(recipe_file, tmp_path / "out") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_any_clipper_can_be_measured(make_experiment):
    experiment = make_experiment()
    experiment = replace(experiment, recipe=recipe_with_clipper(experiment.recipe, "zclip"))

    assert experiment.recipe.clip.name == "zclip"
    assert len(list(measure_steps(experiment, experiment.new_state(), n_steps=2, every=2))) == 2
