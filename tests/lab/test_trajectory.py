"""A training followed step by step: what is measured is right, and measuring changes nothing."""

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
from unbraid.lab.experiment import of_recipe
from unbraid.lab.trajectory import (
    Reading,
    Trajectory,
    clipped_by,
    correlation,
    flat,
    follow,
    gradient_of,
    logarithms,
    smoothness,
    with_clip,
)
from unbraid.lab.trajectory_run import run_arms
from unbraid.signals import StopRequest
from unbraid.train.step import train_step

DROPOUT = ["model.name=blstm", "model.hidden=4", "model.n_layers=2", "model.dropout=0.5", "model.n_fft=32"]
DROPOUT += ["model.hop_length=16"]


@pytest.fixture
def subject(recipe_file):
    """A factory of tiny subjects; takes overrides."""
    file = recipe_file()
    return lambda *overrides: of_recipe(load_recipe(file, overrides), "tiny")


def hessian(n, seed=0):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root + root.T  # indefinite: of a saddle


def test_on_a_quadratic_the_smoothness_is_the_hessian_along_the_step():
    matrix, rng = hessian(7), torch.Generator().manual_seed(1)
    for _ in range(5):
        weights, change = torch.randn(2, 7, dtype=torch.float64, generator=rng)
        exact = float((matrix @ change).norm() / change.norm())

        assert smoothness(lambda w: matrix @ w, weights, change) == pytest.approx(exact, rel=1e-12)


def test_along_an_eigenvector_it_is_the_eigenvalue_whatever_the_length_of_the_step():
    matrix = hessian(5)
    values, vectors = torch.linalg.eigh(matrix)
    for length in (1e-6, 1.0, 1e3):
        found = smoothness(lambda w: matrix @ w, torch.zeros(5, dtype=torch.float64), length * vectors[:, 0])
        assert found == pytest.approx(abs(float(values[0])), rel=1e-9)


def test_it_is_the_worst_of_the_places_and_not_the_last():
    def bump(weights):  # steep on the way, and level again at the end: the gradient of the sum of -cos
        return weights.sin()

    change = torch.tensor([math.pi], dtype=torch.float64)
    found = smoothness(bump, torch.zeros(1, dtype=torch.float64), change, fractions=(0.5, 1.0))

    assert found == pytest.approx(2 / math.pi)


def test_a_step_that_does_not_move_has_no_smoothness():
    assert math.isnan(smoothness(lambda w: w, torch.ones(3), torch.zeros(3)))


def test_a_step_shorter_than_float32_can_hold_is_divided_by_what_it_moved():
    weights, change = torch.ones(3), torch.full((3,), 4e-8)  # a third of the distance to the next number, or less

    found = smoothness(lambda w: 5 * w.double(), weights, 2 * change)

    assert found == pytest.approx(5)


@pytest.mark.parametrize("overrides", [[], DROPOUT], ids=["conv_tasnet", "dropout"])
def test_measuring_leaves_the_training_bit_for_bit_as_it_was(subject, overrides):
    tiny = subject(*overrides)
    torch.manual_seed(3)
    plain, stream = tiny.fork(), tiny.steps()
    records = [train_step(plain, next(stream)) for _ in range(4)]
    drawn = torch.get_rng_state()
    states = [tiny.fork(), tiny.fork()]
    often = list(follow(tiny, states[0], n_steps=4, every=1))
    never = list(follow(tiny, states[1], n_steps=4, every=5))

    assert torch.equal(torch.get_rng_state(), drawn)
    for state in states:
        assert_same(plain.state_dict() | {"progress": None}, state.state_dict() | {"progress": None})
    for readings in (often, never):
        assert [r.loss for r in readings] == [r.loss for r in records]
        assert [r.grad_norm for r in readings] == [r.grad_norm for r in records]
    assert all(r.smoothness > 0 for r in often)
    assert all(r.smoothness is None for r in never)


