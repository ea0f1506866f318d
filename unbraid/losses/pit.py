"""SeparationLoss: match outputs with targets by PIT, MixIT or a fixed order, around any loss of signals."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unbraid.dsp import SILENCE, without_autocast
from unbraid.errors import UserError
from unbraid.losses import SignalLoss, is_in_db, is_scale_invariant, unwrap_partial
from unbraid.losses.mixit import best_mixing_matrix
from unbraid.losses.pairwise import Extras, Term, as_terms, at_least_float32, call_loss, pairwise_losses, uses_estimate
from unbraid.losses.waveform import neg_sa_sdr, neg_si_sdr, neg_snr
from unbraid.metrics import (
    all_permutations,
    best_assignment,
    mean_over_active,
    mean_square,
    mse_from_moments,
    pair_moments,
    ratio_db,
    reorder,
    si_sdr,
)

ASSIGNMENTS = ("permutation", "fixed", "mixit")

MAX_SA_SDR_SOURCES = 6
"""The most outputs in a sum of losses with SA-SDR, for which every order has to be tried (720 for 6)."""


class OrderedLosses(NamedTuple):
    """The losses of a batch, with the order of the outputs and their SI-SDR.

    Attributes:
        losses: One loss per example, ``(batch,)``.
        order: Index of the output for each target, ``(batch, source)``, int64; with MixIT the most similar output.
        si_sdr: SI-SDR of the output for each target, mean over channels, in dB, ``(batch, source)``; no gradient.
        active: Whether each target is more than silence in every channel, ``(batch, source)``.
    """

    losses: Tensor
    order: Tensor
    si_sdr: Tensor
    active: Tensor


class SeparationLoss:
    """One loss per example, from all of its sources.

    A loss that is undefined for silent targets (SI-SDR) is averaged over the other targets of the example. An example
    of nothing but silence keeps its values, so that it stands out.

    Args:
        loss: ``(estimate, target)`` to one value per signal or per example; or a weighted sum of such losses.
        assign: ``"permutation"`` chooses the order of the outputs with the smallest loss, for each example;
            ``"fixed"`` compares output ``i`` with source ``i``; ``"mixit"`` takes the targets for mixtures, and adds
            each output to the mixture for which the loss is smallest.
        inactive_weight: Weight of a penalty on inactive outputs: those matched with a silent target or with none. The
            penalty is their level above 30 dB below the mixture, in dB, averaged over all outputs. With 0, only a loss
            that depends on level constrains the outputs of silent targets.

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
                "assign = 'mixit' adds outputs up, so the loss must depend on their level, as neg_snr does."
            )
        if assign == "mixit" and inactive_weight:
            raise ValueError(
                "assign = 'mixit' adds every output to a mixture, so none is inactive. Omit inactive_weight."
            )
        self.assign = assign
        self.inactive_weight = inactive_weight

    @property
    def in_db(self) -> bool:
        """Return whether the values are in dB, so that a threshold in dB is meaningful."""
        return len(self.terms) == 1 and is_in_db(self.terms[0].loss) and not self.inactive_weight

    def __call__(self, estimate: Tensor, target: Tensor, **extras: Any) -> Tensor:
        """Return one loss per example, ``(batch,)``, computed in float32 (or float64) under autocast too.

        Args:
            estimate: Outputs of the model, ``(batch, output, channel, time)``.
            target: ``(batch, source, channel, time)``, at most as many sources as outputs.
            **extras: Further inputs of the loss, by name.

        Raises:
            UserError: If the shapes do not match, or an input of the loss is missing.
        """
        return self._compute(at_least_float32(estimate), at_least_float32(target), extras)[0]

    def with_order(self, estimate: Tensor, target: Tensor, **extras: Any) -> OrderedLosses:
        """Return the losses of `__call__` with order and SI-SDR; SI-SDR costs nothing where it is the loss."""
        estimate = at_least_float32(estimate)
        target = at_least_float32(target)
        losses, values, matched = self._compute(estimate, target, extras)
        if len(self.terms) == 1 and self.terms[0].loss is neg_si_sdr:
            ratio = -values.detach()
        else:
            ratio = si_sdr(matched.estimate.detach(), matched.target)
        # Ratios in the order of the outputs are brought into the order of the targets.
        ratio = ratio.mean(-1) if matched.in_target_order else ratio.mean(-1).gather(1, matched.order)
        return OrderedLosses(losses, matched.order, ratio, (mean_square(target) > SILENCE).all(-1))

    @without_autocast
    def _compute(self, estimate: Tensor, target: Tensor, extras: Extras) -> tuple[Tensor, Tensor, "_Matched"]:
        """Return the losses, the values per signal of the last term that has them, and the matched signals."""
        check_estimate(estimate, target)
        matched = _match(self.terms, estimate, target, extras, assign=self.assign, inactive_weight=self.inactive_weight)
        total = estimate.new_zeros(())
        values = estimate.new_zeros(matched.target.shape[:-1])
        for loss, weight in self.terms:
            term = call_loss(loss, matched.estimate, matched.target, extras)
            if term.dim() == 3:  # one value per signal; otherwise one per example already
                values = term
                term = mean_over_active(values, matched.target) if is_scale_invariant(loss) else values.mean((1, 2))
            total = total + (term if weight == 1 else weight * term)
        if self.inactive_weight:
            total = total + self.inactive_weight * _inactive_level(estimate, target, matched, extras)
        return total, values, matched


