"""Buckets stay within their capacity and keep every minimum, maximum, sum and count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.web.downsample import Buckets, downsample_steps


def filled(values, *, capacity, n_parts):
    """Buckets with the values of steps 1, 2, ..., appended in some parts."""
    buckets = Buckets(len(values), capacity=capacity)
    steps = np.arange(1, values.shape[1] + 1)
    for part in np.array_split(steps, n_parts):
        buckets.append(part, 100 * part, values[:, part - 1])
    return buckets


@given(st.integers(1, 3000), st.integers(1, 40), st.sampled_from([4, 16, 64, 4096]), st.integers(0, 5))
def test_buckets_keep_steps_sums_minima_and_maxima(n_steps, n_parts, capacity, seed):
    values = np.random.default_rng(seed).normal(size=(2, n_steps))
    values[:, ::7] = np.nan

    buckets = filled(values, capacity=capacity, n_parts=n_parts)
    result = buckets.downsample(0, n_steps, 10**6)

    assert buckets.n_buckets <= capacity
    assert result.n_steps.sum() == n_steps
    np.testing.assert_allclose(result.total.sum(1), np.nansum(values, 1), atol=1e-6)
    if n_steps > 1:
        np.testing.assert_allclose(np.nanmin(result.low, 1), np.nanmin(values, 1), rtol=1e-6)
        np.testing.assert_allclose(np.nanmax(result.high, 1), np.nanmax(values, 1), rtol=1e-6)
    np.testing.assert_array_equal(result.steps, 1 + np.concatenate([[0], np.cumsum(result.n_steps)[:-1]]))


def test_appending_in_parts_equals_appending_at_once():
    values = np.random.default_rng(0).normal(size=(3, 1000))

    at_once = filled(values, capacity=64, n_parts=1).downsample(0, 1000, 10)
    in_parts = filled(values, capacity=64, n_parts=333).downsample(0, 1000, 10)

    for name in at_once._fields:
        np.testing.assert_allclose(getattr(at_once, name), getattr(in_parts, name), rtol=1e-6, err_msg=name)


def test_a_short_run_has_one_step_per_bucket():
    values = np.arange(50.0)[None]

    result = filled(values, capacity=64, n_parts=7).downsample(10, 19, 100)

    np.testing.assert_array_equal(result.steps, np.arange(10, 20))
    np.testing.assert_array_equal(result.mean[0], np.arange(9.0, 19.0))


def test_nonfinite_values_are_ignored():
    values = np.array([[1.0, np.nan, 3.0, np.inf], [np.nan] * 4])

    result = downsample_steps([1, 2, 3, 4], values, max_buckets=1)

    assert result.low[0] == 1
    assert result.high[0] == 3
    assert result.mean[0] == 2
    assert np.isnan(result.mean[1])


def test_one_spike_in_a_million_steps_survives_downsampling():
    values = np.zeros((1, 1_000_000))
    values[0, 654_321] = 100.0

    result = filled(values, capacity=2**12, n_parts=50).downsample(1, 1_000_000, 500)

    assert len(result.steps) <= 500
    assert result.high.max() == 100
    bucket = int(result.high[0].argmax())
    assert result.steps[bucket] <= 654_322 <= result.steps[bucket] + result.n_steps[bucket]


@pytest.mark.parametrize("n_steps", [0, 1])
def test_zero_steps_and_a_single_step(n_steps):
    buckets = filled(np.ones((2, n_steps)), capacity=16, n_parts=1)

    assert buckets.downsample(0, 10, 5).low.shape == (2, n_steps)
