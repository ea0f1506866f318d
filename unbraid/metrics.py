"""SNR, SI-SDR, SDR in dB, one value per signal or pair; the best assignment; higher is better."""

from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape

MAX_EXHAUSTIVE_SOURCES = 4
"""Up to here all orders are tried at once (24 of 4); above, the assignment problem is solved item by item."""


def si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Scale-invariant signal-to-distortion ratio, in dB; higher is better.

    Both signals lose their mean first. The floor is relative to the target's part of the estimate: gain changes
    nothing, and 100 dB is still right to 0.01 dB in float32. Silence on either side scores below -90 dB, finite; it
    says nothing about separation, so callers leave silent targets out or use a loss that means something there.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.
        floor: Distortion below this share of the target's power is not told apart.

    Returns:
        One ratio per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ; they are never broadcast.

    Reference:
        Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019, arXiv:1811.02508.
    """
    check_same_shape(estimate, target)
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).mean(-1, keepdim=True) / (target.square().mean(-1, keepdim=True) + SILENCE)
    power = (scale * target).square().mean(-1)
    distortion = (estimate - scale * target).square().mean(-1)
    return 10 * ((power + 1e-10 * SILENCE).log10() - (distortion + floor * power + SILENCE).log10())


def snr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Signal-to-noise ratio, in dB; higher is better; unlike `si_sdr`, the estimate's gain counts.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.
        floor: Noise below this share of the target's power is not told apart.

    Returns:
        One ratio per signal, ``(...,)``; finite, and low, for a silent target.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(estimate, target)
    power = target.square().mean(-1)
    noise = (estimate - target).square().mean(-1)
    return 10 * ((power + 1e-10 * SILENCE).log10() - (noise + floor * power + SILENCE).log10())


def sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """BSS Eval's signal-to-distortion ratio with its 512-tap filter, in dB; higher is better; one pair a signal.

    Args:
        estimate: Separated signals, ``(..., time)``, already in the order of the targets.
        target: Reference signals, ``(..., time)``.

    Returns:
        One ratio per signal, ``(...,)``, as `mir_eval` gives it; NaN where either side is silent.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Vincent et al., "Performance measurement in blind audio source separation", IEEE TASLP 2006;
        computed by fast_bss_eval (Scheibler 2021, arXiv:2110.06440).
    """
    import fast_bss_eval

    check_same_shape(estimate, target)
    pairs = (target.flatten(0, -2)[:, None].double(), estimate.flatten(0, -2)[:, None].double())
    silent = (pairs[0].square().mean(-1) <= SILENCE) | (pairs[1].square().mean(-1) <= SILENCE)
    filled = [pair + silent[..., None] * torch.linspace(-1, 1, pair.shape[-1]).double().to(pair) for pair in pairs]
    # as NumPy arrays: torch's batched solver may never come back on the CPU once torch.set_num_threads was called
    on_host = [pair.cpu().numpy() for pair in filled]
    ratio = fast_bss_eval.sdr(*on_host, filter_length=512, return_perm=False, load_diag=1e-10)
    known = torch.from_numpy(ratio).to(silent.device).reshape(silent.shape)
    return torch.where(silent, torch.nan, known).reshape(target.shape[:-1]).to(estimate.dtype)


def pairwise_si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """`si_sdr` of every estimate against every target, by one batched product.

    The distortion is the difference of two powers here: in float32 it is right to 0.01 dB up to about 50 dB and
    grows coarse above 60. That picks the right order; for the value itself take `si_sdr` of the chosen pairs.

    Args:
        estimate: ``(..., source, time)``.
        target: ``(..., source, time)``; the number of sources may be another one.
        floor: As in `si_sdr`.

    Returns:
        ``(..., estimate, target)``, in dB.
    """
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    time = estimate.shape[-1]
    dot = estimate @ target.transpose(-1, -2) / time
    target_power = target.square().mean(-1)[..., None, :]
    estimate_power = estimate.square().mean(-1)[..., :, None]
    power = dot.square() * target_power / (target_power + SILENCE).square()
    distortion = (estimate_power - power).clamp_min(0)
    return 10 * ((power + 1e-10 * SILENCE).log10() - (distortion + floor * power + SILENCE).log10())


def sounding(target: Tensor) -> Tensor:
    """Whether each signal is more than silence, ``(batch, source, channel)``; all count where all are silent."""
    heard = target.square().mean(-1) > SILENCE
    return heard | ~heard.any(dim=(1, 2), keepdim=True)


def mean_over_sounding(values: Tensor, target: Tensor) -> Tensor:
    """Mean of each example's values over the sources and channels whose target is not silent.

    Args:
        values: ``(batch, source, channel)``.
        target: ``(batch, source, channel, time)``.

    Returns:
        ``(batch,)``; where all targets are silent, the mean over all.
    """
    counts = sounding(target)
    return torch.where(counts, values, 0.0).sum((1, 2)) / counts.sum((1, 2))


def best_assignment(scores: Tensor) -> Tensor:
    """The one-to-one assignment of estimates to targets with the highest sum of scores.

    Args:
        scores: ``(batch, estimate, target)``, higher is better; at least as many estimates as targets. A score that
            is not finite counts as the worst, so that a sick example still has an order.

    Returns:
        ``(batch, target)``: which estimate belongs to each target, int64.
    """
    _, n_estimates, n_targets = scores.shape
    scores = torch.nan_to_num(scores.detach().float(), nan=-1e6, posinf=1e6, neginf=-1e6)
    if n_estimates > MAX_EXHAUSTIVE_SOURCES:
        return _by_assignment_solver(scores)
    orders = _orders(n_estimates, n_targets, scores.device)
    sums = scores[:, orders, torch.arange(n_targets, device=scores.device)].sum(-1)
    return orders[sums.argmax(-1)]


@lru_cache(maxsize=16)
def _orders(n_estimates: int, n_targets: int, device: torch.device) -> Tensor:
    return torch.tensor(list(permutations(range(n_estimates), n_targets)), device=device)


def _by_assignment_solver(scores: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    on_host = scores.transpose(1, 2).cpu().numpy()
    columns = [torch.from_numpy(linear_sum_assignment(item, maximize=True)[1]) for item in on_host]
    return torch.stack(columns).to(scores.device)


def reorder(estimate: Tensor, assignment: Tensor) -> Tensor:
    """Put estimates ``(batch, estimate, ...)`` into the order of their targets, ``(batch, target, ...)``."""
    index = assignment.reshape(*assignment.shape, *[1] * (estimate.dim() - 2))
    return estimate.gather(1, index.expand(*assignment.shape, *estimate.shape[2:]))
