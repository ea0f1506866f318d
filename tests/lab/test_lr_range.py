"""Learning-rate range test: where descent and divergence are known, and on separators against a grid."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from unbraid.cli import main as cli
from unbraid.config.recipe import Component, load_recipe
from unbraid.errors import RecipeError
from unbraid.figures import draw_figure
from unbraid.lab.experiment import experiment_from_recipe
from unbraid.lab.lr_range import (
    LrGrid,
    RangeStep,
    divergence_reason,
    format_lr,
    learning_rates,
    lr_grid,
    lr_range,
    lrs_around,
    run_range_test,
    smooth_losses,
    suggest_lr,
)
from unbraid.lab.lr_range_figure import SMOOTHED_LABEL, lr_range_figure, range_test_json, summary_sentences
from unbraid.signals import StopRequest

BLSTM = ["model.name=blstm", "model.hidden=16", "model.n_layers=1", "model.n_fft=128", "model.hop_length=64"]


def descent(curvature, start=1.0):
    """Return steps of gradient descent on curvature / 2 * x ** 2; each has the loss before it, as in a range test."""
    x = start

    def take_step(lr):
        nonlocal x
        loss = 0.5 * curvature * x * x
        gradient = curvature * x
        x -= lr * gradient
        return RangeStep(loss, abs(gradient), 0.0)

    return take_step


@pytest.fixture
def experiment(recipe_file):
    return experiment_from_recipe(load_recipe(recipe_file()), "tiny")


@pytest.mark.parametrize("curvature", [0.3, 1.0, 40.0, 1000.0])
def test_on_a_parabola_the_suggestion_lies_between_bounds_from_theory(curvature):
    lrs = learning_rates()
    steps, reason, diverged = run_range_test(descent(curvature), lrs)
    losses = np.array([step.loss for step in steps])
    suggestion, _ = suggest_lr(lrs[: len(steps)], losses, n_planned=len(lrs), diverged=diverged)

    # A step multiplies the loss by (1 - x)^2, x = lr * curvature, so that 98 % are done where the sum of -2 ln(1 - x)
    # is ln 50. With rates of ratio r, the sum of all x so far is x r / (r - 1), and x <= -ln(1 - x) <= x / (1 - x).
    # The curve is convex there, so that smoothing only delays it, by three standard deviations of 3 % of the steps.
    r = lrs[1] / lrs[0]
    target = np.log(50) / 2
    earliest = target / (r / (r - 1) + target) / curvature
    latest = target * (r - 1) / r / curvature * r ** (3 * 0.03 * len(steps))
    assert earliest / r * 0.95 < suggestion < latest * 1.05  # the suggestion has two digits
    assert latest < 2 / curvature
    assert lrs[len(steps) - 1] > 2 / curvature
    assert diverged != ("did not diverge" in reason)


def test_the_suggestion_is_inverse_to_the_curvature_of_a_parabola():
    lrs = learning_rates()
    suggestions = []
    for curvature in (1.0, 100.0):
        losses = [step.loss for step in run_range_test(descent(curvature), lrs)[0]]
        losses += [1e3] * (len(lrs) - len(losses))
        suggestions.append(suggest_lr(lrs, np.array(losses))[0])

    assert suggestions[0] / suggestions[1] == pytest.approx(100, rel=0.25)


def test_learning_rates_grow_by_a_constant_factor():
    lrs = learning_rates(1e-4, 1.0, 81)

    np.testing.assert_allclose(lrs[1:] / lrs[:-1], 10**0.05)
    assert (lrs[0], lrs[-1]) == (1e-4, 1.0)


def test_smoothing_keeps_a_constant_and_ignores_nonfinite_losses():
    losses = np.full(50, 3.0)
    losses[[7, 8]] = np.nan
    smoothed = smooth_losses(losses, 20)

    assert np.isnan(smoothed[[7, 8]]).all()
    np.testing.assert_allclose(np.delete(smoothed, [7, 8]), 3.0)


def test_a_huge_loss_moves_the_suggestion_no_further_than_one_at_the_start():
    lrs = learning_rates()[:150]
    losses = np.concatenate([np.full(80, 5.0), np.linspace(5.0, 0.0, 40), np.zeros(29), [5.0]])
    before, _ = suggest_lr(lrs, losses)
    losses[-1] = 1e30

    assert suggest_lr(lrs, losses)[0] == before


@pytest.mark.parametrize(("n_planned", "n_made"), [(60, 60), (100, 100), (200, 200), (200, 60)])
def test_noise_alone_rarely_diverges_and_rarely_suggests_a_rate(n_planned, n_made):
    n_diverged = 0
    n_suggested = 0
    for seed in range(50):
        losses = np.random.default_rng(seed).normal(10.0, 2.0, n_made)
        n_diverged += any(divergence_reason(losses[:n], n_planned) for n in range(1, n_made + 1))
        suggestion, reason = suggest_lr(learning_rates(n_steps=n_planned)[:n_made], losses, n_planned=n_planned)
        n_suggested += suggestion is not None
        assert (suggestion is None) == ("never fell" in reason)

    assert n_diverged <= 1  # of a thousand seeds: at most four
    assert n_suggested <= 1  # the same


def test_a_loss_that_gives_back_half_of_its_descent_has_diverged():
    falls = np.concatenate([np.full(60, 10.0), np.linspace(10.0, 0.0, 60)])

    assert not divergence_reason(np.concatenate([falls, np.full(60, 4.0)]), 200)
    assert "back at 6," in divergence_reason(np.concatenate([falls, np.full(60, 6.0)]), 200)


def test_a_loss_that_only_rises_has_diverged():
    assert "never fallen before" in divergence_reason(np.concatenate([np.full(30, 10.0), np.full(20, 11.0)]), 200)


def test_five_nonfinite_steps_end_the_test_and_four_do_not():
    losses = iter([1.0] * 30 + [np.nan] * 4 + [1.0] * 3 + [np.nan] * 9)
    steps, reason, diverged = run_range_test(lambda _lr: RangeStep(next(losses), 1.0, 0.0), learning_rates())

    assert len(steps) == 42
    assert "5 steps in a row" in reason
    assert diverged


def test_a_loss_still_falling_at_the_end_asks_for_higher_rates_and_an_early_descent_for_lower_ones():
    lrs = learning_rates()
    suggestion, reason = suggest_lr(lrs, np.concatenate([np.full(150, 5.0), np.linspace(5.0, 0.0, 50)]))
    assert suggestion > 1
    assert "higher --to" in reason

    suggestion, reason = suggest_lr(lrs, np.concatenate([np.linspace(5.0, 0.0, 15), np.full(185, 0.0)]))
    assert suggestion is None
    assert "lower than --from 1e-7" in reason


def test_an_interrupted_descent_suggests_nothing_and_says_that_the_loss_was_falling():
    lrs = learning_rates()
    losses = np.concatenate([np.full(80, 5.0), np.linspace(5.0, 0.0, 60), np.full(60, 0.0)])
    suggestion, reason = suggest_lr(lrs[:120], losses[:120], n_planned=200)
    assert suggestion is None
    assert "still falling when the test was stopped" in reason
    assert "higher rates" not in reason

    assert "higher rates" in suggest_lr(lrs[:180], losses[:180], n_planned=200)[1]  # long past the lowest loss
    assert (
        suggest_lr(lrs[:120], losses[:120], n_planned=200, diverged=True)[0] is not None
    )  # and what comes next is known


def test_an_interrupted_test_has_not_diverged():
    stop = StopRequest()
    stop.signal = signal.SIGINT
    steps, reason, diverged = run_range_test(descent(1.0), learning_rates(), stop=stop)

    assert (steps, diverged) == ([], False)
    assert "interrupted before 1e-7" in reason


def test_divergence_within_the_baseline_asks_for_lower_rates():
    suggestion, reason = suggest_lr(learning_rates()[:25], np.full(25, 5.0), n_planned=200, diverged=True)

    assert suggestion is None
    assert "Only 25 steps have a finite loss, too few for a suggestion: start lower than --from 1e-7" in reason


def test_a_range_test_leaves_its_subject_alone_and_is_the_same_again(experiment):
    before = {name: weight.clone() for name, weight in experiment.weights.items()}
    lrs = np.geomspace(1e-5, 1e-1, 20)
    first = lr_range(experiment, lrs)
    second = lr_range(experiment, lrs)

    np.testing.assert_array_equal(first.losses, second.losses)
    assert all(torch.equal(before[name], weight) for name, weight in experiment.weights.items())
    assert (first.lrs == lrs).all()
    assert np.isfinite(first.grad_norms).all()
    assert first.update_ratios[-1] > 100 * first.update_ratios[0]


def test_the_recipes_learning_rate_schedule_filters_and_ema_have_no_effect(experiment):
    recipe = experiment.recipe
    others = replace(
        recipe,
        optim=Component("adam", {"lr": 7.0}),
        schedule=Component("cosine", {"warmup_steps": 500}),
        filters=(Component("threshold", {"threshold_db": 100.0}),),
        train=replace(recipe.train, ema=0.999),
    )
    lrs = np.geomspace(1e-4, 1e-1, 20)
    plain = lr_range(experiment, lrs)
    changed = lr_range(replace(experiment, recipe=others), lrs)

    np.testing.assert_array_equal(plain.losses, changed.losses)


def test_an_optimizer_without_a_learning_rate_is_refused(experiment, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch.optim import SGD\ndef own(parameters):\n    return SGD(parameters, 1)\n"
    )
    recipe = replace(experiment.recipe, optim=Component("mine:own"), folder=tmp_path)

    with pytest.raises(RecipeError, match="no key 'lr'"):
        lr_range(replace(experiment, recipe=recipe))


def test_a_grid_trains_each_rate_from_the_same_weights(experiment):
    grid = lr_grid(experiment, [1e-12, 1e-3, 1e-12], n_steps=3, n_items=4)

    assert grid.losses[0] == grid.losses[2]
    assert grid.losses[1] < grid.losses[0]
    assert grid.best == 1e-3


def test_a_grid_without_finite_losses_has_no_best():
    assert LrGrid(np.array([1.0, 2.0]), np.array([np.nan, np.inf]), 1, 1).best is None
    assert LrGrid(np.array([1.0, 2.0, 3.0]), np.array([np.nan, 4.0, -np.inf]), 1, 1).best == 2.0


def test_the_summary_says_how_far_the_suggestion_is_from_the_grids_best(experiment):
    test = replace(lr_range(experiment, np.geomspace(1e-5, 1e-3, 20)), suggestion=0.01)
    summary = " ".join(summary_sentences(test, LrGrid(np.array([0.01, 0.03, 0.1]), np.array([3.0, 2.0, 4.0]), 50, 32)))
    at_edge = " ".join(summary_sentences(test, LrGrid(np.array([0.03, 0.1]), np.array([2.0, 4.0]), 50, 32)))

    assert "3e-2 ends lowest, at 2; the suggestion is off by a factor of 3.0" in summary
    assert "at the edge" in at_edge


def test_the_summary_warns_of_components_with_a_known_bias(experiment):
    test = replace(lr_range(experiment, np.geomspace(1e-5, 1e-3, 20)), suggestion=0.01)

    assert "may be too low" in " ".join(summary_sentences(replace(test, optimizer="sgd")))
    assert "on which the rule was chosen" in " ".join(summary_sentences(replace(test, optimizer="sgd")))
    assert "may be too high" in " ".join(summary_sentences(replace(test, clipper="autoclip")))
    assert "may be" not in " ".join(summary_sentences(test))


def test_nonfinite_values_are_null_in_json_and_the_capped_curve_is_labelled(experiment):
    test = lr_range(experiment, np.geomspace(1e-5, 1e-3, 20))
    test.losses[3], test.grad_norms[4] = np.nan, np.inf
    grid = LrGrid(np.array([0.01, 0.03]), np.array([np.inf, 2.0]), 50, 32)
    row = json.loads(json.dumps(range_test_json(test, grid), allow_nan=False))
    labels = [line.get_label() for line in draw_figure(lr_range_figure(test, grid)).axes[0].lines]

    assert (row["losses"][3], row["grad_norms"][4], row["grid_losses"]) == (None, None, [None, 2.0])
    assert "smoothed_capped" in row
    assert SMOOTHED_LABEL in labels
    assert "smoothed" not in labels


def test_grid_rates_lie_on_half_decades_around_the_suggestion():
    np.testing.assert_allclose(lrs_around(0.028), 10.0 ** np.array([-3, -2.5, -2, -1.5, -1, -0.5, 0]))


@pytest.mark.parametrize(("lr", "text"), [(3e-3, "3e-3"), (0.0318, "3.2e-2"), (1.0, "1e0"), (10.0, "1e1")])
def test_a_learning_rate_is_formatted_as_in_recipes(lr, text):
    assert format_lr(lr) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "1", "--to", "0.1"], "must be below"),
        (["--from", "1", "--to", "1"], "must be below"),
        (["--from", "0"], "above 0"),
        (["--to", "inf"], "above 0 and finite"),
        (["--steps", "59"], "too few"),
        (["--set", "optim.name=adm"], "Did you mean"),
    ],
)
def test_an_impossible_range_is_refused_in_one_sentence(recipe_file, tmp_path, capsys, options, message):
    assert cli.main(["lab", "lr-range", str(recipe_file()), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_cannot_be_created_is_reported_before_the_work(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("unbraid.lab.lr_range.train_step", None)  # the work would fail
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "lr-range", str(recipe_file()), "--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_the_command_draws_and_prints_a_setting_to_copy(recipe_file, tmp_path, capsys):
    options = ["--from", "1e-5", "--to", "1", "--steps", "60", "--out", str(tmp_path / "out")]
    assert cli.main(["lab", "lr-range", str(recipe_file()), *options]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "lr-range.json").read_text())
    setting = next(line for line in printed.splitlines() if line.startswith("To use it: --set ")).removeprefix(
        "To use it: --set "
    )

    assert load_recipe(recipe_file(), [setting]).optim.options["lr"] == numbers["suggestion"]
    assert len(numbers["losses"]) == 60
    assert (tmp_path / "out" / "lr-range.png").read_bytes().startswith(b"\x89PNG")


def test_with_json_only_json_is_printed_and_nothing_is_drawn(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab", "lr-range", str(recipe_file()), "--steps", "60", "--json"]) == 0

    assert {"lrs", "losses", "suggestion", "reason"} <= json.loads(capsys.readouterr().out).keys()
    assert not (tmp_path / "lr-range").exists()


def test_after_a_signal_the_steps_made_so_far_are_drawn(recipe_file, tmp_path):
    options = ["--steps", "1000000", "--out", str(tmp_path / "out")]
    words = [sys.executable, "-u", "-m", "unbraid", "lab", "lr-range", str(recipe_file()), *options]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    child.stdout.readline()  # the first progress line, after the first step
    child.send_signal(signal.SIGINT)
    printed, _ = child.communicate(timeout=120)

    assert child.returncode == 128 + signal.SIGINT
    assert "interrupted" in printed
    assert "To start over, run the same command" in printed
    assert json.loads((tmp_path / "out" / "lr-range.json").read_text())["losses"]
    assert (tmp_path / "out" / "lr-range.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", [[], BLSTM], ids=["conv_tasnet", "blstm"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_suggestion_lies_within_a_factor_of_three_of_the_best_of_a_grid(recipe_file, model, optimizer):
    recipe = load_recipe(recipe_file(), [*model, f"optim.name={optimizer}"])
    experiment = experiment_from_recipe(recipe, "tiny")
    suggestion = lr_range(experiment).suggestion
    grid = lr_grid(experiment, 10.0 ** np.arange(-3, 0.1, 0.5), n_steps=40)

    assert max(grid.best / suggestion, suggestion / grid.best) < 3
