"""Stochastic gradients, schedules and early stopping on a line, against what is expected of them."""

import numpy as np
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov

from unbraid.textbook.line import Points, descend, hessian, make_problem
from unbraid.textbook.training import (
    descend_stochastic,
    expected_squares,
    features,
    fit_polynomial,
    noise_floor,
    noisy_curve,
    polynomial_losses,
    scheduled,
    stop_early,
)
from unbraid.train.optim import Constant, Cosine


def test_where_all_points_are_alike_it_is_plain_descent_under_every_plan():
    points = Points(torch.full((5,), 2.0, dtype=torch.float64), torch.full((5,), 3.0, dtype=torch.float64))
    start = torch.tensor([0.3, -0.4], dtype=torch.float64)
    lrs = torch.tensor([[0.05] * 30, [0.1] * 30], dtype=torch.float64)

    found = descend_stochastic(points, start, lrs=lrs, batch_size=2, seed=0, loss="l2", n_runs=3)

    for plan, lr in enumerate((0.05, 0.1)):
        wanted = descend(points, start, lr=lr, n_steps=30, loss="l2")
        torch.testing.assert_close(found[plan], wanted.expand(3, 31, 2))


def test_far_on_it_wanders_as_far_from_the_minimum_as_the_noise_floor_says():
    problem = make_problem("l2")
    lrs = torch.full((1, 400), 0.05, dtype=torch.float64)

    paths = descend_stochastic(problem.points, problem.start, lrs=lrs, batch_size=4, seed=0, loss="l2", n_runs=400)

    squared = (paths[0, :, 300:] - problem.best).square().sum(-1).mean()
    assert float(squared) == pytest.approx(noise_floor(problem.points, lr=0.05, batch_size=4), rel=0.05)


def test_the_noise_floor_shrinks_with_the_rate_and_with_the_batch():
    points = make_problem("l2").points

    high, low = (noise_floor(points, lr=lr, batch_size=4) for lr in (0.01, 0.0025))
    assert high / low == pytest.approx(4, rel=0.05)  # of squared distances
    assert noise_floor(points, lr=0.001, batch_size=2) > 1.3 * noise_floor(points, lr=0.001, batch_size=4)


def test_early_stopping_keeps_the_best_and_waits_so_often():
    losses = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 1.0]

    assert stop_early(losses, patience=3) == (5, 2)  # the better one beyond is never seen
    assert stop_early(losses, patience=5) == (6, 6)


def test_the_same_seed_gives_the_same_path_another_run_another_and_every_plan_the_same_points():
    problem = make_problem()
    lrs = torch.tensor([[0.1] * 20, [0.1] * 20, [0.05] * 20], dtype=torch.float64)

    def paths(seed):
        return descend_stochastic(problem.points, problem.start, lrs=lrs, batch_size=4, seed=seed, loss="l2", n_runs=2)

    found = paths(0)
    assert torch.equal(found, paths(0))
    assert not torch.equal(found, paths(1))
    assert not torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0, :, 1] - problem.start, 2 * (found[2, :, 1] - problem.start))


