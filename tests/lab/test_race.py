"""Who is ahead in a race, and by how much more than chance."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from unbraid.cli import main as cli
from unbraid.lab.confidence import mean_interval
from unbraid.lab.race import plan_race, summarise_arms, verdict_sentence
from unbraid.lab.race_figure import RaceCurves, draw_race
from unbraid.lab.sweep import RunEnd, RunSummary


def outcome(arm, seed, si_sdri, *, how="finished", loss=1.0):
    return RunSummary(arm, seed, RunEnd(how, 10), loss, 2.0, si_sdri, 0, 0.5, 1.0)


def test_intervals_are_those_of_students_t():
    found = mean_interval([1.0, 2.0, 3.0])

    assert found.mean == 2
    assert found.spread == 1
    assert found.half == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert mean_interval([1.0, 3.0]).half == pytest.approx(12.706204736432095 * math.sqrt(2) / math.sqrt(2))
    assert mean_interval([1.0]).text() == "1.00"
    assert mean_interval([]).text() == "-"


def test_a_lead_that_every_seed_shows_is_more_than_the_spread_though_the_seeds_differ_by_far_more():
    outcomes = [outcome("a", seed, 5.0 * seed + 1 + 0.01 * seed) for seed in range(3)]
    outcomes += [outcome("b", seed, 5.0 * seed) for seed in range(3)]

    said = verdict_sentence(outcomes)

    assert said.startswith("Ahead is a, by 1.01 dB of valid SI-SDRi before b.")
    assert "more than the spread over 3 seeds" in said
    assert "not more than" not in said


def test_a_lead_of_some_seeds_alone_is_said_to_be_no_more_than_chance():
    outcomes = [outcome("a", seed, value) for seed, value in enumerate([1.0, 4.0, 1.0])]
    outcomes += [outcome("b", seed, 1.5) for seed in range(3)]

    assert "not more than chance" in verdict_sentence(outcomes)


def test_one_seed_shows_no_spread():
    assert "With one seed nobody knows" in verdict_sentence([outcome("a", 0, 2.0), outcome("b", 0, 1.0)])


def test_an_arm_that_diverged_with_one_seed_is_not_ahead_and_is_said():
    outcomes = [outcome("a", 0, 9.0), outcome("a", 1, None, how="diverged")]
    outcomes += [outcome(arm, seed, value + 0.1 * seed) for arm, value in (("b", 2.0), ("c", 1.0)) for seed in (0, 1)]

    assert verdict_sentence(outcomes).startswith("Ahead is b")
    assert "1 of the arms did not finish with every seed" in verdict_sentence(outcomes)
    assert summarise_arms(outcomes)[0].fallen == ("seed 1 diverged at step 10",)


def test_an_optimizer_that_is_not_the_recipes_gets_its_own_rate_unless_one_is_given(recipe_file, tmp_path):
    file = recipe_file()

    def rates(over, *given):
        cells, notes = plan_race(file, over, seeds=1, out=tmp_path / "out", overrides=given)
        return [cell.recipe.optim.options.get("lr") for cell in cells], notes

    assert rates(["optim.name=adam,sgd,muon"], "optim.lr=2e-3") == ([2e-3] * 3, "")
    assert rates(["optim.name=adam,sgd", "optim.lr=1e-3,1e-2"]) == ([1e-3, 1e-2, 1e-3, 1e-2], "")
    found, notes = rates(["optim.name=adam,sgd"], "optim.name=adam")
    assert found == [1e-3, 1e-2]
    assert "sgd at 0.01" in notes
    assert rates(["clip.name=none,fixed"])[1] == ""


def test_a_race_prints_a_row_for_each_arm_draws_writes_and_names_the_dashboard(recipe_file, tmp_path, capsys):
    out, numbers = tmp_path / "race", tmp_path / "race.json"
    words = ["lab", "race", str(recipe_file()), "--over", "clip.max_norm=1e-3,1e3", "--seeds", "2", "--steps", "3"]
    words += ["--set", "clip.name=fixed"]
    words += [
        "--set",
        "validate.every_steps=0",
        "--set",
        "validate.n_items=1",
        "--set",
        "save.every_steps=0",
        "-o",
        str(out),
        "--json",
        str(numbers),
    ]

    assert cli.main(words) == 0

    said = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert [arm["arm"] for arm in found["arms"]] == ["clip.max_norm=1e-3", "clip.max_norm=1e3"]
    assert len(found["runs"]) == 4
    assert found["arms"][0]["si_sdri"]["n"] == 2
    assert [arm["clipped"] for arm in found["arms"]] == [1, 0]
    assert found["verdict"] in said.replace("\n", " ")
    assert f"dashboard {out}" in said
    assert (out / "race.png").stat().st_size > 10_000
    assert (out / "clip.max_norm=1e-3" / "seed-1" / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--over", "optim.name"], "must look like optim.name=sgd,adam"),
        (["--over", "optim.name=sgd,nadam"], "'nadam' is not one of"),
        (["--over", "optim.name=sgd,sgd"], "twice"),
        (["--over", "clip.name=none,fixed", "--seeds", "0"], "--seeds 0 must be 1 or more"),
        (["--over", "optim.foo=1,2"], "has no key 'foo'"),
        ([], "needs something to compare"),
    ],
)
def test_what_a_race_does_not_take_is_one_sentence(recipe_file, tmp_path, capsys, words, said):
    assert cli.main(["lab", "race", str(recipe_file()), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_figure_is_drawn_of_arms_that_ended_at_different_steps_or_at_none():
    at = np.arange(1.0, 21)
    losses = {"a": [(at, at), (at[:7], at[:7] + 1)], "b": [(at[:0], at[:0])]}
    norms = {"a": [(at, 3 * at)], "b": []}
    scores = {"a": [(at[9:10], at[:1])], "b": []}
    figure = Figure()

    draw_race(RaceCurves(losses, norms, scores), figure)

    figure.canvas.draw()

    line = figure.axes[0].get_lines()[0].get_ydata()
    assert line[:7] == pytest.approx(at[:7] + 0.5)
    assert line[7:] == pytest.approx(at[7:])
    assert figure.axes[1].get_lines()[0].get_ydata() == pytest.approx(3 * at)