@pytest.mark.parametrize("overrides", [[], DROPOUT, ["train.accumulate=2"]], ids=["plain", "dropout", "accumulate"])
def test_the_gradient_that_is_compared_is_that_of_the_step(subject, overrides):
    tiny = subject(*overrides)
    state, parts = tiny.fork(), next(tiny.steps())
    model, before = tiny.model().train(), flat(state.unwrapped_model)
    record = train_step(state, parts)
    gradient = gradient_of(model, state.loss, parts, seed=state.seed, step=record.step)(before)

    assert float(gradient.norm()) == pytest.approx(record.grad_norm, rel=1e-5)


def test_what_is_measured_in_float32_is_what_float64_gives(subject):
    tiny = subject(*DROPOUT, "model.dropout=0")
    state, parts = tiny.fork(), next(tiny.steps())
    wide = [replace(p, mixture=p.mixture.double(), sources=p.sources.double()) for p in parts]
    before = flat(state.unwrapped_model)
    train_step(state, parts)
    change = flat(state.unwrapped_model) - before
    narrow = gradient_of(tiny.model().train(), state.loss, parts, seed=0, step=1)
    exact = gradient_of(tiny.model().double().train(), state.loss, wide, seed=0, step=1)

    found = smoothness(narrow, before, change)
    assert found == pytest.approx(smoothness(exact, before.double(), change.double()), rel=1e-3)


def test_the_step_size_is_how_far_the_weights_went(subject):
    tiny = subject(
        "optim.name=sgd", "optim.lr=1e-3", "optim.momentum=0", "clip.name=fixed", "clip.name=fixed", "clip.max_norm=0.5"
    )
    readings = list(follow(tiny, tiny.fork(), n_steps=3, every=2))

    for reading in readings:
        assert reading.step_size == pytest.approx(1e-3 * min(reading.grad_norm, 0.5), rel=1e-3)
    assert [r.smoothness is not None for r in readings] == [False, True, False]


