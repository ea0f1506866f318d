"""The figures of the line: their numbers for seed 0, captions that agree with them, and animations."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from unbraid.errors import UserError
from unbraid.textbook.drawing import drawable_path
from unbraid.textbook.line import noisy_points, untrained_line
from unbraid.textbook.line_figure import line_figures


@cache
def figures_by_name(loss, seed=0):
    return {figure.name: figure for figure in line_figures(loss, seed)}


@pytest.fixture
def figures():
    return figures_by_name("l2")


def test_numbers_of_seed_0_equal_closed_forms_in_numpy(figures):
    """Minimum, gradient, slices, paths and losses of l2 in closed form, from the points and the start alone."""
    start = untrained_line(0).numpy()
    x = noisy_points(0).x.numpy()
    y = noisy_points(0).y.numpy()
    design = np.stack([x, np.ones_like(x)], 1)
    best, (squares,), _, _ = np.linalg.lstsq(design, y, rcond=None)
    h = 2 * design.T @ design / len(x)
    m = np.linspace(-2, 5, 100)
    b = np.linspace(-4, 4, 100)

    def loss(line):
        return ((design @ line - y) ** 2).mean()

    def after(lr, n_steps):
        return best + np.linalg.matrix_power(np.eye(2) - lr * h, n_steps) @ (start - best)

    def divergence_step(lr):
        return next(k for k in range(99) if loss(after(lr, k)) > 1e6 * loss(start))

    def nearest(values, value):
        return values[np.abs(values - value).argmin()]

    first_losses = (design @ start - y) ** 2
    gradient = h @ (start - best)
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
            "mean": first_losses.mean(),
            "sum": first_losses.sum(),
            "max": first_losses.max(),
            "norm_of_mean": np.linalg.norm(gradient),
            "norm_of_sum": 40 * np.linalg.norm(gradient),
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
            "start_m_backward": gradient[0],
            "start_b_backward": gradient[1],
            "start_m_differences": gradient[0],
            "start_b_differences": gradient[1],
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
            "diverged_at_step_lr_1": divergence_step(1.0),
            "diverged_at_step_lr_0_5": divergence_step(0.5),
            "last_loss_lr_0_1": loss(after(0.1, 300)),
            "last_loss_lr_0_01": loss(after(0.01, 300)),
            "last_loss_lr_0_001": loss(after(0.001, 300)),
            "last_loss_lr_0_0001": loss(after(0.0001, 300)),
            "l2_stable_below": 2 / np.linalg.eigvalsh(h)[-1],
        },
        "11-loss-and-gradient-norm": {
            "first_norm": np.linalg.norm(gradient),
            "last_norm_lr_0_01": np.linalg.norm(h @ (after(0.01, 300) - best)),
            "too_high_rates": 2,
            "right_rates": 2,
            "too_low_rates": 2,
        },
        "11b-batch-and-stochastic": {"distance_after_5_all": np.linalg.norm(after(0.1, 5) - best)},
    }
    for name, numbers in expected.items():
        assert {key: figures[name].numbers[key] for key in numbers} == pytest.approx(numbers, rel=1e-6), name


RECORDED = {
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


def test_other_numbers_of_seed_0_equal_recorded_values(figures):
    """These depend on random draws. If one changes, the chapter's text must be checked."""
    for name, numbers in RECORDED.items():
        assert {key: figures[name].numbers[key] for key in numbers} == pytest.approx(numbers, rel=1e-6), name


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_numbers_and_captions_are_finite(loss):
    for figure in figures_by_name(loss).values():
        assert json.dumps(dict(figure.numbers), allow_nan=False)
        assert not {"nan", "inf"} & set(figure.caption.replace(",", " ").split())


def test_every_figure_depends_on_the_seed(figures):
    others = figures_by_name("l2", 1)
    assert [name for name, other in others.items() if other.numbers == figures[name].numbers] == []


def test_with_l1_the_caption_says_that_the_norm_hardly_falls(figures):
    l1_figure = figures_by_name("l1")["11-loss-and-gradient-norm"]
    first = l1_figure.numbers["first_norm"]
    later = l1_figure.numbers["norm_at_nine_tenths"]

    assert later > 0.8 * first
    assert f"from {first:.2f} to {later:.2f}: with l1 it hardly falls" in l1_figure.caption
    assert "hardly" not in figures["11-loss-and-gradient-norm"].caption


def test_unknown_loss_is_refused():
    with pytest.raises(UserError, match="'l3' is not one of"):
        line_figures("l3", 0)


@pytest.mark.parametrize(
    ("name", "n_moving", "n_points"),
    [
        ("09-descent-by-hand", 4, lambda frame: frame + 1),
        ("10-six-learning-rates", 12, lambda frame: 1 + round(300 * (frame / 59) ** 2)),
    ],
)
def test_only_moving_artists_are_marked_as_animated(figures, name, n_moving, n_points):
    animation = figures[name].animation
    figure = Figure(figsize=figures[name].figsize, layout="constrained")

    go_to_frame = animation.draw(figure)
    moving = [artist for axes in figure.axes for artist in axes.findobj() if artist.get_animated()]
    trails = [artist for artist in moving if getattr(artist, "get_marker", str)() == "."]

    assert animation.n_frames == 60
    assert len(moving) == n_moving
    for frame in (0, 30, 59):
        go_to_frame(frame)
        assert {len(trail.get_xdata()) for trail in trails} == {n_points(frame)}


def test_animation_begins_at_the_start_and_ends_at_the_numbers(figures):
    spec = figures["09-descent-by-hand"]
    figure = Figure(figsize=spec.figsize, layout="constrained")
    go_to_frame = spec.animation.draw(figure)
    (trail,) = (line for line in figure.axes[1].lines if line.get_animated())

    go_to_frame(0)
    assert trail.get_xydata()[-1] == pytest.approx(untrained_line(0).numpy())
    go_to_frame(59)
    assert trail.get_xydata()[-1] == pytest.approx([spec.numbers["m"], spec.numbers["b"]])


def test_diverged_path_is_drawn_in_its_own_direction():
    path = torch.tensor([[1.0, 2.0], [-4e200, 2e200], [3e7, 0.0]], dtype=torch.float64)
    drawn = drawable_path(path).T.tolist()
    assert drawn == [pytest.approx(point) for point in ([1, 2], [-1000, 500], [1000, 0])]