def check_estimate(estimate: Tensor, target: Tensor) -> None:
    """Raise an error if the output of a model cannot be compared with the sources.

    Raises:
        UserError: If the shapes do not match; more outputs than sources are allowed.
    """
    fits = estimate.dim() == 4 and estimate.shape[0] == target.shape[0] and estimate.shape[2:] == target.shape[2:]
    if not fits or estimate.shape[1] < target.shape[1]:
        raise UserError(
            f"The model returned {tuple(estimate.shape)}. For sources {tuple(target.shape)} it must return (batch, "
            "source, channel, time) of the same size, with at least as many sources."
        )


class _Matched(NamedTuple):
    """Estimates and the targets that they are compared with.

    With as many outputs as targets, the targets are put in the order of the outputs (``in_target_order`` is False):
    they need no gradient, so this costs one copy and nothing in the backward pass.
    """

    estimate: Tensor
    target: Tensor
    order: Tensor
    in_target_order: bool


def _match(
    terms: Sequence[Term],
    estimate: Tensor,
    target: Tensor,
    extras: Extras,
    *,
    assign: str,
    inactive_weight: float = 0.0,
) -> _Matched:
    """Match outputs with targets as ``assign`` says."""
    if assign == "mixit":
        matrix = best_mixing_matrix(terms, estimate, target, extras)
        sums = torch.einsum("bno,boct->bnct", matrix.to(estimate.dtype), estimate)
        # Records want one output for each target: the most similar one among those that were added up.
        similarity = pair_moments(estimate.detach().transpose(1, 2), target.transpose(1, 2)).dot.mean(1)
        order = torch.where(matrix, similarity.transpose(1, 2).nan_to_num(), -torch.inf).argmax(-1)
        return _Matched(sums, target, order, in_target_order=True)
    order = find_order(estimate, target, terms, assign=assign, extras=extras, inactive_weight=inactive_weight)
    if assign == "fixed":
        return _Matched(estimate[:, : target.shape[1]], target, order, in_target_order=True)
    if estimate.shape[1] != target.shape[1]:
        return _Matched(reorder(estimate, order), target, order, in_target_order=True)
    # argsort inverts a permutation
    return _Matched(estimate, reorder(target, order.argsort(1)), order, in_target_order=False)


@without_autocast
def match_to_targets(
    estimate: Tensor, target: Tensor, signal_loss: SignalLoss | Sequence[Term], *, assign: str
) -> Tensor:
    """Return one estimate for each target, ``(batch, source, channel, time)``, in the order of the targets.

    Outputs without a target are dropped. With MixIT, an estimate is the sum of the outputs that belong to the target.
    """
    if assign == "mixit":
        return _match(as_terms(signal_loss), estimate, target, {}, assign=assign).estimate
    return reorder(estimate, find_order(estimate, target, signal_loss, assign=assign))


def evaluation_loss(assign: str) -> SignalLoss:
    """Return the loss that chooses the order of the outputs in evaluation, whatever the model was trained with."""
    return neg_snr if assign == "mixit" else neg_si_sdr


