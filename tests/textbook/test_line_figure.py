"""The plates of the line: a table of their numbers for seed 0, captions that hold what was found, and what moves."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from unbraid.errors import UserError
from unbraid.textbook.drawing import drawable
from unbraid.textbook.line import noisy_points, untrained_line
from unbraid.textbook.line_figure import line_figures


@cache
def made(loss, seed=0):
    return {plate.name: plate for plate in line_figures(loss, seed)}


@pytest.fixture
def plates():
    return made("l2")


def test_the_numbers_of_seed_0_are_what_numpy_works_out(plates):
    """Minimum, gradient, slices, paths and losses of l2 in closed form, from the points and the start alone."""
    start, x, y = untrained_line(0).numpy(), noisy_points(0).x.numpy(), noisy_points(0).y.numpy()
    design = np.stack([x, np.ones_like(x)], 1)
    best, (squares,), _, _ = np.linalg.lstsq(design, y, rcond=None)
    h, m, b = 2 * design.T @ design / len(x), np.linspace(-2, 5, 100), np.linspace(-4, 4, 100)

    def loss(line):
        return ((design @ line - y) ** 2).mean()

    def after(lr, n_steps):
        return best + np.linalg.matrix_power(np.eye(2) - lr * h, n_steps) @ (start - best)

    def lost(lr):
        return next(k for k in range(99) if loss(after(lr, k)) > 1e6 * loss(start))

    def nearest(values, at):
        return values[np.abs(values - at).argmin()]

    first, slope = (design @ start - y) ** 2, h @ (start - best)
    crossings = best - h[0, 1] / np.diag(h) * (start - best)[::-1]
    means = best - h[0, 1] / np.diag(h) * (np.array([b.mean(), m.mean()]) - best[::-1])
    expected = {
        "01-untrained-line": {"m": start[0], "b": start[1]},
        "02-data": {
            "n_points": 40,
            "noise_deviation": (y - 2 * x - 1).std(ddof=1),
            "x_mean": x.mean(),
            "y_mean": y.mean(),
            "loss": loss(start),
        },
        "03-loss-of-each-point": {
            "mean": first.mean(),
            "sum": first.sum(),
            "max": first.max(),
            "norm_of_mean": np.linalg.norm(slope),
            "norm_of_sum": 40 * np.linalg.norm(slope),
        },
        "04-brute-force": {
            "exact_m": best[0],
            "exact_b": best[1],
            "exact_loss": squares / 40,
            "n_evaluations": 10_000,
            "exponent_of_ten_for_a_million": 2_000_000,
        },
        "05-slices-and-means": {
            "m_of_slice": nearest(m, best[0]),
            "b_of_slice": nearest(b, best[1]),
            "m_of_slice_through_start": nearest(m, crossings[0]),
            "b_of_slice_through_start": nearest(b, crossings[1]),
            "m_of_mean": nearest(m, means[0]),
            "b_of_mean": nearest(b, means[1]),
        },
        "06-backward": {
            "start_m_backward": slope[0],
            "start_b_backward": slope[1],
            "start_m_differences": slope[0],
            "start_b_differences": slope[1],
        },
        "07-gradient-along-m": {
            "crossing": best[0],
            "crossing_through_start": crossings[0],
            "lowest_derivative": h[0, 0] * (-2 - best[0]),
            "highest_derivative": h[0, 0] * (5 - best[0]),
        },
        "08-gradient-along-b": {
            "crossing": best[1],
            "crossing_through_start": crossings[1],
            "lowest_derivative": h[1, 1] * (-4 - best[1]),
            "highest_derivative": h[1, 1] * (4 - best[1]),
        },
        "09-descent-by-hand": {
            "m": after(0.1, 59)[0],
            "b": after(0.1, 59)[1],
            "loss_after_5": loss(after(0.1, 5)),
            "last_loss": loss(after(0.1, 59)),
            "last_distance": np.linalg.norm(after(0.1, 59) - best),
        },
        "10-six-learning-rates": {
            "lost_at_step_lr_1": lost(1.0),
            "lost_at_step_lr_0_5": lost(0.5),
            "last_loss_lr_0_1": loss(after(0.1, 300)),
            "last_loss_lr_0_01": loss(after(0.01, 300)),
            "last_loss_lr_0_001": loss(after(0.001, 300)),
            "last_loss_lr_0_0001": loss(after(0.0001, 300)),
            "l2_stable_below": 2 / np.linalg.eigvalsh(h)[-1],
        },
        "11-loss-and-gradient-norm": {
            "first_norm": np.linalg.norm(slope),
            "last_norm_lr_0_01": np.linalg.norm(h @ (after(0.01, 300) - best)),
            "too_high_rates": 2,
            "right_rates": 2,
            "too_low_rates": 2,
        },
        "11b-batch-and-stochastic": {"distance_after_5_all": np.linalg.norm(after(0.1, 5) - best)},
    }
    for name, numbers in expected.items():
        assert {key: plates[name].numbers[key] for key in numbers} == pytest.approx(numbers, rel=1e-6), name


DRAWN = {
    "04-brute-force": {
        "grid_m": 1.959596,
        "grid_b": 1.171717,
        "grid_loss": 0.2790895,
    },
    "05-slices-and-means": {
        "loss_of_slice": 0.2794306,
        "loss_of_mean_over_b": 6.514143,
    },
    "11-loss-and-gradient-norm": {
        "nine_tenths_at_step": 20,
        "norm_at_nine_tenths": 4.348741,
        "convolution_norm": 0.4413458,
        "convolution_norm_of_sums": 0.0515805,
    },
    "11b-batch-and-stochastic": {
        "distance_after_5_few": 0.04400865,
        "last_distance_few": 0.09253244,
    },
    "15-early-stopping": {
        "best_step": 130,
        "stopped_at_step": 230,
        "best_valid_loss": 0.1116106,
        "last_valid_loss": 2.079975,
        "train_loss_at_best": 0.06100287,
        "last_train_loss": 0.04634582,
        "lr": 0.4804518,
    },
    "16-warm-up-and-decay": {
        "last_distance_constant": 0.1456056,
        "last_distance_constant_tenth": 0.0415204,
        "last_distance_cosine": 0.03263729,
        "last_distance_warm_up_cosine": 0.03263729,
        "expected_last_warm_up_cosine": 0.03254422,
        "expected_last_constant": 0.1387012,
        "distance_after_20_constant": 0.1475236,
        "distance_after_20_constant_tenth": 0.8092559,
        "distance_after_20_warm_up_cosine": 0.3009127,
        "floor_constant": 0.1387012,
        "floor_constant_tenth": 0.03808764,
    },
}


def test_what_is_drawn_or_run_for_seed_0_is_as_on_the_first_day(plates):
    """No formula gives these; where one changes, the chapter's text must be read again."""
    for name, numbers in DRAWN.items():
        assert {key: plates[name].numbers[key] for key in numbers} == pytest.approx(numbers, rel=1e-6), name


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_numbers_are_valid_json_and_captions_say_nothing_that_is_not_finite(loss):
    for plate in made(loss).values():
        assert json.dumps(dict(plate.numbers), allow_nan=False)
        assert not {"nan", "inf"} & set(plate.caption.replace(",", " ").split())


