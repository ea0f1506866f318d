"""Where the loss is taken, and closed forms of it: a parabola, a line between two minima, the plane of a path."""

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.errors import UserError
from unbraid.lab.landscape import Chart, around, barrier, between, measured, of_path, steps_from
from unbraid.lab.weight_directions import combined

NAMES = ("weight", "bias")


def state_of(seed, scale=1.0):
    torch.manual_seed(seed)
    return {"weight": scale * torch.randn(2, 3, dtype=torch.float64), "bias": torch.randn(2, dtype=torch.float64)}


def square(weights):
    """Half the squared length of the weights: a bowl."""
    return float(sum((weights[name].double() ** 2).sum() for name in NAMES) / 2)


def losses(chart, measure=square):
    return np.array(list(chart.losses(measure)))


def test_slices_of_a_bowl_are_parabolas():
    state = state_of(0)
    found = around(state, NAMES, span=0.5, n_points=5, seed=2)
    lines, grid = found.split(losses(found.chart))

    directions = found.chart.anchors[1:]
    for line, direction in zip(lines, directions, strict=True):
        slope = float((state["weight"] * direction["weight"]).sum())
        curvature = float((direction["weight"] ** 2).sum())
        assert line == pytest.approx(square(state) + slope * found.offsets + curvature * found.offsets**2 / 2)
    assert grid.shape == (5, 5)
    assert grid[2, 2] == square(state)
    assert grid[2] == pytest.approx(lines[0])
    assert grid[:, 2] == pytest.approx(lines[1])


def test_both_ends_of_a_line_are_the_models_themselves():
    one, other = state_of(0), state_of(1)
    found = between(one, other, beyond=0.2, n_points=11)
    taken = losses(found.chart)

    assert found.at[[0, -1]] == pytest.approx([-0.2, 1.2])
    assert len(found.at) == 15
    assert taken[found.at == 0] == square(one)
    assert taken[found.at == 1] == square(other)


def test_a_barrier_is_the_height_above_the_straight_line():
    at = np.array([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    parabola = 4 * at * (1 - at)

    assert barrier(at, parabola + 3 * at) == pytest.approx((1.0, 0.5))
    assert barrier(at, -parabola)[0] == 0
    assert barrier(at, 2 * at)[0] == 0
    assert np.isnan(barrier(at, np.where(at == 0.5, np.inf, parabola))).all()
    assert barrier(at, np.where(at == 1.5, np.nan, parabola)) == pytest.approx((1.0, 0.5))


def test_between_two_equal_models_there_is_no_barrier():
    one = state_of(0)
    found = between(one, one)

    assert barrier(found.at, losses(found.chart))[0] == pytest.approx(0, abs=1e-14)


def test_a_paths_chart_takes_the_checkpoints_themselves_and_the_plane():
    states = {10 * k: state_of(k) | {"n": torch.tensor(k)} for k in range(5)}
    found = of_path(states, NAMES, margin=0.1, n_points=4)
    own, grid = found.split(losses(found.chart))

    assert found.steps == [0, 10, 20, 30, 40]
    assert own.tolist() == [square(states[step]) for step in found.steps]
    corner = combined([states[40], *found.plane.axes], (1.0, found.x[0], found.y[-1]))
    assert grid[-1, 0] == square(corner)
    assert found.x[0] < found.plane.path[:, 0].min() < found.plane.path[:, 0].max() < found.x[-1]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda one: around(one, NAMES, span=-1.0), "lower end first"),
        (lambda one: around(one, NAMES, span=float("nan")), "no inside"),
        (lambda one: around(one, NAMES, n_points=20), "give 21"),
        (lambda one: around(one, NAMES, n_points=1), "3 or more"),
        (lambda one: between(one, one, beyond=-0.6), "lower end first"),
        (lambda one: between(one, one, n_points=2), "3 or more"),
        (lambda one: of_path(dict.fromkeys((1, 2, 3), one), NAMES), "no plane"),
        (lambda one: steps_from(1.0, -1.0, 5), "from 1 to -1"),
    ],
)
def test_a_range_that_cannot_be_is_refused(make, told):
    with pytest.raises(UserError, match=told):
        make(state_of(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.other = nn.Linear(2, 2, bias=False)
        self.other.weight = self.one.weight

    def forward(self, given):
        return self.other(self.norm(self.one(given)))


def test_the_loss_is_that_of_the_weights_given_and_the_model_is_left_alone():
    torch.manual_seed(0)
    model, given = Tied().train(), torch.randn(8, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = []

    def loss(some):
        grads.append(torch.is_grad_enabled() or some.training)
        return some(given).square().mean()

    measure = measured(model, loss)
    found = around(before, [name for name, _ in model.named_parameters()], n_points=3)
    taken = losses(found.chart, measure)
    moved = found.chart.anchors[1]["one.weight"] + before["one.weight"]

    assert not any(grads)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    model.eval()
    assert taken[1] == float(model(given).square().mean().detach())
    model.one.weight.data.copy_(moved)
    assert taken[2] == pytest.approx(float(model(given).square().mean().detach()), rel=1e-5)


def test_what_is_known_is_not_taken_again():
    chart = Chart([state_of(0)], np.array([[1.0], [2.0], [3.0]]), {})

    assert list(chart.losses(square, known=[0.0, 0.0])) == [square(combined(chart.anchors, (3.0,)))]
