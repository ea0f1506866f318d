import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import RecipeError
from unbraid.robust.clip import AutoClip, FixedClip, NoClip

NORMS = st.one_of(
    st.floats(1e-6, 1e6),
    st.sampled_from([1.0, 1.0, 2.0, 5.0]),  # duplicates
    st.sampled_from([math.nan, math.inf, 0.0]),
)
STEPS = st.lists(st.tuples(NORMS, st.booleans()), max_size=60)


def limit_of(clipper, norm, finite=True):
    return clipper(torch.tensor(norm, dtype=torch.float64), torch.tensor(finite)).item()


def expected_limits(steps, percentile):
    """What the definition gives after each step: numpy's percentile of all finite, positive norms of good steps."""
    history, limits = [], []
    for norm, finite in steps:
        if finite and math.isfinite(norm) and norm > 0:
            history.append(norm)
        limits.append(np.percentile(history, percentile) if history else math.inf)
    return limits


@given(STEPS, st.one_of(st.sampled_from([0, 10, 50, 100]), st.floats(0, 100)))
def test_the_limit_is_numpys_percentile_of_the_whole_history_at_every_step(steps, percentile):
    clipper = AutoClip(percentile=percentile)

    limits = [limit_of(clipper, norm, finite) for norm, finite in steps]

    np.testing.assert_allclose(limits, expected_limits(steps, percentile), rtol=1e-6)


def test_a_long_history_is_still_exact():
    norms = np.random.default_rng(0).lognormal(sigma=2, size=3000)
    clipper = AutoClip()

    limits = [limit_of(clipper, norm) for norm in norms]

    np.testing.assert_allclose(limits[-1], np.percentile(norms, 10), rtol=1e-12)


@given(STEPS, STEPS, st.floats(0, 100))
def test_what_is_taken_up_goes_on_identically(before, after, percentile):
    going_on, resumed = AutoClip(percentile=percentile), AutoClip(percentile=percentile)
    for step in before:
        limit_of(going_on, *step)

    resumed.load_state_dict(going_on.state_dict())

    assert [limit_of(resumed, *step) for step in after] == [limit_of(going_on, *step) for step in after]


def test_a_saved_state_does_not_change_with_the_steps_that_follow():
    clipper = AutoClip()
    limit_of(clipper, 3.0)
    state = clipper.state_dict()
    limit_of(clipper, 4.0)

    fresh = AutoClip()
    fresh.load_state_dict(state)

    assert limit_of(fresh, math.nan) == 3.0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1), st.floats(0, 100), st.floats(0.1, 10))
def test_a_gain_on_all_norms_is_a_gain_on_the_limit(norms, percentile, gain):
    one, other = AutoClip(percentile=percentile), AutoClip(percentile=percentile)

    limits = [(limit_of(one, norm), limit_of(other, gain * norm)) for norm in norms]

    np.testing.assert_allclose([gain * limit for limit, _ in limits], [limit for _, limit in limits], rtol=1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1))
def test_percentile_100_never_clips_and_0_clips_to_the_smallest(norms):
    highest, lowest = AutoClip(percentile=100), AutoClip(percentile=0)

    for i, norm in enumerate(norms):
        assert limit_of(highest, norm) >= norm
        assert limit_of(lowest, norm) == min(norms[: i + 1])


@pytest.mark.parametrize("percentile", [-1, 100.5, math.nan, math.inf])
def test_a_percentile_that_does_not_exist_is_refused(percentile):
    with pytest.raises(RecipeError, match="between 0 and 100"):
        AutoClip(percentile=percentile)


@pytest.mark.parametrize("norm", [0.0, 1e-9, 3.0, 1e30, math.inf, math.nan])
def test_a_fixed_limit_does_not_hang_on_the_norm(norm):
    assert limit_of(FixedClip(max_norm=2.5), norm, math.isfinite(norm)) == 2.5


def test_five_is_the_fixed_limit_unless_told():
    assert limit_of(FixedClip(), 1.0) == 5.0


@pytest.mark.parametrize("max_norm", [0, -1, math.nan, math.inf])
def test_a_limit_that_cannot_be_meant_is_refused_with_the_way_out(max_norm):
    with pytest.raises(RecipeError, match='name = "none"'):
        FixedClip(max_norm=max_norm)


def test_no_clipping_is_no_limit():
    assert limit_of(NoClip(), 1e30) == math.inf