def test_another_seed_gives_other_numbers_everywhere(plates):
    assert [name for name, plate in made("l2", 1).items() if plate.numbers == plates[name].numbers] == []


def test_with_l1_the_caption_says_that_the_norm_hardly_falls(plates):
    plate = made("l1")["11-loss-and-gradient-norm"]
    first, later = plate.numbers["first_norm"], plate.numbers["norm_at_nine_tenths"]

    assert later > 0.8 * first
    assert f"from {first:.2f} to {later:.2f}: with l1 it hardly falls" in plate.caption
    assert "hardly" not in plates["11-loss-and-gradient-norm"].caption


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="'l3' is not one of"):
        line_figures("l3", 0)


@pytest.mark.parametrize(
    ("name", "n_moving", "n_drawn"),
    [
        ("09-descent-by-hand", 4, lambda frame: frame + 1),
        ("10-six-learning-rates", 12, lambda frame: 1 + round(300 * (frame / 59) ** 2)),
    ],
)
def test_what_moves_is_marked_so_that_the_rest_is_drawn_once(plates, name, n_moving, n_drawn):
    motion, figure = plates[name].animation, Figure(figsize=plates[name].figsize, layout="constrained")

    move = motion.draw(figure)
    moving = [artist for axes in figure.axes for artist in axes.findobj() if artist.get_animated()]
    trails = [artist for artist in moving if getattr(artist, "get_marker", str)() == "."]

    assert motion.n_frames == 60
    assert len(moving) == n_moving
    for frame in (0, 30, 59):
        move(frame)
        assert {len(trail.get_xdata()) for trail in trails} == {n_drawn(frame)}


def test_the_first_frame_is_at_the_start_and_the_last_where_the_numbers_say(plates):
    plate = plates["09-descent-by-hand"]
    figure = Figure(figsize=plate.figsize, layout="constrained")
    move = plate.animation.draw(figure)
    (trail,) = (line for line in figure.axes[1].lines if line.get_animated())

    move(0)
    assert trail.get_xydata()[-1] == pytest.approx(untrained_line(0).numpy())
    move(59)
    assert trail.get_xydata()[-1] == pytest.approx([plate.numbers["m"], plate.numbers["b"]])


def test_a_path_that_is_lost_is_drawn_in_its_own_direction():
    path = torch.tensor([[1.0, 2.0], [-4e200, 2e200], [3e7, 0.0]], dtype=torch.float64)
    drawn = drawable(path).T.tolist()
    assert drawn == [pytest.approx(place) for place in ([1, 2], [-1000, 500], [1000, 0])]
