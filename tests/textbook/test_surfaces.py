"""Descent on surfaces, clippers at a cliff, gradients through time: against closed forms."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.seeding import generator
from unbraid.textbook.surfaces import (
    BY_NUMBER,
    GRID,
    RACERS,
    Dents,
    FedBack,
    Quadratic,
    autoclip_limits,
    clip_by,
    clippings,
    descend,
    evaluate,
    grid,
    lstm_gradients,
    orthogonal,
    race,
    recurrent_gradients,
    training_norms,
)
from unbraid.textbook.surfaces_figure import PERCENTILES, autoclip, cliff, recurrence, surface_figures
from unbraid.train.optim import OPTIMIZERS

VALLEY = Quadratic.turned((0.08, 8.0), 30, (1.0, 0.5))
START = np.array([-4.0, 2.0])


def test_sgd_on_a_quadratic_goes_by_powers_of_one_matrix():
    found = descend(VALLEY, [START], RACERS["SGD"], 0.2, 30)

    factor = np.eye(2) - 0.2 * VALLEY.hessian
    expected = [VALLEY.lowest + np.linalg.matrix_power(factor, k) @ (START - VALLEY.lowest) for k in range(31)]
    np.testing.assert_allclose(found.points[:, 0], expected, rtol=1e-10)


def test_momentum_on_a_quadratic_goes_by_powers_of_a_matrix_of_place_and_velocity():
    lr, mu = 0.05, 0.9
    found = descend(VALLEY, [START], RACERS["momentum"], lr, 30)

    hessian, one = VALLEY.hessian, np.eye(2)
    matrix = np.block([[one - lr * hessian, -lr * mu * one], [hessian, mu * one]])
    state = np.concatenate([START - VALLEY.lowest, np.zeros(2)])
    expected = [VALLEY.lowest + (np.linalg.matrix_power(matrix, k) @ state)[:2] for k in range(31)]
    np.testing.assert_allclose(found.points[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adams_first_step_is_one_learning_rate_long_in_each_coordinate(name):
    make = partial(RACERS[name], weight_decay=0.0)

    step = np.diff(descend(VALLEY, [START], make, 0.02, 1).points[:, 0], axis=0)[0]

    np.testing.assert_allclose(np.abs(step), 0.02, rtol=1e-6)
    assert np.array_equal(np.sign(step), -np.sign(VALLEY.hessian @ (START - VALLEY.lowest)))


def test_muons_steps_on_a_row_of_two_are_all_of_one_length():
    make = partial(RACERS["Muon"], weight_decay=0.0)

    steps = np.linalg.norm(np.diff(descend(VALLEY, [START], make, 0.1, 40).points[:, 0], axis=0), axis=1)

    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
    assert 0.68 < steps[0] / (0.1 * 0.2 * 2**0.5) < 1.21


@pytest.mark.parametrize("name", sorted(BY_NUMBER))
def test_starts_in_one_weight_go_as_starts_of_their_own(name):
    starts, lrs = np.array([[-4.0, 2.0], [2.0, -1.0]]), [0.1, 0.02]

    found, apart = (descend(VALLEY, starts, RACERS[name], lrs, 20, apart=apart).points for apart in (False, True))

    np.testing.assert_allclose(found, apart, rtol=1e-9)


@pytest.mark.parametrize("name", RACERS)
def test_starts_side_by_side_go_as_each_would_alone_with_its_own_learning_rate(name):
    starts, lrs = np.array([[-4.0, 2.0], [2.0, -1.0]]), [0.1, 0.02]

    found = descend(VALLEY, starts, RACERS[name], lrs, 20)

    for place, (start, lr) in enumerate(zip(starts, lrs, strict=True)):
        weight = nn.Parameter(torch.from_numpy(start[None].copy()))
        optimizer = RACERS[name]([weight], lr=lr)
        for _ in range(20):
            optimizer.zero_grad()
            VALLEY(weight).sum().backward()
            optimizer.step()
        np.testing.assert_allclose(found.points[-1, place], weight.detach()[0].numpy(), rtol=1e-8)


def test_a_race_takes_the_learning_rate_of_the_grid_that_theory_says_is_best():
    # SGD shrinks distance by max |1 - lr h|: best at 2 / (8 + 0.08) = 0.2475, and every rate from 0.25 on diverges.
    found = race(VALLEY, [START], 150, racers={"SGD": RACERS["SGD"]}, lrs=GRID)

    assert found["SGD"].lr == 0.2
    assert found["SGD"].descent.outcome[0] == pytest.approx(
        np.mean([VALLEY(torch.tensor(p[None])).item() for p in found["SGD"].descent.points[-15:, 0]])
    )


def test_a_descent_that_is_lost_never_wins():
    found = descend(VALLEY, [START], RACERS["SGD"], 50.0, 300)

    assert found.outcome[0] == np.inf


def test_the_dents_sum_to_what_the_formula_says():
    dents = Dents(np.array([[1.0, 0.0]]), np.array([0.5]), 0.3, 2.0)

    assert evaluate(dents, [1.0, 0.0]) == pytest.approx(1.0 - 0.5)
    assert evaluate(dents, [1.3, 0.0]) == pytest.approx(1.69 - 0.5 * np.exp(-0.5))


def test_the_cliffs_loss_is_that_of_the_loop_written_out():
    state = 0.5
    for _ in range(15):
        state = 1 / (1 + np.exp(-(5.5 * state - 2.2)))

    assert evaluate(FedBack(), [5.5, -2.2]) == pytest.approx((state - 0.7) ** 2, rel=1e-12)


def test_a_grid_has_x_across_and_y_up():
    x, y, points = grid((0, 1), (10, 12), 3)

    assert points.shape == (3, 3, 2)
    assert points[2, 0].tolist() == [x[0], y[2]] == [0.0, 12.0]


@pytest.mark.parametrize(("name", "expected"), [("fixed norm", [0.6, 0.8]), ("by value", [1.0, 1.0])])
def test_clipping_by_norm_keeps_the_direction_and_by_value_turns_it(name, expected):
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)

    clip_by(clippings(1.0, 1.0, 10.0)[name], weight)

    np.testing.assert_allclose(weight.grad[0].numpy(), expected)


def test_without_a_clip_the_descent_leaves_the_cliff_and_with_a_fixed_norm_it_stays():
    start, lr, n_steps, most = np.array([5.5, -2.2]), 0.3, 80, 0.1
    ends = {}
    for name in ("no clipping", "fixed norm"):
        clip = partial(clip_by, clippings(most, most, 10.0)[name])
        ends[name] = descend(FedBack(), [start], OPTIMIZERS["sgd"], lr, n_steps, clip=clip)

    free, held = ends["no clipping"], ends["fixed norm"]
    assert np.abs(free.points[-1, 0] - start).max() > 2  # farther than n_steps of the longest clipped step: 80 * 0.03
    assert np.linalg.norm(np.diff(held.points[:, 0], axis=0), axis=1).max() <= lr * most * (1 + 1e-9)
    assert np.linalg.norm(held.points[-1, 0] - start) < 0.7
    assert held.norms.max() > 10  # it met the wall too
    assert held.losses[-20:].min() < free.losses[-20:].min()


@pytest.mark.parametrize("radius", [0.9, 1.1])
def test_the_gradient_through_a_linear_recurrence_is_a_power_of_its_matrix(radius):
    rng = generator(1, "test")
    weight, direction = rng.normal(size=(5, 5)) * radius / 3, rng.normal(size=5)

    found = recurrent_gradients(weight, rng.normal(size=(12, 5)), direction, linear=True)

    expected = [np.linalg.matrix_power(weight.T, k) @ direction for k in range(13)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_an_orthogonal_recurrence_keeps_the_norm_and_a_factor_raises_it_to_the_distance():
    rng = generator(2, "test")
    turn, direction = orthogonal(rng, 6), np.ones(6) / 6**0.5

    np.testing.assert_allclose(turn @ turn.T, np.eye(6), atol=1e-12)
    found = recurrent_gradients(1.1 * turn, np.zeros((20, 6)), direction, linear=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.1 ** np.arange(21), rtol=1e-10)


def test_tanh_about_zero_is_a_linear_recurrence():
    rng = generator(3, "test")
    weight, direction, inputs = rng.normal(size=(4, 4)) / 2, rng.normal(size=4), np.zeros((8, 4))

    curved, straight = (recurrent_gradients(weight, inputs, direction, linear=linear) for linear in (False, True))

    np.testing.assert_allclose(curved, straight, rtol=1e-12)


def test_tanhs_gradient_is_a_product_of_slopes_and_weights():
    weight, inputs = np.array([[1.5]]), np.array([[0.3], [-0.2], [0.5]])
    states = [0.0]
    for one in inputs[:, 0]:
        states.append(np.tanh(1.5 * states[-1] + one))
    factors = [1.5 * (1 - state**2) for state in states[1:]]

    found = recurrent_gradients(weight, inputs, [1.0])

    expected = [1.0, factors[2], factors[2] * factors[1], factors[2] * factors[1] * factors[0]]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)


def test_an_lstm_whose_gates_keep_more_lets_gradients_live_longer():
    inputs, direction = np.zeros((40, 8)), np.ones(8) / 8**0.5

    left = [
        np.linalg.norm(lstm_gradients(generator(0, "test"), inputs, direction, forget_bias=bias)[-1])
        for bias in (0.0, 1.0, 3.0)
    ]

    assert left[0] < 1e-3 * left[1] < 1e-3 * left[2]


def test_an_lstms_gradient_at_distance_0_is_the_direction_and_nothing_by_the_cell():
    direction = np.arange(1.0, 4.0)

    found = lstm_gradients(generator(0, "test"), np.zeros((2, 3)), direction, forget_bias=1.0)

    assert found.shape == (3, 6)
    np.testing.assert_allclose(found[0], [1, 2, 3, 0, 0, 0])


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_autoclips_limit_is_numpys_percentile_of_all_norms_so_far(percentile):
    norms = generator(4, "test").lognormal(size=80)

    expected = [np.percentile(norms[: k + 1], percentile) for k in range(80)]
    np.testing.assert_allclose(autoclip_limits(norms, percentile), expected, rtol=1e-12)


def test_training_norms_are_the_same_for_the_same_seed_and_others_for_another():
    first = training_norms(0, 50)

    assert np.array_equal(first, training_norms(0, 50))
    assert not np.allclose(first, training_norms(1, 50))
    assert np.isfinite(first).all()
    assert (first > 0).all()


@pytest.mark.parametrize("make", [cliff, lambda: recurrence(0), lambda: autoclip(0)])
def test_a_plates_numbers_are_the_same_for_the_same_seed(make):
    assert make().numbers == make().numbers


def test_autoclip_at_100_never_clips_and_at_0_all_but_each_new_smallest():
    numbers = autoclip(0).numbers

    norms = training_norms(0)
    n_records = (norms == np.minimum.accumulate(norms)).sum()
    assert numbers["p = 100: share of steps clipped"] == 0
    assert numbers["p = 0: share of steps clipped"] == pytest.approx(1 - n_records / len(norms))


@pytest.mark.slow
def test_the_plates_of_surfaces_come_in_order_and_repeat():
    first, again = surface_figures(3), surface_figures(3)

    assert [plate.name for plate in first] == sorted(plate.name for plate in first)
    assert [plate.numbers for plate in first] == [plate.numbers for plate in again]
    assert all(np.isfinite(list(plate.numbers.values())).all() for plate in first)
    assert not np.array_equal(Dents.drawn(3).centres, Dents.drawn(4).centres)
