"""Race: which arm is ahead, and whether its lead may be chance."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from unbraid.cli import main as cli
from unbraid.lab.confidence import mean_interval
from unbraid.lab.race import plan_race, summarise_arms, verdict_sentence
from unbraid.lab.race_figure import draw_race
from unbraid.lab.sweep import RunEnd, RunSummary


def run_summary(arm, seed, si_sdri, *, how="finished", loss=1.0):
    return RunSummary(arm, seed, RunEnd(how, 10), loss, 2.0, si_sdri, 0, 0.5, 1.0)


def test_intervals_follow_students_t():
    interval = mean_interval([1.0, 2.0, 3.0])

    assert interval.mean == 2
    assert interval.std == 1
    assert interval.margin == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert mean_interval([1.0, 3.0]).margin == pytest.approx(12.706204736432095 * math.sqrt(2) / math.sqrt(2))
    assert mean_interval([1.0]).text() == "1.00"
    assert mean_interval([]).text() == "-"


def test_a_lead_in_every_seed_exceeds_the_spread_although_seeds_differ_more():
    summaries = [run_summary("a", seed, 5.0 * seed + 1 + 0.01 * seed) for seed in range(3)]
    summaries += [run_summary("b", seed, 5.0 * seed) for seed in range(3)]

    verdict = verdict_sentence(summaries)

    assert verdict.startswith("a is ahead, by 1.01 dB of validation SI-SDRi over b.")
    assert "more than the spread over 3 seeds" in verdict
    assert "may be chance" not in verdict


def test_a_lead_in_only_some_seeds_may_be_chance():
    summaries = [run_summary("a", seed, value) for seed, value in enumerate([1.0, 4.0, 1.0])]
    summaries += [run_summary("b", seed, 1.5) for seed in range(3)]

    assert "That may be chance" in verdict_sentence(summaries)


def test_one_seed_cannot_show_chance():
    summaries = [run_summary("a", 0, 2.0), run_summary("b", 0, 1.0)]

    assert "One seed cannot show how much of that is chance" in verdict_sentence(summaries)


def test_an_arm_that_diverged_with_one_seed_is_not_ahead_and_is_mentioned():
    summaries = [run_summary("a", 0, 9.0), run_summary("a", 1, None, how="diverged")]
    summaries += [run_summary("b", 0, 2.0), run_summary("b", 1, 2.1)]
    summaries += [run_summary("c", 0, 1.0), run_summary("c", 1, 1.1)]

    assert verdict_sentence(summaries).startswith("b is ahead")
    assert "1 of the arms did not finish with every seed" in verdict_sentence(summaries)
    assert summarise_arms(summaries)[0].unfinished == ("seed 1 diverged at step 10",)


def test_another_optimizer_than_the_recipes_gets_its_default_learning_rate_unless_one_is_set(recipe_file, tmp_path):
    file = recipe_file()

    def learning_rates(over, *overrides):
        runs, note = plan_race(file, over, seeds=1, out=tmp_path / "out", overrides=overrides)
        return [run.recipe.optim.options.get("lr") for run in runs], note

    assert learning_rates(["optim.name=adam,sgd,muon"], "optim.lr=2e-3") == ([2e-3] * 3, "")
    assert learning_rates(["optim.name=adam,sgd", "optim.lr=1e-3,1e-2"]) == ([1e-3, 1e-2, 1e-3, 1e-2], "")
    lrs, note = learning_rates(["optim.name=adam,sgd"], "optim.name=adam")
    assert lrs == [1e-3, 1e-2]
    assert "sgd at 0.01" in note
    assert learning_rates(["clip.name=none,fixed"])[1] == ""


def test_a_race_prints_a_table_writes_figure_and_numbers_and_names_the_dashboard(recipe_file, tmp_path, capsys):
    out = tmp_path / "race"
    numbers = tmp_path / "race.json"
    words = ["lab", "race", str(recipe_file()), "--over", "clip.max_norm=1e-3,1e3", "--seeds", "2", "--steps", "3"]
    words += ["--set", "clip.name=fixed"]
    words += ["--set", "validate.every_steps=0", "--set", "validate.n_items=1", "--set", "save.every_steps=0"]
    words += ["-o", str(out), "--json", str(numbers)]

    assert cli.main(words) == 0

    printed = capsys.readouterr().out
    results = json.loads(numbers.read_text())
    assert [arm["arm"] for arm in results["arms"]] == ["clip.max_norm=1e-3", "clip.max_norm=1e3"]
    assert len(results["runs"]) == 4
    assert results["arms"][0]["si_sdri"]["n"] == 2
    assert [arm["clipped"] for arm in results["arms"]] == [1, 0]
    assert results["verdict"] in printed.replace("\n", " ")
    assert f"dashboard {out}" in printed
    assert (out / "race.png").stat().st_size > 10_000
    assert (out / "clip.max_norm=1e-3" / "seed-1" / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--over", "optim.name"], "must look like optim.name=sgd,adam"),
        (["--over", "optim.name=sgd,nadam"], "'nadam' is unknown"),
        (["--over", "optim.name=sgd,sgd"], "twice"),
        (["--over", "clip.name=none,fixed", "--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--over", "optim.foo=1,2"], "has no key 'foo'"),
        ([], "needs something to compare"),
    ],
)
def test_bad_race_options_end_in_one_sentence(recipe_file, tmp_path, capsys, words, message):
    assert cli.main(["lab", "race", str(recipe_file()), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_figure_shows_arms_that_ended_at_different_steps_or_none():
    steps = np.arange(1.0, 21)
    losses = {"a": [(steps, steps), (steps[:7], steps[:7] + 1)], "b": [(steps[:0], steps[:0])]}
    norms = {"a": [(steps, 3 * steps)], "b": []}
    scores = {"a": [(steps[9:10], steps[:1])], "b": []}
    figure = Figure()

    draw_race(losses, norms, scores, figure)

    figure.canvas.draw()

    line = figure.axes[0].get_lines()[0].get_ydata()
    assert line[:7] == pytest.approx(steps[:7] + 0.5)
    assert line[7:] == pytest.approx(steps[7:])
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx(3 * steps)
