from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import SIGNAL_LOSSES

from unbraid.errors import UserError
from unbraid.losses import LOSSES
from unbraid.losses.mixit import best_mixing_matrix
from unbraid.losses.pairwise import Term
from unbraid.losses.pit import SeparationLoss, find_order, match_to_targets
from unbraid.losses.waveform import l1, neg_sa_sdr, neg_si_sdr, neg_snr, neg_thresholded_snr

every_loss = pytest.mark.parametrize("name", SIGNAL_LOSSES)


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def estimates_of(target, *, seed=1, shuffle=True):
    """Return each target with some of another one and noise, in a different order for each example."""
    estimate = target + 0.4 * target.roll(1, 1) + 0.3 * signals(*target.shape, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(target.shape[1], generator=rng) if shuffle else slice(None) for _ in target]
    return torch.stack([item[order] for item, order in zip(estimate, orders, strict=True)])


def smallest_over_orders(name, estimate, target, *, count=None):
    """Return the smallest mean over the sources ``count``, over all orders, for each example: the definition of PIT."""
    n_targets = target.shape[1]
    count = list(range(n_targets) if count is None else count)
    smallest = []
    for item, reference in zip(estimate, target, strict=True):
        pairs = [[LOSSES[name](one, other).mean().item() for other in reference] for one in item]
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


@given(st.sampled_from(SIGNAL_LOSSES), st.integers(1, 4), st.integers(1, 2), st.integers(0, 999))
def test_no_order_is_better_for_estimates_unrelated_to_the_targets(name, n_sources, n_channels, seed):
    target, estimate = (signals(2, n_sources, n_channels, 50, seed=seed + k) for k in (0, 1000))

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    torch.testing.assert_close(losses, smallest_over_orders(name, estimate, target), atol=1e-3, rtol=1e-4)


@every_loss
def test_the_loss_does_not_depend_on_the_order_of_outputs_and_sources(name):
    target = signals(4, 3, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name])

    permuted = loss(estimate[:, [2, 0, 1]], target[:, [1, 0, 2]])

    torch.testing.assert_close(permuted, loss(estimate, target))


@every_loss
def test_fixed_order_compares_each_output_with_its_own_source(name):
    target = signals(2, 3, 1, 400)
    estimate, loss = estimates_of(target, shuffle=False), SeparationLoss(LOSSES[name], assign="fixed")

    torch.testing.assert_close(loss(estimate, target), LOSSES[name](estimate, target).mean((1, 2)))
    assert (loss(estimate[:, [1, 2, 0]], target) > loss(estimate, target)).all()


@every_loss
@pytest.mark.parametrize("n_outputs", [3, 6])
def test_outputs_without_a_target_do_not_count(name, n_outputs):
    target = signals(2, 2, 1, 400)
    spare = signals(2, n_outputs - 2, 1, 400, seed=9)
    estimate = torch.cat([spare, estimates_of(target)], 1)

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    torch.testing.assert_close(losses, SeparationLoss(LOSSES[name])(estimate[:, -2:], target))


@every_loss
def test_the_gradient_is_that_of_the_chosen_order_alone(name):
    target = signals(3, 3, 1, 400)
    estimate = estimates_of(target)
    order = find_order(estimate, target, LOSSES[name])

    first = estimate.clone().requires_grad_()
    second = estimate.clone().requires_grad_()
    SeparationLoss(LOSSES[name])(first, target).sum().backward()
    chosen = torch.stack([item[indices] for item, indices in zip(second, order, strict=True)])
    LOSSES[name](chosen, target).mean((1, 2)).sum().backward()

    torch.testing.assert_close(first.grad, second.grad)


@every_loss
@pytest.mark.parametrize("assign", ["permutation", "fixed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nonfinite_example_does_not_change_the_losses_of_the_others(name, assign, value):
    target = signals(3, 2, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name], assign=assign)
    alone = loss(estimate, target)
    estimate[1, 0, 0, 100] = value

    losses = loss(estimate, target)

    assert losses.isfinite().tolist() == [True, False, True]
    assert torch.equal(losses[[0, 2]], alone[[0, 2]])


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_low_precision_outputs_is_computed_in_float32(name, dtype):
    target = signals(2, 2, 1, 400)
    estimate = estimates_of(target).to(dtype)

    losses = SeparationLoss(LOSSES[name])(estimate, target)

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, SeparationLoss(LOSSES[name])(estimate.float(), target))


