import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import RecipeError
from unbraid.robust.filter import OutlierFilter, PercentileFilter, ThresholdFilter

LOSSES = st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=30)


def observe(loss_filter, losses):
    losses = torch.as_tensor(losses, dtype=torch.float32)
    loss_filter.observe(losses, torch.ones(len(losses), dtype=torch.bool))


def weights(loss_filter, *losses):
    return loss_filter(torch.tensor(losses)).tolist()


def test_a_loss_at_or_below_the_threshold_has_weight_0():
    assert weights(ThresholdFilter(threshold_db=-20), -20.001, -20.0, -19.999, 0.0, 300.0) == [0, 0, 1, 1, 1]


def test_the_default_threshold_is_minus_30_db():
    assert weights(ThresholdFilter(), -30.0, -29.9) == [0, 1]


def test_filters_with_limits_in_db_need_losses_in_db():
    assert [kind().needs_db for kind in (ThresholdFilter, OutlierFilter, PercentileFilter)] == [True, True, False]


@given(LOSSES, st.floats(0.1, 99), st.integers(1, 20))
def test_losses_below_numpys_percentile_of_the_last_losses_are_dropped(losses, percentile, window):
    loss_filter = PercentileFilter(percentile=percentile, window=window, warmup=1)
    observe(loss_filter, losses)
    limit = np.percentile(np.array(losses[-window:]), percentile)

    assert weights(loss_filter, limit - 0.01, limit + 0.01) == [0, 1]


def test_a_loss_equal_to_the_percentile_is_not_dropped():
    loss_filter = PercentileFilter(percentile=50, warmup=1)
    observe(loss_filter, [1.0, 2.0, 3.0])

    assert weights(loss_filter, 1.9, 2.0, 2.1) == [0, 1, 1]


def test_percentile_0_does_not_drop_even_a_new_lowest_loss():
    loss_filter = PercentileFilter(percentile=0, warmup=1)
    observe(loss_filter, [1.0, 2.0, 3.0])

    assert weights(loss_filter, -100.0) == [1]


def test_the_dropped_share_is_about_the_percentile_while_losses_fall_slowly():
    rng = np.random.default_rng(0)
    loss_filter = PercentileFilter(percentile=10)
    dropped = []
    for step in range(1000):
        losses = torch.from_numpy(rng.normal(-0.002 * step, 3, 8))
        dropped += (1 - loss_filter(losses)).tolist()
        observe(loss_filter, losses)

    assert 0.08 < np.mean(dropped[800:]) < 0.12


@pytest.mark.parametrize("kind", [PercentileFilter, OutlierFilter])
def test_nothing_is_dropped_during_warm_up(kind):
    loss_filter = kind(warmup=5)
    observe(loss_filter, [1.0, 1.0, 1.0, 1.0])
    assert weights(loss_filter, -1000.0, 1000.0) == [1, 1]

    observe(loss_filter, [math.nan])
    assert weights(loss_filter, -1000.0, 1000.0) == [1, 1]

    observe(loss_filter, [1.0])
    assert sum(weights(loss_filter, -1000.0, 1000.0)) == 1


@pytest.mark.parametrize("kind", [PercentileFilter, OutlierFilter])
def test_nothing_is_dropped_in_the_first_step_even_without_warm_up(kind):
    assert weights(kind(warmup=0), -1000.0, 1000.0) == [1, 1]


@pytest.mark.parametrize(("spread", "limit_db"), [(0.5, 6.0), (2.0, 12.0)])
def test_an_outlier_is_6_deviations_from_the_median_and_at_least_6_db(spread, limit_db):
    loss_filter = OutlierFilter(warmup=1)
    observe(loss_filter, [-10.0 - spread, -10.0, -10.0 + spread])  # median -10, MAD = spread

    assert weights(loss_filter, -99.0, -10.0, -10.0 + limit_db - 0.01, -10.0 + limit_db + 0.01) == [1, 1, 1, 0]


def test_one_outlier_does_not_hide_the_next():
    loss_filter = OutlierFilter(warmup=10)
    observe(loss_filter, np.random.default_rng(0).normal(-10, 1, 50))
    for _ in range(5):
        assert weights(loss_filter, 40.0) == [0]
        observe(loss_filter, [40.0])


def test_the_limit_follows_a_lasting_change_of_level():
    rng = np.random.default_rng(0)
    loss_filter = OutlierFilter(window=100, warmup=50)
    dropped = []
    for level in (-10.0, 20.0):
        for _ in range(100):
            losses = torch.from_numpy(rng.normal(level, 1, 2))
            dropped += (1 - loss_filter(losses)).tolist()
            observe(loss_filter, losses)

    assert not any(dropped[:200])
    assert all(dropped[200:220])
    assert not any(dropped[252:])  # half of the window


def test_the_order_of_the_examples_in_a_step_makes_no_difference():
    losses = np.random.default_rng(0).normal(size=60)
    for kind in (PercentileFilter, OutlierFilter):
        forwards = kind(warmup=1)
        backwards = kind(warmup=1)
        observe(forwards, losses)
        observe(backwards, losses[::-1].copy())

        assert torch.equal(forwards(torch.from_numpy(losses)), backwards(torch.from_numpy(losses)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PercentileFilter, {"percentile": -1}),
        (PercentileFilter, {"percentile": 100}),
        (PercentileFilter, {"percentile": math.nan}),
        (PercentileFilter, {"window": 0}),
        (PercentileFilter, {"window": 10, "warmup": 11}),
        (OutlierFilter, {"warmup": -1}),
        (OutlierFilter, {"n_mads": -1}),
        (OutlierFilter, {"at_least_db": math.inf}),
    ],
)
def test_an_invalid_option_is_refused_with_the_allowed_range(kind, options):
    with pytest.raises(RecipeError, match=r"\[\[filter\]\] \w+ = .* must be"):
        kind(**options)
