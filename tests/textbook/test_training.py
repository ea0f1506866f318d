"""Stochastic gradients, schedules and early stopping on a line, compared with theory."""

import numpy as np
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov

from unbraid.textbook.line import Points, descend, hessian, make_problem
from unbraid.textbook.training import (
    expected_squared_distances,
    fit_polynomial,
    legendre_features,
    noise_floor,
    noisy_curve,
    polynomial_losses,
    scheduled_lrs,
    stochastic_descent,
    stop_early,
)
from unbraid.train.optim import Constant, Cosine


def test_with_equal_points_stochastic_descent_is_plain_descent():
    points = Points(torch.full((5,), 2.0, dtype=torch.float64), torch.full((5,), 3.0, dtype=torch.float64))
    start = torch.tensor([0.3, -0.4], dtype=torch.float64)
    lrs = torch.tensor([[0.05] * 30, [0.1] * 30], dtype=torch.float64)

    paths = stochastic_descent(points, start, lrs=lrs, batch_size=2, seed=0, loss="l2", n_runs=3)

    for schedule, lr in enumerate((0.05, 0.1)):
        expected = descend(points, start, lr=lr, n_steps=30, loss="l2")
        torch.testing.assert_close(paths[schedule], expected.expand(3, 31, 2))


def test_stochastic_descent_settles_at_the_noise_floor():
    problem = make_problem("l2")
    lrs = torch.full((1, 400), 0.05, dtype=torch.float64)

    paths = stochastic_descent(problem.points, problem.start, lrs=lrs, batch_size=4, seed=0, loss="l2", n_runs=400)

    squared = (paths[0, :, 300:] - problem.best).square().sum(-1).mean()
    assert float(squared) == pytest.approx(noise_floor(problem.points, lr=0.05, batch_size=4), rel=0.05)


def test_noise_floor_falls_with_lower_lr_and_larger_batch():
    points = make_problem("l2").points

    high, low = (noise_floor(points, lr=lr, batch_size=4) for lr in (0.01, 0.0025))
    assert high / low == pytest.approx(4, rel=0.05)  # of squared distances
    assert noise_floor(points, lr=0.001, batch_size=2) > 1.3 * noise_floor(points, lr=0.001, batch_size=4)


def test_early_stopping_returns_the_best_and_waits_for_its_patience():
    losses = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 1.0]

    assert stop_early(losses, patience=3) == (5, 2)  # the better one later is never seen
    assert stop_early(losses, patience=5) == (6, 6)


def test_paths_repeat_by_seed_differ_by_run_and_share_draws_between_schedules():
    problem = make_problem()
    lrs = torch.tensor([[0.1] * 20, [0.1] * 20, [0.05] * 20], dtype=torch.float64)

    def paths(seed):
        return stochastic_descent(problem.points, problem.start, lrs=lrs, batch_size=4, seed=seed, loss="l2", n_runs=2)

    first = paths(0)
    assert torch.equal(first, paths(0))
    assert not torch.equal(first, paths(1))
    assert not torch.equal(first[:, 0], first[:, 1])
    assert torch.equal(first[0], first[1])
    torch.testing.assert_close(first[0, :, 1] - problem.start, 2 * (first[2, :, 1] - problem.start))


