import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.errors import CheckpointError, RecipeError
from unbraid.robust.clip import AutoClip, FixedClip, NoClip, ZClip, clip_
from unbraid.robust.quantile import DeviceQuantile, HostQuantile

NORMS = st.one_of(
    st.floats(1e-6, 1e6),
    st.sampled_from([1.0, 1.0, 2.0, 5.0]),  # duplicates
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0]),
)
every_kind = pytest.mark.parametrize("kind", ["host", "device"])
STEPS = st.lists(st.tuples(NORMS, st.booleans()), max_size=60)


def limit_of(clipper, norm, finite=True):
    return clipper(torch.tensor(norm, dtype=torch.float64), torch.tensor(finite)).item()


def quantile_of_kind(kind):
    """A stand-in for quantile_for that ignores the device."""
    quantile = {"host": HostQuantile, "device": DeviceQuantile}[kind]
    return lambda _device, window: quantile(window)


@pytest.fixture
def force(monkeypatch):
    """A function that makes every AutoClip from now on store its norms as on the host, or as on a device."""
    return lambda kind: monkeypatch.setattr("unbraid.robust.clip.quantile_for", quantile_of_kind(kind))


def expected_limits(steps, percentile, window=0):
    """The limit after each step by the definition: numpy's percentile of all finite, positive norms of good steps."""
    history = []
    limits = []
    for norm, finite in steps:
        if finite and math.isfinite(norm) and norm > 0:
            history.append(norm)
        limits.append(np.percentile(history[-window:], percentile) if history else math.inf)
    return limits


@every_kind
@given(STEPS, st.one_of(st.sampled_from([0, 10, 50, 100]), st.floats(0, 100)), st.sampled_from([0, 1, 5]))
def test_the_limit_is_numpys_percentile_of_the_norms_so_far_at_every_step(kind, steps, percentile, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.robust.clip.quantile_for", quantile_of_kind(kind))
        clipper = AutoClip(percentile=percentile, window=window)

        limits = [limit_of(clipper, norm, finite) for norm, finite in steps]

    np.testing.assert_allclose(limits, expected_limits(steps, percentile, window), rtol=1e-6)


def test_a_long_history_is_still_exact():
    norms = np.random.default_rng(0).lognormal(sigma=2, size=3000)
    clipper = AutoClip()

    limits = [limit_of(clipper, norm) for norm in norms]

    np.testing.assert_allclose(limits[-1], np.percentile(norms, 10), rtol=1e-12)


@given(STEPS, STEPS, st.floats(0, 100))
def test_a_restored_history_continues_identically(before, after, percentile):
    original, resumed = AutoClip(percentile=percentile), AutoClip(percentile=percentile)
    for step in before:
        limit_of(original, *step)

    resumed.load_state_dict(original.state_dict())

    assert [limit_of(resumed, *step) for step in after] == [limit_of(original, *step) for step in after]


def test_a_saved_state_does_not_change_with_later_steps():
    clipper = AutoClip()
    limit_of(clipper, 3.0)
    state = clipper.state_dict()
    limit_of(clipper, 4.0)

    fresh = AutoClip()
    fresh.load_state_dict(state)

    assert limit_of(fresh, math.nan) == 3.0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1), st.floats(0, 100), st.floats(0.1, 10))
def test_scaling_all_norms_scales_the_limit(norms, percentile, gain):
    clipper = AutoClip(percentile=percentile)
    scaled = AutoClip(percentile=percentile)

    limits = [(limit_of(clipper, norm), limit_of(scaled, gain * norm)) for norm in norms]

    np.testing.assert_allclose([gain * limit for limit, _ in limits], [limit for _, limit in limits], rtol=1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1))
def test_percentile_100_never_clips_and_0_clips_to_the_smallest(norms):
    highest, lowest = AutoClip(percentile=100), AutoClip(percentile=0)

    for i, norm in enumerate(norms):
        assert limit_of(highest, norm) >= norm
        assert limit_of(lowest, norm) == min(norms[: i + 1])


@every_kind
@pytest.mark.parametrize("window", [0, 50])
def test_norms_that_are_nan_infinite_or_zero_are_ignored(force, kind, window):
    force(kind)
    clipper = AutoClip(window=window)

    limits = [limit_of(clipper, norm) for norm in (3.0, math.nan, 4.0, math.inf, 0.0, -1.0, 5.0)]

    np.testing.assert_allclose(limits[-1], np.percentile([3.0, 4.0, 5.0], 10), rtol=1e-12)
    assert clipper.state_dict()["norms"].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(("saved", "loaded"), [("host", "device"), ("device", "host")])
