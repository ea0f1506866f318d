"""Descent on surfaces, clipping and gradients through time, against what is known in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.lab.surface_plates import surface_plates
from unbraid.lab.surfaces import (
    RACERS,
    Dents,
    FedBack,
    Quadratic,
    autoclip_limits,
    clip_by,
    clippings,
    descend,
    evaluate,
    lstm_gradients,
    orthogonal,
    race,
    recurrent_gradients,
    training_norms,
)

VALLEY = Quadratic.turned((8.0, 0.1), 30.0, (0.5, -0.2))
START = np.array([-1.5, 1.0])


def test_a_turned_valley_keeps_its_curvatures_and_its_lowest_point():
    assert sorted(np.linalg.eigvalsh(VALLEY.hessian)) == pytest.approx([0.1, 8.0])
    assert evaluate(VALLEY, VALLEY.lowest) == pytest.approx(0.0)


def test_sgd_follows_the_powers_of_its_matrix():
    found = descend(VALLEY, START[None], RACERS["SGD"], 0.2, 40)

    step = np.eye(2) - 0.2 * VALLEY.hessian
    wanted = [VALLEY.lowest + np.linalg.matrix_power(step, k) @ (START - VALLEY.lowest) for k in range(41)]
    np.testing.assert_allclose(found.points[:, 0], wanted, atol=1e-12)


def test_momentum_follows_its_recursion():
    found = descend(VALLEY, START[None], RACERS["momentum"], 0.05, 40)

    at, speed, wanted = START.copy(), np.zeros(2), [START]
    for _ in range(40):
        speed = 0.9 * speed + VALLEY.hessian @ (at - VALLEY.lowest)
        at = at - 0.05 * speed
        wanted.append(at)
    np.testing.assert_allclose(found.points[:, 0], wanted, atol=1e-12)


def test_the_first_step_of_adam_is_the_learning_rate_along_each_axis():
    found = descend(VALLEY, START[None], RACERS["Adam"], 0.3, 1)

    slope = VALLEY.hessian @ (START - VALLEY.lowest)
    np.testing.assert_allclose(found.points[1, 0] - START, -0.3 * np.sign(slope), rtol=1e-6)


@pytest.mark.parametrize("name", RACERS)
def test_starts_side_by_side_go_as_each_would_alone(name):
    starts, lrs = np.array([START, [2.0, 2.0]]), np.array([0.05, 0.1])

    together = descend(VALLEY, starts, RACERS[name], lrs, 20)

    for place in (0, 1):
        alone = descend(VALLEY, starts[place : place + 1], RACERS[name], lrs[place], 20)
        np.testing.assert_allclose(together.points[:, place], alone.points[:, 0], rtol=1e-9, atol=1e-12)


def test_each_racer_is_given_its_best_learning_rate_of_the_grid():
    lrs = (0.01, 0.1, 0.2, 0.3)

    found = race(VALLEY, START[None], 60, racers={"SGD": RACERS["SGD"]}, lrs=lrs)["SGD"]

    outcomes = {lr: float(descend(VALLEY, START[None], RACERS["SGD"], lr, 60).outcome[0]) for lr in lrs}
    assert found.lr == min(outcomes, key=outcomes.get) == 0.2
    assert outcomes[0.3] > 1e3  # beyond 2 over the largest curvature


def test_dents_of_one_seed_are_the_same_and_deepen_the_bowl():
    dents, again, other = Dents.drawn(0), Dents.drawn(0), Dents.drawn(1)
    points = np.concatenate([dents.centres, again.centres])

    np.testing.assert_array_equal(evaluate(dents, points), evaluate(again, points))
    assert not np.allclose(dents.centres, other.centres)
    bowl = 0.5 * dents.curvature * (dents.centres**2).sum(1)
    assert (evaluate(dents, dents.centres) <= bowl - dents.depths + 1e-12).all()


def test_the_neuron_fed_back_without_a_weight_has_a_loss_known_on_paper():
    state = 1 / (1 + np.exp(-0.4))

    assert evaluate(FedBack(target=0.7), [0.0, 0.4]) == pytest.approx((state - 0.7) ** 2)


def test_by_norm_the_direction_stays_and_by_value_it_turns():
    gradient = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    clipped = {}
    for name, clipper in clippings(1.0, 3.5, 10.0).items():
        weight = nn.Parameter(torch.zeros_like(gradient))
        weight.grad = gradient.clone()
        clip_by(clipper, weight)
        clipped[name] = weight.grad[0].tolist()

    assert clipped["no clipping"] == [3.0, 4.0]
    assert clipped["fixed norm"] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert clipped["by value"] == [3.0, 3.5]
    assert clipped["AutoClip"] == pytest.approx([3.0, 4.0])  # the first norm is its own percentile


@pytest.mark.parametrize("percentile", [0, 1, 10, 50, 90, 100])
def test_autoclips_limit_is_the_percentile_of_the_norms_so_far(percentile):
    norms = training_norms(0, 200)

    wanted = [np.percentile(norms[: k + 1], percentile) for k in range(len(norms))]
    np.testing.assert_allclose(autoclip_limits(norms, percentile), wanted, rtol=1e-6)


def test_the_gradient_through_a_linear_net_is_a_power_of_its_weights():
    rng = np.random.default_rng(0)
    weight, direction = 0.9 * orthogonal(rng, 5), rng.normal(size=5)

    found = recurrent_gradients(weight, rng.normal(size=(30, 5)), direction, linear=True)

    wanted = [np.linalg.matrix_power(weight.T, k) @ direction for k in range(31)]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(direction) * 0.9 ** np.arange(31))


def test_a_tanh_never_makes_a_gradient_longer_than_the_linear_net_of_orthogonal_weights():
    rng = np.random.default_rng(1)
    weight, direction, inputs = 1.1 * orthogonal(rng, 5), rng.normal(size=5), rng.normal(size=(40, 5))

    found = np.linalg.norm(recurrent_gradients(weight, inputs, direction), axis=1)

    assert (found <= np.linalg.norm(direction) * 1.1 ** np.arange(41) + 1e-12).all()


def test_an_lstm_that_forgets_more_passes_less_gradient():
    def left(bias):
        rng = np.random.default_rng(2)
        inputs, direction = rng.normal(size=(50, 6)), rng.normal(size=6)
        return np.linalg.norm(lstm_gradients(rng, inputs, direction, bias)[-1])

    assert left(-2.0) < left(0.0) < left(3.0)


@pytest.fixture(scope="module")
def plates():
    return {plate.name: plate for plate in surface_plates(0)}


@pytest.mark.slow
def test_without_a_clip_the_cliff_throws_it_far_and_with_one_it_stays(plates):
    told = plates["13-cliff"].numbers

    assert told["no clipping: longest step"] > 10 * 0.03
    assert told["fixed norm: longest step"] == pytest.approx(0.3 * 0.1, rel=1e-4)  # learning rate times limit
    assert told["AutoClip: longest step"] < told["no clipping: longest step"] / 10


@pytest.mark.slow
def test_the_linear_net_of_the_plate_is_a_power_of_its_radius(plates):
    told = plates["13-recurrent-gradients"].numbers

    for radius in (0.9, 1.1, 2):
        assert told[f"linear, {radius:g}, 100 steps back"] == pytest.approx(radius**100, rel=1e-6)
    assert told["LSTM, forget bias 0, 100 steps back"] < told["LSTM, forget bias 3, 100 steps back"]


@pytest.mark.slow
def test_the_limit_and_the_share_clipped_follow_the_percentile(plates):
    told = plates["14-autoclip"].numbers
    limits = [told[f"p = {p}: limit at the end"] for p in (0, 1, 10, 25, 50, 90, 100)]
    shares = [told[f"p = {p}: share of steps clipped"] for p in (0, 1, 10, 25, 50, 90, 100)]

    assert limits == sorted(limits)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_surfaces(plates):
    again = {plate.name: plate for plate in surface_plates(0)}

    assert {name: plate.caption for name, plate in plates.items()} == {n: p.caption for n, p in again.items()}
    assert all(dict(plates[name].numbers) == dict(again[name].numbers) for name in plates)