@pytest.mark.parametrize(("name", "assign"), [("neg_si_sdr", "permutation"), ("neg_snr", "mixit"), ("l1", "mixit")])
def test_autocast_changes_neither_loss_nor_order(name, assign):
    target = signals(64, 2, 1, 400)
    estimate = target.mean(1, keepdim=True) + 1e-3 * signals(64, 4 if assign == "mixit" else 2, 1, 400, seed=1)
    loss = SeparationLoss(LOSSES[name], assign=assign)

    plain, ordered = loss.with_order(estimate, target), match_to_targets(estimate, target, LOSSES[name], assign=assign)
    with torch.autocast("cpu", torch.bfloat16):
        assert (target @ target.mT).dtype == torch.bfloat16  # or it would say nothing
        under, ordered_under = (
            loss.with_order(estimate, target),
            match_to_targets(estimate, target, LOSSES[name], assign=assign),
        )

    assert all(map(torch.equal, plain, under))
    assert torch.equal(ordered, ordered_under)


@every_loss
def test_the_channels_of_a_source_stay_together(name):
    target = signals(1, 2, 2, 400)
    crossed = torch.stack([target[:, [0, 1], [0, 1]], target[:, [1, 0], [0, 1]]], 1)  # left and right of other sources

    assert (SeparationLoss(LOSSES[name])(crossed, target) > SeparationLoss(LOSSES[name])(target, target) + 0.01).all()


@pytest.mark.parametrize("assign", ["permutation", "fixed"])
def test_a_silent_target_does_not_count_in_si_sdr(assign):
    target = signals(2, 3, 1, 400)
    estimate = estimates_of(target, shuffle=False)
    target[0, 2] = 0

    losses = SeparationLoss(neg_si_sdr, assign=assign)(estimate, target)

    torch.testing.assert_close(losses[0], neg_si_sdr(estimate[0, :2], target[0, :2]).mean())
    torch.testing.assert_close(losses[1], neg_si_sdr(estimate[1], target[1]).mean())


@pytest.mark.parametrize("n_sources", [2, 3, 5])
@pytest.mark.parametrize("loudness", [0.01, 1.0, 100.0])
def test_a_silent_target_does_not_influence_the_order_of_the_others(n_sources, loudness):
    target = signals(4, n_sources, 1, 400)
    target[:, 0] = 0
    estimate = estimates_of(target)
    estimate[:, -1] *= loudness

    losses = SeparationLoss(neg_si_sdr)(estimate, target)

    expected = smallest_over_orders("neg_si_sdr", estimate, target, count=range(1, n_sources))
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


def test_a_silent_channel_does_not_count_and_the_other_does():
    target = signals(1, 2, 2, 400)
    estimate = estimates_of(target, shuffle=False)
    target[0, 0, 1] = 0

    losses = SeparationLoss(neg_si_sdr, assign="fixed")(estimate, target)

    pairs = neg_si_sdr(estimate, target)
    torch.testing.assert_close(losses[0], (pairs[0, 0, 0] + pairs[0, 1, 0] + pairs[0, 1, 1]) / 3)


def test_the_loss_of_a_silent_example_is_finite_and_large():
    estimate = signals(1, 2, 1, 400).requires_grad_()

    losses = SeparationLoss(neg_si_sdr)(estimate, torch.zeros(1, 2, 1, 400))
    losses.sum().backward()

    assert 90 < losses.item() < 999
    assert estimate.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("assign", ["permutation", "fixed"])
def test_losses_do_not_depend_on_the_other_examples(name, assign):
    target = signals(4, 3, 1, 400)
    estimate, loss = estimates_of(target), SeparationLoss(LOSSES[name], assign=assign)

    one_by_one = torch.cat([loss(estimate[i : i + 1], target[i : i + 1]) for i in range(4)])

    torch.testing.assert_close(loss(estimate, target), one_by_one)


