"""Gradient descent on a line, against what is known in closed form."""

import numpy as np
import pytest
import torch

from unbraid.errors import UserError
from unbraid.lab.line import (
    LOSSES,
    along,
    brute_force,
    convolution_gradient,
    crossing,
    descend,
    descend_at_rates,
    difference_gradient,
    exact_path,
    gradients,
    hessian,
    highest_stable_lr,
    l2_gradient,
    make_problem,
    mean_loss,
    norm_of_sums,
    true_norm,
    verdicts,
)

LRS = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0001)


def least_squares(points):
    design = np.stack([points.x.numpy(), np.ones(len(points.x))], 1)
    return np.linalg.lstsq(design, points.y.numpy(), rcond=None)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_minimum_of_l2_is_that_of_least_squares(seed):
    problem = make_problem("l2", seed)

    assert problem.best.tolist() == pytest.approx(least_squares(problem.points).tolist(), abs=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_line_nearby_is_better_than_the_minimum(loss):
    problem = make_problem(loss)
    draws = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(-4, 0, 2000, dtype=torch.float64)[:, None]

    others = mean_loss(problem.points, problem.best + sizes * draws, loss)

    assert others.min() >= mean_loss(problem.points, problem.best, loss) - 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_the_grids_minimum_is_as_near_as_its_steps_allow(loss):
    problem = make_problem(loss)
    grid = brute_force(problem.points, loss)

    corner = [values[torch.searchsorted(values, at)] for values, at in zip((grid.m, grid.b), problem.best, strict=True)]
    bound = mean_loss(problem.points, torch.stack(corner), loss)
    assert mean_loss(problem.points, problem.best, loss) <= grid.losses.min() <= bound


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    problem = make_problem(loss)
    lines = torch.tensor([[0.1, 0.2], [4.0, -3.0], [-1.5, 2.0]], dtype=torch.float64)

    found = gradients(problem.points, lines, loss)

    torch.testing.assert_close(found, difference_gradient(problem.points, lines, loss), rtol=1e-6, atol=1e-7)


def test_the_gradient_of_l2_is_the_one_on_paper():
    problem = make_problem("l2")
    lines = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    torch.testing.assert_close(gradients(problem.points, lines, "l2"), l2_gradient(problem.points, lines))


def test_slices_of_l2_are_parabolas_with_the_curvature_of_the_hessian():
    problem = make_problem("l2")
    lowest = mean_loss(problem.points, problem.best, "l2")

    for axis in (0, 1):
        moved = torch.linspace(-2, 2, 9, dtype=torch.float64)
        found = mean_loss(problem.points, along(problem.best, axis, problem.best[axis] + moved), "l2")
        torch.testing.assert_close(found, lowest + 0.5 * hessian(problem.points)[axis, axis] * moved**2)


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_the_gradient_along_each_axis_crosses_zero_at_the_minimum(loss):
    problem = make_problem(loss)

    for axis in (0, 1):
        values = problem.best[axis] + torch.linspace(-2.03, 1.97, 401, dtype=torch.float64)
        slopes = gradients(problem.points, along(problem.best, axis, values), loss)[:, axis]
        assert crossing(values, slopes) == pytest.approx(float(problem.best[axis]), abs=1e-4)


def test_a_curve_that_never_crosses_zero_has_no_crossing():
    values = torch.linspace(0, 1, 5)

    assert np.isnan(crossing(values, values + 1))


def test_descent_at_every_rate_follows_the_closed_form_those_that_diverge_too():
    problem = make_problem("l2")

    paths = descend_at_rates(problem.points, problem.start, lrs=LRS, n_steps=60, loss="l2")

    for lr, path in zip(LRS, paths, strict=True):
        wanted = exact_path(problem.points, problem.start, lr=lr, n_steps=60)
        torch.testing.assert_close(path, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_by_hand_and_all_at_once_come_to_the_same(loss):
    problem = make_problem(loss)

    alone = descend(problem.points, problem.start, lr=0.1, n_steps=50, loss=loss)
    together = descend_at_rates(problem.points, problem.start, lrs=LRS, n_steps=50, loss=loss)

    torch.testing.assert_close(together[LRS.index(0.1)], alone)


@pytest.mark.parametrize(("factor", "ends_nearer"), [(0.98, True), (1.02, False)])
def test_descent_is_stable_up_to_two_over_the_largest_curvature(factor, ends_nearer):
    problem = make_problem("l2")
    lr = factor * highest_stable_lr(problem.points)

    path = descend(problem.points, problem.start, lr=lr, n_steps=400, loss="l2")

    distance = (path - problem.best).norm(dim=1)
    assert bool(distance[-1] < distance[0]) is ends_nearer


def test_rates_are_judged_too_high_right_and_too_low():
    problem = make_problem("l2")
    paths = descend_at_rates(problem.points, problem.start, lrs=LRS, n_steps=200, loss="l2")

    words = verdicts(problem, mean_loss(problem.points, paths, "l2"), LRS)

    assert words[:3] == ["too high", "too high", "right"]
    assert words[-2:] == ["too low", "too low"]


def test_huber_is_half_of_l2_near_zero_and_a_straight_line_beyond_one():
    residual = torch.tensor([-3.0, -0.5, 0.0, 0.8, 2.0], dtype=torch.float64)

    assert LOSSES["huber"](residual).tolist() == pytest.approx([2.5, 0.125, 0.0, 0.32, 1.5])


def test_the_norm_of_sums_is_right_for_single_elements_and_wrong_for_a_convolution():
    single = [torch.tensor([[3.0]]), torch.tensor([4.0])]
    convolution = convolution_gradient(0)
    elements = torch.cat([part.flatten() for part in convolution])

    assert norm_of_sums(single) == true_norm(single) == pytest.approx(5.0)
    assert true_norm(convolution) == pytest.approx(float(elements.norm()), rel=1e-12)
    assert norm_of_sums(convolution) < 0.8 * true_norm(convolution)


def test_the_same_seed_gives_the_same_problem_and_another_another():
    first, again, other = make_problem("l2", 3), make_problem("l2", 3), make_problem("l2", 4)

    assert torch.equal(first.points.y, again.points.y)
    assert torch.equal(first.start, again.start)
    assert not torch.equal(first.points.y, other.points.y)


def test_an_unknown_loss_is_one_sentence():
    with pytest.raises(UserError, match="'l3' is not one of l1, l2, huber"):
        make_problem("l3")
