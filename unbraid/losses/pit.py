"""Permutation-invariant training, and fixed order, around any loss on signals."""

import torch
from torch import Tensor

from unbraid.dsp import SILENCE
from unbraid.losses import SignalLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.metrics import best_assignment, pairwise_si_sdr, reorder


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
        estimate, target = estimate.float(), target.float()
        if self.assign == "permutation":
            estimate = reorder(estimate, assign_sources(self.signal_loss, estimate, target))
        values = self.signal_loss(estimate, target)
        if self.signal_loss is not neg_si_sdr:
            return values.mean(dim=tuple(range(1, values.dim())))
        return _mean_over_sounding(values, target)


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
            counts = _sounding(target).transpose(1, 2)[:, :, None] > 0
            pairs = torch.where(counts, pairs, 0.0).mean(1)
        else:
            shape = (estimate.shape[0], estimate.shape[1], *target.shape[1:])
            pairs = -signal_loss(estimate[:, :, None].expand(shape), target[:, None].expand(shape)).mean(-1)
        return best_assignment(pairs)


def _mean_over_sounding(values: Tensor, target: Tensor) -> Tensor:
    sounding = _sounding(target)
    return (values * sounding).sum((1, 2)) / sounding.sum((1, 2))


def _sounding(target: Tensor) -> Tensor:
    """1 for each signal that is not silent, else 0, ``(batch, source, channel)``; all 1 where all are silent."""
    sounding = (target.square().mean(-1) > SILENCE).to(target.dtype)
    return torch.where(sounding.sum((1, 2), keepdim=True) > 0, sounding, 1.0)
