"""`unbraid lab landscape`: figures and numbers of real checkpoints, stopping, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import UserError
from unbraid.figures import draw_figure
from unbraid.lab.experiment import mean_loss, of_checkpoint, of_recipe
from unbraid.lab.landscape import Around, Between, Chart
from unbraid.lab.landscape_figure import Field, plate_between, plates_around
from unbraid.lab.landscape_run import folder_for, loss_of, view_around
from unbraid.robust.precision import Precision


@pytest.fixture
def run(recipe_file, tmp_path):
    """A run with checkpoints at steps 2, 4 and 6."""
    words = ["train", str(recipe_file()), "--run", str(tmp_path / "run"), "--set", "save.keep=9"]
    words += ["--set", "validate.every_steps=0"]
    assert cli.main(words) == 0
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def look(out, *words):
    return cli.main(["lab", "landscape", *map(str, words), "--out", str(out), "--items", "2"])


def told_in(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def whole_pictures(folder):
    for path in folder.glob("*.png"):
        with Image.open(path) as found:
            found.load()
    return sorted(path.stem for path in folder.glob("*.png"))


def own_loss(path, n_items=2):
    return loss_at(of_checkpoint(path), n_items)


def loss_at(subject, n_items):
    with torch.no_grad():
        return float(mean_loss(subject.model(), subject.loss(), Precision("fp32"), subject.fixed(n_items)))


def test_the_three_views_of_a_run_leave_it_byte_for_byte(run, tmp_path, capsys):
    before, out = contents(run), tmp_path / "out"
    first, last = run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000006"
    capsys.readouterr()

    assert look(out, last, "--points", "3", "--span", "0.5") == 0
    assert "24 points in" in capsys.readouterr().out
    assert look(out, first, "--to", last, "--points", "5") == 0
    assert look(out, run, "--plane", "--points", "4") == 0

    assert contents(run) == before
    names = ["around-contour", "around-lines", "around-surface", "between", "path-contour", "path-surface"]
    assert whole_pictures(out) == names
    told = capsys.readouterr().out
    assert "barrier" in told
    assert "random walk" in told
    line, path, around = (told_in(out / f"{name}.json") for name in ("between", "path", "around"))
    ends = [line["losses"][line["at"].index(place)] for place in (0.0, 1.0)]
    assert ends == [own_loss(first), own_loss(last)]
    assert path["steps"] == [2, 4, 6]
    assert [path["losses"][0], path["losses"][2]] == ends
    assert path["distances"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert around["losses"][1] == ends[1]
    assert [len(part["losses"]) for part in (around, line, path)] == [5 * 3 + 9, 7, 3 + 16]


def test_the_same_command_draws_what_is_there_and_another_seed_begins_anew(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert look(out, run, "--points", "3") == 0
    once = told_in(out / "around.json")["losses"]
    capsys.readouterr()

    assert look(out, run, "--points", "3") == 0
    assert "24 points were there already" in capsys.readouterr().out
    assert told_in(out / "around.json")["losses"] == once
    assert look(out, run, "--points", "3", "--seed", "1") == 0
    again = told_in(out / "around.json")["losses"]

    assert "already" not in capsys.readouterr().out
    assert again[1] == once[1]
    assert again != once
    assert len(list(out.glob("points-*.json"))) == 2


def test_figures_of_other_weights_are_not_overwritten(run, tmp_path, capsys):
    out, first = tmp_path / "out", run / "checkpoints" / "step-000002"
    assert look(out, run, "--points", "3") == 0
    before = contents(out)
    capsys.readouterr()

    assert look(out, first, "--points", "3") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "around.json was not made from these weights; give another folder by --out" in said
    assert contents(out) == before
    assert told_in(*out.glob("points-*.json"))["key"]["device"] in ("cpu", "cuda")
    (out / "around.json").write_text("{")
    assert look(out, run, "--points", "3") == 2


def test_the_loss_is_the_subjects_own_and_its_weights_stay(recipe_file):
    subject = of_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in subject.weights.items()}
    measure, digest = loss_of(subject, 3)
    view = view_around(subject, n_points=3)
    losses = list(view.chart.losses(measure))

    assert losses[1] == loss_at(subject, 3)
    assert all(torch.equal(before[name], weight) for name, weight in subject.weights.items())
    assert digest != loss_of(subject, 2)[1]


@pytest.mark.slow
def test_sigterm_keeps_the_points_and_the_same_command_ends_as_if_never_stopped(run, tmp_path):
    words = [sys.executable, "-u", "-m", "unbraid", "lab", "landscape", str(run), "--points", "21", "--items", "3"]
    out = tmp_path / "out"
    child = subprocess.Popen([*words, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "points/s" in child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    told = child.communicate(timeout=60)[0]

    assert child.returncode == 128 + signal.SIGTERM
    assert "of 546 points, kept in" in told
    assert "To go on: the same command." in told
    assert not list(out.glob("*.png"))
    (kept,) = out.glob("points-*.json")
    so_far = told_in(kept)["losses"]
    assert 0 < len(so_far) < 546
    assert cli.main([*words[4:], "--out", str(out)]) == 0
    losses = told_in(out / "around.json")["losses"]
    assert losses[: len(so_far)] == so_far
    assert len(losses) == 546
    assert losses[10] == own_loss(run, 3)


def test_points_without_a_finite_loss_are_left_white_and_told():
    offsets = np.linspace(-1, 1, 5)
    losses = np.arange(50.0)
    losses[[30, 31]] = np.nan, np.inf
    plates = plates_around(Around(offsets, Chart([], np.zeros((50, 1)), {})), losses, name="x", unit="loss")

    assert "At 2 of 25 points the loss is not finite" in plates[1].caption
    for plate in plates:
        draw_figure(plate).canvas.draw()
    flat = Field(offsets, offsets, np.ones((5, 5)), "loss", ("x", "y"), np.zeros((1, 2)), np.ones(1))
    assert np.all(np.diff(flat.levels()) > 0)
    lost = Field(offsets, offsets, np.full((5, 5), np.nan), "loss", ("x", "y"), np.zeros((1, 2)), np.ones(1))
    assert np.all(np.diff(lost.levels()) > 0)


def around_with(losses):
    return plates_around(Around(np.linspace(-1, 1, 5), Chart([], np.zeros((50, 1)), {})), losses, name="x", unit="loss")


def test_a_model_whose_own_loss_is_not_finite_is_not_called_lowest():
    losses = np.arange(50.0)
    losses[[2, 7, 12, 17, 22, 37]] = np.nan  # the model, on each line and in the grid
    plates = around_with(losses)

    assert "At the model it is not finite" in plates[0].caption
    assert "At the model itself (the middle) the loss is not finite" in plates[1].caption
    assert "At 1 of 25 points" in plates[1].caption
    for plate in plates:
        assert "nan" not in plate.caption
        assert "None of" not in plate.caption
        draw_figure(plate).canvas.draw()


def test_ends_of_lines_that_lie_lower_or_are_lost_are_told_as_such():
    losses = np.zeros(50)
    losses[[0, 4]], losses[[5, 9]], losses[10] = -0.5, 0.25, np.inf
    told = around_with(losses)[0].caption

    assert "lies -0.50 to +0.25 from that (of 4 lines: those of the others are not finite)" in told
    assert "None of the 25 points lies lower" in around_with(losses)[1].caption


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [np.nan, 2.0, 1.0], [3.0, 2.5, 1.0]])
def test_a_barrier_is_told_only_of_the_points_that_were_taken(losses):
    found = Between(np.array([0.0, 0.5, 1.0]), Chart([], np.zeros((3, 1)), {}))
    told = plate_between(found, np.array(losses), names=("a", "b"), unit="loss").caption

    assert "nan" not in told
    expected = {2.0: "at none of the 1 points between", 2.5: "rises at most 0.50"}[losses[1]]
    assert ("no height of a barrier" if np.isnan(losses[0]) else expected) in told


def test_bad_words_end_in_one_sentence_before_any_point(run, tmp_path, capsys):
    capsys.readouterr()
    for words, told in (
        (["--points", "4"], "give 5"),
        (["--points", "1"], "3 or more"),
        (["--points", "-5"], "3 or more"),
        (["--points", "1000001"], "at most 1001"),
        (["--to", run / "checkpoints" / "step-000002", "--span", "1e9"], "at most 1001"),
        (["--span", "nan"], "has no inside"),
        (["--to", tmp_path / "speech"], "is no checkpoint"),
        (["--to", run, "--set", "model.hidden=8"], "weights of another model"),
        (["--plane", "--points", "2"], "3 or more"),
    ):
        assert look(tmp_path / "out", run, *words) == 2

        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert told in said
        assert not (tmp_path / "out").exists()


def test_a_span_upside_down_and_two_views_at_once_are_refused(tmp_path, capsys):
    for words in (["--span", "-1"], ["--span", "0"], ["--to", "x", "--plane"], ["--items", "0"]):
        with pytest.raises(SystemExit, match="2"):
            look(tmp_path, "checkpoint", *words)
        assert capsys.readouterr().err.count("\n") == 1


def test_another_model_and_a_folder_that_is_no_checkpoint_are_refused(run, recipe_file, tmp_path, capsys):
    small = [str(recipe_file()), "--set", "model.hidden=8", "--set", "train.max_steps=2"]
    assert cli.main(["train", *small, "--run", str(tmp_path / "small")]) == 0
    capsys.readouterr()

    assert look(tmp_path / "out", run, "--to", tmp_path / "small") == 2
    assert "weights of another model" in capsys.readouterr().err
    assert look(tmp_path / "out", tmp_path / "speech") == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert look(tmp_path / "out", tmp_path / "small", "--plane") == 2
    said = capsys.readouterr().err
    assert "keeps 1 of the 3 or more checkpoints" in said
    assert "--set save.keep=" in said
    assert look(tmp_path / "out", run / "checkpoints" / "step-000006", "--plane") == 2
    assert "run directory" in capsys.readouterr().err


def test_figures_of_two_checkpoints_lie_in_two_folders_and_none_in_a_run(run, tmp_path):
    subject = of_checkpoint(run)

    assert folder_for(run, subject, None) == Path("landscape") / f"{run.name}-{subject.name}"
    assert folder_for(run, subject, tmp_path) == tmp_path
    with pytest.raises(UserError, match="nothing of a run is touched"):
        folder_for(run, subject, run)


def test_the_way_to_the_same_weights_is_refused(run, tmp_path, capsys):
    assert look(tmp_path / "out", run / "checkpoints" / "last", "--to", run / "checkpoints" / "step-000006") == 2
    assert "holds the same weights" in capsys.readouterr().err
