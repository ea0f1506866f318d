"""SNR, SI-SDR, SDR in dB, one value per signal or pair; the best assignment; higher is better."""

import math
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape, without_autocast

MAX_EXHAUSTIVE_SOURCES = 4
"""Up to here all orders are tried at once (24 of 4); above, the assignment problem is solved item by item."""


@without_autocast
def si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Scale-invariant signal-to-distortion ratio, in dB; higher is better.

    Both signals lose their mean first. The floor is relative to the target's part of the estimate: gain changes
    nothing, and 100 dB is still right to 0.01 dB in float32, unless an offset larger than the signal is taken off it.
    Silence on either side scores below -90 dB, finite; it says nothing about separation, so callers leave silent
    targets out or use a loss that means something there.

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
    wide = estimate.dtype == target.dtype and estimate.dtype in (torch.float32, torch.float64)
    if target.requires_grad or not wide:
        return _plain_si_sdr(estimate, target, floor)
    return _SiSdr.apply(estimate, target, floor)[0]  # type: ignore[no-untyped-call]


def _plain_si_sdr(estimate: Tensor, target: Tensor, floor: float) -> Tensor:
    """The definition, in a dozen passes over copies of the signals; `_SiSdr` copies nothing but the residual."""
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).mean(-1, keepdim=True) / (target.square().mean(-1, keepdim=True) + SILENCE)
    return ratio_db((scale * target).square().mean(-1), (estimate - scale * target).square().mean(-1), floor=floor)


class _SiSdr(torch.autograd.Function):
    """SI-SDR and its gradient from sums over time, the target without its mean, and one residual.

    What the rounding of the scale leaves of the target in the residual is measured there, and put right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(estimate: Tensor, target: Tensor, floor: float) -> tuple[Tensor, ...]:
        """The ratio; target and residual without their means; and by how much either enters the gradient."""
        centred = target - target.mean(-1, keepdim=True)
        energy = mean_square(centred) + SILENCE
        # a rounding is left of the centred target's mean, which an estimate with an offset would multiply
        scale = (_mean_product(estimate, centred) - estimate.mean(-1) * centred.mean(-1)) / energy
        residual = torch.addcmul(estimate, centred, -scale[..., None])
        residual -= residual.mean(-1, keepdim=True)
        left = _mean_product(residual, centred) / energy
        scale = scale + left
        power = scale.square() * (energy - SILENCE)
        distortion = (mean_square(residual) - left.square() * energy).clamp_min(0)
        below = distortion + floor * power + SILENCE
        per_sample = (20 / math.log(10)) / estimate.shape[-1]
        by_power = (1 / (power + 1e-10 * SILENCE) - floor / below) * scale * (1 - SILENCE / energy)
        shares = torch.stack([-per_sample / below, per_sample * (by_power + left / below)])
        return ratio_db(power, distortion, floor=floor), centred, residual, shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradient is made of, and the signals for a gradient of the gradient."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.floor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Of the estimate alone."""
        gradient = gradients[0]
        if gradient is None:
            return None, None, None
        estimate, target, centred, residual, shares = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to differentiate it again
            ratio = _plain_si_sdr(estimate, target, ctx.floor)
            return torch.autograd.grad(ratio, estimate, gradient, create_graph=True)[0], None, None
        of_residual, of_target = ((gradient * share)[..., None] for share in shares)
        return (residual * of_residual).addcmul_(centred, of_target), None, None


def _mean_product(one: Tensor, other: Tensor) -> Tensor:
    """``(one * other).mean(-1)`` without the product in memory."""
    return torch.einsum("...t,...t->...", one, other) / one.shape[-1]


def mean_square(signal: Tensor) -> Tensor:
    """``signal.square().mean(-1)`` without the squares in memory."""
    return torch.linalg.vector_norm(signal, dim=-1).square() / signal.shape[-1]


def ratio_db(power: Tensor, distortion: Tensor, *, floor: float) -> Tensor:
    """Ten times the logarithm of power over distortion; silence on either side stays finite, and low.

    Args:
        power: Mean squares of what is wanted.
        distortion: Mean squares of what is not, of the same shape.
        floor: Distortion below this share of the power is not told apart.
    """
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
    return ratio_db(target.square().mean(-1), (estimate - target).square().mean(-1), floor=floor)


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


