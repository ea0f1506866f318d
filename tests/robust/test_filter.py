import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.robust import FILTERS
from unbraid.robust.filter import ThresholdFilter

LOSSES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)


def test_a_loss_at_or_below_the_threshold_counts_nothing():
    weights = ThresholdFilter(threshold_db=-20)(torch.tensor([-20.001, -20.0, -19.999, 0.0, 300.0]))

    assert weights.tolist() == [0, 0, 1, 1, 1]


def test_the_textbooks_threshold_is_30_db():
    assert ThresholdFilter()(torch.tensor([-30.0, -29.9])).tolist() == [0, 1]


def test_a_threshold_in_db_asks_for_losses_in_db():
    assert ThresholdFilter().needs_db


@pytest.mark.parametrize("name", sorted(FILTERS))
@given(LOSSES)
def test_a_weight_hangs_on_its_own_loss_alone(name, losses):
    losses = torch.tensor(losses)

    alone = torch.cat([FILTERS[name]()(loss[None]) for loss in losses])

    assert torch.equal(FILTERS[name]()(losses), alone)


@pytest.mark.parametrize("name", sorted(FILTERS))
@given(LOSSES)
def test_weights_are_finite_and_never_negative(name, losses):
    weights = FILTERS[name]()(torch.tensor(losses))

    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_weights_have_no_gradient_and_the_dtype_of_the_losses(name):
    losses = torch.tensor([-50.0, 1.0], dtype=torch.float64, requires_grad=True)

    weights = FILTERS[name]()(losses)

    assert not weights.requires_grad
    assert weights.dtype == torch.float64
