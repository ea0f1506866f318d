"""Negative SNR and SI-SDR, L1."""

from torch import Tensor

from unbraid.dsp import check_same_shape
from unbraid.metrics import si_sdr, snr


def neg_si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Negative `si_sdr`: ``(..., time)`` twice in, ``(...,)`` out, in dB; lower is better."""
    return -si_sdr(estimate, target)


def neg_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Negative `snr`: ``(..., time)`` twice in, ``(...,)`` out, in dB; lower is better."""
    return -snr(estimate, target)


def l1(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference: ``(..., time)`` twice in, ``(...,)`` out.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(estimate, target)
    return (estimate - target).abs().mean(-1)