@without_autocast
def find_order(
    estimate: Tensor,
    target: Tensor,
    signal_loss: SignalLoss | Sequence[Term],
    *,
    assign: str = "permutation",
    extras: Extras | None = None,
    inactive_weight: float = 0.0,
) -> Tensor:
    """Return the order of the outputs with the smallest loss, for each example; channels stay together.

    Only this search compares all pairs, and it needs no gradient. The loss is then computed in its exact form from the
    chosen pairs alone. A silent target has no influence on the order under SI-SDR, as it does not count in the loss.

    Args:
        estimate: ``(batch, output, channel, time)``.
        target: ``(batch, source, channel, time)``; not more sources than outputs.
        signal_loss: ``(estimate, target)`` to one value per signal, or the terms of a sum.
        assign: ``"permutation"``, or ``"fixed"`` for output ``i`` with source ``i``.
        extras: Further inputs of the loss, by name.
        inactive_weight: As in `SeparationLoss`.

    Returns:
        Index of the output for each target, ``(batch, target)``, int64.

    Raises:
        UserError: If there are too many orders for a loss that needs every order as a whole.
    """
    if assign == "fixed":
        return torch.arange(target.shape[1], device=target.device).expand(target.shape[:2])
    extras = extras or {}
    terms = [term for term in as_terms(signal_loss) if uses_estimate(term.loss)]
    # The errors of SA-SDR add up over pairs. Alone, its ratio falls as they fall; in a sum it must be computed whole.
    is_single_term = len(terms) == 1 and not inactive_weight
    sa_sdr_weight = 0.0
    with torch.no_grad():
        pairs = estimate.new_zeros(len(estimate), estimate.shape[1], target.shape[1])
        for loss, weight in terms:
            if unwrap_partial(loss) is neg_sa_sdr and not is_single_term:
                sa_sdr_weight += weight
            else:
                pairs = pairs + weight * pairwise_losses(loss, estimate, target, extras)
        if inactive_weight:
            # Matching an output with an active target saves its penalty.
            level = _levels(estimate, target, extras).mean(-1) / estimate.shape[1]
            pairs = pairs - inactive_weight * level[..., None] * _active_in_any_channel(target)[:, None]
        if sa_sdr_weight:
            return _best_order_with_sa_sdr(pairs, sa_sdr_weight, estimate, target)
        return best_assignment(-pairs)


def _best_order_with_sa_sdr(pairs: Tensor, weight: float, estimate: Tensor, target: Tensor) -> Tensor:
    """Return the order with the smallest sum of its pairs and of a weighted SA-SDR, by trying every order."""
    if estimate.shape[1] > MAX_SA_SDR_SOURCES:
        raise UserError(
            f"neg_sa_sdr in a sum of losses allows at most {MAX_SA_SDR_SOURCES} outputs, as every order is tried. "
            "Use neg_snr instead, or neg_sa_sdr alone."
        )
    orders = all_permutations(estimate.shape[1], target.shape[1], estimate.device)
    columns = torch.arange(target.shape[1], device=estimate.device)
    errors = mse_from_moments(pair_moments(estimate.transpose(1, 2), target.transpose(1, 2))).mean(1)
    # (batch, estimate, target) to the sum over the pairs of each order, (batch, order)
    pair_sums = pairs[:, orders, columns].sum(-1)
    error_sums = errors[:, orders, columns].sum(-1)
    power = mean_square(target).mean(-1).sum(1, keepdim=True)
    total = pair_sums - weight * ratio_db(power, error_sums, floor=1e-13)
    # A NaN would otherwise win the argmin.
    return orders[total.nan_to_num(torch.inf).argmin(1)]


def _inactive_level(estimate: Tensor, target: Tensor, matched: _Matched, extras: Extras) -> Tensor:
    """Return the level of the outputs without an active target, in dB, averaged over all outputs, ``(batch,)``."""
    no_output = torch.zeros(estimate.shape[:2], dtype=torch.bool, device=estimate.device)
    has_active_target = no_output.scatter(1, matched.order, _active_in_any_channel(target))
    return torch.where(has_active_target[..., None], 0.0, _levels(estimate, target, extras)).mean((1, 2))


def _active_in_any_channel(target: Tensor) -> Tensor:
    """Return whether each source is more than silence in at least one channel, ``(batch, source)``."""
    return (mean_square(target) > SILENCE).any(-1)


def _levels(estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """Return the level of each output above a floor 30 dB below the mixture, in dB, ``(batch, output, channel)``.

    Silence has a level of 0 dB. Without a mixture, the sum of the targets replaces it.
    """
    mixture = extras.get("mixture")
    reference = mean_square(target.sum(1) if mixture is None else at_least_float32(mixture))[:, None]
    floor = 1e-3 * reference + SILENCE
    return 10 * ((mean_square(estimate) + floor).log10() - floor.log10())