@pytest.mark.parametrize("window", [0, 3])
def test_a_run_resumed_on_another_kind_of_device_is_identical(force, saved, loaded, window):
    norms = [3.0, 1.0, 7.0, 2.0, 5.0, 4.0]
    force(saved)
    clipper = AutoClip(window=window)
    before = [limit_of(clipper, norm) for norm in norms]
    force(loaded)
    resumed = AutoClip(window=window)
    resumed.load_state_dict(clipper.state_dict())

    after = [limit_of(resumed, norm) for norm in norms]

    np.testing.assert_allclose(
        before + after, expected_limits([(norm, True) for norm in 2 * norms], 10, window), rtol=1e-12
    )


@every_kind
def test_a_window_drops_older_norms(force, kind):
    force(kind)
    clipper = AutoClip(percentile=0, window=2)

    assert [limit_of(clipper, norm) for norm in (1.0, 2.0, 3.0, 4.0)] == [1.0, 1.0, 2.0, 3.0]


@every_kind
@pytest.mark.parametrize("window", [0, 10])
def test_nothing_is_clipped_during_warm_up(force, kind, window):
    force(kind)
    clipper = AutoClip(percentile=0, window=window, warmup_steps=3)

    limits = [limit_of(clipper, norm) for norm in (3.0, math.nan, 2.0, 4.0, 1.0)]

    assert limits == [math.inf, math.inf, math.inf, 2.0, 1.0]


def test_a_state_saved_right_after_loading_equals_the_loaded_one():
    clipper = AutoClip()
    other = AutoClip()
    third = AutoClip()
    limit_of(clipper, 3.0)
    other.load_state_dict(clipper.state_dict())
    third.load_state_dict(other.state_dict())

    assert limit_of(third, math.nan) == 3.0


def test_a_window_cannot_resume_from_norms_without_order():
    clipper = AutoClip()
    limit_of(clipper, 3.0)

    with pytest.raises(CheckpointError, match="window = 0"):
        AutoClip(window=5).load_state_dict(clipper.state_dict())


@pytest.mark.parametrize("options", [{"window": -1}, {"warmup_steps": -1}, {"window": 5, "warmup_steps": 6}])
def test_an_invalid_window_or_warm_up_is_refused(options):
    with pytest.raises(RecipeError, match="must"):
        AutoClip(**options)


@pytest.mark.parametrize("percentile", [-1, 100.5, math.nan, math.inf])
def test_an_invalid_percentile_is_refused(percentile):
    with pytest.raises(RecipeError, match="between 0 and 100"):
        AutoClip(percentile=percentile)


@pytest.mark.parametrize("norm", [0.0, 1e-9, 3.0, 1e30, math.inf, math.nan])
def test_a_fixed_limit_does_not_depend_on_the_norm(norm):
    assert limit_of(FixedClip(max_norm=2.5), norm, math.isfinite(norm)) == 2.5


def test_the_default_fixed_limit_is_5():
    assert limit_of(FixedClip(), 1.0) == 5.0


@pytest.mark.parametrize("max_norm", [0, -1, math.nan, math.inf])
def test_an_invalid_limit_is_refused_with_advice(max_norm):
    with pytest.raises(RecipeError, match='name = "none"'):
        FixedClip(max_norm=max_norm)


def test_no_clipping_means_no_limit():
    assert limit_of(NoClip(), 1e30) == math.inf


def zclip_as_published(norms, *, alpha=0.97, z_threshold=2.5, warmup_steps=25):
    """The limit at each norm by the published rule, written out."""
    limits = []
    first = []
    mean = var = None
    for norm in norms:
        if len(first) < warmup_steps:
            first.append(norm)
            mean = np.mean(first)
            var = np.var(first)
            limits.append(math.inf)
            continue
        z = (norm - mean) / (np.sqrt(var) + 1e-6 * mean)
        limits.append(mean + z_threshold**2 / z * np.sqrt(var) if z > z_threshold else math.inf)
        learned = min(norm, limits[-1])
        mean = alpha * mean + (1 - alpha) * learned
        var = alpha * var + (1 - alpha) * (learned - mean) ** 2
    return limits


