import os
import subprocess
import sys
from itertools import permutations

import mir_eval
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.metrics import _si_sdr_definition, best_assignment, pairwise_si_sdr, reorder, sdr, si_sdr, snr


def signals(*shape, seed=0, dtype=torch.float64):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy(target, ratio_db, seed=1):
    """The target and noise at right angles to it, whose power is exactly so many dB lower."""
    target = target - target.mean(-1, keepdim=True)
    noise = signals(*target.shape, seed=seed)
    noise = noise - noise.mean(-1, keepdim=True)
    noise = noise - (noise * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True) * target
    gain = (target.square().mean(-1, keepdim=True) / noise.square().mean(-1, keepdim=True)).sqrt()
    return target + 10 ** (-ratio_db / 20) * gain * noise


@pytest.mark.parametrize("ratio_db", [-20, 0, 10, 50, 100])
@pytest.mark.parametrize("metric", [si_sdr, snr])
def test_orthogonal_noise_has_the_ratio_it_was_scaled_to(metric, ratio_db):
    target = signals(3, 4000)

    ratios = metric(noisy(target, ratio_db), target - target.mean(-1, keepdim=True))

    torch.testing.assert_close(ratios, torch.full((3,), float(ratio_db)).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize("ratio_db", [-30, 0, 30, 60, 100])
@pytest.mark.parametrize("n_samples", [800, 24_000])
@pytest.mark.parametrize("metric", [si_sdr, snr])
def test_float32_is_accurate_to_a_hundredth_of_a_db(metric, n_samples, ratio_db):
    target = signals(16, n_samples)
    estimate, target = noisy(target, ratio_db).float(), (target - target.mean(-1, keepdim=True)).float()

    ratios = metric(estimate, target)

    assert ratios.dtype == torch.float32
    torch.testing.assert_close(ratios.double(), metric(estimate.double(), target.double()), atol=0.01, rtol=0)


@given(st.floats(1e-4, 300), st.floats(1e-4, 300))
def test_si_sdr_is_invariant_to_gain(estimate_gain, target_gain):
    target = signals(2, 2000).float()
    estimate = noisy(target.double(), 40).float()

    torch.testing.assert_close(
        si_sdr(estimate_gain * estimate, target_gain * target), si_sdr(estimate, target), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("ratio_db", [0, 40])
def test_si_sdr_is_invariant_to_offset_and_polarity(ratio_db):
    target = signals(2, 2000)
    estimate = noisy(target, ratio_db)

    torch.testing.assert_close(si_sdr(0.3 - estimate, target + 0.5), si_sdr(estimate, target), atol=1e-6, rtol=0)


def test_a_gain_of_a_half_has_an_snr_of_6_db():
    target = signals(2, 2000)

    torch.testing.assert_close(snr(target / 2, target), torch.full((2,), 6.0206).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("metric", [si_sdr, snr])
def test_a_perfect_estimate_has_a_finite_and_high_ratio(metric):
    target = signals(1, 2000, dtype=torch.float32)

    assert 120 < metric(target, target).item() < 140


@pytest.mark.parametrize("silent", ["estimate", "target", "both"])
def test_silence_scores_below_minus_90_db_and_finite(silent):
    sound, silence = signals(1, 2000, dtype=torch.float32), torch.zeros(1, 2000)
    pair = {"estimate": (silence, sound), "target": (sound, silence), "both": (silence, silence)}[silent]

    assert -400 < si_sdr(*pair).item() < -90


@pytest.mark.parametrize("metric", [si_sdr, snr, sdr])
def test_shapes_are_never_broadcast(metric):
    with pytest.raises(ValueError, match="same shape"):
        metric(signals(2, 1, 1000), signals(2, 3, 1000))


@pytest.mark.parametrize("metric", [si_sdr, snr, sdr])
def test_each_signal_has_its_own_value(metric):
    target = signals(2, 3, 1, 1500)
    estimate = target + signals(2, 3, 1, 1500, seed=1)

    ratios = metric(estimate, target)

    assert ratios.shape == (2, 3, 1)
    torch.testing.assert_close(ratios[1, 2, 0], metric(estimate[1, 2, 0][None], target[1, 2, 0][None])[0])


@pytest.mark.filterwarnings("ignore:mir_eval.separation:FutureWarning")
def test_sdr_equals_mir_eval():
    target = signals(2, 4000, seed=2)
    filtered = torch.from_numpy(np.stack([np.convolve(row, [1, 0.5, -0.2])[:4000] for row in target.numpy()]))
    estimate = filtered + torch.tensor([[0.3], [0.01]]) * signals(2, 4000, seed=3)

    expected, *_ = mir_eval.separation.bss_eval_sources(target.numpy(), estimate.numpy(), compute_permutation=False)

    torch.testing.assert_close(sdr(estimate, target), torch.from_numpy(expected), atol=0.01, rtol=0)


def test_sdr_of_float32_equals_that_of_float64():
    target = signals(3, 2000)
    estimate = target + 0.1 * signals(3, 2000, seed=1)

    torch.testing.assert_close(sdr(estimate.float(), target.float()).double(), sdr(estimate, target), atol=0.01, rtol=0)


def test_sdr_of_silence_is_nan_and_does_not_affect_the_others():
    target = signals(3, 2000)
    estimate = target + signals(3, 2000, seed=1)
    whole = sdr(estimate, target)
    target[0], estimate[2] = 0, 0

    ratios = sdr(estimate, target)

    assert ratios.isnan().tolist() == [True, False, True]
    assert ratios[1] == pytest.approx(whole[1].item(), abs=1e-6)


@given(st.integers(1, 4), st.integers(1, 4), st.floats(-30, 40), st.integers(0, 99))
def test_pairwise_si_sdr_equals_si_sdr_of_every_pair(n_estimates, n_targets, ratio_db, seed):
    target = signals(2, n_targets, 1000, seed=seed)
    estimate = noisy(target[:, torch.arange(n_estimates) % n_targets], ratio_db, seed=seed + 1).float()
    target = target.float()

    pairs = pairwise_si_sdr(estimate, target)

    shape = (2, n_estimates, n_targets, 1000)
    each = si_sdr(estimate[:, :, None].expand(shape), target[:, None].expand(shape))
    active = each > -60  # of two signals at right angles only the rounding is left
    # Powers are right to some units in the last place; their difference, the distortion, is as coarse as it is small.
    units = 16 * 2.0**-24 * 10 ** (each[active] / 10)
    assert ((pairs - each)[active].abs() <= 0.005 + 4.35 * units).all()


@pytest.mark.parametrize("ratio_db", [-10, 20, 60, 100])
@pytest.mark.parametrize("n_sources", [2, 3, 6])
def test_pairwise_si_sdr_finds_the_order_at_any_quality(n_sources, ratio_db):
    target = signals(8, n_sources, 2000)
    orders = torch.stack([torch.randperm(n_sources, generator=torch.Generator().manual_seed(i)) for i in range(8)])
    estimate = reorder(noisy(target, ratio_db), orders).float()

    assert torch.equal(best_assignment(pairwise_si_sdr(estimate, target.float())), orders.argsort(1))


def brute_force(scores):
    """The highest sum over all one-to-one assignments of estimates (rows) to targets (columns)."""
    orders = permutations(range(len(scores)), len(scores[0]))
    return max(sum(scores[e][t] for t, e in enumerate(order)) for order in orders)


@given(st.integers(1, 6), st.integers(0, 2), st.integers(0, 9999))
def test_the_assignment_is_one_to_one_and_no_other_is_better(n_targets, n_spare, seed):
    n_estimates = min(6, n_targets + n_spare)
    scores = 20 * torch.randn(3, n_estimates, n_targets, generator=torch.Generator().manual_seed(seed))

    assignment = best_assignment(scores)

    assert assignment.shape == (3, n_targets)
    assert assignment.dtype == torch.int64
    for chosen, item in zip(assignment, scores, strict=True):
        assert len(set(chosen.tolist())) == n_targets
        assert item[chosen, torch.arange(n_targets)].sum().item() == pytest.approx(brute_force(item.tolist()), abs=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_sources", [3, 5])
def test_a_nonfinite_example_has_an_order_and_does_not_affect_the_others(n_sources, value):
    scores = torch.randn(2, n_sources, n_sources, generator=torch.Generator().manual_seed(0))
    healthy = best_assignment(scores)
    scores[0] = value

    assignment = best_assignment(scores)

    assert sorted(assignment[0].tolist()) == list(range(n_sources))
    assert torch.equal(assignment[1], healthy[1])


@pytest.mark.parametrize("n_sources", [3, 5])
def test_a_nan_score_is_not_chosen_if_another_is_possible(n_sources):
    scores = torch.zeros(1, n_sources, n_sources)
    scores[0, 0, 0] = torch.nan

    assert best_assignment(scores)[0, 0] != 0


def test_reordering_moves_whole_estimates_and_drops_unassigned_ones():
    estimate = torch.arange(2 * 3 * 2 * 4.0).reshape(2, 3, 2, 4)

    ordered = reorder(estimate, torch.tensor([[2, 0], [1, 2]]))

    assert torch.equal(ordered[0], estimate[0, [2, 0]])
    assert torch.equal(ordered[1], estimate[1, [1, 2]])


def test_sdr_does_not_hang_after_the_number_of_threads_was_set():
    script = (
        "import torch\n"
        "from unbraid.metrics import sdr\n"
        "torch.set_num_threads(2)\n"
        "target = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))\n"
        "for _ in range(5):\n"
        "    assert sdr(2 * target, target).min() > 50\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False).returncode == 0


def at_ratio(ratio_db, *, offset=0.0, gain=3.0):
    """Target and estimate whose SI-SDR is known, in float64 and then rounded to float32."""
    rng = torch.Generator().manual_seed(0)
    target = 0.05 * torch.randn(4, 32_000, generator=rng, dtype=torch.float64)
    noise = torch.randn(4, 32_000, generator=rng, dtype=torch.float64)
    target, noise = (signal - signal.mean(-1, keepdim=True) for signal in (target, noise))
    noise -= (noise * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True) * target
    noise *= 10 ** (-ratio_db / 20) * target.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return (gain * (target + noise) + offset).float(), (target + offset).float()


@pytest.mark.parametrize("ratio_db", [-30, 0, 20, 50, 60, 70, 80, 90, 100])
@pytest.mark.parametrize("offset", [0.0, 0.05, 1.0])
def test_si_sdr_is_accurate_to_a_hundredth_of_a_db_up_to_100_db(ratio_db, offset):
    estimate, target = at_ratio(ratio_db, offset=offset)

    exact = _si_sdr_definition(estimate.double(), target.double(), 1e-13)

    torch.testing.assert_close(si_sdr(estimate, target).double(), exact, atol=0.01, rtol=0)
    if not offset:  # rounding to float32 has its own noise under an offset
        assert exact.mean().item() == pytest.approx(ratio_db, abs=0.02)


@pytest.mark.parametrize("ratio_db", [0, 40, 80])
def test_the_gradient_of_si_sdr_equals_that_of_its_definition_in_float64(ratio_db):
    estimate, target = at_ratio(ratio_db)
    short, exact = estimate.clone().requires_grad_(), estimate.double().requires_grad_()

    si_sdr(short, target).sum().backward()
    _si_sdr_definition(exact, target.double(), 1e-13).sum().backward()

    assert ((short.grad - exact.grad).norm() / exact.grad.norm()).item() < 1e-4


def test_si_sdr_can_be_differentiated_twice_and_mapped():
    rng = torch.Generator().manual_seed(0)
    estimate, target = (torch.randn(3, 30, generator=rng, dtype=torch.float64) + 1 for _ in range(2))
    estimate.requires_grad_()

    assert torch.autograd.gradcheck(lambda signal: si_sdr(signal, target), estimate)
    assert torch.autograd.gradgradcheck(lambda signal: si_sdr(signal, target), estimate)
    torch.testing.assert_close(torch.func.vmap(si_sdr)(estimate, target), si_sdr(estimate, target))


def test_si_sdr_has_a_gradient_for_the_target_too():
    estimate, target = (torch.randn(2, 30, dtype=torch.float64, requires_grad=True) for _ in range(2))

    assert torch.autograd.gradcheck(si_sdr, (estimate, target))


@pytest.mark.parametrize("n_sources", [2, 3, 5])
def test_the_pit_loss_equals_fast_bss_eval(n_sources):
    import fast_bss_eval

    rng = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn(4, n_sources, 8000, generator=rng)
    estimate = target.roll(1, 1) + 0.05 * torch.randn(4, n_sources, 8000, generator=rng)
    ours, theirs = estimate.clone().requires_grad_(), estimate.clone().requires_grad_()

    loss = SeparationLoss(neg_si_sdr)(ours[:, :, None], target[:, :, None])
    expected = fast_bss_eval.si_sdr_pit_loss(theirs, target, zero_mean=True).mean(-1)
    loss.sum().backward()
    expected.sum().backward()

    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * theirs.grad.abs().max().item(), rtol=0)
