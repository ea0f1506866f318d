"""Losses on waveforms: negative SI-SDR, SNR, thresholded SNR and SA-SDR, and L1."""

from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape
from unbraid.metrics import PairMoments, mean_square, mse_from_moments, ratio_db, si_sdr, snr


def neg_si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the negative SI-SDR in dB, the loss form of `unbraid.metrics.si_sdr`; lower is better.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``. Silent targets have no meaningful value; the metric says more.

    Returns:
        One value per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019, arXiv:1811.02508.
    """
    return -si_sdr(estimate, target)


def neg_snr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the negative SNR in dB; lower is better. The gain of the estimate counts.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.

    Returns:
        One value per signal, ``(...,)``; finite for a silent target, whose output it pushes down.

    Raises:
        ValueError: If the shapes differ.
    """
    return -snr(estimate, target)


def neg_thresholded_snr(
    estimate: Tensor, target: Tensor, mixture: Tensor | None = None, *, max_db: float = 30.0
) -> Tensor:
    """Return the negative SNR in dB, saturated at ``max_db``; lower is better.

    Estimates that are nearly right have almost no gradient. With a mixture, its power replaces that of a silent target:
    0 dB then means an output as loud as the mixture, and ``-max_db`` a silent one. Without a mixture, the output of a
    silent target is pushed down as by `neg_snr`.

    Args:
        estimate: ``(..., time)``; ``(batch, source, channel, time)`` if a mixture is passed.
        target: As ``estimate``.
        mixture: ``(batch, channel, time)``.
        max_db: The SNR at which the loss saturates, in dB; above 0, at most 120.

    Returns:
        One value per signal, ``(...,)``, in dB, at least ``-max_db``.

    Raises:
        ValueError: If the shapes differ, or ``max_db`` is out of range.

    Reference:
        Wisdom et al., "Unsupervised sound separation using mixture invariant training", NeurIPS 2020,
        arXiv:2006.12701; for silent targets, arXiv:2011.00803.
    """
    check_same_shape(estimate, target)
    if not 0 < max_db <= 120:
        raise ValueError(f"max_db = {max_db} must be above 0 dB and at most 120 dB.")
    power = mean_square(target)
    if mixture is not None:
        # (batch, channel) to (batch, 1, channel), which broadcasts over the sources
        power = power.where(power > SILENCE, mean_square(mixture)[:, None])
    # The floor is what saturates the ratio: distortion below this share of the power counts as this share.
    return -ratio_db(power, (estimate - target).square().mean(-1), floor=10 ** (-max_db / 10))


def neg_thresholded_snr_from_moments(moments: PairMoments, *, max_db: float = 30.0) -> Tensor:
    """Compute `neg_thresholded_snr` of all pairs, ``(..., estimate, target)``."""
    power = moments.target_power
    if moments.mixture_power is not None:
        power = power.where(power > SILENCE, moments.mixture_power)
    return -ratio_db(power, mse_from_moments(moments), floor=10 ** (-max_db / 10))


def neg_sa_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the negative source-aggregated SDR in dB: one ratio of the energies of all sources; lower is better.

    A silent source needs no exception: its output counts as error, by its energy. A quiet source counts little.

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
    """Return the mean absolute difference of the waveforms.

    Args:
        estimate: Separated signals, ``(..., time)``.
        target: Reference signals, ``(..., time)``.

    Returns:
        One value per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape(estimate, target)
    return (estimate - target).abs().mean(-1)