def test_zclip_is_the_published_rule():
    rng = np.random.default_rng(0)
    norms = rng.lognormal(sigma=0.3, size=200) * np.where(rng.random(200) < 0.05, 50, 1)
    clipper = ZClip()

    limits = [limit_of(clipper, norm) for norm in norms]

    assert 5 < sum(map(math.isfinite, limits)) < 50
    np.testing.assert_allclose(limits, zclip_as_published(norms), rtol=1e-9)


def test_a_larger_spike_is_clipped_closer_to_the_mean():
    limits = []
    for spike in (10.0, 100.0, 1e4):
        clipper = ZClip()
        for i in range(100):
            limit_of(clipper, 1.0 + 0.1 * (i % 2))
        limits.append(limit_of(clipper, spike))

    assert limits == sorted(limits, reverse=True)
    assert 1.05 < limits[-1] < 1.06


def test_zclip_does_not_clip_a_steady_norm():
    clipper = ZClip()

    assert {limit_of(clipper, 3.0) for _ in range(200)} == {math.inf}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1), st.floats(1e-3, 1e3))
def test_scaling_all_norms_scales_the_limit_of_zclip(norms, gain):
    clipper = ZClip(warmup_steps=3)
    scaled = ZClip(warmup_steps=3)

    limits = [(limit_of(clipper, norm), limit_of(scaled, gain * norm)) for norm in norms]

    np.testing.assert_allclose([gain * limit for limit, _ in limits], [limit for _, limit in limits], rtol=1e-4)


def test_invalid_norms_leave_the_statistics_bit_for_bit():
    clipper = ZClip(warmup_steps=2)
    for norm in (1.0, 2.0, 1.5):
        limit_of(clipper, norm)
    before = clipper.state_dict()

    for norm, finite in ((math.nan, False), (math.nan, True), (math.inf, True), (0.0, True), (9.0, False)):
        assert limit_of(clipper, norm, finite) > 0
        assert torch.equal(clipper.state_dict()["known"], before["known"])


@pytest.mark.parametrize(
    "options", [{"z_threshold": 0}, {"z_threshold": math.nan}, {"alpha": 1}, {"alpha": 0}, {"warmup_steps": 1}]
)
def test_invalid_options_of_zclip_are_refused(options):
    with pytest.raises(RecipeError, match="must be"):
        ZClip(**options)


def with_gradients(*gradients):
    """Parameters with these gradients; None for no gradient."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.full((2, 3), gradient)
    return parameters


@pytest.mark.parametrize("max_norm", [0.1, 5.0, 1e3])
def test_clip_equals_torchs_clip_grad_norm(max_norm):
    mine = with_gradients(3.0, None, -4.0)
    theirs = with_gradients(3.0, None, -4.0)

    norm = clip_(iter(mine), FixedClip(max_norm=max_norm))

    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for one, other in zip(mine, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-6)


def test_a_single_tensor_can_be_clipped():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 5.0)

    assert clip_(parameter, FixedClip(max_norm=1.0)).item() == 10.0
    assert parameter.grad.norm().item() == pytest.approx(1.0)


def test_gradients_of_several_dtypes_are_clipped_together():
    parameters = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)

    clip_(parameters, FixedClip(max_norm=1.0))

    assert [parameter.grad.dtype for parameter in parameters] == [torch.float32, torch.bfloat16]
    assert sum(parameter.grad.float().norm() ** 2 for parameter in parameters) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_norm_changes_neither_gradients_nor_clipper(bad):
    clipper = AutoClip()
    parameters = with_gradients(3.0, bad)
    limit_of(clipper, 2.0)

    norm = clip_(parameters, clipper)

    assert not norm.isfinite()
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 3.0))
    assert clipper.state_dict()["norms"].tolist() == [2.0]


def test_gradients_of_zero_stay_zero():
    parameters = with_gradients(0.0, 0.0)

    assert clip_(parameters, AutoClip()).item() == 0
    assert all(torch.equal(parameter.grad, torch.zeros(2, 3)) for parameter in parameters)


def test_without_a_gradient_there_is_nothing_to_clip():
    clipper = AutoClip()

    assert clip_(with_gradients(None, None), clipper).item() == 0
    assert len(clipper.state_dict()["norms"]) == 0
