"""LOSSES, by name: ``(estimate, target)``, both ``(..., time)``, to one value per signal; lower is better."""

from collections.abc import Callable

from torch import Tensor

from unbraid.losses.waveform import l1, neg_si_sdr, neg_snr

SignalLoss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, SignalLoss] = {"neg_si_sdr": neg_si_sdr, "neg_snr": neg_snr, "l1": l1}

IN_DB: frozenset[SignalLoss] = frozenset({neg_si_sdr, neg_snr})
"""Losses whose values are in dB, so that a threshold in dB means something."""


IGNORE_LEVEL: frozenset[SignalLoss] = frozenset({neg_si_sdr})
"""Losses that do not care for an estimate's gain, and to which a silent target means nothing."""


def ignores_level(loss: SignalLoss | None) -> bool:
    """Whether a loss leaves the level open: one of `IGNORE_LEVEL`, or your own with ``ignores_level = True``."""
    return loss in IGNORE_LEVEL or getattr(loss, "ignores_level", False) is True


def is_in_db(loss: SignalLoss) -> bool:
    """Whether a loss is in dB: one of `IN_DB`, or one of your own with ``unit = "dB"`` as an attribute."""
    return loss in IN_DB or getattr(loss, "unit", None) == "dB"
