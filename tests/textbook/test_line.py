"""Gradient descent on a line, compared with closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.errors import UserError
from unbraid.textbook.line import (
    LOSSES,
    Points,
    brute_force,
    classify_lrs,
    closed_form_path,
    convolution_gradient,
    descend,
    descend_at_lrs,
    difference_gradient,
    grad_norm,
    gradients,
    hessian,
    highest_stable_lr,
    l2_gradient,
    lines_along_axis,
    make_problem,
    mean_loss,
    noisy_points,
    norm_of_sums,
    point_losses,
    residuals,
    untrained_line,
    zero_crossing,
)

LRS = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0001)


def least_squares(points):
    design = np.stack([points.x.numpy(), np.ones(len(points.x))], 1)
    return np.linalg.lstsq(design, points.y.numpy(), rcond=None)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_l2_line_is_least_squares(seed):
    problem = make_problem("l2", seed)

    assert problem.best.tolist() == pytest.approx(least_squares(problem.points).tolist(), abs=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_line_nearby_is_better_than_the_best(loss):
    problem = make_problem(loss)
    draws = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(-4, 0, 2000, dtype=torch.float64)[:, None]

    losses = mean_loss(problem.points, problem.best + sizes * draws, loss)

    assert losses.min() >= mean_loss(problem.points, problem.best, loss) - 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_grid_minimum_is_as_low_as_the_grid_allows(loss):
    problem = make_problem(loss)
    grid = brute_force(problem.points, loss)

    corner = [grid.m[torch.searchsorted(grid.m, problem.best[0])], grid.b[torch.searchsorted(grid.b, problem.best[1])]]
    bound = mean_loss(problem.points, torch.stack(corner), loss)
    assert mean_loss(problem.points, problem.best, loss) <= grid.losses.min() <= bound


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences(loss):
    problem = make_problem(loss)
    lines = torch.tensor([[0.1, 0.2], [4.0, -3.0], [-1.5, 2.0]], dtype=torch.float64)

    expected = difference_gradient(problem.points, lines, loss)

    torch.testing.assert_close(gradients(problem.points, lines, loss), expected, rtol=1e-6, atol=1e-7)


def test_gradient_of_l2_equals_its_formula():
    problem = make_problem("l2")
    lines = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    torch.testing.assert_close(gradients(problem.points, lines, "l2"), l2_gradient(problem.points, lines))


def test_l2_slices_are_parabolas_with_the_hessians_curvature():
    problem = make_problem("l2")
    lowest = mean_loss(problem.points, problem.best, "l2")

    for axis in (0, 1):
        offsets = torch.linspace(-2, 2, 9, dtype=torch.float64)
        losses = mean_loss(problem.points, lines_along_axis(problem.best, axis, problem.best[axis] + offsets), "l2")
        torch.testing.assert_close(losses, lowest + 0.5 * hessian(problem.points)[axis, axis] * offsets**2)


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_gradient_along_each_axis_crosses_zero_at_the_minimum(loss):
    problem = make_problem(loss)

    for axis in (0, 1):
        values = problem.best[axis] + torch.linspace(-2.03, 1.97, 401, dtype=torch.float64)
        slopes = gradients(problem.points, lines_along_axis(problem.best, axis, values), loss)[:, axis]
        assert zero_crossing(values, slopes) == pytest.approx(float(problem.best[axis]), abs=1e-4)


def test_curve_above_zero_has_no_zero_crossing():
    values = torch.linspace(0, 1, 5)

    assert np.isnan(zero_crossing(values, values + 1))


def test_descent_follows_the_closed_form_even_where_it_diverges():
    problem = make_problem("l2")

    paths = descend_at_lrs(problem.points, problem.start, lrs=LRS, n_steps=60, loss="l2")

    for lr, path in zip(LRS, paths, strict=True):
        expected = closed_form_path(problem.points, problem.start, lr=lr, n_steps=60)
        torch.testing.assert_close(path, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_by_hand_equals_descent_at_many_lrs(loss):
    problem = make_problem(loss)

    alone = descend(problem.points, problem.start, lr=0.1, n_steps=50, loss=loss)
    together = descend_at_lrs(problem.points, problem.start, lrs=LRS, n_steps=50, loss=loss)

    torch.testing.assert_close(together[LRS.index(0.1)], alone)


@pytest.mark.parametrize(("factor", "converges"), [(0.98, True), (1.02, False)])
def test_descent_is_stable_up_to_two_over_the_largest_eigenvalue(factor, converges):
    problem = make_problem("l2")
    lr = factor * highest_stable_lr(problem.points)

    path = descend(problem.points, problem.start, lr=lr, n_steps=400, loss="l2")

    distance = (path - problem.best).norm(dim=1)
    assert bool(distance[-1] < distance[0]) is converges


@pytest.mark.parametrize("seed", range(10))
def test_two_lrs_are_too_high_two_right_and_two_too_low_for_every_seed(seed):
    problem = make_problem("l2", seed)
    paths = descend_at_lrs(problem.points, problem.start, lrs=LRS, n_steps=300, loss="l2")
    losses = mean_loss(problem.points, paths, "l2")

    assert classify_lrs(problem, losses, LRS) == ["too high"] * 2 + ["right"] * 2 + ["too low"] * 2
    excess_left = (losses[:, -1] - mean_loss(problem.points, problem.best, "l2")) / losses[:, 0]
    assert (excess_left[:2] > 1).all()
    assert (excess_left[2:4] < 0.01).all()
    assert (excess_left[4:] > 0.005).all()


def test_with_l1_an_oscillating_lr_is_too_high_and_a_still_falling_one_too_low():
    problem = make_problem("l1")
    lrs = (3.0, 0.02, 0.0005)
    paths = descend_at_lrs(problem.points, problem.start, lrs=lrs, n_steps=300, loss="l1")

    assert classify_lrs(problem, mean_loss(problem.points, paths, "l1"), lrs) == ["too high", "right", "too low"]


def test_huber_is_half_of_l2_near_zero_and_linear_beyond_one():
    residual = torch.tensor([-3.0, -0.5, 0.0, 0.8, 2.0], dtype=torch.float64)

    assert LOSSES["huber"](residual).tolist() == pytest.approx([2.5, 0.125, 0.0, 0.32, 1.5])


def test_norm_of_sums_is_right_only_for_single_elements():
    single = [torch.tensor([[3.0]]), torch.tensor([4.0])]
    convolution = convolution_gradient(0)
    elements = torch.cat([gradient.flatten() for gradient in convolution])

    assert norm_of_sums(single) == grad_norm(single) == pytest.approx(5.0)
    assert grad_norm(convolution) == pytest.approx(float(elements.norm()), rel=1e-12)
    assert norm_of_sums(convolution) < 0.8 * grad_norm(convolution)


def test_problem_depends_on_the_seed_only():
    first = make_problem("l2", 3)
    again = make_problem("l2", 3)
    other = make_problem("l2", 4)

    assert torch.equal(first.points.y, again.points.y)
    assert torch.equal(first.start, again.start)
    assert not torch.equal(first.points.y, other.points.y)


def test_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'l3' is not one of l1, l2, huber"):
        make_problem("l3")


def test_untrained_line_does_not_touch_torchs_global_generator():
    before = torch.get_rng_state()
    untrained_line(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_points_scatter_around_the_true_line():
    points = noisy_points(0, n_points=20_000)
    noise = points.y - (2 * points.x + 1)

    assert float(noise.std()) == pytest.approx(0.5, rel=0.03)  # 6 standard errors
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert (points.x.diff() > 0).all()
    assert -1 <= points.x[0] < -0.999
    assert 2.999 < points.x[-1] <= 3


def test_best_l1_line_goes_through_two_points():
    points = noisy_points(4)
    assert (residuals(points, make_problem("l1", 4).best).abs() < 1e-12).sum() == 2


def test_with_m_fixed_the_best_l1_b_is_the_median_residual():
    points = noisy_points(0, n_points=41)
    values = torch.linspace(-4, 4, 80_001, dtype=torch.float64)

    losses = mean_loss(points, lines_along_axis(torch.tensor([1.7, 0.0], dtype=torch.float64), 1, values), "l1")

    assert float(values[losses.argmin()]) == pytest.approx(float((points.y - 1.7 * points.x).median()), abs=1e-4)


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_zero_at_the_minimum(loss, seed):
    problem = make_problem(loss, seed)
    assert gradients(problem.points, problem.best, loss).norm() < 1e-12


def test_hessian_equals_double_backward():
    problem = make_problem()
    expected = torch.func.jacrev(lambda line: gradients(problem.points, line, "l2"))(problem.start)
    torch.testing.assert_close(hessian(problem.points), expected)


def test_grid_has_the_loss_of_each_pair():
    points = noisy_points(0)
    grid = brute_force(points, "l2", n_values=4)

    for row, m in enumerate(grid.m):
        for column, b in enumerate(grid.b):
            assert float(grid.losses[row, column]) == pytest.approx(
                float((m * points.x + b - points.y).square().mean())
            )


@pytest.mark.parametrize("axis", [0, 1])
def test_mean_over_the_grid_is_lowest_where_the_slice_through_the_grid_centre_is(axis):
    """The mean over b of a parabola in (m, b) is the slice at the mean b plus a constant: not that at the best b."""
    points = noisy_points(1)
    grid = brute_force(points, "l2", n_values=400)
    h = hessian(points)
    best = make_problem("l2", 1).best
    values, other = (grid.m, grid.b) if axis == 0 else (grid.b, grid.m)
    step = float(values[1] - values[0])

    lowest = float(values[grid.losses.mean(1 - axis).argmin()])

    expected = best[axis] - h[0, 1] / h[axis, axis] * (other.mean() - best[1 - axis])
    assert lowest == pytest.approx(float(expected), abs=0.51 * step)
    assert abs(lowest - float(best[axis])) > 10 * step


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_by_hand_equals_torch_sgd_on_a_linear_layer(loss):
    problem = make_problem(loss)
    layer = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(problem.start[0])
        layer.bias.fill_(problem.start[1])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.07)
    for _ in range(30):
        optimizer.zero_grad()
        LOSSES[loss](layer(problem.points.x[:, None]) - problem.points.y[:, None]).mean().backward()
        optimizer.step()

    before = problem.start.clone()
    path = descend(problem.points, problem.start, lr=0.07, n_steps=30, loss=loss)

    assert path[-1].tolist() == pytest.approx([layer.weight.item(), layer.bias.item()], rel=1e-12)
    assert torch.equal(problem.start, before)


def test_every_step_at_every_lr_is_a_matrix_power_in_numpy():
    """x_k - x* = (I - lr H)^k (x_0 - x*), from numpy's least squares and the points alone."""
    problem = make_problem("l2", 2)
    design = np.stack([problem.points.x.numpy(), np.ones(len(problem.points.x))], 1)
    h = 2 * design.T @ design / len(design)
    best = least_squares(problem.points)

    paths = descend_at_lrs(problem.points, problem.start, lrs=LRS, n_steps=120, loss="l2")

    for lr, path in zip(LRS, paths, strict=True):
        offset = problem.start.numpy() - best
        for line in path.numpy():
            assert np.linalg.norm(line - best - offset) <= 1e-9 * np.linalg.norm(offset) + 1e-13
            offset = offset - lr * h @ offset


def test_with_l1_the_norm_hardly_falls_while_the_loss_does():
    """Far from the minimum each point's gradient is plus or minus x, whatever its residual."""
    problem = make_problem("l1")
    path = descend(problem.points, problem.start, lr=0.01, n_steps=300, loss="l1")
    losses = mean_loss(problem.points, path, "l1")
    half = int(torch.nonzero(losses < losses[0] / 2)[0])

    norms = {loss: gradients(problem.points, path, loss).norm(dim=-1) for loss in ("l1", "l2")}

    assert norms["l1"][half] > 0.95 * norms["l1"][0]
    assert norms["l2"][half] < 0.6 * norms["l2"][0]


def test_point_losses_of_a_worked_example():
    points = Points(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 6.0]))
    line = torch.tensor([1.0, 0.0])  # residuals 0, 0.5 and -4

    assert point_losses(points, line, "l1").tolist() == [0, 0.5, 4]
    assert point_losses(points, line, "l2").tolist() == [0, 0.25, 16]
    assert point_losses(points, line, "huber").tolist() == [0, 0.125, 3.5]