def test_a_schedule_counts_over_the_steps_of_the_experiment(subject):
    tiny = subject("optim.name=sgd", "optim.momentum=0", "schedule.name=cosine", "clip.name=fixed")
    readings = list(follow(tiny, tiny.fork(), n_steps=4, every=4))

    rates = [r.step_size / min(r.grad_norm, r.max_norm) for r in readings]
    wanted = [(1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    assert np.allclose(rates, np.array(wanted) * rates[0], rtol=1e-2)


def test_an_arm_that_only_leaves_steps_out_ends_early_and_the_others_are_told(subject, tmp_path):
    tiny = subject("train.loss_upper_limit=1e-9")
    for _ in range(2):  # the second time there is nothing to do
        course = run_arms(tiny, tmp_path, n_steps=30, every=30)

        assert [len(arm.readings) for arm in course.arms] == [11, 11]
        assert {r.outcome for r in course.arms[0].readings} == {"over_limit"}
        assert all(r.step_size == 0 for r in course.arms[0].readings)
        assert "It ended there: 11 of the last 11 steps had to be left out." in course.sentences()[1]


def readings_of(columns):
    return tuple(
        Reading(place + 1, "trained", loss, norm, math.inf, 1.0, smooth)
        for place, (loss, norm, smooth) in enumerate(columns)
    )


def test_the_correlation_is_that_of_logarithms_where_both_are_known():
    norms = np.array([1.0, 10.0, 100.0, 7.0, np.nan, 0.0])
    smooth = np.array([2.0, 200.0, 20000.0, np.nan, 5.0, 5.0])

    arm = Trajectory("none", readings_of(zip(-norms, norms, smooth, strict=True)))
    found = arm.correlation("grad_norm")
    assert found.value == pytest.approx(1)
    assert found.n_points == 3
    assert all(math.isnan(end) for end in found.interval)
    assert correlation(logarithms(norms), logarithms(1 / smooth)).value == pytest.approx(-1)
    assert math.isnan(correlation(norms[:2], smooth[:2]).value)
    assert math.isnan(correlation(np.ones(4), np.arange(1.0, 5.0)).value)


def test_a_loss_below_0_counts_as_it_is():
    arm = Trajectory("none", readings_of([(-1.0, 1.0, 1.0), (-2.0, 1.0, 10.0), (-3.0, 1.0, 100.0)]))

    assert arm.correlation("loss").value == pytest.approx(-1)
    assert arm.correlation("loss").n_points == 3


def test_a_correlation_can_leave_out_the_first_steps():
    rows = [(1.0, 1e6, 1e-6), (1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (1.0, 3.0, 9.0), (1.0, 4.0, None)]
    arm = Trajectory("none", readings_of(rows))

    assert arm.correlation("grad_norm").value < 0
    late = arm.correlation("grad_norm", first_step=2)
    assert late.value == pytest.approx(1)
    assert late.n_points == 3


def test_every_arm_begins_alike_and_only_the_clipping_differs(subject, tmp_path):
    tiny = subject("optim.name=sgd", "optim.lr=1e-5")
    course = run_arms(tiny, tmp_path, clips=("none", "autoclip", "recipe", "none"), n_steps=6, every=3)
    none, auto, own = course.arms

    assert [arm.clip for arm in course.arms] == ["none", "autoclip", "recipe"]
    assert none.readings[0].loss == auto.readings[0].loss == own.readings[0].loss
    assert all(r.max_norm == math.inf for r in none.readings)
    assert all(r.max_norm == 5.0 for r in own.readings)
    assert none.clipped == 0
    assert auto.clipped == sum(r.grad_norm > r.max_norm for r in auto.readings) > 0
    assert auto.readings[5].max_norm == pytest.approx(np.percentile(auto.column("grad_norm"), 10))


def test_the_interval_of_a_correlation_holds_the_truth_as_often_as_it_says():
    rng, truth = np.random.default_rng(0), 0.6
    pairs = rng.multivariate_normal([0, 0], [[1, truth], [truth, 1]], (2000, 20))
    ends = np.array([correlation(one[:, 0], one[:, 1]).interval for one in pairs])
    held = np.mean((ends[:, 0] < truth) & (truth < ends[:, 1]))

    assert held == pytest.approx(0.95, abs=0.02)


def test_a_step_is_clipped_where_its_norm_after_transforms_was_too_long(subject, tmp_path):
    tiny = subject(
        "optim.name=sgd",
        "optim.lr=1e-5",
        'transform=[{name="value", max_value=1e-6}]',
        "clip.name=fixed",
        "clip.max_norm=0.5",
    )
    (own,) = run_arms(tiny, tmp_path, clips=("recipe",), n_steps=3, every=3).arms

    assert min(r.grad_norm for r in own.readings) > 0.5
    assert own.clipped == 0


def test_an_arm_that_began_at_other_weights_is_not_gone_on_with(subject, tmp_path):
    tiny = subject("optim.name=sgd")
    run_arms(tiny, tmp_path, clips=("none",), n_steps=2, every=2)
    elsewhere = replace(tiny, weights={name: weight + 1 for name, weight in tiny.weights.items()})

    with pytest.raises(UserError, match="began at other weights"):
        run_arms(elsewhere, tmp_path, clips=("none", "autoclip"), n_steps=2, every=2)


def test_the_recipes_own_options_stay_where_its_clipper_is_named(subject):
    recipe = subject("clip.name=autoclip", "clip.percentile=50").recipe

    assert clipped_by(recipe, "autoclip").clip.options == {"percentile": 50}
    assert clipped_by(recipe, "none").clip.options == {}
    assert clipped_by(recipe, "recipe") == recipe
    with pytest.raises(RecipeError, match=r"'autoclop' is not one of .* Did you mean 'autoclip'"):
        clipped_by(recipe, "autoclop")


def test_what_was_stopped_goes_on_as_if_it_had_not_been(subject, tmp_path):
    tiny, stop = subject(*DROPOUT), StopRequest()

    def strike(_done, text):
        if text.startswith("autoclip: step 3"):
            stop.signal = signal.SIGINT

    cut = run_arms(tiny, tmp_path / "cut", n_steps=6, every=2, stop=stop, progress=strike)
    whole = run_arms(tiny, tmp_path / "whole", n_steps=6, every=2)
    heard = []
    gone_on = run_arms(tiny, tmp_path / "cut", n_steps=6, every=2, progress=lambda _done, text: heard.append(text))

    assert [len(arm.readings) for arm in cut.arms] == [6, 3]
    assert gone_on == whole
    assert [text.split(",")[0] for text in heard] == ["autoclip: step 4", "autoclip: step 5", "autoclip: step 6"]


def test_a_folder_of_another_experiment_is_refused_and_left(subject, tmp_path):
    run_arms(subject(), tmp_path, clips=("none",), n_steps=2, every=1)
    for tiny, every in ((subject("optim.lr=1e-4"), 1), (subject(), 2)):
        with pytest.raises(UserError, match="give another --out"):
            run_arms(tiny, tmp_path, clips=("none",), n_steps=2, every=every)

    assert len(run_arms(subject(), tmp_path, clips=("none",), n_steps=2, every=1).arms[0].readings) == 2


def command(recipe_file, out, *more):
    return cli.main(["lab", "trajectory", str(recipe_file()), "-o", str(out), *more])


def test_the_command_leaves_figure_and_numbers(recipe_file, tmp_path, capsys):
    numbers = tmp_path / "deep" / "numbers.json"
    assert command(recipe_file, tmp_path / "out", "--steps", "8", "--every", "2", "--json", str(numbers)) == 0

    told = json.loads(numbers.read_text(), parse_constant=pytest.fail)
    assert [arm["clip"] for arm in told["arms"]] == ["none", "autoclip"]
    for arm in told["arms"]:
        assert len(arm["loss"]) == len(arm["grad_norm"]) == len(arm["step_size"]) == 8
        assert list(arm["smoothness"]) == ["2", "4", "6", "8"]
        assert arm["correlations"]["gradient norm with smoothness"]["points"] == 4
    assert set(told["arms"][0]["max_norm"]) == {None}
    assert (tmp_path / "out" / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert str(numbers) in said
    assert "8 of 8 steps, 0 clipped, 0 left out" in said
    assert "over 4 points" in said


def test_ctrl_c_draws_what_is_known_and_the_same_command_goes_on(recipe_file, tmp_path, monkeypatch, capsys):
    def struck(subject, state, **options):
        for reading in follow(subject, state, **options):
            if reading.step == 5 and state.clipper.__class__.__name__ == "NoClip":
                os.kill(os.getpid(), signal.SIGINT)
            yield reading

    monkeypatch.setattr(trajectory_run, "follow", struck)
    options = ("--steps", "7", "--every", "1")
    assert command(recipe_file, tmp_path / "out", *options) == 130
    said = capsys.readouterr().out
    assert "none: 5 of 7 steps" in said
    assert "Stopped by signal 2; go on with: " in said
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["none", "trajectory.json", "trajectory.png"]

    monkeypatch.undo()
    assert command(recipe_file, tmp_path / "out", *options) == 0
    assert "none: 7 of 7 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip", "autoclop"], "is not one of autoclip, fixed, none, zclip. Did you mean 'autoclip'?"),
        (["--every", "9", "--steps", "8"], "--every 9 is more than --steps 8"),
        (["--steps", "0"], "argument --steps: 0 must be above 0"),
        (["--set", "optim.lr=fast"], "optim.lr"),
        (["--set", "data.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_any_work(recipe_file, tmp_path, capsys, words, said):
    try:
        status = command(recipe_file, tmp_path / "out", *words)
    except SystemExit as ended:
        status = ended.code

    told = capsys.readouterr()
    assert status == 2
    assert told.err.count("\n") == 1
    assert said in told.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused_before_any_work(recipe_file, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(SystemExit) as ended:
        command(recipe_file, tmp_path / "out", "--steps", "100000")

    assert ended.value.code == 2
    assert "is a file, and a folder is needed" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_without_matplotlib_nothing_is_trained(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert command(recipe_file, tmp_path / "out") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_arm_alone_is_drawn_and_followed_as_any(subject):
    tiny = with_clip(subject(), "zclip")

    assert tiny.recipe.clip.name == "zclip"
    assert len(list(follow(tiny, tiny.fork(), n_steps=2, every=2))) == 2
