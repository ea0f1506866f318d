import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.robust.quantile import DeviceHistory, DeviceWindow, HostHistory, HostWindow, Recent, history_for

VALUES = st.one_of(
    st.floats(1e-6, 1e6),
    st.sampled_from([1.0, 1.0, 2.0, 5.0]),  # duplicates
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0]),
)
STEPS = st.lists(st.tuples(VALUES, st.booleans()), max_size=60)
PERCENTILES = st.one_of(st.sampled_from([0, 10, 50, 100]), st.floats(0, 100))
WINDOWS = st.sampled_from([0, 1, 2, 7])
BATCHES = st.lists(st.lists(st.tuples(st.one_of(VALUES, st.floats(-50, 50)), st.booleans()), max_size=12), max_size=8)

all_kinds = pytest.mark.parametrize("kind", ["host", "device"])


def make(kind, window, percentile):
    """Either kind, both on the CPU."""
    if kind == "host":
        return HostWindow(window, percentile) if window else HostHistory(percentile)
    return DeviceWindow(window, percentile) if window else DeviceHistory(percentile)


def add(history, value, counts=True):
    history.add(torch.tensor(value, dtype=torch.float64), torch.tensor(counts))
    return history.percentile().item()


def filled(kind, window, percentile, values):
    history = make(kind, window, percentile)
    for value in values:
        add(history, value)
    return history


def expected(steps, window, percentile):
    """What the definition gives after each step."""
    known, percentiles = [], []
    for value, counts in steps:
        if counts and math.isfinite(value) and value > 0:
            known.append(value)
        percentiles.append(np.percentile(known[-window:], percentile) if known else math.inf)
    return percentiles


@all_kinds
@given(STEPS, WINDOWS, PERCENTILES)
def test_it_is_numpys_percentile_at_every_step(kind, steps, window, percentile):
    history = make(kind, window, percentile)

    np.testing.assert_allclose([add(history, *step) for step in steps], expected(steps, window, percentile), rtol=1e-6)


@given(STEPS, WINDOWS, PERCENTILES)
def test_both_kinds_give_the_same_bits(steps, window, percentile):
    host, device = make("host", window, percentile), make("device", window, percentile)

    assert [add(host, *step) for step in steps] == [add(device, *step) for step in steps]


@pytest.mark.parametrize("saved", ["host", "device"])
@pytest.mark.parametrize("loaded", ["host", "device"])
@given(STEPS, STEPS, WINDOWS, PERCENTILES)
def test_what_one_kind_saves_goes_on_identically_in_any(saved, loaded, before, after, window, percentile):
    going_on, resumed = make(saved, window, percentile), make(loaded, window, percentile)
    for step in before:
        add(going_on, *step)

    resumed.load_state_dict(going_on.state_dict())

    assert resumed.percentile().item() == going_on.percentile().item()
    assert [add(resumed, *step) for step in after] == [add(going_on, *step) for step in after]
    assert torch.equal(resumed.state_dict()["norms"], going_on.state_dict()["norms"])


@all_kinds
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(
    ("value", "counts"), [(math.nan, True), (math.inf, True), (0.0, True), (-1.0, True), (2.5, False)]
)
def test_what_does_not_count_leaves_no_trace(kind, window, value, counts):
    history = filled(kind, window, 30, [3.0, 1.0, 2.0, 5.0, 4.0])
    before, percentile = history.state_dict()["norms"], history.percentile().item()

    assert add(history, value, counts) == percentile
    assert torch.equal(history.state_dict()["norms"], before)
    assert add(history, 0.5) == add(filled(kind, window, 30, [3.0, 1.0, 2.0, 5.0, 4.0]), 0.5)


@all_kinds
def test_a_saved_state_does_not_change_with_the_steps_that_follow(kind):
    for window in (0, 3):
        history = filled(kind, window, 50, [1.0, 2.0, 3.0])
        state = history.state_dict()
        add(history, 9.0)

        assert state["norms"].tolist() == [1.0, 2.0, 3.0]


