"""Columns over steps stay within their room, and lose no least, greatest, sum or count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.web.downsample import Buckets, of_each_step


def filled(values, *, capacity, pieces):
    buckets = Buckets(len(values), capacity=capacity)
    steps = np.arange(1, values.shape[1] + 1)
    for part in np.array_split(steps, pieces):
        buckets.append(part, 100 * part, values[:, part - 1])
    return buckets


@given(st.integers(1, 3000), st.integers(1, 40), st.sampled_from([4, 16, 64, 4096]), st.integers(0, 5))
def test_what_went_in_is_what_the_buckets_hold(n_steps, pieces, capacity, seed):
    values = np.random.default_rng(seed).normal(size=(2, n_steps))
    values[:, ::7] = np.nan

    buckets = filled(values, capacity=capacity, pieces=pieces)
    whole = buckets.thinned(0, n_steps, 10**6)

    assert buckets.n <= capacity
    assert whole.n_steps.sum() == n_steps
    np.testing.assert_allclose(whole.total.sum(1), np.nansum(values, 1), atol=1e-6)
    if n_steps > 1:
        np.testing.assert_allclose(np.nanmin(whole.low, 1), np.nanmin(values, 1), rtol=1e-6)
        np.testing.assert_allclose(np.nanmax(whole.high, 1), np.nanmax(values, 1), rtol=1e-6)
    np.testing.assert_array_equal(whole.steps, 1 + np.concatenate([[0], np.cumsum(whole.n_steps)[:-1]]))


def test_in_pieces_or_at_once_is_the_same():
    values = np.random.default_rng(0).normal(size=(3, 1000))

    one, many = (filled(values, capacity=64, pieces=pieces).thinned(0, 1000, 10) for pieces in (1, 333))

    for name in one._fields:
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-6, err_msg=name)


def test_a_run_that_fits_is_kept_step_by_step():
    values = np.arange(50.0)[None]

    thinned = filled(values, capacity=64, pieces=7).thinned(10, 19, 100)

    np.testing.assert_array_equal(thinned.steps, np.arange(10, 20))
    np.testing.assert_array_equal(thinned.mean[0], np.arange(9.0, 19.0))


def test_a_value_that_is_not_finite_counts_for_nothing():
    values = np.array([[1.0, np.nan, 3.0, np.inf], [np.nan] * 4])

    thinned = of_each_step([1, 2, 3, 4], values, n_most=1)

    assert thinned.low[0] == 1
    assert thinned.high[0] == 3
    assert thinned.mean[0] == 2
    assert np.isnan(thinned.mean[1])


def test_one_spike_of_a_million_steps_is_seen_in_the_thinned_curve():
    values = np.zeros((1, 1_000_000))
    values[0, 654_321] = 100.0

    thinned = filled(values, capacity=2**12, pieces=50).thinned(1, 1_000_000, 500)

    assert len(thinned.steps) <= 500
    assert thinned.high.max() == 100
    place = int(thinned.high[0].argmax())
    assert thinned.steps[place] <= 654_322 <= thinned.steps[place] + thinned.n_steps[place]


@pytest.mark.parametrize("n_steps", [0, 1])
def test_nothing_and_a_single_step(n_steps):
    buckets = filled(np.ones((2, n_steps)), capacity=16, pieces=1)

    assert buckets.thinned(0, 10, 5).low.shape == (2, n_steps)