def test_expected_squared_distance_is_the_mean_of_many_runs():
    problem = make_problem()
    lrs = scheduled_lrs(Cosine(warmup_steps=5), 0.1, 60)
    paths = stochastic_descent(
        problem.points, problem.start, lrs=lrs[None], batch_size=4, seed=0, loss="l2", n_runs=4000
    )
    squares = (paths[0] - problem.best).square().sum(-1)

    expected = expected_squared_distances(problem.points, problem.start, lrs=lrs, batch_size=4)

    error = squares.std(0) / len(squares) ** 0.5
    assert ((squares.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_expected_path_of_huge_batches_is_plain_descent():
    problem = make_problem()
    lrs = torch.full((30,), 0.1, dtype=torch.float64)

    expected = expected_squared_distances(problem.points, problem.start, lrs=lrs, batch_size=10**12)

    path = descend(problem.points, problem.start, lr=0.1, n_steps=30, loss="l2")
    torch.testing.assert_close(expected, (path - problem.best).square().sum(-1), rtol=1e-5, atol=0)


def test_expected_distance_under_a_constant_lr_settles_at_the_noise_floor():
    problem = make_problem()
    lrs = torch.full((1000,), 0.1, dtype=torch.float64)
    expected = expected_squared_distances(problem.points, problem.start, lrs=lrs, batch_size=4)
    assert float(expected[-1]) == pytest.approx(noise_floor(problem.points, lr=0.1, batch_size=4), rel=1e-9)


def test_noise_floor_of_a_small_lr_solves_the_lyapunov_equation():
    """To first order: H S + S H = lr C / batch, with C the covariance of one point's gradient at the minimum."""
    problem = make_problem()
    design = np.stack([problem.points.x.numpy(), np.ones(len(problem.points.x))], 1)
    at_minimum = 2 * (design @ problem.best.numpy() - problem.points.y.numpy())[:, None] * design

    covariance = at_minimum.T @ at_minimum / len(at_minimum)
    solution = solve_continuous_lyapunov(hessian(problem.points).numpy(), 1e-5 / 4 * covariance)

    assert noise_floor(problem.points, lr=1e-5, batch_size=4) == pytest.approx(np.trace(solution), rel=1e-3)


def test_noise_floor_is_zero_without_noise_and_infinite_at_too_high_an_lr():
    points = make_problem().points
    assert noise_floor(Points(points.x, 2 * points.x + 1), lr=0.1, batch_size=4) == pytest.approx(0, abs=1e-25)
    assert noise_floor(points, lr=0.4, batch_size=4) == float("inf")
    assert noise_floor(points, lr=0.3, batch_size=10**9) < 1


def test_decay_ends_nearer_than_a_constant_lr_and_warm_up_changes_little():
    problem = make_problem()

    def final_distance(schedule):
        lrs = scheduled_lrs(schedule, 0.1, 500)
        return float(expected_squared_distances(problem.points, problem.start, lrs=lrs, batch_size=4)[-1])

    decayed = final_distance(Cosine())
    assert decayed < final_distance(Constant()) / 10
    assert final_distance(Cosine(warmup_steps=50)) == pytest.approx(decayed, rel=0.01)


def test_scheduled_lrs_begin_low_and_end_near_zero():
    lrs = scheduled_lrs(Cosine(warmup_steps=9), 0.2, 100)

    assert float(lrs[0]) == pytest.approx(0.02)
    assert lrs.max() <= 0.2
    assert 0 < lrs[-1] < 0.2 / 1000
    assert scheduled_lrs(Constant(), 0.2, 3).tolist() == [0.2] * 3


def test_polynomial_fit_follows_the_closed_form_at_each_step():
    """Along the Hessian's eigenvectors w_k = (1 - (1 - lr v)^k) / v times the negative gradient at zero."""
    curve = noisy_curve(0)
    design = np.polynomial.legendre.legvander(curve.train.x.numpy(), curve.degree)
    y = curve.train.y.numpy()
    values, directions = np.linalg.eigh(2 * design.T @ design / len(y))
    negative_gradient = directions.T @ (2 * design.T @ y / len(y))

    path = fit_polynomial(curve, lr=0.4, n_steps=500)

    for step in (0, 1, 10, 500):
        growth = np.array([(1 - (1 - 0.4 * v) ** step) / v if v > 1e-9 else 0.4 * step for v in values])
        assert path[step].numpy() == pytest.approx(directions @ (growth * negative_gradient), rel=1e-6, abs=1e-9)


def test_features_are_legendre_polynomials():
    x = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(legendre_features(x, 2), torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2], 1))


@pytest.mark.parametrize("seed", range(5))
def test_training_loss_keeps_falling_after_validation_loss_turns_up(seed):
    curve = noisy_curve(seed)
    path = fit_polynomial(curve, lr=0.3, n_steps=4000)

    train, valid = polynomial_losses(path, curve.train), polynomial_losses(path, curve.valid)

    best = int(valid.argmin())
    assert 0 < best < 2000
    assert (train.diff() <= 1e-15).all()
    assert valid[-1] > 2 * valid[best]
