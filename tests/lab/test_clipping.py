"""Clipping sweep: its runs, its test scores, and its conclusions from few seeds."""

import json
from pathlib import Path

import numpy as np
import pytest

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import RecipeError, UserError
from unbraid.lab.clipping import ARMS, PAPER, SCORES_FILE, clipping_markdown, conclusions, plan_clipping
from unbraid.lab.clipping_run import (
    TABLE_BEGINS,
    TABLE_ENDS,
    extract_table,
    parse_steps,
    train_and_score,
    write_table_into,
)
from unbraid.lab.sweep import Arm, Interrupted, plan_runs, run_sweep
from unbraid.records import read_steps
from unbraid.signals import StopRequest

SHORT = ["validate.every_steps=0", "save.every_steps=0", "data.batch_size=2"]


def row(loss, percentile, si_sdri, unfinished=()):
    return {"loss": loss, "percentile": percentile, "si_sdri": si_sdri, "unfinished": list(unfinished)}


def test_percentile_100_equals_training_without_clipping(recipe_file, tmp_path):
    file = recipe_file()
    overrides = ["model.hidden=8", "train.max_steps=5", *SHORT]
    (percentile_100,) = plan_clipping(
        file, percentiles=[100], losses=["snr"], seeds=1, out=tmp_path / "a", overrides=overrides
    )
    overrides += ['model={name="blstm", hidden=8, n_layers=2}', 'loss={name="neg_snr"}']
    arms = [Arm("none", ("clip.name=none",))]
    (not_clipped,) = plan_runs(file, arms, seeds=1, out=tmp_path / "b", overrides=overrides)
    list(run_sweep([percentile_100, not_clipped], stop=StopRequest()))
    records = read_steps(percentile_100.directory.steps)

    assert [r.loss for r in records] == [r.loss for r in read_steps(not_clipped.directory.steps)]
    assert not any(r.clipped for r in records)
    assert records[-1].loss != records[0].loss


def test_a_run_interrupted_while_scoring_is_scored_by_the_next_call(recipe_file, tmp_path):
    overrides = ["model.hidden=8", "train.max_steps=1", *SHORT]
    runs = plan_clipping(recipe_file(), percentiles=[100], losses=["snr"], seeds=1, out=tmp_path, overrides=overrides)
    list(run_sweep(runs, stop=StopRequest()))

    with pytest.raises(Interrupted):
        train_and_score(runs, StopRequest(signal=15), 2)

    assert not (runs[0].directory.path / SCORES_FILE).exists()
    assert len(train_and_score(runs, StopRequest(), 2)) == 1
    assert len(json.loads((runs[0].directory.path / SCORES_FILE).read_text())["si_sdri"]) == 2


def test_each_loss_has_its_model_and_the_recipes_own_conv_tasnet_stays(recipe_file, tmp_path):
    file = recipe_file('[[filter]]\nname = "threshold"\nthreshold_db = -30.0\n')
    runs = plan_clipping(file, percentiles=[0, 50], seeds=1, out=tmp_path)
    by_loss = {run.arm.name.partition(",")[0]: run.recipe for run in runs}

    assert len(runs) == 2 * len(ARMS)
    assert {run.recipe.model.name for run in runs} == {"chimera", "blstm", "conv_tasnet", "sepformer"}
    assert by_loss["conv_tasnet"].model == load_recipe(file).model
    assert by_loss["snr"].model.options == {"hidden": 128, "n_layers": 2}
    assert {loss for loss, recipe in by_loss.items() if recipe.filters} == {"conv_tasnet", "sepformer"}
    assert [run.recipe.clip.options["percentile"] for run in runs[:2]] == [0, 50]
    assert runs[0].recipe.optim.options["lr"] == 1e-3  # the recipe's


def test_a_model_option_goes_to_the_networks_that_have_it(recipe_file, tmp_path):
    overrides = ["model.n_filters=24", "model.hidden=8"]
    runs = plan_clipping(recipe_file(), percentiles=[10], seeds=1, out=tmp_path, overrides=overrides)
    sizes = {run.arm.name.partition(",")[0]: run.recipe.model.options for run in runs}

    assert sizes["snr"] == {"hidden": 8, "n_layers": 2}
    assert (sizes["conv_tasnet"]["n_filters"], sizes["conv_tasnet"]["hidden"]) == (24, 8)
    assert "hidden" not in sizes["sepformer"]
    with pytest.raises(RecipeError, match="no key 'n_filterz'"):
        plan_clipping(recipe_file(), percentiles=[10], seeds=1, out=tmp_path, overrides=["model.n_filterz=24"])


