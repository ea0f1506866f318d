import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.robust import FILTERS
from unbraid.robust.filter import StatefulFilter

LOSSES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)
EARLIER = torch.linspace(-30, 30, 150)

every_filter = pytest.mark.parametrize("name", sorted(FILTERS))


def trained_filter(name, losses=EARLIER):
    """The filter after batch steps, where it remembers."""
    loss_filter = FILTERS[name]()
    if hasattr(loss_filter, "observe"):
        for batch in losses.split(16):
            loss_filter.observe(batch, torch.ones(len(batch), dtype=torch.bool))
    return loss_filter


def saved(loss_filter):
    """Its state, as bytes, so that it can be compared."""
    state = loss_filter.state_dict() if hasattr(loss_filter, "state_dict") else {}
    return {name: value.numpy().tobytes() for name, value in state.items()}


@every_filter
@given(LOSSES)
def test_a_weight_depends_on_its_own_loss_alone(name, losses):
    losses, loss_filter = torch.tensor(losses), trained_filter(name)

    alone = torch.cat([loss_filter(loss[None]) for loss in losses])

    assert torch.equal(loss_filter(losses), alone)


@every_filter
@given(LOSSES)
def test_weights_are_finite_and_never_negative(name, losses):
    for loss_filter in (FILTERS[name](), trained_filter(name)):
        weights = loss_filter(torch.tensor(losses))

        assert weights.isfinite().all()
        assert (weights >= 0).all()


@every_filter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_have_no_gradient_and_the_dtype_of_the_losses(name, dtype):
    losses = torch.tensor([-50.0, 1.0], dtype=dtype, requires_grad=True)

    for loss_filter in (FILTERS[name](), trained_filter(name)):
        weights = loss_filter(losses)

        assert not weights.requires_grad
        assert weights.dtype == dtype


@every_filter
def test_computing_weights_changes_neither_state_nor_losses(name):
    loss_filter, losses = trained_filter(name), torch.tensor([-200.0, 0.0, 200.0])
    before = saved(loss_filter)

    first, second = loss_filter(losses), loss_filter(losses)

    assert torch.equal(first, second)
    assert losses.tolist() == [-200.0, 0.0, 200.0]
    assert saved(loss_filter) == before


@every_filter
def test_bad_and_nonfinite_losses_are_not_learned(name):
    loss_filter = trained_filter(name)
    before = saved(loss_filter)
    if hasattr(loss_filter, "observe"):
        loss_filter.observe(torch.tensor([7.0, math.nan, math.inf]), torch.tensor([False, True, True]))

    assert saved(loss_filter) == before
    assert torch.equal(loss_filter(EARLIER), trained_filter(name)(EARLIER))


@every_filter
def test_an_empty_batch_is_allowed(name):
    loss_filter, nothing = trained_filter(name), torch.empty(0)
    if hasattr(loss_filter, "observe"):
        loss_filter.observe(nothing, nothing > 0)

    assert loss_filter(nothing).shape == (0,)


@every_filter
@pytest.mark.parametrize("n_before", [0, 5, 150])
def test_a_stateful_component_resumes_identically_from_its_state_dict(name, n_before):
    original, resumed = trained_filter(name, EARLIER[:n_before]), FILTERS[name]()
    if hasattr(original, "state_dict"):
        resumed.load_state_dict(original.state_dict())

    for losses in EARLIER.flip(0).split(40):
        assert torch.equal(resumed(losses), original(losses))
        for loss_filter in (resumed, original):
            if hasattr(loss_filter, "observe"):
                loss_filter.observe(losses, losses > -25)
        assert saved(resumed) == saved(original)


@every_filter
def test_a_stateful_filter_has_the_whole_interface(name):
    loss_filter = FILTERS[name]()

    assert isinstance(loss_filter.needs_db, bool)
    assert isinstance(loss_filter, StatefulFilter) == hasattr(loss_filter, "observe")
