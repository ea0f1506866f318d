"""Points of a loss landscape, against closed forms: a parabola, a line between two minima, the plane of a path."""

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.errors import UserError
from unbraid.lab.landscape import (
    WeightPoints,
    axis_positions,
    interpolate,
    loss_barrier,
    loss_of_weights,
    path_slice,
    random_slices,
)
from unbraid.lab.weight_directions import linear_combination

NAMES = ("weight", "bias")


def make_state(seed, scale=1.0):
    torch.manual_seed(seed)
    return {"weight": scale * torch.randn(2, 3, dtype=torch.float64), "bias": torch.randn(2, dtype=torch.float64)}


def quadratic(weights):
    """Half the squared norm of the weights."""
    return float(sum((weights[name].double() ** 2).sum() for name in NAMES) / 2)


def losses_at(points, loss=quadratic):
    return np.array(list(points.losses(loss)))


def test_slices_of_a_quadratic_loss_are_parabolas():
    state = make_state(0)
    slices = random_slices(state, NAMES, span=0.5, n_points=5, seed=2)
    lines, grid = slices.split(losses_at(slices.points))

    directions = slices.points.anchors[1:]
    for line, direction in zip(lines, directions, strict=True):
        slope = float((state["weight"] * direction["weight"]).sum())
        curvature = float((direction["weight"] ** 2).sum())
        expected = quadratic(state) + slope * slices.offsets + curvature * slices.offsets**2 / 2
        assert line == pytest.approx(expected)
    assert grid.shape == (5, 5)
    assert grid[2, 2] == quadratic(state)
    assert grid[2] == pytest.approx(lines[0])
    assert grid[:, 2] == pytest.approx(lines[1])


def test_an_interpolation_ends_exactly_at_the_models():
    first = make_state(0)
    second = make_state(1)
    line = interpolate(first, second, beyond=0.2, n_points=11)
    losses = losses_at(line.points)

    assert line.positions[[0, -1]] == pytest.approx([-0.2, 1.2])
    assert len(line.positions) == 15
    assert losses[line.positions == 0] == quadratic(first)
    assert losses[line.positions == 1] == quadratic(second)


def test_a_barrier_is_the_height_above_the_straight_line():
    positions = np.array([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    parabola = 4 * positions * (1 - positions)
    inf_between = np.where(positions == 0.5, np.inf, parabola)
    nan_beyond = np.where(positions == 1.5, np.nan, parabola)

    assert loss_barrier(positions, parabola + 3 * positions) == pytest.approx((1.0, 0.5))
    assert loss_barrier(positions, -parabola)[0] == 0
    assert loss_barrier(positions, 2 * positions)[0] == 0
    assert np.isnan(loss_barrier(positions, inf_between)).all()
    assert loss_barrier(positions, nan_beyond) == pytest.approx((1.0, 0.5))


def test_equal_models_have_no_barrier_between_them():
    state = make_state(0)
    line = interpolate(state, state)

    assert loss_barrier(line.positions, losses_at(line.points))[0] == pytest.approx(0, abs=1e-14)


def test_a_path_slice_holds_the_checkpoints_and_the_plane():
    states = {10 * k: make_state(k) | {"n": torch.tensor(k)} for k in range(5)}
    path = path_slice(states, NAMES, margin=0.1, n_points=4)
    checkpoint_losses, grid = path.split(losses_at(path.points))

    assert path.steps == [0, 10, 20, 30, 40]
    assert checkpoint_losses.tolist() == [quadratic(states[step]) for step in path.steps]
    corner = linear_combination([states[40], *path.plane.axes], (1.0, path.x[0], path.y[-1]))
    assert grid[-1, 0] == quadratic(corner)
    across = path.plane.coordinates[:, 0]
    assert path.x[0] < across.min() < across.max() < path.x[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda state: random_slices(state, NAMES, span=-1.0), "lower end first"),
        (lambda state: random_slices(state, NAMES, span=float("nan")), "empty or not finite"),
        (lambda state: random_slices(state, NAMES, n_points=20), "give 21"),
        (lambda state: random_slices(state, NAMES, n_points=1), "3 or more"),
        (lambda state: interpolate(state, state, beyond=-0.6), "lower end first"),
        (lambda state: interpolate(state, state, n_points=2), "3 or more"),
        (lambda state: path_slice(dict.fromkeys((1, 2, 3), state), NAMES), "no plane"),
        (lambda state: axis_positions(1.0, -1.0, 5), "range 1 to -1"),
    ],
)
def test_an_impossible_range_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(make_state(0))


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def test_loss_of_weights_uses_the_weights_passed_and_leaves_the_model_unchanged():
    torch.manual_seed(0)
    model = TiedModel().train()
    x = torch.randn(8, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_training_mode = []

    def mean_square(model):
        in_training_mode.append(torch.is_grad_enabled() or model.training)
        return model(x).square().mean()

    loss = loss_of_weights(model, mean_square)
    slices = random_slices(before, [name for name, _ in model.named_parameters()], n_points=3)
    losses = losses_at(slices.points, loss)
    moved = slices.points.anchors[1]["first.weight"] + before["first.weight"]

    assert not any(in_training_mode)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    model.eval()
    assert losses[1] == float(model(x).square().mean().detach())
    model.first.weight.data.copy_(moved)
    assert losses[2] == pytest.approx(float(model(x).square().mean().detach()), rel=1e-5)


def test_points_already_done_are_not_computed_again():
    points = WeightPoints([make_state(0)], np.array([[1.0], [2.0], [3.0]]), {})

    assert list(points.losses(quadratic, n_done=2)) == [quadratic(linear_combination(points.anchors, (3.0,)))]
