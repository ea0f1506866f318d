"""The table of clipping percentiles: its runs, its test scores, and what is said of few seeds."""

import json
from pathlib import Path

import numpy as np
import pytest

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import RecipeError, UserError
from unbraid.lab.clipping import CONTESTS, PUBLISHED, TESTED, clipping_markdown, plan_clipping, reading
from unbraid.lab.clipping_run import (
    TABLE_BEGINS,
    TABLE_ENDS,
    steps_of,
    table_in,
    trained_and_tested,
    write_table_into,
)
from unbraid.lab.sweep import Arm, Interrupted, plan_runs, run_sweep
from unbraid.records import read_steps
from unbraid.signals import StopRequest

SHORT = ["validate.every_steps=0", "save.every_steps=0", "data.batch_size=2"]


def row(loss, percentile, si_sdri, fallen=()):
    return {"loss": loss, "percentile": percentile, "si_sdri": si_sdri, "fallen": list(fallen)}


def test_the_hundredth_percentile_is_no_clipping(recipe_file, tmp_path):
    file, overrides = recipe_file(), ["model.hidden=8", "train.max_steps=5", *SHORT]
    (cut,) = plan_clipping(file, percentiles=[100], losses=["snr"], seeds=1, out=tmp_path / "a", overrides=[*overrides])
    bare = [*overrides, 'model={name="blstm", hidden=8, n_layers=2}', 'loss={name="neg_snr"}']
    (free,) = plan_runs(file, [Arm("none", ("clip.name=none",))], seeds=1, out=tmp_path / "b", overrides=bare)
    list(run_sweep([cut, free], stop=StopRequest()))
    ours, theirs = read_steps(cut.directory.steps), read_steps(free.directory.steps)

    assert [r.loss for r in ours] == [r.loss for r in theirs]
    assert not any(r.clipped for r in ours)
    assert ours[-1].loss != ours[0].loss


def test_a_signal_while_scores_are_taken_leaves_the_run_to_be_scored(recipe_file, tmp_path):
    overrides = ["model.hidden=8", "train.max_steps=1", *SHORT]
    cells = plan_clipping(recipe_file(), percentiles=[100], losses=["snr"], seeds=1, out=tmp_path, overrides=overrides)
    list(run_sweep(cells, stop=StopRequest()))

    with pytest.raises(Interrupted):
        trained_and_tested(cells, StopRequest(signal=15), 2)

    assert not (cells[0].directory.path / TESTED).exists()
    assert len(trained_and_tested(cells, StopRequest(), 2)) == 1
    assert len(json.loads((cells[0].directory.path / TESTED).read_text())["si_sdri"]) == 2


def test_each_loss_brings_its_model_and_a_conv_tasnet_of_the_recipes_own_stays(recipe_file, tmp_path):
    file = recipe_file('[[filter]]\nname = "threshold"\nthreshold_db = -30.0\n')
    cells = plan_clipping(file, percentiles=[0, 50], seeds=1, out=tmp_path)
    by_loss = {cell.arm.name.partition(",")[0]: cell.recipe for cell in cells}

    assert len(cells) == 2 * len(CONTESTS)
    assert {cell.recipe.model.name for cell in cells} == {"chimera", "blstm", "conv_tasnet", "sepformer"}
    assert by_loss["conv_tasnet"].model == load_recipe(file).model
    assert by_loss["snr"].model.options == {"hidden": 128, "n_layers": 2}
    assert {loss for loss, recipe in by_loss.items() if recipe.filters} == {"conv_tasnet", "sepformer"}
    assert [cell.recipe.clip.options["percentile"] for cell in cells[:2]] == [0, 50]
    assert cells[0].recipe.optim.options["lr"] == 1e-3  # the recipe's


def test_a_size_of_a_model_goes_to_the_networks_that_have_it(recipe_file, tmp_path):
    overrides = ["model.n_filters=24", "model.hidden=8"]
    cells = plan_clipping(recipe_file(), percentiles=[10], seeds=1, out=tmp_path, overrides=overrides)
    sizes = {cell.arm.name.partition(",")[0]: cell.recipe.model.options for cell in cells}

    assert sizes["snr"] == {"hidden": 8, "n_layers": 2}
    assert (sizes["conv_tasnet"]["n_filters"], sizes["conv_tasnet"]["hidden"]) == (24, 8)
    assert "hidden" not in sizes["sepformer"]
    with pytest.raises(RecipeError, match="no key 'n_filterz'"):
        plan_clipping(recipe_file(), percentiles=[10], seeds=1, out=tmp_path, overrides=["model.n_filterz=24"])


