"""The chapter on gradient descent: its figures, numbers and page."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from unbraid.cli import main
from unbraid.lab.animate import frames, write_gif
from unbraid.lab.chapter import figure_of, page
from unbraid.lab.line import make_problem
from unbraid.lab.line_plates import line_plates
from unbraid.lab.plates import Motion, Plate


@pytest.fixture(scope="module")
def numbers():
    return {plate.name: plate.numbers for plate in line_plates("l2", 0)}


def test_the_numbers_of_seed_0_are_those_of_least_squares(numbers):
    points = make_problem("l2", 0).points
    design = np.stack([points.x.numpy(), np.ones(len(points.x))], 1)
    (m, b), squares, *_ = np.linalg.lstsq(design, points.y.numpy(), rcond=None)
    forced = numbers["04-brute-force"]

    assert [forced["exact_m"], forced["exact_b"]] == pytest.approx([m, b], rel=1e-9)
    assert forced["exact_loss"] == pytest.approx(squares[0] / len(points.x), rel=1e-9)
    assert [forced["grid_m"], forced["grid_b"]] == pytest.approx([m, b], abs=8 / 99)
    assert forced["n_evaluations"] == 100**2
    assert numbers["07-gradient-along-m"]["crossing"] == pytest.approx(m, abs=1e-3)
    assert numbers["08-gradient-along-b"]["crossing"] == pytest.approx(b, abs=1e-3)
    largest = np.linalg.eigvalsh(2 * design.T @ design / len(design))[-1]
    assert numbers["10-six-learning-rates"]["l2_stable_below"] == pytest.approx(2 / largest, rel=1e-9)
    assert numbers["03-loss-of-each-point"]["norm_of_sum"] == pytest.approx(
        len(points.x) * numbers["03-loss-of-each-point"]["norm_of_mean"]
    )


def test_a_slice_is_lowest_at_the_minimum_and_the_mean_elsewhere(numbers):
    told, best = numbers["05-slices-and-means"], numbers["04-brute-force"]

    assert told["m_of_slice"] == pytest.approx(best["exact_m"], abs=7 / 99)
    assert abs(told["m_of_mean"] - best["exact_m"]) > 0.1


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_the_same_seed_gives_the_same_numbers_and_captions(loss):
    first, again = line_plates(loss, 1), line_plates(loss, 1)

    for one, other in zip(first, again, strict=True):
        assert dict(one.numbers) == pytest.approx(dict(other.numbers), rel=1e-9, abs=1e-12, nan_ok=True)
    told = [[one.caption for one in plates if one.name != "06-backward"] for plates in (first, again)]  # of rounding
    assert told[0] == told[1]


def test_early_stopping_ends_before_the_validation_loss_has_climbed(numbers):
    told = numbers["15-early-stopping"]

    assert told["best_step"] < told["stopped_at_step"]
    assert told["best_valid_loss"] < told["last_valid_loss"]
    assert told["last_train_loss"] < told["train_loss_at_best"]


@pytest.mark.slow
def test_the_command_leaves_figures_animations_numbers_and_a_page(tmp_path, capsys):
    out = tmp_path / "deep" / "out"

    assert main(["lab", "gradient-descent", "-o", str(out), "--loss", "huber"]) == 0

    assert str(out / "index.html") in capsys.readouterr().out
    told = json.loads((out / "numbers.json").read_text())
    names = [plate["name"] for plate in told["plates"]]
    assert (told["loss"], told["seed"]) == ("huber", 0)
    assert {name[:2] for name in names} == {f"{n:02d}" for n in range(1, 17)}
    assert [name for name in names if not (out / f"{name}.png").exists()] == []
    for name in ("09-descent-by-hand", "10-six-learning-rates", "12-race-narrow-valley", "13-cliff"):
        with Image.open(out / f"{name}.gif") as moving:
            assert moving.n_frames > 20
    pictures = re.findall(r'src="([^"]+)"', (out / "index.html").read_text())
    assert set(pictures) >= {f"{name}.png" for name in names}
    assert [name for name in pictures if not (out / name).exists()] == []
    assert list(out.glob(".*.tmp")) == []


def test_the_page_shows_hostile_words_as_text():
    plate = Plate("01-x", "<script>", "a & <b>", {"<i>": 1.0}, lambda figure: None)

    shown = page([plate], loss="l2", seed=0, animate=True, videos=False)

    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "<i>" not in shown


@pytest.mark.parametrize("plate", line_plates("l2", 0), ids=lambda plate: plate.name)
def test_every_figure_of_the_line_draws(plate):
    figure = figure_of(plate)

    assert figure.axes
    assert plate.caption.endswith(".")


def test_frames_are_those_of_the_motion_and_the_gif_holds_them_all(tmp_path):
    def draw(figure):
        axes = figure.add_subplot()
        axes.set(xlim=(0, 10), ylim=(0, 1))
        (dot,) = axes.plot([], [], "o", color="red", markersize=20, animated=True)
        return lambda frame: dot.set_data([frame], [0.5])

    pictures = list(frames(Motion(8, draw), (3.0, 2.0)))
    write_gif(tmp_path / "moving.gif", pictures, frames_per_second=15)

    assert len(pictures) == 8
    red = [np.nonzero((picture[..., 0] > 200) & (picture[..., 1] < 60))[1].mean() for picture in pictures[1:]]
    assert (np.diff(red) > 0).all()
    with Image.open(tmp_path / "moving.gif") as moving:
        assert moving.n_frames == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--loss", "l3"], "choose from"), (["--seed", "x"], "invalid int value")],
)
def test_bad_words_are_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lab", "gradient-descent", *words])

    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    assert main(["lab", "gradient-descent", "-o", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
