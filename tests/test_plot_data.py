import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.plot_data import bin_starts, running_mean, shares, thin


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 20))
def test_a_thinned_curve_keeps_its_extremes_and_its_order(values, n_bins):
    x, y = np.arange(len(values), dtype=float), np.array(values)

    at, kept = thin(x, y, n_bins)

    assert len(at) <= max(2 * n_bins, 1)
    assert (np.diff(at) > 0).all()
    assert np.array_equal(kept, y[at.astype(int)])
    assert (kept.min(), kept.max()) == (y.min(), y.max())


def test_the_running_mean_starts_with_fewer_values():
    assert running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2) == pytest.approx([2.0, 3.0, 5.0, 7.0])


def test_shares_are_of_the_steps_that_can_be_marked():
    marked = np.array([True, False, True, True, False, False])
    among = np.array([True, True, True, False, False, False])

    found = shares(marked, among, bin_starts(6, 3))

    assert found[:2].tolist() == [0.5, 1.0]
    assert np.isnan(found[2])
