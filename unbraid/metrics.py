"""SNR, SI-SDR and SDR in dB, for single signals or for all pairs, and the best assignment; higher is better."""

import math
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape, without_autocast

ALREADY_SEPARATED_DB = 80.0
"""A mixture that scores this much holds nothing but the source: 16-bit audio lies about 90 dB above its noise."""

MAX_EXHAUSTIVE_SOURCES = 4
"""Up to this many sources all orders are tried at once (24 for 4); above, each example is solved by SciPy."""


@without_autocast
def si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio in dB; higher is better.

    Both signals are made zero-mean first. The floor is relative to the target's part of the estimate, so gain changes
    nothing. In float32 a ratio of 100 dB is still accurate to 0.01 dB, unless the signals have an offset larger than
    themselves. Silence on either side scores below -90 dB but stays finite. Such a value says nothing about
    separation: skip silent targets, or use a loss that is defined for them.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.
        floor: Distortion below this share of the target's power counts as this share.

    Returns:
        One ratio per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ; they are never broadcast.

    Reference:
        Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019, arXiv:1811.02508.
    """
    check_same_shape(estimate, target)
    full_precision = estimate.dtype == target.dtype and estimate.dtype in (torch.float32, torch.float64)
    # The fused form has no gradient for the target, and expects both signals in one dtype of full precision.
    if target.requires_grad or not full_precision:
        return _si_sdr_definition(estimate, target, floor)
    return _FusedSiSdr.apply(estimate, target, floor)[0]  # type: ignore[no-untyped-call]


def _si_sdr_definition(estimate: Tensor, target: Tensor, floor: float) -> Tensor:
    """Compute SI-SDR as it is defined, in a dozen passes over copies of the signals."""
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).mean(-1, keepdim=True) / (target.square().mean(-1, keepdim=True) + SILENCE)
    return ratio_db((scale * target).square().mean(-1), (estimate - scale * target).square().mean(-1), floor=floor)


class _FusedSiSdr(torch.autograd.Function):
    """SI-SDR and its gradient from sums over time, with two copies of the signals: centred target and residual.

    The scale is rounded, so the residual still contains a trace of the target. This trace is measured and corrected.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(estimate: Tensor, target: Tensor, floor: float) -> tuple[Tensor, ...]:
        """Return the ratio, the centred target and residual, and the weight of each in the gradient."""
        # 1. Project the estimate on the centred target: scale = <estimate, target> / <target, target>.
        centred = target - target.mean(-1, keepdim=True)
        energy = mean_square(centred) + SILENCE
        # Rounding leaves a small mean in `centred`, which an offset of the estimate would amplify; subtract it.
        scale = (_mean_product(estimate, centred) - estimate.mean(-1) * centred.mean(-1)) / energy

        # 2. Subtract the projection, and move what is left of the target in the residual back into the scale.
        residual = torch.addcmul(estimate, centred, -scale[..., None])
        residual -= residual.mean(-1, keepdim=True)
        correction = _mean_product(residual, centred) / energy
        scale = scale + correction
        power = scale.square() * (energy - SILENCE)
        distortion = (mean_square(residual) - correction.square() * energy).clamp_min(0)

        # 3. The gradient is a weighted sum of the residual and the centred target, with one weight each per signal.
        denominator = distortion + floor * power + SILENCE
        per_sample = (20 / math.log(10)) / estimate.shape[-1]
        power_slope = (1 / (power + 1e-10 * SILENCE) - floor / denominator) * scale * (1 - SILENCE / energy)
        weights = torch.stack([-per_sample / denominator, per_sample * (power_slope + correction / denominator)])
        return ratio_db(power, distortion, floor=floor), centred, residual, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        """Save the terms of the gradient, and the signals for a second derivative."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.floor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Return the gradient of the estimate; the target has none."""
        gradient = gradients[0]
        if gradient is None:
            return None, None, None
        estimate, target, centred, residual, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True, which needs a differentiable gradient
            ratio = _si_sdr_definition(estimate, target, ctx.floor)
            return torch.autograd.grad(ratio, estimate, gradient, create_graph=True)[0], None, None
        residual_weight, target_weight = ((gradient * weight)[..., None] for weight in weights)
        return (residual * residual_weight).addcmul_(centred, target_weight), None, None


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``(a * b).mean(-1)`` without storing the product."""
    return torch.einsum("...t,...t->...", a, b) / a.shape[-1]


def mean_square(signal: Tensor) -> Tensor:
    """Compute ``signal.square().mean(-1)`` without storing the squares."""
    return torch.linalg.vector_norm(signal, dim=-1).square() / signal.shape[-1]


def ratio_db(power: Tensor, distortion: Tensor, *, floor: float) -> Tensor:
    """Return the ratio of two powers in dB; it stays finite, and low, where either is zero.

    Args:
        power: Mean squares of the signal.
        distortion: Mean squares of the distortion, of the same shape.
        floor: Distortion below this share of the power counts as this share.
    """
    # The two constants differ so that silence against silence is -100 dB and not 0 dB, the value of an even mixture.
    return 10 * ((power + 1e-10 * SILENCE).log10() - (distortion + floor * power + SILENCE).log10())


def snr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Return the signal-to-noise ratio in dB; higher is better. Unlike in `si_sdr`, the gain of the estimate counts.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.
        floor: Noise below this share of the target's power counts as this share.

    Returns:
        One ratio per signal, ``(...,)``; finite, and low, for a silent target.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(estimate, target)
    return ratio_db(target.square().mean(-1), (estimate - target).square().mean(-1), floor=floor)


def sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the signal-to-distortion ratio of BSS Eval, with its 512-tap filter, in dB; higher is better.

    Args:
        estimate: Separated signals, ``(..., time)``, in the order of the targets.
        target: Reference signals, ``(..., time)``.

    Returns:
        One ratio per signal, ``(...,)``, as computed by `mir_eval`; NaN where either signal is silent.

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
    # The filter is undefined for silence: solve for a ramp there instead, and replace the result by NaN.
    filled = [pair + silent[..., None] * torch.linspace(-1, 1, pair.shape[-1]).double().to(pair) for pair in pairs]
    # As NumPy arrays: torch's batched solver can hang on the CPU after a call of torch.set_num_threads.
    on_host = [pair.cpu().numpy() for pair in filled]
    ratio = fast_bss_eval.sdr(*on_host, filter_length=512, return_perm=False, load_diag=1e-10)
    ratio = torch.from_numpy(ratio).to(silent.device).reshape(silent.shape)
    return torch.where(silent, torch.nan, ratio).reshape(target.shape[:-1]).to(estimate.dtype)


class PairMoments(NamedTuple):
    """First and second moments over time of every pair of signals, from which their ratios follow.

    The fields broadcast against each other. In float32 a difference of two powers is accurate to 0.01 dB up to 35 to
    50 dB, depending on the processor, and becomes coarse above 60 dB. That is enough to choose an order; compute the
    value itself from the chosen pairs.

    Attributes:
        dot: Mean of the product, ``(..., estimate, target)``.
        estimate_power: Mean square, ``(..., estimate, 1)``.
        target_power: Mean square, ``(..., 1, target)``.
        estimate_mean: Mean, ``(..., estimate, 1)``.
        target_mean: Mean, ``(..., 1, target)``.
        mixture_power: Mean square of the mixture, ``(..., 1, 1)``; None if it is unknown.
    """

    dot: Tensor
    estimate_power: Tensor
    target_power: Tensor
    estimate_mean: Tensor
    target_mean: Tensor
    mixture_power: Tensor | None = None


@without_autocast
def pair_moments(estimate: Tensor, target: Tensor) -> PairMoments:
    """Compute the moments of every estimate with every target, both ``(..., source, time)``, by one batched product."""
    return PairMoments(
        estimate @ target.transpose(-1, -2) / estimate.shape[-1],
        mean_square(estimate)[..., :, None],
        mean_square(target)[..., None, :],
        estimate.mean(-1)[..., :, None],
        target.mean(-1)[..., None, :],
    )


def si_sdr_from_moments(moments: PairMoments, *, floor: float = 1e-13) -> Tensor:
    """Compute `si_sdr` of all pairs, ``(..., estimate, target)``."""
    # Subtracting the means' products makes both signals zero-mean. The clamps undo roundings below zero.
    dot = moments.dot - moments.estimate_mean * moments.target_mean
    target_energy = (moments.target_power - moments.target_mean.square()).clamp_min(0)
    estimate_energy = (moments.estimate_power - moments.estimate_mean.square()).clamp_min(0)
    power = dot.square() * target_energy / (target_energy + SILENCE).square()
    return ratio_db(power, (estimate_energy - power).clamp_min(0), floor=floor)


def mse_from_moments(moments: PairMoments) -> Tensor:
    """Compute the mean squared error of all pairs, ``(..., estimate, target)``."""
    return (moments.estimate_power - 2 * moments.dot + moments.target_power).clamp_min(0)


def snr_from_moments(moments: PairMoments, *, floor: float = 1e-13) -> Tensor:
    """Compute `snr` of all pairs, ``(..., estimate, target)``."""
    return ratio_db(moments.target_power, mse_from_moments(moments), floor=floor)


def pairwise_si_sdr(estimate: Tensor, target: Tensor, *, floor: float = 1e-13) -> Tensor:
    """Return `si_sdr` of every estimate against every target, by one batched product, as accurate as `PairMoments`.

    Args:
        estimate: ``(..., source, time)``.
        target: ``(..., source, time)``; the number of sources may differ.
        floor: As in `si_sdr`.

    Returns:
        ``(..., estimate, target)``, in dB.
    """
    return si_sdr_from_moments(pair_moments(estimate, target), floor=floor)


def is_active(target: Tensor) -> Tensor:
    """Return whether each signal of ``(batch, source, channel, time)`` is more than silence.

    Returns:
        Boolean, ``(batch, source, channel)``; all True for an example in which every signal is silent.
    """
    not_silent = mean_square(target) > SILENCE
    return not_silent | ~not_silent.any(dim=(1, 2), keepdim=True)


def mean_over_defined(values: Tensor, defined: Tensor) -> Tensor:
    """Average each example's metric over the signals for which it is defined.

    Args:
        values: ``(batch, source, channel)``. A NaN of a defined value stays NaN: it is the model's.
        defined: Boolean, of the same shape.

    Returns:
        ``(batch,)``; NaN if the metric is defined for no signal of the example.
    """
    return torch.where(defined, values, 0.0).sum((1, 2)) / defined.sum((1, 2))


def can_improve(mixture_score: Tensor) -> Tensor:
    """Return whether separation can improve on the mixture, which it cannot where the mixture already is the source.

    A source alone in its mixture scores at the metric's ceiling, so the improvement would be about -100 dB, whatever
    the model does.

    Args:
        mixture_score: SI-SDR or SDR of the unprocessed mixture, in dB.
    """
    return mixture_score < ALREADY_SEPARATED_DB


def mean_over_active(values: Tensor, target: Tensor) -> Tensor:
    """Average each example's values over the sources and channels whose target is not silent.

    Args:
        values: ``(batch, source, channel)``.
        target: ``(batch, source, channel, time)``.

    Returns:
        ``(batch,)``; the mean over all signals where every target is silent.
    """
    active = is_active(target)
    return torch.where(active, values, 0.0).sum((1, 2)) / active.sum((1, 2))


def best_assignment(scores: Tensor) -> Tensor:
    """Return the one-to-one assignment of estimates to targets with the highest sum of scores.

    Args:
        scores: ``(batch, estimate, target)``, higher is better; at least as many estimates as targets. NaN and -inf
            count as the worst score, so that a bad example still gets an order.

    Returns:
        The index of the estimate for each target, ``(batch, target)``, int64.
    """
    _, n_estimates, n_targets = scores.shape
    scores = torch.nan_to_num(scores.detach().float(), nan=-1e6, posinf=1e6, neginf=-1e6)
    if n_estimates > MAX_EXHAUSTIVE_SOURCES:
        return _solve_assignment(scores)
    # For few sources, summing the scores of all orders stays on the device, without waiting for it.
    orders = all_permutations(n_estimates, n_targets, scores.device)
    sums = scores[:, orders, torch.arange(n_targets, device=scores.device)].sum(-1)
    return orders[sums.argmax(-1)]


@lru_cache(maxsize=16)
def all_permutations(n_estimates: int, n_targets: int, device: torch.device) -> Tensor:
    """Return every choice of a different estimate for each target, ``(permutation, target)``, int64."""
    return torch.tensor(list(permutations(range(n_estimates), n_targets)), device=device)


def _solve_assignment(scores: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    # Targets become the rows, so that the columns are the estimate of each target.
    on_host = scores.transpose(1, 2).cpu().numpy()
    columns = [torch.from_numpy(linear_sum_assignment(item, maximize=True)[1]) for item in on_host]
    return torch.stack(columns).to(scores.device)


def reorder(estimate: Tensor, assignment: Tensor) -> Tensor:
    """Put estimates ``(batch, estimate, ...)`` in the order of their targets, ``(batch, target, ...)``."""
    # index_select copies whole signals; gather would read one index per sample.
    offsets = torch.arange(len(estimate), device=estimate.device)[:, None] * estimate.shape[1]
    rows = estimate.flatten(0, 1).index_select(0, (offsets + assignment).flatten())
    return rows.unflatten(0, assignment.shape)