@all_kinds
def test_a_window_is_saved_from_old_to_new_and_the_whole_from_small_to_large(kind):
    values = [3.0, 1.0, 2.0, 5.0, 4.0]

    assert filled(kind, 3, 50, values).state_dict()["norms"].tolist() == [2.0, 5.0, 4.0]
    assert filled(kind, 0, 50, values).state_dict()["norms"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@all_kinds
def test_a_narrower_window_takes_up_the_last_values_of_a_wider(kind):
    narrow = make(kind, 2, 0)
    narrow.load_state_dict(filled(kind, 5, 0, [1.0, 2.0, 3.0, 4.0]).state_dict())

    assert narrow.percentile().item() == 3.0


@all_kinds
@pytest.mark.parametrize("window", [0, 10])
def test_too_few_values_are_infinity(kind, window):
    history = make(kind, window, 10)

    seen = []
    for value in (4.0, math.nan, 3.0, 2.0):
        add(history, value)
        seen.append(history.percentile(at_least=3).item())

    assert seen == [math.inf, math.inf, math.inf, pytest.approx(np.percentile([4, 3, 2], 10))]


@all_kinds
def test_a_million_values_stay_exact(kind):
    values = np.random.default_rng(0).lognormal(sigma=2, size=1_000_000)
    history = make(kind, 0, 10)
    history.load_state_dict({"norms": torch.from_numpy(np.sort(values))})

    assert history.percentile().item() == pytest.approx(np.percentile(values, 10), rel=1e-12)
    for value in (1e-9, 1e9, 0.5, 0.1):
        values = np.append(values, value)
        assert add(history, value) == pytest.approx(np.percentile(values, 10), rel=1e-12)
    assert torch.equal(history.state_dict()["norms"], torch.from_numpy(np.sort(values)))


@all_kinds
def test_growing_past_every_capacity_stays_exact(kind):
    values = np.random.default_rng(0).lognormal(sigma=2, size=3000)
    history = make(kind, 0, 10)

    percentiles = [add(history, value) for value in values]

    for n in (1023, 1024, 1025, 2048, 2049, 3000):
        assert percentiles[n - 1] == pytest.approx(np.percentile(values[:n], 10), rel=1e-12)


@pytest.mark.parametrize(
    ("device", "window", "kind"),
    [("cpu", 0, HostHistory), ("cpu", 5, HostWindow), ("cuda", 0, DeviceHistory), ("mps", 5, DeviceWindow)],
)
def test_the_kind_follows_from_where_the_values_lie(device, window, kind):
    assert type(history_for(torch.device(device), window)) is kind


def observe(recent, batch):
    values = torch.tensor([value for value, _ in batch], dtype=torch.float64)
    recent.add(values, torch.tensor([valid for _, valid in batch], dtype=torch.bool))


def valid_values(batches, window):
    return [value for batch in batches for value, valid in batch if valid and math.isfinite(value)][-window:]


def statistics(recent, percentile=30.0):
    return [x.item() for x in (recent.count, recent.percentile(percentile), recent.median(), recent.mad())]


@given(BATCHES, st.integers(1, 9), PERCENTILES)
def test_many_values_a_step_are_remembered_in_order_up_to_the_window(batches, window, percentile):
    recent = Recent(window)

    for i, batch in enumerate(batches):
        observe(recent, batch)

        known = valid_values(batches[: i + 1], window)
        assert recent.count.item() == len(known)
        assert recent.state_dict()["values"].tolist() == known
        if known:
            deviations = np.abs(np.array(known) - np.median(known))
            wanted = [len(known), np.percentile(known, percentile), np.median(known), np.median(deviations)]
            np.testing.assert_allclose(statistics(recent, percentile), wanted, rtol=1e-9, atol=1e-12)
        else:
            assert statistics(recent, percentile) == [0, math.inf, math.inf, math.inf]


@given(BATCHES, BATCHES, st.integers(1, 9))
def test_many_values_a_step_go_on_identically_from_what_was_saved(before, after, window):
    going_on, resumed = Recent(window), Recent(window)
    for batch in before:
        observe(going_on, batch)

    resumed.load_state_dict(going_on.state_dict())

    for batch in after:
        observe(going_on, batch)
        observe(resumed, batch)
        assert statistics(resumed) == statistics(going_on)
        assert torch.equal(resumed.state_dict()["values"], going_on.state_dict()["values"])


@given(BATCHES, st.integers(1, 9))
def test_how_values_are_cut_into_steps_makes_no_difference(batches, window):
    one, many = Recent(window), Recent(window)

    observe(one, [pair for batch in batches for pair in batch])
    for batch in batches:
        observe(many, batch)

    assert torch.equal(one.state_dict()["values"], many.state_dict()["values"])
