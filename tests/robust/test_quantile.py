import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.robust.quantile import DeviceQuantile, HostQuantile, quantile_for

FINITE = st.one_of(st.floats(1e-6, 1e6), st.floats(-50, 50), st.sampled_from([1.0, 1.0, 2.0, 5.0, 0.0]))  # duplicates
VALUES = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))
STEPS = st.lists(st.tuples(VALUES, st.booleans()), max_size=60)
PERCENTILES = st.one_of(st.sampled_from([0, 10, 50, 100]), st.floats(0, 100))
WINDOWS = st.sampled_from([None, 1, 2, 7])
BATCHES = st.lists(st.lists(st.tuples(VALUES, st.booleans()), max_size=12), max_size=8)
KINDS = {"host": HostQuantile, "device": DeviceQuantile}

all_kinds = pytest.mark.parametrize("kind", sorted(KINDS))


def add(quantile, value, valid=True):
    quantile.add(torch.tensor(value, dtype=torch.float64), torch.tensor(valid))


def percentiles(quantile, steps, percent):
    """The percentile after each step."""
    results = []
    for value, valid in steps:
        add(quantile, value, valid)
        results.append(quantile.percentile(percent).item())
    return results


def filled(kind, window, values):
    quantile = KINDS[kind](window)
    for value in values:
        add(quantile, value)
    return quantile


def valid_values(steps, window):
    values = [value for value, valid in steps if valid and math.isfinite(value)]
    return values if window is None else values[-window:]


def expected(steps, window, percent):
    """numpy's percentile after each step."""
    results = []
    for n_steps in range(1, len(steps) + 1):
        values = valid_values(steps[:n_steps], window)
        results.append(np.percentile(values, percent) if values else math.inf)
    return results


def saved(quantile):
    return quantile.state_dict()["values"].tolist()


@all_kinds
@given(STEPS, WINDOWS, PERCENTILES)
def test_it_is_numpys_percentile_at_every_step(kind, steps, window, percent):
    results = percentiles(KINDS[kind](window), steps, percent)

    np.testing.assert_allclose(results, expected(steps, window, percent), rtol=1e-6, atol=1e-12)


@given(STEPS, WINDOWS, PERCENTILES)
def test_both_kinds_give_the_same_bits(steps, window, percent):
    host = HostQuantile(window)
    device = DeviceQuantile(window)

    assert percentiles(host, steps, percent) == percentiles(device, steps, percent)


@pytest.mark.parametrize("saved_kind", sorted(KINDS))
@pytest.mark.parametrize("loaded_kind", sorted(KINDS))
@given(STEPS, STEPS, WINDOWS, PERCENTILES)
def test_a_saved_state_continues_identically_in_either_kind(saved_kind, loaded_kind, before, after, window, percent):
    original = KINDS[saved_kind](window)
    resumed = KINDS[loaded_kind](window)
    percentiles(original, before, percent)

    resumed.load_state_dict(original.state_dict())

    assert resumed.percentile(percent).item() == original.percentile(percent).item()
    assert percentiles(resumed, after, percent) == percentiles(original, after, percent)
    assert saved(resumed) == saved(original)


@all_kinds
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("value", "valid"), [(math.nan, True), (math.inf, True), (-math.inf, True), (math.nan, False), (2.5, False)]
)
def test_an_invalid_value_leaves_no_trace(kind, window, value, valid):
    quantile = filled(kind, window, [3.0, 1.0, 2.0, 5.0, 4.0])
    before = saved(quantile)
    percentile = quantile.percentile(30).item()

    add(quantile, value, valid)

    assert quantile.percentile(30).item() == percentile
    assert saved(quantile) == before
    add(quantile, 0.5)
    untouched = filled(kind, window, [3.0, 1.0, 2.0, 5.0, 4.0, 0.5])
    assert quantile.percentile(30).item() == untouched.percentile(30).item()


@all_kinds
@pytest.mark.parametrize("window", [None, 3])
def test_a_saved_state_does_not_change_with_later_steps(kind, window):
    quantile = filled(kind, window, [1.0, 2.0, 3.0])
    state = quantile.state_dict()
    add(quantile, 9.0)

    assert state["values"].tolist() == [1.0, 2.0, 3.0]


@all_kinds
def test_a_window_is_saved_oldest_first_and_the_whole_history_sorted(kind):
    values = [3.0, 1.0, 2.0, 5.0, 4.0]

    assert saved(filled(kind, 3, values)) == [2.0, 5.0, 4.0]
    assert saved(filled(kind, None, values)) == [1.0, 2.0, 3.0, 4.0, 5.0]


@all_kinds
def test_a_narrower_window_restores_the_last_values_of_a_wider_one(kind):
    narrow = KINDS[kind](2)
    narrow.load_state_dict(filled(kind, 5, [1.0, 2.0, 3.0, 4.0]).state_dict())

    assert narrow.percentile(0).item() == 3.0