@given(st.integers(2, 5), st.integers(0, 99))
def test_sa_sdr_chooses_the_order_with_the_smallest_total_error(n_sources, seed):
    target, estimate = (signals(2, n_sources, 1, 60, seed=seed + k) for k in (0, 1000))

    losses = SeparationLoss(neg_sa_sdr)(estimate, target)

    orders = [list(order) for order in permutations(range(n_sources))]
    expected = torch.stack([neg_sa_sdr(estimate[:, order], target) for order in orders]).amin(0)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("loss", [neg_sa_sdr, neg_snr, neg_thresholded_snr, l1])
def test_a_silent_target_pushes_its_output_down(loss):
    target = signals(2, 2, 1, 400)
    target[:, 1] = 0
    estimate = (target + signals(2, 2, 1, 400, seed=1)).requires_grad_()

    losses = SeparationLoss(loss)(estimate, target, mixture=target.sum(1))
    (gradient,) = torch.autograd.grad(losses.sum(), estimate)

    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert ((gradient * estimate)[:, 1].sum(-1) > 0).all()


@pytest.mark.parametrize("with_mixture", [True, False])
def test_only_inactive_outputs_are_driven_to_silence(with_mixture):
    target = signals(2, 2, 1, 400)
    target[0, 1] = 0  # one example with a silent source; in both the third output is to spare
    estimate = torch.cat([estimates_of(target, shuffle=False), signals(2, 1, 1, 400, seed=7)], 1).requires_grad_()
    extras = {"mixture": target.sum(1)} if with_mixture else {}

    plain = SeparationLoss(neg_si_sdr)(estimate, target, **extras)
    driven = SeparationLoss(neg_si_sdr, inactive_weight=0.5)(estimate, target, **extras)
    (gradient,) = torch.autograd.grad((driven - plain).sum(), estimate)

    share = lambda signal, mixture: 10 * torch.log10(signal.square().mean() / (1e-3 * mixture.square().mean()) + 1)  # noqa: E731
    expected = [
        0.5 * (share(estimate[0, 1], target[0].sum(0)) + share(estimate[0, 2], target[0].sum(0))) / 3,
        0.5 * share(estimate[1, 2], target[1].sum(0)) / 3,
    ]
    torch.testing.assert_close(driven - plain, torch.stack(expected), rtol=1e-3, atol=1e-4)
    assert gradient.flatten(1).abs().sum(1).gt(0).all()
    assert gradient.abs().sum((-1, -2)).gt(0).tolist() == [[False, True, True], [False, False, True]]


def test_silent_outputs_without_a_target_have_no_penalty():
    target = signals(1, 1, 1, 400)
    estimate = torch.cat([target, torch.zeros_like(target)], 1)

    loss = SeparationLoss(neg_snr, inactive_weight=1.0)(estimate, target)

    torch.testing.assert_close(loss, neg_snr(target, target)[:, 0, 0])


@pytest.mark.parametrize("assign", ["permutation", "fixed"])
def test_a_sum_of_losses_is_their_weighted_sum_in_one_order(assign):
    target = signals(3, 3, 1, 400)
    estimate = estimates_of(target)
    losses = SeparationLoss([Term(neg_snr, 0.3), Term(l1, 50.0), Term(neg_sa_sdr, 0.1)], assign=assign)

    ordered = match_to_targets(estimate, target, losses.terms, assign=assign)

    parts = 0.3 * neg_snr(ordered, target).mean((1, 2)) + 50 * l1(ordered, target).mean((1, 2))
    torch.testing.assert_close(losses(estimate, target), parts + 0.1 * neg_sa_sdr(ordered, target))


def test_the_order_minimises_the_sum_of_losses():
    target, estimate = signals(6, 3, 1, 50), signals(6, 3, 1, 50, seed=1)
    losses = SeparationLoss([Term(neg_snr, 0.05), Term(l1, 50.0)])

    smallest = torch.stack(
        [SeparationLoss(losses.terms, assign="fixed")(estimate[:, list(o)], target) for o in permutations(range(3))]
    ).amin(0)

    torch.testing.assert_close(losses(estimate, target), smallest)