@pytest.mark.slow
def test_the_command_trains_scores_and_writes_a_table_and_does_nothing_twice(recipe_file, tmp_path, capsys):
    out, numbers, page = tmp_path / "clipping", tmp_path / "clipping.json", tmp_path / "clipping.md"
    words = ["lab", "clipping", str(recipe_file()), "--percentiles", "10", "100", "--losses", "deep_clustering", "snr"]
    words += ["--steps", "2", "--seeds", "2", "--test-items", "2", "-o", str(out), "--json", str(numbers)]
    words += ["--markdown", str(page), "--set", "model.hidden=8", *(w for s in SHORT for w in ("--set", s))]

    assert cli.main(words) == 0
    said, first = capsys.readouterr().out, json.loads(numbers.read_text())
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("tested.json")}
    assert cli.main(words) == 0

    assert [(r["loss"], r["percentile"]) for r in first["rows"]] == [
        ("deep_clustering", 10),
        ("deep_clustering", 100),
        ("snr", 10),
        ("snr", 100),
    ]
    assert all(len(r["si_sdri"]) == 2 for r in first["rows"])
    assert table_in(page.read_text()) == clipping_markdown(first["rows"])
    assert clipping_markdown(first["rows"]) in said
    assert "12.7 standard errors" in said
    assert first["given"]["command"].startswith("unbraid lab clipping recipe.toml")
    assert len(stamps) == 8
    assert {path: path.stat().st_mtime_ns for path in out.rglob("tested.json")} == stamps
    assert json.loads(numbers.read_text())["rows"] == first["rows"]


def test_the_table_puts_the_papers_column_beside_ours_where_it_has_one():
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


def test_what_two_seeds_show_is_read_with_students_t():
    sure = reading([row("snr", 10, [2.0, 3.0]), row("snr", 100, [1.0, 2.01])])[0]
    unsure = reading([row("snr", 10, [2.0, 4.0]), row("snr", 100, [1.0, 2.0])])[0]

    assert "above 0" in sure
    assert "which includes 0" in unsure


def test_the_best_of_six_is_not_called_better_than_none_by_chance():
    rng = np.random.default_rng(0)
    tables = [{p: rng.standard_normal(3).tolist() for p in (0, 1, 10, 25, 50, 90, 100)} for _ in range(1000)]
    said = [reading([row("snr", p, values) for p, values in table.items()])[0] for table in tables]

    assert np.mean(["above 0" in sentence for sentence in said]) < 0.04  # 0.08 with an interval for one comparison


def test_the_papers_best_percentile_is_ten_or_below_for_every_loss():
    for column in PUBLISHED.values():
        assert len(column) == 7
        assert max(column, key=column.__getitem__) <= 10
        assert min(column, key=column.__getitem__) == 100


def test_steps_are_one_number_or_one_for_each_loss():
    assert steps_of(["30"], ["snr"]) == 30
    assert steps_of(["snr=3", "conv_tasnet=4"], ["snr", "conv_tasnet"]) == {"snr": 3, "conv_tasnet": 4}
    assert steps_of([], ["snr"]) is None
    for wrong in (["0"], ["snr=0"], ["mi=3"], ["1", "2"], ["snr=1", "snr=2"]):
        with pytest.raises(RecipeError, match="--steps"):
            steps_of(wrong, ["snr"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--percentiles", "101"], "to 100, which never clips"),
        (["--percentiles", "10", "10"], "has 10 twice"),
        (["--losses", "snrr"], "Did you mean 'snr'"),
        (["--losses", "snr", "--seeds", "0"], "--seeds 0 must be 1 or more"),
    ],
)
def test_what_the_command_does_not_take_is_one_sentence(recipe_file, tmp_path, capsys, words, said):
    assert cli.main(["lab", "clipping", str(recipe_file()), "-o", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_table_is_written_between_its_marks_and_the_text_around_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{TABLE_BEGINS}\nold\n{TABLE_ENDS}\nbelow\n")

    write_table_into(page, "| new |\n")

    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert table_in(text) == "| new |\n"
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        write_table_into(page, "| new |\n")


def test_the_page_shows_the_table_that_was_measured():
    root = Path(__file__).resolve().parent.parent.parent
    measured = json.loads((root / "benchmarks" / "results" / "clipping.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "learn" / "clipping.md").read_text(encoding="utf-8")

    assert table_in(page) == clipping_markdown(measured["rows"])
    assert all(sentence in " ".join(page.split()) for sentence in reading(measured["rows"]))
    assert measured["given"]["command"] in " ".join(page.replace("\\\n", " ").split())