@all_kinds
@pytest.mark.parametrize("window", [None, 10])
def test_too_few_values_give_infinity(kind, window):
    quantile = KINDS[kind](window)

    results = []
    for value in (4.0, math.nan, 3.0, 2.0):
        add(quantile, value)
        results.append(quantile.percentile(10, at_least=3).item())

    assert results == [math.inf, math.inf, math.inf, pytest.approx(np.percentile([4, 3, 2], 10))]


@all_kinds
def test_a_million_values_stay_exact(kind):
    values = np.random.default_rng(0).lognormal(sigma=2, size=1_000_000)
    quantile = KINDS[kind]()
    quantile.load_state_dict({"values": torch.from_numpy(np.sort(values))})

    assert quantile.percentile(10).item() == pytest.approx(np.percentile(values, 10), rel=1e-12)
    for value in (1e-9, 1e9, 0.5, 0.1):
        values = np.append(values, value)
        add(quantile, value)
        assert quantile.percentile(10).item() == pytest.approx(np.percentile(values, 10), rel=1e-12)
    assert torch.equal(quantile.state_dict()["values"], torch.from_numpy(np.sort(values)))


@pytest.mark.parametrize(("kind", "n_values"), [("host", 20_000), ("device", 3000)])
def test_growing_past_every_capacity_stays_exact(kind, n_values):
    values = np.random.default_rng(0).lognormal(sigma=2, size=n_values)

    results = percentiles(KINDS[kind](), [(value, True) for value in values], 10)

    for n in (1023, 1024, 1025, 2048, 2049, 3000, n_values):
        assert results[n - 1] == pytest.approx(np.percentile(values[:n], 10), rel=1e-12)


@pytest.mark.parametrize("window", [4000, 9000])
def test_a_window_of_several_blocks_stays_exact(window):
    values = np.random.default_rng(0).permutation(25_000).astype(float)

    results = percentiles(HostQuantile(window), [(value, True) for value in values], 90)

    for n in (8001, 9001, 12_000, 25_000):
        assert results[n - 1] == pytest.approx(np.percentile(values[max(0, n - window) : n], 90), rel=1e-12)


@pytest.mark.parametrize(("device", "kind"), [("cpu", HostQuantile), ("cuda", DeviceQuantile), ("mps", DeviceQuantile)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kind_follows_from_the_device(device, kind, window):
    quantile = quantile_for(torch.device(device), window)

    assert type(quantile) is kind
    assert quantile.window == window


def add_batch(quantile, batch):
    values = torch.tensor([value for value, _ in batch], dtype=torch.float64)
    quantile.add(values, torch.tensor([valid for _, valid in batch], dtype=torch.bool))


def statistics(quantile, percent=30.0):
    return [x.item() for x in (quantile.count, quantile.percentile(percent), quantile.median(), quantile.mad())]


@given(BATCHES, st.sampled_from([None, 1, 2, 5, 9]), PERCENTILES)
def test_several_values_a_step_are_added_in_order(batches, window, percent):
    quantile = DeviceQuantile(window)

    for i, batch in enumerate(batches):
        add_batch(quantile, batch)

        values = valid_values([pair for earlier in batches[: i + 1] for pair in earlier], window)
        assert quantile.count.item() == len(values)
        assert saved(quantile) == (sorted(values) if window is None else values)
        if values:
            deviations = np.abs(np.array(values) - np.median(values))
            expected_now = [len(values), np.percentile(values, percent), np.median(values), np.median(deviations)]
            np.testing.assert_allclose(statistics(quantile, percent), expected_now, rtol=1e-9, atol=1e-9)
        else:
            assert statistics(quantile, percent) == [0, math.inf, math.inf, math.inf]


@given(BATCHES, BATCHES, st.integers(1, 9))
def test_several_values_a_step_continue_identically_from_a_saved_state(before, after, window):
    original = DeviceQuantile(window)
    resumed = DeviceQuantile(window)
    for batch in before:
        add_batch(original, batch)

    resumed.load_state_dict(original.state_dict())

    for batch in after:
        add_batch(original, batch)
        add_batch(resumed, batch)
        assert statistics(resumed) == statistics(original)
        assert saved(resumed) == saved(original)


@given(BATCHES, st.sampled_from([None, 1, 2, 5, 9]))
def test_the_division_of_values_into_steps_makes_no_difference(batches, window):
    at_once = DeviceQuantile(window)
    step_by_step = DeviceQuantile(window)

    add_batch(at_once, [pair for batch in batches for pair in batch])
    for batch in batches:
        add_batch(step_by_step, batch)

    assert saved(at_once) == saved(step_by_step)