@pytest.mark.parametrize("name", ["neg_snr", "neg_thresholded_snr", "neg_sa_sdr", "l1"])
@pytest.mark.parametrize(("n_outputs", "n_mixtures"), [(4, 2), (3, 3), (5, 2), (2, 1)])
def test_mixit_finds_the_best_mixing_matrix(name, n_outputs, n_mixtures):
    estimate, target = signals(3, n_outputs, 1, 40), signals(3, n_mixtures, 1, 40, seed=1)
    loss = LOSSES[name]

    losses = SeparationLoss(loss, assign="mixit")(estimate, target)

    smallest = []
    for target_of_output in product(range(n_mixtures), repeat=n_outputs):
        sums = torch.stack([estimate[:, [d == n for d in target_of_output]].sum(1) for n in range(n_mixtures)], 1)
        values = loss(sums, target)
        smallest.append(values.mean((1, 2)) if values.dim() == 3 else values)
    torch.testing.assert_close(losses, torch.stack(smallest).amin(0), atol=1e-4, rtol=1e-5)


def test_mixit_assigns_true_sources_to_their_mixtures():
    sources = signals(2, 4, 1, 4000)
    mixtures = torch.stack([sources[:, [0, 2]].sum(1), sources[:, [1, 3]].sum(1)], 1)
    estimate = sources.requires_grad_()

    result = SeparationLoss(neg_snr, assign="mixit").with_order(estimate, mixtures)
    (gradient,) = torch.autograd.grad(result.losses.sum(), estimate)

    assert (result.losses < -90).all()
    assert best_mixing_matrix([Term(neg_snr)], estimate, mixtures, {})[0].tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert all(order[0] in (0, 2) and order[1] in (1, 3) for order in result.order.tolist())
    assert gradient.isfinite().all()


def test_too_many_mixing_matrices_raise_an_error():
    with pytest.raises(UserError, match="Reduce the number of outputs"):
        SeparationLoss(neg_snr, assign="mixit")(signals(1, 17, 1, 10), signals(1, 2, 1, 10))
    with pytest.raises(UserError, match="the limit is 256 for this loss and 65536 for neg_snr"):
        SeparationLoss(l1, assign="mixit")(signals(1, 9, 1, 10), signals(1, 2, 1, 10))
    assert SeparationLoss(neg_snr, assign="mixit")(signals(1, 9, 1, 10), signals(1, 2, 1, 10)).isfinite()


def mixture_loss(estimate, target, mixture, *, share=1.0):
    return share * (estimate - mixture[:, None]).abs().mean(-1) + 0 * target.mean(-1)


def embedding_loss(embedding, target):
    return embedding.mean((1, 2)) + 0 * target.mean((1, 2, 3))


def test_a_loss_receives_the_inputs_that_its_parameters_name():
    target, mixture = signals(2, 2, 1, 100), signals(2, 1, 100, seed=5)
    estimate = estimates_of(target)

    by_mixture = SeparationLoss(mixture_loss)(estimate, target, mixture=mixture)
    by_embedding = SeparationLoss([Term(embedding_loss, 2.0), Term(neg_snr)])(
        estimate, target, mixture=mixture, embedding=torch.full((2, 3, 4), 7.0)
    )

    torch.testing.assert_close(by_mixture, (estimate - mixture[:, None]).abs().mean((1, 2, 3)))
    torch.testing.assert_close(by_embedding, 14 + SeparationLoss(neg_snr)(estimate, target))


