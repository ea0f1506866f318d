"""Which output belongs to which source: permutation-invariant training, MixIT and fixed order, around any loss."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unbraid.dsp import SILENCE, without_autocast
from unbraid.errors import UserError
from unbraid.losses import SignalLoss, bare, is_in_db, is_scale_invariant
from unbraid.losses.mixit import mixit_ways
from unbraid.losses.pairwise import Extras, Term, as_terms, compares, pair_losses, value_of, wide
from unbraid.losses.waveform import neg_sa_sdr, neg_si_sdr, neg_snr
from unbraid.metrics import (
    all_orders,
    best_assignment,
    distortion_of,
    mean_over_active,
    mean_square,
    pair_products,
    ratio_db,
    reorder,
    si_sdr,
)

ASSIGNMENTS = ("permutation", "fixed", "mixit")
MAX_WHOLE_SOURCES = 6


class Assigned(NamedTuple):
    """What a loss came to, and how the outputs were held against the targets.

    Attributes:
        losses: ``(batch,)``.
        order: Which output belongs to each target, ``(batch, source)``, int64; with MixIT the one most like it.
        si_sdr: Of each target's output, mean over channels, in dB, ``(batch, source)``; no gradient.
        active: Whether each target is more than silence, ``(batch, source)``.
    """

    losses: Tensor
    order: Tensor
    si_sdr: Tensor
    active: Tensor


class SeparationLoss:
    """One loss per example from all of its sources.

    Where silence among the targets means nothing to the loss (SI-SDR), silent ones are left out of an example's mean;
    an example with nothing but silence keeps its values, so that they are seen.

    Args:
        loss: ``(estimate, target)`` to one value per signal, or to one per example; or several of them with weights.
        assign: ``"permutation"`` takes the order of the outputs that makes the loss smallest, for each example;
            ``"fixed"`` keeps output ``i`` for source ``i``; ``"mixit"`` takes the targets for mixtures themselves, and
            adds each output to the one where it makes the loss smallest.
        inactive_weight: How much outputs count that no active target belongs to, because it is silent or there are
            fewer targets than outputs: their level above 30 dB under the mixture, in dB, mean over all outputs. With 0
            they are left to themselves, but for what a loss that cares for level says of a silent target.

    Reference:
        Kolbaek et al., "Multi-talker speech separation with utterance-level permutation invariant training",
        IEEE/ACM TASLP 2017, arXiv:1703.06284. Wisdom et al., "Unsupervised sound separation using mixture invariant
        training", NeurIPS 2020, arXiv:2006.12701; and, for inactive outputs, "What's all the fuss about free universal
        sound separation data?", ICASSP 2021, arXiv:2011.00803.
    """

    def __init__(
        self,
        loss: SignalLoss | Sequence[Term],
        *,
        assign: Literal["permutation", "fixed", "mixit"] = "permutation",
        inactive_weight: float = 0.0,
    ) -> None:
        self.terms = (Term(loss),) if callable(loss) else tuple(loss)
        if assign not in ASSIGNMENTS:
            raise ValueError(f"assign = {assign!r} is not one of {', '.join(ASSIGNMENTS)}.")
        if not self.terms or not all(0 < term.weight < float("inf") for term in self.terms):
            raise ValueError("A sum of losses needs one or more terms, each with a weight above 0.")
        if not 0 <= inactive_weight < float("inf"):
            raise ValueError(f"inactive_weight = {inactive_weight} must be 0 or more.")
        if assign == "mixit" and any(is_scale_invariant(term.loss) for term in self.terms):
            raise ValueError(
                "assign = 'mixit' adds outputs up, which needs a loss that cares for level, as neg_snr does."
            )
        if assign == "mixit" and inactive_weight:
            raise ValueError(
                "assign = 'mixit' gives every output to a mixture, so that none is inactive; leave inactive_weight out."
            )
        self.assign, self.inactive_weight = assign, inactive_weight

    @property
    def in_db(self) -> bool:
        """Whether its values are in dB, so that a threshold in dB means something."""
        return len(self.terms) == 1 and is_in_db(self.terms[0].loss) and not self.inactive_weight

    def __call__(self, estimate: Tensor, target: Tensor, **extras: Any) -> Tensor:
        """Losses ``(batch,)`` of estimates and targets, both ``(batch, source, channel, time)``.

        In float32 (float64 stays), also where the call stands under autocast.
        """
        return self._judged(wide(estimate), wide(target), extras)[0]

    def assigned(self, estimate: Tensor, target: Tensor, **extras: Any) -> Assigned:
        """Losses as `__call__` gives them, with order and SI-SDR; the latter costs nothing where it is the loss."""
        estimate, target = wide(estimate), wide(target)
        losses, values, held = self._judged(estimate, target, extras)
        if len(self.terms) == 1 and self.terms[0].loss is neg_si_sdr:
            ratio = -values.detach()
        else:
            ratio = si_sdr(held.estimate.detach(), held.target)
        ratio = ratio.mean(-1) if held.by_target else ratio.mean(-1).gather(1, held.order)
        return Assigned(losses, held.order, ratio, (mean_square(target) > SILENCE).all(-1))

    @without_autocast
    def _judged(self, estimate: Tensor, target: Tensor, extras: Extras) -> tuple[Tensor, Tensor, "_Held"]:
        """Losses, the values of the last term that has one for each signal, and what was held against what."""
        check_estimate(estimate, target)
        held = _hold(self.terms, estimate, target, extras, assign=self.assign, inactive_weight=self.inactive_weight)
        total, values = estimate.new_zeros(()), estimate.new_zeros(held.target.shape[:-1])
        for loss, weight in self.terms:
            found = value_of(loss, held.estimate, held.target, extras)
            if found.dim() == 3:
                values = found
                found = mean_over_active(found, held.target) if is_scale_invariant(loss) else found.mean((1, 2))
            total = total + (found if weight == 1 else weight * found)
        if self.inactive_weight:
            total = total + self.inactive_weight * _inactivity(estimate, target, held, extras)
        return total, values, held


def check_estimate(estimate: Tensor, target: Tensor) -> None:
    """Refuse what a model returned if it cannot be held against the sources.

    Raises:
        UserError: If shapes do not fit; more outputs than sources do.
    """
    fits = estimate.dim() == 4 and estimate.shape[0] == target.shape[0] and estimate.shape[2:] == target.shape[2:]
    if not fits or estimate.shape[1] < target.shape[1]:
        raise UserError(
            f"The model returned {tuple(estimate.shape)}; it must return (batch, source, channel, time) as the sources "
            f"have it, {tuple(target.shape)}, with as many outputs or more."
        )


class _Held(NamedTuple):
    """Estimates beside the targets they are held against, and how that came about.

    Where there are as many outputs as targets, the targets are put into the order of the outputs: they need no
    gradient, so that this costs one copy and nothing in the backward. `by_target` says that it was the other way.
    """

    estimate: Tensor
    target: Tensor
    order: Tensor
    by_target: bool


def _hold(
    terms: Sequence[Term],
    estimate: Tensor,
    target: Tensor,
    extras: Extras,
    *,
    assign: str,
    inactive_weight: float = 0.0,
) -> _Held:
    if assign == "mixit":
        ways = mixit_ways(terms, estimate, target, extras)
        summed = torch.einsum("bno,boct->bnct", ways.to(estimate.dtype), estimate)
        similarity = pair_products(estimate.detach().transpose(1, 2), target.transpose(1, 2)).dot.mean(1)
        order = torch.where(ways, similarity.transpose(1, 2).nan_to_num(), -torch.inf).argmax(-1)
        return _Held(summed, target, order, by_target=True)
    order = output_order(estimate, target, terms, assign=assign, extras=extras, inactive_weight=inactive_weight)
    if assign == "fixed" or estimate.shape[1] != target.shape[1]:
        chosen = estimate[:, : target.shape[1]] if assign == "fixed" else reorder(estimate, order)
        return _Held(chosen, target, order, by_target=True)
    return _Held(estimate, reorder(target, order.argsort(1)), order, by_target=False)


@without_autocast
def order_as_targets(
    estimate: Tensor, target: Tensor, signal_loss: SignalLoss | Sequence[Term], *, assign: str
) -> Tensor:
    """Estimates as they are held against the targets, ``(batch, source, channel, time)``.

    In the order of their targets, outputs to spare left out; with MixIT the sums of outputs that make up each target.
    """
    if assign == "mixit":
        return _hold(as_terms(signal_loss), estimate, target, {}, assign=assign).estimate
    return reorder(estimate, output_order(estimate, target, signal_loss, assign=assign))


def judge_by(assign: str) -> SignalLoss:
    """What the order of outputs is judged by where a model is scored, whatever it was trained by."""
    return neg_snr if assign == "mixit" else neg_si_sdr


def output_order(
    estimate: Tensor,
    target: Tensor,
    signal_loss: SignalLoss | Sequence[Term],
    *,
    assign: str,
    extras: Extras | None = None,
    inactive_weight: float = 0.0,
) -> Tensor:
    """Which output belongs to each target, ``(batch, source)``.

    Args:
        estimate: ``(batch, output, channel, time)``.
        target: ``(batch, source, channel, time)``.
        signal_loss: What makes the best order the best.
        assign: ``"permutation"`` or ``"fixed"``, as `SeparationLoss` takes it.
        extras: What the loss may ask for beside.
        inactive_weight: As `SeparationLoss` takes it.
    """
    if assign == "fixed":
        return torch.arange(target.shape[1], device=target.device).expand(target.shape[:2])
    return assign_sources(signal_loss, estimate, target, extras=extras, inactive_weight=inactive_weight)


@without_autocast
def assign_sources(
    signal_loss: SignalLoss | Sequence[Term],
    estimate: Tensor,
    target: Tensor,
    *,
    extras: Extras | None = None,
    inactive_weight: float = 0.0,
) -> Tensor:
    """Which estimate belongs to which target, for each example; channels stay together.

    Only this search looks at all pairs, and it needs no gradient: the loss is then taken of the chosen pairs alone,
    in its exact form. A silent target has no say in SI-SDR, as it is left out of the loss.

    Args:
        signal_loss: ``(estimate, target)`` to one value per signal, or terms of a sum.
        estimate: ``(batch, source, channel, time)``.
        target: ``(batch, source, channel, time)``; not more sources than estimates.
        extras: What the loss may ask for beside.
        inactive_weight: As `SeparationLoss` takes it.

    Returns:
        ``(batch, target)``, int64.

    Raises:
        UserError: If there are too many orders for a loss that has to see each as a whole.
    """
    extras = extras or {}
    terms = [term for term in as_terms(signal_loss) if compares(term.loss)]
    alone = len(terms) == 1 and not inactive_weight  # the errors of SA-SDR add up, and their ratio is in the same order
    whole = 0.0
    with torch.no_grad():
        pairs = estimate.new_zeros(len(estimate), estimate.shape[1], target.shape[1])
        for loss, weight in terms:
            if bare(loss) is neg_sa_sdr and not alone:
                whole += weight
            else:
                pairs = pairs + weight * pair_losses(loss, estimate, target, extras)
        if inactive_weight:
            level = _levels(estimate, target, extras).mean(-1) / estimate.shape[1]
            pairs = pairs - inactive_weight * level[..., None] * _active(target)[:, None]
        return _best_whole_order(pairs, whole, estimate, target) if whole else best_assignment(-pairs)


def _best_whole_order(pairs: Tensor, weight: float, estimate: Tensor, target: Tensor) -> Tensor:
    """The order that makes the sum of its pairs and of a weighted SA-SDR smallest, by trying all."""
    if estimate.shape[1] > MAX_WHOLE_SOURCES:
        raise UserError(
            f"neg_sa_sdr in a sum of losses takes at most {MAX_WHOLE_SOURCES} outputs, as every order has to be tried; "
            "take neg_snr instead, or neg_sa_sdr alone."
        )
    orders = all_orders(estimate.shape[1], target.shape[1], estimate.device)
    places = torch.arange(target.shape[1], device=estimate.device)
    errors = distortion_of(pair_products(estimate.transpose(1, 2), target.transpose(1, 2))).mean(1)
    sums, error = (table[:, orders, places].sum(-1) for table in (pairs, errors))
    power = mean_square(target).mean(-1).sum(1, keepdim=True)
    total = sums - weight * ratio_db(power, error, floor=1e-13)
    return orders[total.nan_to_num(torch.inf).argmin(1)]


def _inactivity(estimate: Tensor, target: Tensor, held: _Held, extras: Extras) -> Tensor:
    """How far the outputs without a active target are above silence, in dB, mean over all outputs, ``(batch,)``."""
    none = torch.zeros(estimate.shape[:2], dtype=torch.bool, device=estimate.device)
    active = none.scatter(1, held.order, _active(target))
    return torch.where(active[..., None], 0.0, _levels(estimate, target, extras)).mean((1, 2))


def _active(target: Tensor) -> Tensor:
    """Whether a source is heard in any channel, ``(batch, source)``."""
    return (mean_square(target) > SILENCE).any(-1)


def _levels(estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """How far each output is above 30 dB under the mixture, in dB, from 0 for silence, ``(batch, output, channel)``."""
    mixture = extras.get("mixture")
    reference = mean_square(target.sum(1) if mixture is None else wide(mixture))[:, None]
    floor = 1e-3 * reference + SILENCE
    return 10 * ((mean_square(estimate) + floor).log10() - floor.log10())
