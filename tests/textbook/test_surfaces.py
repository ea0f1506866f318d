"""Descent on surfaces, clippers at a cliff, and gradients through time, compared with closed forms."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.seeding import generator
from unbraid.textbook.surfaces import (
    ELEMENTWISE,
    LR_GRID,
    RACE_OPTIMIZERS,
    DentedBowl,
    Quadratic,
    RecurrentNeuron,
    autoclip_max_norms,
    clip_gradient,
    descend,
    grid_points,
    losses_at,
    lstm_gradients,
    make_clippers,
    race,
    random_orthogonal,
    recurrent_gradients,
    training_norms,
)
from unbraid.textbook.surfaces_figure import (
    PERCENTILES,
    autoclip_figure,
    cliff_figure,
    recurrence_figure,
    surface_figures,
)
from unbraid.train.optim import OPTIMIZERS

VALLEY = Quadratic.rotated((0.08, 8.0), 30, (1.0, 0.5))
START = np.array([-4.0, 2.0])


def test_sgd_on_a_quadratic_is_a_matrix_power():
    result = descend(VALLEY, [START], RACE_OPTIMIZERS["SGD"], 0.2, 30)

    factor = np.eye(2) - 0.2 * VALLEY.hessian
    expected = [VALLEY.minimum + np.linalg.matrix_power(factor, k) @ (START - VALLEY.minimum) for k in range(31)]
    np.testing.assert_allclose(result.points[:, 0], expected, rtol=1e-10)


def test_momentum_on_a_quadratic_is_a_power_of_the_matrix_of_position_and_velocity():
    lr = 0.05
    mu = 0.9
    result = descend(VALLEY, [START], RACE_OPTIMIZERS["momentum"], lr, 30)

    hessian = VALLEY.hessian
    identity = np.eye(2)
    matrix = np.block([[identity - lr * hessian, -lr * mu * identity], [hessian, mu * identity]])
    state = np.concatenate([START - VALLEY.minimum, np.zeros(2)])
    expected = [VALLEY.minimum + (np.linalg.matrix_power(matrix, k) @ state)[:2] for k in range(31)]
    np.testing.assert_allclose(result.points[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_first_step_of_adam_is_one_lr_long_in_each_coordinate(name):
    make_optimizer = partial(RACE_OPTIMIZERS[name], weight_decay=0.0)

    step = np.diff(descend(VALLEY, [START], make_optimizer, 0.02, 1).points[:, 0], axis=0)[0]

    np.testing.assert_allclose(np.abs(step), 0.02, rtol=1e-6)
    assert np.array_equal(np.sign(step), -np.sign(VALLEY.hessian @ (START - VALLEY.minimum)))


def test_steps_of_muon_on_a_row_of_two_have_constant_length():
    make_optimizer = partial(RACE_OPTIMIZERS["Muon"], weight_decay=0.0)

    steps = np.linalg.norm(np.diff(descend(VALLEY, [START], make_optimizer, 0.1, 40).points[:, 0], axis=0), axis=1)

    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
    assert 0.68 < steps[0] / (0.1 * 0.2 * 2**0.5) < 1.21


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_starts_in_one_weight_move_like_starts_in_separate_weights(name):
    starts = np.array([[-4.0, 2.0], [2.0, -1.0]])
    lrs = [0.1, 0.02]

    together = descend(VALLEY, starts, RACE_OPTIMIZERS[name], lrs, 20, one_weight_per_start=False)
    separate = descend(VALLEY, starts, RACE_OPTIMIZERS[name], lrs, 20, one_weight_per_start=True)

    np.testing.assert_allclose(together.points, separate.points, rtol=1e-9)


@pytest.mark.parametrize("name", RACE_OPTIMIZERS)
def test_starts_side_by_side_move_like_each_start_alone_at_its_own_lr(name):
    starts = np.array([[-4.0, 2.0], [2.0, -1.0]])
    lrs = [0.1, 0.02]

    result = descend(VALLEY, starts, RACE_OPTIMIZERS[name], lrs, 20)

    for index, (start, lr) in enumerate(zip(starts, lrs, strict=True)):
        weight = nn.Parameter(torch.from_numpy(start[None].copy()))
        optimizer = RACE_OPTIMIZERS[name]([weight], lr=lr)
        for _ in range(20):
            optimizer.zero_grad()
            VALLEY(weight).sum().backward()
            optimizer.step()
        np.testing.assert_allclose(result.points[-1, index], weight.detach()[0].numpy(), rtol=1e-8)


def test_race_chooses_the_lr_that_theory_says_is_best():
    # SGD shrinks distance by max |1 - lr h|: best at 2 / (8 + 0.08) = 0.2475, and every rate from 0.25 on diverges.
    result = race(VALLEY, [START], 150, optimizers={"SGD": RACE_OPTIMIZERS["SGD"]}, lrs=LR_GRID)

    assert result["SGD"].lr == 0.2
    assert result["SGD"].descent.final_loss[0] == pytest.approx(
        np.mean([VALLEY(torch.tensor(p[None])).item() for p in result["SGD"].descent.points[-15:, 0]])
    )


def test_final_loss_of_a_diverged_descent_is_infinite():
    result = descend(VALLEY, [START], RACE_OPTIMIZERS["SGD"], 50.0, 300)

    assert result.final_loss[0] == np.inf


def test_dented_bowl_equals_its_formula():
    bowl = DentedBowl(np.array([[1.0, 0.0]]), np.array([0.5]), 0.3, 2.0)

    assert losses_at(bowl, [1.0, 0.0]) == pytest.approx(1.0 - 0.5)
    assert losses_at(bowl, [1.3, 0.0]) == pytest.approx(1.69 - 0.5 * np.exp(-0.5))


def test_recurrent_neuron_equals_the_loop_written_out():
    state = 0.5
    for _ in range(15):
        state = 1 / (1 + np.exp(-(5.5 * state - 2.2)))

    assert losses_at(RecurrentNeuron(), [5.5, -2.2]) == pytest.approx((state - 0.7) ** 2, rel=1e-12)


def test_grid_points_have_x_across_and_y_up():
    x, y, points = grid_points((0, 1), (10, 12), 3)

    assert points.shape == (3, 3, 2)
    assert points[2, 0].tolist() == [x[0], y[2]] == [0.0, 12.0]


@pytest.mark.parametrize(("name", "expected"), [("fixed norm", [0.6, 0.8]), ("by value", [1.0, 1.0])])
def test_clipping_by_norm_keeps_the_direction_and_by_value_does_not(name, expected):
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)

    clip_gradient(make_clippers(1.0, 1.0, 10.0)[name], weight)

    np.testing.assert_allclose(weight.grad[0].numpy(), expected)


def test_descent_leaves_the_cliff_unclipped_and_stays_with_a_fixed_norm():
    start = np.array([5.5, -2.2])
    lr = 0.3
    n_steps = 80
    max_norm = 0.1
    descents = {}
    for name in ("no clipping", "fixed norm"):
        clip = partial(clip_gradient, make_clippers(max_norm, max_norm, 10.0)[name])
        descents[name] = descend(RecurrentNeuron(), [start], OPTIMIZERS["sgd"], lr, n_steps, clip=clip)

    unclipped = descents["no clipping"]
    clipped = descents["fixed norm"]
    assert np.abs(unclipped.points[-1, 0] - start).max() > 2  # 80 clipped steps can cover 80 * 0.03 = 2.4 at most
    assert np.linalg.norm(np.diff(clipped.points[:, 0], axis=0), axis=1).max() <= lr * max_norm * (1 + 1e-9)
    assert np.linalg.norm(clipped.points[-1, 0] - start) < 0.7
    assert clipped.grad_norms.max() > 10  # it met the wall too
    assert clipped.losses[-20:].min() < unclipped.losses[-20:].min()


@pytest.mark.parametrize("radius", [0.9, 1.1])
def test_gradient_through_a_linear_recurrence_is_a_matrix_power(radius):
    rng = generator(1, "test")
    weight = rng.normal(size=(5, 5)) * radius / 3
    direction = rng.normal(size=5)

    result = recurrent_gradients(weight, rng.normal(size=(12, 5)), direction, linear=True)

    expected = [np.linalg.matrix_power(weight.T, k) @ direction for k in range(13)]
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_scaled_orthogonal_recurrence_has_a_power_of_its_scale_as_norm():
    rng = generator(2, "test")
    rotation = random_orthogonal(rng, 6)
    direction = np.ones(6) / 6**0.5

    np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-12)
    result = recurrent_gradients(1.1 * rotation, np.zeros((20, 6)), direction, linear=True)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1.1 ** np.arange(21), rtol=1e-10)


def test_tanh_around_zero_is_linear():
    rng = generator(3, "test")
    weight = rng.normal(size=(4, 4)) / 2
    direction = rng.normal(size=4)
    inputs = np.zeros((8, 4))

    with_tanh = recurrent_gradients(weight, inputs, direction)
    linear = recurrent_gradients(weight, inputs, direction, linear=True)

    np.testing.assert_allclose(with_tanh, linear, rtol=1e-12)


def test_gradient_through_tanh_is_a_product_of_slopes_and_weights():
    weight = np.array([[1.5]])
    inputs = np.array([[0.3], [-0.2], [0.5]])
    states = [0.0]
    for net_input in inputs[:, 0]:
        states.append(np.tanh(1.5 * states[-1] + net_input))
    factors = [1.5 * (1 - state**2) for state in states[1:]]

    result = recurrent_gradients(weight, inputs, [1.0])

    expected = [1.0, factors[2], factors[2] * factors[1], factors[2] * factors[1] * factors[0]]
    np.testing.assert_allclose(result[:, 0], expected, rtol=1e-12)


def test_lstm_gradients_last_longer_with_a_higher_forget_bias():
    inputs = np.zeros((40, 8))
    direction = np.ones(8) / 8**0.5

    norms = [
        np.linalg.norm(lstm_gradients(generator(0, "test"), inputs, direction, forget_bias=bias)[-1])
        for bias in (0.0, 1.0, 3.0)
    ]

    assert norms[0] < 1e-3 * norms[1] < 1e-3 * norms[2]


def test_lstm_gradient_at_distance_0_is_the_direction_and_zero_for_the_cell():
    direction = np.arange(1.0, 4.0)

    result = lstm_gradients(generator(0, "test"), np.zeros((2, 3)), direction, forget_bias=1.0)

    assert result.shape == (3, 6)
    np.testing.assert_allclose(result[0], [1, 2, 3, 0, 0, 0])


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_autoclip_limit_is_numpys_percentile_of_all_norms_so_far(percentile):
    norms = generator(4, "test").lognormal(size=80)

    expected = [np.percentile(norms[: k + 1], percentile) for k in range(80)]
    np.testing.assert_allclose(autoclip_max_norms(norms, percentile), expected, rtol=1e-12)


def test_training_norms_depend_on_the_seed_only():
    first = training_norms(0, 50)

    assert np.array_equal(first, training_norms(0, 50))
    assert not np.allclose(first, training_norms(1, 50))
    assert np.isfinite(first).all()
    assert (first > 0).all()


@pytest.mark.parametrize("make_figure", [cliff_figure, lambda: recurrence_figure(0), lambda: autoclip_figure(0)])
def test_numbers_of_figures_repeat_for_the_same_seed(make_figure):
    assert make_figure().numbers == make_figure().numbers


def test_autoclip_at_100_never_clips_and_at_0_all_but_each_new_smallest():
    numbers = autoclip_figure(0).numbers

    norms = training_norms(0)
    n_records = (norms == np.minimum.accumulate(norms)).sum()
    assert numbers["p = 100: fraction of steps clipped"] == 0
    assert numbers["p = 0: fraction of steps clipped"] == pytest.approx(1 - n_records / len(norms))


@pytest.mark.slow
def test_surface_figures_are_in_order_and_repeat():
    first = surface_figures(3)
    again = surface_figures(3)

    assert [figure.name for figure in first] == sorted(figure.name for figure in first)
    assert [figure.numbers for figure in first] == [figure.numbers for figure in again]
    assert all(np.isfinite(list(figure.numbers.values())).all() for figure in first)
    assert not np.array_equal(DentedBowl.random(3).centres, DentedBowl.random(4).centres)