@pytest.mark.slow
def test_the_command_trains_scores_and_writes_a_table_and_repeats_no_work(recipe_file, tmp_path, capsys):
    out = tmp_path / "clipping"
    numbers = tmp_path / "clipping.json"
    page = tmp_path / "clipping.md"
    words = ["lab", "clipping", str(recipe_file()), "--percentiles", "10", "100", "--losses", "deep_clustering", "snr"]
    words += ["--steps", "2", "--seeds", "2", "--test-items", "2", "-o", str(out), "--json", str(numbers)]
    words += ["--markdown", str(page), "--set", "model.hidden=8", *(w for s in SHORT for w in ("--set", s))]

    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    first = json.loads(numbers.read_text())
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("tested.json")}
    assert cli.main(words) == 0

    assert [(r["loss"], r["percentile"]) for r in first["rows"]] == [
        ("deep_clustering", 10),
        ("deep_clustering", 100),
        ("snr", 10),
        ("snr", 100),
    ]
    assert all(len(r["si_sdri"]) == 2 for r in first["rows"])
    assert extract_table(page.read_text()) == clipping_markdown(first["rows"])
    assert clipping_markdown(first["rows"]) in printed
    assert "12.7 standard errors" in printed
    assert first["given"]["command"].startswith("unbraid lab clipping recipe.toml")
    assert len(stamps) == 8
    assert {path: path.stat().st_mtime_ns for path in out.rglob("tested.json")} == stamps
    assert json.loads(numbers.read_text())["rows"] == first["rows"]


def test_the_papers_column_stands_next_to_ours_if_it_has_one():
    rows = [
        row("snr", 10, [1.0, 3.0]),
        row("snr", 100, [1.0]),
        row("conv_tasnet", 10, [], ["seed 0 diverged at step 3"]),
    ]

    assert clipping_markdown(rows) == (
        "| p | snr | paper, SNR | conv_tasnet |\n"
        "|---|---|---|---|\n"
        "| 10 | 2.00 ± 12.71 | 10.4 | -; seed 0 diverged at step 3 |\n"
        "| 100 | 1.00 | 8.3 | - |\n"
    )


def test_two_seeds_are_compared_by_students_t():
    clear = conclusions([row("snr", 10, [2.0, 3.0]), row("snr", 100, [1.0, 2.01])])[0]
    unclear = conclusions([row("snr", 10, [2.0, 4.0]), row("snr", 100, [1.0, 2.0])])[0]

    assert "above 0" in clear
    assert "which includes 0" in unclear


def test_the_best_of_six_is_rarely_called_better_than_no_clipping_by_chance():
    rng = np.random.default_rng(0)
    tables = [{p: rng.standard_normal(3).tolist() for p in (0, 1, 10, 25, 50, 90, 100)} for _ in range(1000)]
    sentences = [conclusions([row("snr", p, values) for p, values in table.items()])[0] for table in tables]

    assert np.mean(["above 0" in sentence for sentence in sentences]) < 0.04  # 0.08 with an interval for one comparison


def test_the_papers_best_percentile_is_ten_or_below_for_every_loss():
    for column in PAPER.values():
        assert len(column) == 7
        assert float(max(column, key=column.__getitem__)) <= 10
        assert float(min(column, key=column.__getitem__)) == 100


def test_steps_are_one_number_or_one_for_each_loss():
    assert parse_steps(["30"], ["snr"]) == 30
    assert parse_steps(["snr=3", "conv_tasnet=4"], ["snr", "conv_tasnet"]) == {"snr": 3, "conv_tasnet": 4}
    assert parse_steps([], ["snr"]) is None
    for wrong in (["0"], ["snr=0"], ["mi=3"], ["1", "2"], ["snr=1", "snr=2"]):
        with pytest.raises(RecipeError, match="--steps"):
            parse_steps(wrong, ["snr"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--percentiles", "101"], "to 100 (which never clips)"),
        (["--percentiles", "10", "10"], "has 10 twice"),
        (["--losses", "snrr"], "Did you mean 'snr'"),
        (["--losses", "snr", "--seeds", "0"], "--seeds 0 must be 1 or more"),
    ],
)
def test_bad_options_end_in_one_sentence(recipe_file, tmp_path, capsys, words, message):
    assert cli.main(["lab", "clipping", str(recipe_file()), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_table_is_written_between_its_marks_and_the_text_around_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{TABLE_BEGINS}\nold\n{TABLE_ENDS}\nbelow\n")

    write_table_into(page, "| new |\n")

    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert extract_table(text) == "| new |\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match="needs the lines"):
        write_table_into(page, "| new |\n")


def test_the_page_shows_the_table_that_was_measured():
    root = Path(__file__).resolve().parent.parent.parent
    measured = json.loads((root / "benchmarks" / "results" / "clipping.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "learn" / "clipping.md").read_text(encoding="utf-8")

    assert extract_table(page) == clipping_markdown(measured["rows"])
    assert all(sentence in " ".join(page.split()) for sentence in conclusions(measured["rows"]))
    assert measured["given"]["command"] in " ".join(page.replace("\\\n", " ").split())
