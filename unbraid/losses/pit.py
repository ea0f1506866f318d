"""Permutation-invariant training, and fixed order, around any loss on signals."""

from typing import NamedTuple

import torch
from torch import Tensor

from unbraid.dsp import SILENCE
from unbraid.errors import UserError
from unbraid.losses import SignalLoss, ignores_level
from unbraid.losses.waveform import neg_si_sdr
from unbraid.metrics import best_assignment, mean_over_sounding, pairwise_si_sdr, reorder, si_sdr, sounding


class Assigned(NamedTuple):
    """What a loss came to, and how the outputs were held against the targets.

    Attributes:
        losses: ``(batch,)``.
        order: Which output belongs to each target, ``(batch, source)``, int64.
        si_sdr: Of each target's output, mean over channels, in dB, ``(batch, source)``; no gradient.
        sounding: Whether each target is more than silence, ``(batch, source)``.
    """

    losses: Tensor
    order: Tensor
    si_sdr: Tensor
    sounding: Tensor


class SeparationLoss:
    """One loss per example from all of its sources.

    Where silence among the targets means nothing to the loss (SI-SDR), silent ones are left out of an example's mean;
    an example with nothing but silence keeps its values, so that they are seen.

    Args:
        signal_loss: ``(estimate, target)`` to one value per signal.
        assign: ``"permutation"`` takes the order of the outputs that makes the loss smallest, for each example;
            ``"fixed"`` keeps output ``i`` for source ``i``.

    Reference:
        Kolbaek et al., "Multi-talker speech separation with utterance-level permutation invariant training",
        IEEE/ACM TASLP 2017, arXiv:1703.06284.
    """

    def __init__(self, signal_loss: SignalLoss, *, assign: str = "permutation") -> None:
        self.signal_loss, self.assign = signal_loss, assign

    def __call__(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Losses ``(batch,)`` of estimates and targets, both ``(batch, source, channel, time)``, in float32."""
        return self._judged(estimate.float(), target.float())[0]

    def assigned(self, estimate: Tensor, target: Tensor) -> Assigned:
        """Losses as `__call__` gives them, with order and SI-SDR; the latter costs nothing where it is the loss."""
        estimate, target = estimate.float(), target.float()
        losses, values, order, ordered = self._judged(estimate, target)
        ratio = -values.detach() if self.signal_loss is neg_si_sdr else si_sdr(ordered.detach(), target)
        return Assigned(losses, order, ratio.mean(-1), (target.square().mean(-1) > SILENCE).all(-1))

    def _judged(self, estimate: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses, their values for each signal, the order of the outputs, and the outputs in that order."""
        check_estimate(estimate, target)
        order = output_order(estimate, target, self.signal_loss, assign=self.assign)
        ordered = reorder(estimate, order)
        values = self.signal_loss(ordered, target)
        if values.shape != target.shape[:-1]:
            raise UserError(
                f"The loss returned {tuple(values.shape)} for signals {tuple(target.shape)}; "
                f"it must return one value a signal, {tuple(target.shape[:-1])}."
            )
        losses = mean_over_sounding(values, target) if ignores_level(self.signal_loss) else values.mean((1, 2))
        return losses, values, order, ordered


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


def order_as_targets(estimate: Tensor, target: Tensor, signal_loss: SignalLoss, *, assign: str) -> Tensor:
    """Estimates in the order of their targets, ``(batch, source, channel, time)``; outputs to spare are left out."""
    return reorder(estimate, output_order(estimate, target, signal_loss, assign=assign))


def output_order(estimate: Tensor, target: Tensor, signal_loss: SignalLoss, *, assign: str) -> Tensor:
    """Which output belongs to each target, ``(batch, source)``.

    Args:
        estimate: ``(batch, output, channel, time)``.
        target: ``(batch, source, channel, time)``.
        signal_loss: What makes the best order the best.
        assign: As `SeparationLoss` takes it.
    """
    if assign == "fixed":
        return torch.arange(target.shape[1], device=target.device).expand(target.shape[:2])
    return assign_sources(signal_loss, estimate, target)


def assign_sources(signal_loss: SignalLoss, estimate: Tensor, target: Tensor) -> Tensor:
    """Which estimate belongs to which target, for each example; channels stay together.

    Only this search looks at all pairs, and it needs no gradient: the loss is then taken of the chosen pairs alone,
    in its exact form. A silent target has no say in SI-SDR, as it is left out of the loss.

    Args:
        signal_loss: ``(estimate, target)`` to one value per signal.
        estimate: ``(batch, source, channel, time)``.
        target: ``(batch, source, channel, time)``; not more sources than estimates.

    Returns:
        ``(batch, target)``, int64.
    """
    with torch.no_grad():
        if signal_loss is neg_si_sdr:
            pairs = pairwise_si_sdr(estimate.transpose(1, 2), target.transpose(1, 2))
            counts = sounding(target).transpose(1, 2)[:, :, None]
            pairs = torch.where(counts, pairs, 0.0).mean(1)
        else:
            shape = (estimate.shape[0], estimate.shape[1], *target.shape[1:])
            pairs = -signal_loss(estimate[:, :, None].expand(shape), target[:, None].expand(shape)).mean(-1)
        return best_assignment(pairs)
