"""Negative SI-SDR, SNR, thresholded SNR, SA-SDR; L1."""

from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape
from unbraid.metrics import Products, distortion_of, mean_square, ratio_db, si_sdr, snr


def neg_si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Negative `si_sdr`: ``(..., time)`` twice in, ``(...,)`` out, in dB; lower is better."""
    return -si_sdr(estimate, target)


def neg_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Negative `snr`: ``(..., time)`` twice in, ``(...,)`` out, in dB; lower is better."""
    return -snr(estimate, target)


def neg_thresholded_snr(
    estimate: Tensor, target: Tensor, mixture: Tensor | None = None, *, max_db: float = 30.0
) -> Tensor:
    """Negative SNR that levels off at ``max_db``, so that what is nearly right no longer pulls.

    The power of a silent target is taken to be the mixture's, where that is given: a loss of 0 dB means an output as
    loud as the mixture, and of ``-max_db`` silence. Without it the output is pushed down as `neg_snr` does.

    Args:
        estimate: ``(..., time)``; ``(batch, source, channel, time)`` where the mixture is given.
        target: As ``estimate``.
        mixture: ``(batch, channel, time)``.
        max_db: The best that is told apart, in dB.

    Returns:
        ``(...,)``, in dB, at least ``-max_db``.

    Raises:
        ValueError: If the shapes differ, or ``max_db`` is not above 0.

    Reference:
        Wisdom et al., "Unsupervised sound separation using mixture invariant training", NeurIPS 2020,
        arXiv:2006.12701; for silent targets, arXiv:2011.00803.
    """
    check_same_shape(estimate, target)
    if not 0 < max_db <= 120:
        raise ValueError(f"max_db = {max_db} must be above 0 dB and at most 120 dB.")
    power = mean_square(target)
    if mixture is not None:
        power = power.where(power > SILENCE, mean_square(mixture)[:, None])
    return -ratio_db(power, (estimate - target).square().mean(-1), floor=10 ** (-max_db / 10))


def neg_thresholded_snr_of(products: Products, *, max_db: float = 30.0) -> Tensor:
    """`neg_thresholded_snr` of all pairs from sums alone, ``(..., estimate, target)``."""
    power = products.target_power
    if products.mixture_power is not None:
        power = power.where(power > SILENCE, products.mixture_power)
    return -ratio_db(power, distortion_of(products), floor=10 ** (-max_db / 10))


def neg_sa_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Negative source-aggregated SDR: the energies of all sources' errors in one ratio, in dB; lower is better.

    A silent source counts by what its output is heard, so that it needs no exception; and a quiet one counts little.

    Args:
        estimate: ``(batch, source, channel, time)``.
        target: As ``estimate``.

    Returns:
        One value per example, ``(batch,)``.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        von Neumann et al., "SA-SDR: a novel loss function for separation of meeting style data", ICASSP 2022,
        arXiv:2110.15581.
    """
    check_same_shape(estimate, target)
    axes = tuple(range(1, target.dim()))
    return -ratio_db(target.square().mean(axes), (estimate - target).square().mean(axes), floor=1e-13)


def l1(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference: ``(..., time)`` twice in, ``(...,)`` out.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(estimate, target)
    return (estimate - target).abs().mean(-1)
