"""The gradient noise scale of gradients whose noise and signal are known."""

import numpy as np
import pytest
import torch

from unbraid.errors import UserError
from unbraid.lab.gradient_noise import noise_scale

DIMENSIONS = 40
SIGMA = 3.0
TRUE_GRADIENT = torch.linspace(-1, 1, DIMENSIONS, dtype=torch.float64)
NOISE = DIMENSIONS * SIGMA**2
SIGNAL = float(TRUE_GRADIENT @ TRUE_GRADIENT)


def random_noise_scale(seed, n_batches, batch_size):
    rng = np.random.default_rng(seed)
    noise = SIGMA * rng.standard_normal((n_batches, batch_size, DIMENSIONS)).mean(1)
    gradients = TRUE_GRADIENT + torch.from_numpy(noise)
    return noise_scale(lambda index: gradients[index], n_batches, batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_signal_and_their_errors_are_unbiased(batch_size):
    results = [random_noise_scale(seed, 20, batch_size) for seed in range(400)]
    noise, signal = (np.array([getattr(result, name) for result in results]) for name in ("noise", "signal"))

    assert noise.mean() == pytest.approx(NOISE, abs=4 * noise.std() / 20)
    assert signal.mean() == pytest.approx(SIGNAL, abs=4 * signal.std() / 20)
    assert np.mean([result.noise_error for result in results]) == pytest.approx(noise.std(), rel=0.15)
    assert np.mean([result.signal_error for result in results]) == pytest.approx(signal.std(), rel=0.25)


def test_scale_of_many_batches_is_the_true_one():
    result = random_noise_scale(0, 4000, 1)

    assert result.signal_is_significant
    assert result.scale == pytest.approx(NOISE / SIGNAL, rel=0.1)
    assert abs(result.scale - NOISE / SIGNAL) < 4 * result.scale_error


def test_estimates_equal_the_formulas_of_the_paper():
    gradients = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = noise_scale(lambda index: gradients[index], 5, 2)
    small, big = float(gradients.square().sum(1).mean()), float(gradients.mean(0).square().sum())

    assert result.signal == pytest.approx((10 * big - 2 * small) / (10 - 2))
    assert result.noise == pytest.approx((small - big) / (1 / 2 - 1 / 10))
    without_one = [np.delete(np.arange(5), index) for index in range(5)]
    noises = [noise_scale(lambda index, rest=rest: gradients[rest[index]], 4, 2).noise for rest in without_one]
    assert result.noise_error == pytest.approx(np.sqrt(4 / 5 * ((noises - np.mean(noises)) ** 2).sum()))


def test_signal_of_pure_noise_is_not_significant():
    gradients = torch.eye(6, dtype=torch.float64)  # at right angles to each other: nothing in common
    result = noise_scale(lambda index: gradients[index], 6, 1)

    assert result.signal == pytest.approx(0, abs=1e-12)
    assert not result.signal_is_significant


def test_equal_gradients_have_no_noise():
    result = noise_scale(lambda index: TRUE_GRADIENT.clone(), 4, 2)

    assert (result.noise, result.scale) == pytest.approx((0, 0), abs=1e-10)
    assert result.signal == pytest.approx(SIGNAL)


def test_too_few_batches_and_nonfinite_gradients_are_refused():
    with pytest.raises(UserError, match="3 batches or more, not 2"):
        noise_scale(lambda index: TRUE_GRADIENT, 2, 1)
    with pytest.raises(UserError, match="not finite"):
        noise_scale(lambda index: TRUE_GRADIENT * torch.nan, 3, 1)
