from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.losses import LOSSES
from unbraid.losses.pit import SeparationLoss, assign_sources
from unbraid.losses.waveform import neg_si_sdr

every_loss = pytest.mark.parametrize("name", sorted(LOSSES))


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def estimates_of(target, *, seed=1, shuffle=True):
    """Each target with a little of every other one and some noise, in another order for each example."""
    estimate = target + 0.4 * target.roll(1, 1) + 0.3 * signals(*target.shape, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(target.shape[1], generator=rng) if shuffle else slice(None) for _ in target]
    return torch.stack([item[order] for item, order in zip(estimate, orders, strict=True)])


def smallest_over_orders(name, estimate, target, *, count=None):
    """The definition: the mean over the sources that count, in the order that makes it smallest, example by example."""
    n_targets = target.shape[1]
    count = list(range(n_targets) if count is None else count)
    smallest = []
    for item, wanted in zip(estimate, target, strict=True):
        pairs = [[LOSSES[name](one, other).mean().item() for other in wanted] for one in item]
        orders = permutations(range(len(item)), n_targets)
        smallest.append(min(sum(pairs[order[t]][t] for t in count) / len(count) for order in orders))
    return torch.tensor(smallest)


@every_loss
@pytest.mark.parametrize("n_sources", [2, 3, 4, 5, 6])
def test_no_order_of_the_outputs_has_a_smaller_loss(name, n_sources):
    target = signals(3, n_sources, 1, 400)
    estimate = estimates_of(target)

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    torch.testing.assert_close(losses, smallest_over_orders(name, estimate, target), atol=1e-4, rtol=1e-5)


@given(st.sampled_from(sorted(LOSSES)), st.integers(1, 4), st.integers(1, 2), st.integers(0, 999))
def test_no_order_is_better_for_estimates_that_have_nothing_to_do_with_the_targets(name, n_sources, n_channels, seed):
    target, estimate = (signals(2, n_sources, n_channels, 50, seed=seed + k) for k in (0, 1000))

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    torch.testing.assert_close(losses, smallest_over_orders(name, estimate, target), atol=1e-3, rtol=1e-4)


@every_loss
def test_the_order_of_outputs_and_of_sources_changes_nothing(name):
    target = signals(4, 3, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name])

    turned = loss(estimate[:, [2, 0, 1]], target[:, [1, 0, 2]])

    torch.testing.assert_close(turned, loss(estimate, target))


@every_loss
def test_fixed_order_holds_each_output_against_its_own_source(name):
    target = signals(2, 3, 1, 400)
    estimate, loss = estimates_of(target, shuffle=False), SeparationLoss(LOSSES[name], assign="fixed")

    torch.testing.assert_close(loss(estimate, target), LOSSES[name](estimate, target).mean((1, 2)))
    assert (loss(estimate[:, [1, 2, 0]], target) > loss(estimate, target)).all()


@every_loss
@pytest.mark.parametrize("n_outputs", [3, 6])
def test_spare_outputs_are_left_to_themselves(name, n_outputs):
    target = signals(2, 2, 1, 400)
    spare = signals(2, n_outputs - 2, 1, 400, seed=9)
    estimate = torch.cat([spare, estimates_of(target)], 1)

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    torch.testing.assert_close(losses, SeparationLoss(LOSSES[name])(estimate[:, -2:], target))


@every_loss
def test_the_gradient_is_that_of_the_chosen_order_alone(name):
    target = signals(3, 3, 1, 400)
    estimate = estimates_of(target)
    order = assign_sources(LOSSES[name], estimate, target)

    one, other = estimate.clone().requires_grad_(), estimate.clone().requires_grad_()
    SeparationLoss(LOSSES[name])(one, target).sum().backward()
    chosen = torch.stack([item[places] for item, places in zip(other, order, strict=True)])
    LOSSES[name](chosen, target).mean((1, 2)).sum().backward()

    torch.testing.assert_close(one.grad, other.grad)


@every_loss
@pytest.mark.parametrize("assign", ["permutation", "fixed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_example_has_a_bad_loss_and_its_neighbours_their_own(name, assign, value):
    target = signals(3, 2, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name], assign=assign)
    alone = loss(estimate, target)
    estimate[1, 0, 0, 100] = value

    losses = loss(estimate, target)

    assert losses.isfinite().tolist() == [True, False, True]
    assert torch.equal(losses[[0, 2]], alone[[0, 2]])


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_low_precision_outputs_is_taken_in_float32(name, dtype):
    target = signals(2, 2, 1, 400)
    estimate = estimates_of(target).to(dtype)

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, SeparationLoss(LOSSES[name])(estimate.float(), target))


@every_loss
def test_the_channels_of_a_source_stay_together(name):
    target = signals(1, 2, 2, 400)
    crossed = torch.stack([target[:, [0, 1], [0, 1]], target[:, [1, 0], [0, 1]]], 1)  # left and right of other sources

    assert (SeparationLoss(LOSSES[name])(crossed, target) > SeparationLoss(LOSSES[name])(target, target) + 0.01).all()


@pytest.mark.parametrize("assign", ["permutation", "fixed"])
def test_a_silent_target_is_left_out_of_si_sdr(assign):
    target = signals(2, 3, 1, 400)
    estimate = estimates_of(target, shuffle=False)
    target[0, 2] = 0

    losses = SeparationLoss(neg_si_sdr, assign=assign)(estimate, target)

    torch.testing.assert_close(losses[0], neg_si_sdr(estimate[0, :2], target[0, :2]).mean())
    torch.testing.assert_close(losses[1], neg_si_sdr(estimate[1], target[1]).mean())


@pytest.mark.parametrize("n_sources", [2, 3, 5])
@pytest.mark.parametrize("loudness", [0.01, 1.0, 100.0])
def test_a_silent_target_has_no_say_in_the_order_of_the_others(n_sources, loudness):
    target = signals(4, n_sources, 1, 400)
    target[:, 0] = 0
    estimate = estimates_of(target)
    estimate[:, -1] *= loudness

    losses = SeparationLoss(neg_si_sdr)(estimate, target)

    expected = smallest_over_orders("neg_si_sdr", estimate, target, count=range(1, n_sources))
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


def test_one_silent_channel_is_left_out_and_the_other_counts():
    target = signals(1, 2, 2, 400)
    estimate = estimates_of(target, shuffle=False)
    target[0, 0, 1] = 0

    losses = SeparationLoss(neg_si_sdr, assign="fixed")(estimate, target)

    pairs = neg_si_sdr(estimate, target)
    torch.testing.assert_close(losses[0], (pairs[0, 0, 0] + pairs[0, 1, 0] + pairs[0, 1, 1]) / 3)


def test_an_example_of_nothing_but_silence_is_finite_and_stands_out():
    estimate = signals(1, 2, 1, 400).requires_grad_()

    losses = SeparationLoss(neg_si_sdr)(estimate, torch.zeros(1, 2, 1, 400))
    losses.sum().backward()

    assert 90 < losses.item() < 999
    assert estimate.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("assign", ["permutation", "fixed"])
def test_an_example_does_not_notice_its_neighbours(name, assign):
    target = signals(4, 3, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name], assign=assign)

    one_by_one = torch.cat([loss(estimate[i : i + 1], target[i : i + 1]) for i in range(4)])

    torch.testing.assert_close(loss(estimate, target), one_by_one)