def test_a_missing_input_of_a_loss_raises_an_error():
    with pytest.raises(UserError, match="asks for embedding, which the model does not return"):
        SeparationLoss(embedding_loss)(signals(2, 2, 1, 100), signals(2, 2, 1, 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeparationLoss(neg_snr, assign="any"), "not one of"),
        (lambda: SeparationLoss([]), "one or more terms"),
        (lambda: SeparationLoss([Term(neg_snr, 0.0)]), "weight above 0"),
        (lambda: SeparationLoss(neg_snr, inactive_weight=-1.0), "0 or more"),
        (lambda: SeparationLoss(neg_si_sdr, assign="mixit"), "depend on their level"),
        (lambda: SeparationLoss(neg_snr, assign="mixit", inactive_weight=1.0), "Omit inactive_weight"),
    ],
)
def test_invalid_options_raise_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("n_sources", [2, 3, 5, 8])
def test_si_sdr_is_returned_in_the_order_of_the_targets(n_sources):
    target = signals(3, n_sources, 1, 400)
    estimate = estimates_of(target)

    result = SeparationLoss(neg_si_sdr).with_order(estimate, target)

    chosen = torch.stack([item[order] for item, order in zip(estimate, result.order, strict=True)])
    torch.testing.assert_close(result.si_sdr, -neg_si_sdr(chosen, target)[..., 0])
    torch.testing.assert_close(SeparationLoss(l1).with_order(estimate, target).si_sdr, result.si_sdr)


def custom_loss(prediction, reference):
    return (prediction - reference).square().mean(-1)


class CustomLoss(torch.nn.Module):
    def forward(self, prediction, target):
        return (prediction - target).square().mean(-1)


@pytest.mark.parametrize(
    "loss", [custom_loss, CustomLoss(), lambda estimate, source: (estimate - source).square().mean(-1)]
)
def test_a_custom_loss_may_use_any_parameter_names(loss):
    target = signals(3, 2, 1, 100)

    result = SeparationLoss(loss).with_order(target.flip(1), target)

    assert result.order.tolist() == [[1, 0]] * 3
    assert not result.losses.any()


@pytest.mark.parametrize("weights", [(0.1, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("n_sources", [2, 3, 4])
def test_sa_sdr_in_a_sum_uses_the_best_order_of_the_sum(weights, n_sources):
    target, estimate = signals(20, n_sources, 1, 50), signals(20, n_sources, 1, 50, seed=1)
    target *= torch.logspace(0, -1.5, n_sources)[:, None, None]
    terms = [Term(neg_snr, weights[0]), Term(neg_sa_sdr, weights[1])]

    fixed = SeparationLoss(terms, assign="fixed")
    smallest = torch.stack([fixed(estimate[:, list(o)], target) for o in permutations(range(n_sources))]).amin(0)

    torch.testing.assert_close(SeparationLoss(terms)(estimate, target), smallest, atol=1e-4, rtol=1e-5)


def test_mixit_with_sa_sdr_in_a_sum_minimises_the_sum():
    target, estimate = signals(20, 2, 1, 50), signals(20, 3, 1, 50, seed=1)
    target[:, 1] *= 0.03
    terms = [Term(neg_snr, 0.1), Term(neg_sa_sdr, 1.0)]

    fixed, smallest = SeparationLoss(terms, assign="fixed"), []
    for target_of_output in product(range(2), repeat=3):
        sums = torch.stack([estimate[:, [d == n for d in target_of_output]].sum(1) for n in range(2)], 1)
        smallest.append(fixed(sums, target))

    result = SeparationLoss(terms, assign="mixit")(estimate, target)
    torch.testing.assert_close(result, torch.stack(smallest).amin(0), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("loss", [neg_snr, neg_si_sdr])
def test_the_order_accounts_for_the_penalty_of_inactive_outputs(loss):
    target, estimate = signals(50, 2, 1, 50), signals(50, 3, 1, 50, seed=1)
    estimate *= torch.logspace(-1.5, 0.5, 3)[:, None, None]
    target[:10, 1] = 0

    fixed = SeparationLoss(loss, assign="fixed", inactive_weight=1.0)
    smallest = torch.stack([fixed(estimate[:, list(o)], target) for o in permutations(range(3))]).amin(0)

    result = SeparationLoss(loss, inactive_weight=1.0)(estimate, target)
    torch.testing.assert_close(result, smallest, atol=1e-3, rtol=1e-4)


def test_a_source_in_a_single_channel_is_active():
    target = signals(1, 2, 2, 400)
    target[0, 0, 1] = 0

    plain, driven = (SeparationLoss(neg_snr, inactive_weight=w)(target, target) for w in (0.0, 1.0))

    assert torch.equal(plain, driven)
