"""Local smoothness, compared with Hessians known exactly and with the gradients of real training steps."""

import math
from dataclasses import replace

import pytest
import torch

from unbraid.config.recipe import load_recipe
from unbraid.lab.experiment import experiment_from_recipe
from unbraid.lab.smoothness import flat_weights, gradient_function, smoothness
from unbraid.train.step import train_step

DROPOUT = ["model.name=blstm", "model.hidden=4", "model.n_layers=2", "model.dropout=0.5", "model.n_fft=32"]
DROPOUT += ["model.hop_length=16"]


@pytest.fixture
def make_experiment(recipe_file):
    """Return a factory of tiny experiments; it takes overrides of the recipe."""
    file = recipe_file()
    return lambda *overrides: experiment_from_recipe(load_recipe(file, overrides), "tiny")


def symmetric_matrix(n, seed=0):
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root + root.T  # indefinite, the Hessian of a saddle


def test_smoothness_of_a_quadratic_is_its_hessian_along_the_step():
    matrix = symmetric_matrix(7)
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        weights, change = torch.randn(2, 7, dtype=torch.float64, generator=rng)
        exact = float((matrix @ change).norm() / change.norm())

        assert smoothness(lambda w: matrix @ w, weights, change) == pytest.approx(exact, rel=1e-12)


def test_along_an_eigenvector_it_is_the_eigenvalue_for_any_step_length():
    matrix = symmetric_matrix(5)
    values, vectors = torch.linalg.eigh(matrix)
    for length in (1e-6, 1.0, 1e3):
        result = smoothness(lambda w: matrix @ w, torch.zeros(5, dtype=torch.float64), length * vectors[:, 0])
        assert result == pytest.approx(abs(float(values[0])), rel=1e-9)


def test_it_is_the_largest_of_the_points_and_not_the_last():
    def bump(weights):  # steep halfway and flat again at the end: the gradient of the sum of -cos
        return weights.sin()

    change = torch.tensor([math.pi], dtype=torch.float64)
    result = smoothness(bump, torch.zeros(1, dtype=torch.float64), change, fractions=(0.5, 1.0))

    assert result == pytest.approx(2 / math.pi)


def test_step_that_does_not_move_has_no_smoothness():
    assert math.isnan(smoothness(lambda w: w, torch.ones(3), torch.zeros(3)))


def test_step_below_float32_resolution_is_divided_by_the_distance_really_moved():
    weights = torch.ones(3)
    change = torch.full((3,), 4e-8)  # a third of the distance to the next float32, or less

    result = smoothness(lambda w: 5 * w.double(), weights, 2 * change)

    assert result == pytest.approx(5)


@pytest.mark.parametrize("overrides", [[], DROPOUT, ["train.accumulate=2"]], ids=["plain", "dropout", "accumulate"])
def test_compared_gradient_is_that_of_the_step(make_experiment, overrides):
    experiment = make_experiment(*overrides)
    state = experiment.new_state()
    micro_batches = next(experiment.training_batches())
    model = experiment.copy_model().train()
    before = flat_weights(state.unwrapped_model)
    record = train_step(state, micro_batches)
    gradient = gradient_function(model, state.loss, micro_batches, seed=state.seed, step=record.step)(before)

    assert float(gradient.norm()) == pytest.approx(record.grad_norm, rel=1e-5)


def test_smoothness_in_float32_equals_float64(make_experiment):
    experiment = make_experiment(*DROPOUT, "model.dropout=0")
    state = experiment.new_state()
    batches = next(experiment.training_batches())
    double_batches = [replace(b, mixture=b.mixture.double(), sources=b.sources.double()) for b in batches]
    before = flat_weights(state.unwrapped_model)
    train_step(state, batches)
    change = flat_weights(state.unwrapped_model) - before
    float32 = gradient_function(experiment.copy_model().train(), state.loss, batches, seed=0, step=1)
    float64 = gradient_function(experiment.copy_model().double().train(), state.loss, double_batches, seed=0, step=1)

    expected = smoothness(float64, before.double(), change.double())
    assert smoothness(float32, before, change) == pytest.approx(expected, rel=1e-3)