class Products(NamedTuple):
    """Means over time from which the ratio of two signals follows, for all pairs at once; they broadcast.

    A difference of two powers is right to 0.01 dB up to 35 to 50 dB in float32, by processor, and grows coarse above
    60. That picks the right order; for the value itself take the ratio of the chosen pairs.

    Attributes:
        dot: Of the products, ``(..., estimate, target)``.
        estimate_power: Of the squares, ``(..., estimate, 1)``.
        target_power: Of the squares, ``(..., 1, target)``.
        estimate_mean: Of the signals, ``(..., estimate, 1)``.
        target_mean: Of the signals, ``(..., 1, target)``.
        mixture_power: Of the squares of what both belong to, ``(..., 1, 1)``; None where it is not known.
    """

    dot: Tensor
    estimate_power: Tensor
    target_power: Tensor
    estimate_mean: Tensor
    target_mean: Tensor
    mixture_power: Tensor | None = None


@without_autocast
def pair_products(estimate: Tensor, target: Tensor) -> Products:
    """`Products` of every estimate, ``(..., source, time)``, with every target, by one batched product."""
    return Products(
        estimate @ target.transpose(-1, -2) / estimate.shape[-1],
        mean_square(estimate)[..., :, None],
        mean_square(target)[..., None, :],
        estimate.mean(-1)[..., :, None],
        target.mean(-1)[..., None, :],
    )


def si_sdr_of(products: Products, *, floor: float = 1e-13) -> Tensor:
    """`si_sdr` from sums alone, ``(..., estimate, target)``."""
    dot = products.dot - products.estimate_mean * products.target_mean
    energy = (products.target_power - products.target_mean.square()).clamp_min(0)
    whole = (products.estimate_power - products.estimate_mean.square()).clamp_min(0)
    power = dot.square() * energy / (energy + SILENCE).square()
    return ratio_db(power, (whole - power).clamp_min(0), floor=floor)


def distortion_of(products: Products) -> Tensor:
    """Mean square of the difference from sums alone, ``(..., estimate, target)``."""
    return (products.estimate_power - 2 * products.dot + products.target_power).clamp_min(0)


def snr_of(products: Products, *, floor: float = 1e-13) -> Tensor:
    """`snr` from sums alone, ``(..., estimate, target)``."""
    return ratio_db(products.target_power, distortion_of(products), floor=floor)


def pairwise_si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """`si_sdr` of every estimate against every target, by one batched product; as exact as `Products` says.

    Args:
        estimate: ``(..., source, time)``.
        target: ``(..., source, time)``; the number of sources may be another one.
        floor: As in `si_sdr`.

    Returns:
        ``(..., estimate, target)``, in dB.
    """
    return si_sdr_of(pair_products(estimate, target), floor=floor)


def is_active(target: Tensor) -> Tensor:
    """Whether each signal is more than silence, ``(batch, source, channel)``; all count where all are silent."""
    heard = mean_square(target) > SILENCE
    return heard | ~heard.any(dim=(1, 2), keepdim=True)


def mean_over_active(values: Tensor, target: Tensor) -> Tensor:
    """Mean of each example's values over the sources and channels whose target is not silent.

    Args:
        values: ``(batch, source, channel)``.
        target: ``(batch, source, channel, time)``.

    Returns:
        ``(batch,)``; where all targets are silent, the mean over all.
    """
    counts = is_active(target)
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
    orders = all_orders(n_estimates, n_targets, scores.device)
    sums = scores[:, orders, torch.arange(n_targets, device=scores.device)].sum(-1)
    return orders[sums.argmax(-1)]


@lru_cache(maxsize=16)
def all_orders(n_estimates: int, n_targets: int, device: torch.device) -> Tensor:
    """Every way to choose an estimate for each target, ``(order, target)``, int64."""
    return torch.tensor(list(permutations(range(n_estimates), n_targets)), device=device)


def _by_assignment_solver(scores: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    on_host = scores.transpose(1, 2).cpu().numpy()
    columns = [torch.from_numpy(linear_sum_assignment(item, maximize=True)[1]) for item in on_host]
    return torch.stack(columns).to(scores.device)


def reorder(estimate: Tensor, assignment: Tensor) -> Tensor:
    """Put estimates ``(batch, estimate, ...)`` into the order of their targets, ``(batch, target, ...)``."""
    first = torch.arange(len(estimate), device=estimate.device)[:, None] * estimate.shape[1]
    rows = estimate.flatten(0, 1).index_select(
        0, (first + assignment).flatten()
    )  # gather would read an index for every sample
    return rows.unflatten(0, assignment.shape)
