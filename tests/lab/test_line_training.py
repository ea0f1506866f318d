"""Stochastic gradients, schedules and early stopping on a line, against what is expected of them."""

import pytest
import torch

from unbraid.lab.line import Points, descend, make_problem
from unbraid.lab.line_training import descend_stochastic, noise_floor, stop_early


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
