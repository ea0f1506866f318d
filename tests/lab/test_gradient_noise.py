"""The gradient noise scale: gradients whose noise and signal are known."""

import numpy as np
import pytest
import torch

from unbraid.errors import UserError
from unbraid.lab.gradient_noise import noise_scale

DIMENSIONS, SIGMA = 40, 3.0
TRUE = torch.linspace(-1, 1, DIMENSIONS, dtype=torch.float64)
NOISE, SIGNAL = DIMENSIONS * SIGMA**2, float(TRUE @ TRUE)


def drawn(seed, n_batches, batch_size):
    rng = np.random.default_rng(seed)
    noise = SIGMA * rng.standard_normal((n_batches, batch_size, DIMENSIONS)).mean(1)
    gradients = TRUE + torch.from_numpy(noise)
    return noise_scale(lambda place: gradients[place], n_batches, batch_size)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_and_signal_are_right_on_average_and_so_are_their_errors(batch_size):
    found = [drawn(seed, 20, batch_size) for seed in range(400)]
    noise, signal = (np.array([getattr(one, name) for one in found]) for name in ("noise", "signal"))

    assert noise.mean() == pytest.approx(NOISE, abs=4 * noise.std() / 20)
    assert signal.mean() == pytest.approx(SIGNAL, abs=4 * signal.std() / 20)
    assert np.mean([one.noise_error for one in found]) == pytest.approx(noise.std(), rel=0.15)
    assert np.mean([one.signal_error for one in found]) == pytest.approx(signal.std(), rel=0.25)


def test_with_many_batches_the_scale_is_the_true_one():
    found = drawn(0, 4000, 1)

    assert found.told_apart
    assert found.scale == pytest.approx(NOISE / SIGNAL, rel=0.1)
    assert abs(found.scale - NOISE / SIGNAL) < 4 * found.scale_error


def test_estimates_are_those_of_the_papers_appendix():
    gradients = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = noise_scale(lambda place: gradients[place], 5, 2)
    small, big = float(gradients.square().sum(1).mean()), float(gradients.mean(0).square().sum())

    assert found.signal == pytest.approx((10 * big - 2 * small) / (10 - 2))
    assert found.noise == pytest.approx((small - big) / (1 / 2 - 1 / 10))
    without = [np.delete(np.arange(5), place) for place in range(5)]
    each = [noise_scale(lambda place, kept=kept: gradients[kept[place]], 4, 2).noise for kept in without]
    assert found.noise_error == pytest.approx(np.sqrt(4 / 5 * ((each - np.mean(each)) ** 2).sum()))


def test_gradients_that_are_noise_alone_are_not_told_apart():
    gradients = torch.eye(6, dtype=torch.float64)  # at right angles to each other: nothing in common
    found = noise_scale(lambda place: gradients[place], 6, 1)

    assert found.signal == pytest.approx(0, abs=1e-12)
    assert not found.told_apart


def test_equal_gradients_have_no_noise():
    found = noise_scale(lambda place: TRUE.clone(), 4, 2)

    assert (found.noise, found.scale) == pytest.approx((0, 0), abs=1e-10)
    assert found.signal == pytest.approx(SIGNAL)


def test_too_few_batches_and_gradients_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="3 batches or more, not 2"):
        noise_scale(lambda place: TRUE, 2, 1)
    with pytest.raises(UserError, match="not finite"):
        noise_scale(lambda place: TRUE * torch.nan, 3, 1)
