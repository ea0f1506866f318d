"""`unbraid lab landscape`: figures and numbers of real checkpoints, interruption, and what is refused."""

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
from unbraid.lab.experiment import experiment_from_checkpoint, experiment_from_recipe, mean_loss
from unbraid.lab.landscape import Interpolation, RandomSlices, WeightPoints
from unbraid.lab.landscape_figure import LossSurface, interpolation_figure, random_slice_figures
from unbraid.lab.landscape_run import fixed_loss, output_folder, random_view
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


def landscape(out, *words):
    return cli.main(["lab", "landscape", *map(str, words), "--out", str(out), "--items", "2"])


def read_json(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def complete_images(folder):
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    return sorted(path.stem for path in folder.glob("*.png"))


def checkpoint_loss(path, n_items=2):
    return experiment_loss(experiment_from_checkpoint(path), n_items)


def experiment_loss(experiment, n_items):
    batches = experiment.fixed_batches(n_items)
    with torch.no_grad():
        return float(mean_loss(experiment.copy_model(), experiment.build_loss(), Precision("fp32"), batches))


def test_the_three_views_of_a_run_leave_it_unchanged_byte_for_byte(run, tmp_path, capsys):
    before = contents(run)
    out = tmp_path / "out"
    first = run / "checkpoints" / "step-000002"
    last = run / "checkpoints" / "step-000006"
    capsys.readouterr()

    assert landscape(out, last, "--points", "3", "--span", "0.5") == 0
    assert "24 points in" in capsys.readouterr().out
    assert landscape(out, first, "--to", last, "--points", "5") == 0
    assert landscape(out, run, "--plane", "--points", "4") == 0

    assert contents(run) == before
    names = ["around-contour", "around-lines", "around-surface", "between", "path-contour", "path-surface"]
    assert complete_images(out) == names
    printed = capsys.readouterr().out
    assert "barrier" in printed
    assert "random walk" in printed
    line, path, around = (read_json(out / f"{name}.json") for name in ("between", "path", "around"))
    ends = [line["losses"][line["at"].index(position)] for position in (0.0, 1.0)]
    assert ends == [checkpoint_loss(first), checkpoint_loss(last)]
    assert path["steps"] == [2, 4, 6]
    assert [path["losses"][0], path["losses"][2]] == ends
    assert path["distances"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert around["losses"][1] == ends[1]
    assert [len(view["losses"]) for view in (around, line, path)] == [5 * 3 + 9, 7, 3 + 16]


def test_the_same_command_reuses_its_points_and_another_seed_starts_again(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert landscape(out, run, "--points", "3") == 0
    first = read_json(out / "around.json")["losses"]
    capsys.readouterr()

    assert landscape(out, run, "--points", "3") == 0
    assert "24 points were read from" in capsys.readouterr().out
    assert read_json(out / "around.json")["losses"] == first
    assert landscape(out, run, "--points", "3", "--seed", "1") == 0
    second = read_json(out / "around.json")["losses"]

    assert "were read from" not in capsys.readouterr().out
    assert second[1] == first[1]
    assert second != first
    assert len(list(out.glob("points-*.json"))) == 2


def test_figures_of_other_weights_are_not_overwritten(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert landscape(out, run, "--points", "3") == 0
    before = contents(out)
    capsys.readouterr()

    assert landscape(out, run / "checkpoints" / "step-000002", "--points", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "around.json was made from other weights; choose another folder with --out" in error
    assert contents(out) == before
    assert read_json(*out.glob("points-*.json"))["key"]["device"] in ("cpu", "cuda")
    (out / "around.json").write_text("{")
    assert landscape(out, run, "--points", "3") == 2


def test_the_middle_loss_is_the_models_own_and_its_weights_stay_unchanged(recipe_file):
    experiment = experiment_from_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in experiment.weights.items()}
    loss, digest = fixed_loss(experiment, 3)
    view = random_view(experiment, n_points=3)
    losses = list(view.points.losses(loss))

    assert losses[1] == experiment_loss(experiment, 3)
    assert all(torch.equal(before[name], weight) for name, weight in experiment.weights.items())
    assert digest != fixed_loss(experiment, 2)[1]


@pytest.mark.slow
def test_after_sigterm_the_same_command_ends_as_if_never_stopped(run, tmp_path):
    words = [sys.executable, "-u", "-m", "unbraid", "lab", "landscape", str(run), "--points", "21", "--items", "3"]
    out = tmp_path / "out"
    child = subprocess.Popen([*words, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "points/s" in child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    printed = child.communicate(timeout=60)[0]

    assert child.returncode == 128 + signal.SIGTERM
    assert "of 546 points, saved in" in printed
    assert "To resume, run the same command." in printed
    assert not list(out.glob("*.png"))
    (points_file,) = out.glob("points-*.json")
    so_far = read_json(points_file)["losses"]
    assert 0 < len(so_far) < 546
    assert cli.main([*words[4:], "--out", str(out)]) == 0
    losses = read_json(out / "around.json")["losses"]
    assert losses[: len(so_far)] == so_far
    assert len(losses) == 546
    assert losses[10] == checkpoint_loss(run, 3)


def figures_of(losses):
    slices = RandomSlices(np.linspace(-1, 1, 5), WeightPoints([], np.zeros((50, 1)), {}))
    return random_slice_figures(slices, losses, name="x", unit="loss")


def test_points_without_a_finite_loss_stay_white_and_are_counted():
    losses = np.arange(50.0)
    losses[[30, 31]] = np.nan, np.inf
    figures = figures_of(losses)

    assert "At 2 of 25 points the loss is not finite" in figures[1].caption
    for figure in figures:
        draw_figure(figure).canvas.draw()


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_contour_levels_increase_although_no_loss_differs(value):
    offsets = np.linspace(-1, 1, 5)
    surface = LossSurface(offsets, offsets, np.full((5, 5), value), "loss", ("x", "y"), np.zeros((1, 2)), np.ones(1))

    assert np.all(np.diff(surface.levels()) > 0)


def test_a_model_whose_own_loss_is_not_finite_is_not_called_lowest():
    losses = np.arange(50.0)
    losses[[2, 7, 12, 17, 22, 37]] = np.nan  # the model, on each line and in the grid
    figures = figures_of(losses)

    assert "At the model the loss is not finite" in figures[0].caption
    assert "At the model itself (the middle) the loss is not finite" in figures[1].caption
    assert "At 1 of 25 points" in figures[1].caption
    for figure in figures:
        assert "nan" not in figure.caption
        assert "None of" not in figure.caption
        draw_figure(figure).canvas.draw()


def test_the_caption_tells_of_line_ends_that_are_lower_or_not_finite():
    losses = np.zeros(50)
    losses[[0, 4]] = -0.5
    losses[[5, 9]] = 0.25
    losses[10] = np.inf
    figures = figures_of(losses)

    expected = "differs from it by -0.50 to +0.25 (4 lines; those of the others are not finite)"
    assert expected in figures[0].caption
    assert "None of the 25 points is lower" in figures[1].caption


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 2.0, 1.0], "at none of the 1 points between"),
        ([np.nan, 2.0, 1.0], "the barrier has no height"),
        ([3.0, 2.5, 1.0], "rises at most 0.50"),
    ],
)
def test_the_caption_claims_a_barrier_only_at_the_points_computed(losses, expected):
    line = Interpolation(np.array([0.0, 0.5, 1.0]), WeightPoints([], np.zeros((3, 1)), {}))
    caption = interpolation_figure(line, np.array(losses), names=("a", "b"), unit="loss").caption

    assert "nan" not in caption
    assert expected in caption


def test_bad_options_end_in_one_sentence_before_any_point(run, tmp_path, capsys):
    capsys.readouterr()
    for words, message in (
        (["--points", "4"], "give 5"),
        (["--points", "1"], "3 or more"),
        (["--points", "-5"], "3 or more"),
        (["--points", "1000001"], "at most 1001"),
        (["--to", run / "checkpoints" / "step-000002", "--span", "1e9"], "at most 1001"),
        (["--span", "nan"], "empty or not finite"),
        (["--to", tmp_path / "speech"], "is no checkpoint"),
        (["--to", run, "--set", "model.hidden=8"], "weights of another model"),
        (["--plane", "--points", "2"], "3 or more"),
    ):
        assert landscape(tmp_path / "out", run, *words) == 2

        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()


def test_a_negative_span_and_two_views_at_once_are_refused(tmp_path, capsys):
    for words in (["--span", "-1"], ["--span", "0"], ["--to", "x", "--plane"], ["--items", "0"]):
        with pytest.raises(SystemExit, match="2"):
            landscape(tmp_path, "checkpoint", *words)
        assert capsys.readouterr().err.count("\n") == 1


def test_another_model_and_a_folder_without_a_checkpoint_are_refused(run, recipe_file, tmp_path, capsys):
    small = [str(recipe_file()), "--set", "model.hidden=8", "--set", "train.max_steps=2"]
    assert cli.main(["train", *small, "--run", str(tmp_path / "small")]) == 0
    capsys.readouterr()

    assert landscape(tmp_path / "out", run, "--to", tmp_path / "small") == 2
    assert "weights of another model" in capsys.readouterr().err
    assert landscape(tmp_path / "out", tmp_path / "speech") == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert landscape(tmp_path / "out", tmp_path / "small", "--plane") == 2
    error = capsys.readouterr().err
    assert "holds 1 checkpoints, and a plane needs 3 or more" in error
    assert "--set save.keep=" in error
    assert landscape(tmp_path / "out", run / "checkpoints" / "step-000006", "--plane") == 2
    assert "run directory" in capsys.readouterr().err


def test_each_checkpoint_has_an_output_folder_of_its_own_outside_any_run(run, tmp_path):
    experiment = experiment_from_checkpoint(run)

    assert output_folder(run, experiment, None) == Path("landscape") / f"{run.name}-{experiment.name}"
    assert output_folder(run, experiment, tmp_path) == tmp_path
    with pytest.raises(UserError, match="run directories are left unchanged"):
        output_folder(run, experiment, run)


def test_interpolating_to_the_same_weights_is_refused(run, tmp_path, capsys):
    assert landscape(tmp_path / "out", run / "checkpoints" / "last", "--to", run / "checkpoints" / "step-000006") == 2
    assert "holds the same weights" in capsys.readouterr().err