def test_what_is_expected_of_stochastic_descent_is_what_many_runs_give():
    problem = make_problem()
    lrs = scheduled(Cosine(warmup_steps=5), 0.1, 60)
    paths = descend_stochastic(
        problem.points, problem.start, lrs=lrs[None], batch_size=4, seed=0, loss="l2", n_runs=4000
    )
    squares = (paths[0] - problem.best).square().sum(-1)

    expected = expected_squares(problem.points, problem.start, lrs=lrs, batch_size=4)

    error = squares.std(0) / len(squares) ** 0.5
    assert ((squares.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_with_very_many_points_a_step_the_expected_path_is_that_of_descent_on_all():
    problem = make_problem()
    lrs = torch.full((30,), 0.1, dtype=torch.float64)

    expected = expected_squares(problem.points, problem.start, lrs=lrs, batch_size=10**12)

    path = descend(problem.points, problem.start, lr=0.1, n_steps=30, loss="l2")
    torch.testing.assert_close(expected, (path - problem.best).square().sum(-1), rtol=1e-5, atol=0)


def test_under_a_constant_rate_the_expected_distance_settles_at_the_floor():
    problem = make_problem()
    lrs = torch.full((1000,), 0.1, dtype=torch.float64)
    expected = expected_squares(problem.points, problem.start, lrs=lrs, batch_size=4)
    assert float(expected[-1]) == pytest.approx(noise_floor(problem.points, lr=0.1, batch_size=4), rel=1e-9)


def test_a_small_rates_floor_solves_the_lyapunov_equation():
    """To first order: H S + S H = lr C / batch, with C the covariance of one point's gradient at the minimum."""
    problem = make_problem()
    design = np.stack([problem.points.x.numpy(), np.ones(len(problem.points.x))], 1)
    pull = 2 * (design @ problem.best.numpy() - problem.points.y.numpy())[:, None] * design

    settled = solve_continuous_lyapunov(hessian(problem.points).numpy(), 1e-5 / 4 * pull.T @ pull / len(pull))

    assert noise_floor(problem.points, lr=1e-5, batch_size=4) == pytest.approx(np.trace(settled), rel=1e-3)


def test_points_without_noise_leave_no_floor_and_too_high_a_rate_an_infinite_one():
    points = make_problem().points
    assert noise_floor(Points(points.x, 2 * points.x + 1), lr=0.1, batch_size=4) == pytest.approx(0, abs=1e-25)
    assert noise_floor(points, lr=0.4, batch_size=4) == float("inf")
    assert noise_floor(points, lr=0.3, batch_size=10**9) < 1


def test_a_rate_that_falls_ends_nearer_than_the_same_rate_held_and_warm_up_changes_little():
    problem = make_problem()
    plans = (Constant(), Cosine(), Cosine(warmup_steps=50))

    held, fallen, warmed = (
        float(expected_squares(problem.points, problem.start, lrs=scheduled(plan, 0.1, 500), batch_size=4)[-1])
        for plan in plans
    )

    assert fallen < held / 10
    assert warmed == pytest.approx(fallen, rel=0.01)


def test_a_schedules_rates_begin_low_and_end_near_zero():
    lrs = scheduled(Cosine(warmup_steps=9), 0.2, 100)

    assert float(lrs[0]) == pytest.approx(0.02)
    assert lrs.max() <= 0.2
    assert 0 < lrs[-1] < 0.2 / 1000
    assert scheduled(Constant(), 0.2, 3).tolist() == [0.2] * 3


def test_the_fit_of_a_polynomial_is_the_closed_form_step_by_step():
    """In the Hessian's directions w_k = (1 - (1 - lr v)^k) / v times the pull at zero."""
    curve = noisy_curve(0)
    design, y = np.polynomial.legendre.legvander(curve.train.x.numpy(), curve.degree), curve.train.y.numpy()
    values, directions = np.linalg.eigh(2 * design.T @ design / len(y))
    pulled = directions.T @ (2 * design.T @ y / len(y))

    path = fit_polynomial(curve, lr=0.4, n_steps=500)

    for step in (0, 1, 10, 500):
        grown = np.array([(1 - (1 - 0.4 * v) ** step) / v if v > 1e-9 else 0.4 * step for v in values])
        assert path[step].numpy() == pytest.approx(directions @ (grown * pulled), rel=1e-6, abs=1e-9)


def test_the_features_are_legendres():
    x = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(features(x, 2), torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2], 1))


@pytest.mark.parametrize("seed", range(5))
def test_training_goes_on_falling_where_validation_turns_up(seed):
    curve = noisy_curve(seed)
    path = fit_polynomial(curve, lr=0.3, n_steps=4000)

    train, valid = polynomial_losses(path, curve.train), polynomial_losses(path, curve.valid)

    best = int(valid.argmin())
    assert 0 < best < 2000
    assert (train.diff() <= 1e-15).all()
    assert valid[-1] > 2 * valid[best]
