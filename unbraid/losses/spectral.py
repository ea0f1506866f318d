"""Losses on spectra: multi-resolution STFT, phase-sensitive magnitudes, deep clustering and whitened k-means."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from unbraid.dsp import SILENCE, check_same_shape, stft, without_autocast


def multi_resolution_stft(
    estimate: Tensor,
    target: Tensor,
    *,
    n_ffts: tuple[int, ...] = (2048, 1024, 512),
    hop_lengths: tuple[int, ...] = (240, 120, 50),
    win_lengths: tuple[int, ...] = (1200, 600, 240),
    floor: float = 1e-8,
) -> Tensor:
    """Distance of magnitudes at several resolutions: spectral convergence plus L1 of logarithms, averaged.

    Phase does not count. What lies below the floor counts as equally silent, so that an estimate of digital silence has
    no gradient. Spectral convergence is relative to the target and means nothing where that is silent: it is left out
    there, and the logarithms alone push the estimate down.

    Args:
        estimate: Separated signals, ``(..., time)``, of any length from one sample up.
        target: Reference signals, ``(..., time)``.
        n_ffts: Samples in a frame, even, for each resolution.
        hop_lengths: Samples from frame to frame, for each resolution.
        win_lengths: Samples under the Hann window, at most the frame, for each resolution.
        floor: Smallest power of a bin.

    Returns:
        One value per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ, or the resolutions do not fit together.

    Reference:
        Yamamoto, Song and Kim, "Parallel WaveGAN", ICASSP 2020, arXiv:1910.11480.
    """
    check_same_shape(estimate, target)
    if not len(n_ffts) == len(hop_lengths) == len(win_lengths) >= 1:
        raise ValueError(
            f"n_ffts {list(n_ffts)}, hop_lengths {list(hop_lengths)} and win_lengths {list(win_lengths)} must be "
            "equally long, one number for each resolution."
        )
    sounds = target.square().mean(-1) > SILENCE
    losses = []
    for n_fft, hop_length, win_length in zip(n_ffts, hop_lengths, win_lengths, strict=True):
        window = _hann(win_length, n_fft, target)
        given, wanted = (
            _power(_spectrum(signal, window, hop_length)).clamp_min(floor) for signal in (estimate, target)
        )
        distance = torch.linalg.vector_norm(given.sqrt() - wanted.sqrt(), dim=(-2, -1))  # its gradient at 0 is 0
        convergence = distance / wanted.sum((-2, -1)).sqrt()
        logarithms = 0.5 * (given.log() - wanted.log()).abs().mean((-2, -1))
        losses.append(torch.where(sounds, convergence, 0.0) + logarithms)
    return torch.stack(losses).mean(0)


def multi_resolution_l1(
    estimate: Tensor,
    target: Tensor,
    *,
    win_lengths: tuple[int, ...] = (4096, 2048, 1024, 512, 256),
    hop_samples: int = 147,
    min_n_fft: int = 2048,
    spectral_weight: float = 1.0,
) -> Tensor:
    """L1 of the waveforms plus that of complex spectra at several resolutions, summed; phase counts.

    Args:
        estimate: Separated signals, ``(..., time)``, of any length from one sample up.
        target: Reference signals, ``(..., time)``.
        win_lengths: Samples under the Hann window, for each resolution.
        hop_samples: From frame to frame, for all of them; a `hop_length` would be that of the model's own spectrum.
        min_n_fft: Shorter windows are continued with zeros to a frame of so many samples, even.
        spectral_weight: How much the spectra count; the waveforms count 1.

    Returns:
        One value per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Lu et al., "Music source separation with band-split RoPE Transformer", ICASSP 2024, arXiv:2309.02612.
    """
    check_same_shape(estimate, target)
    difference = estimate - target  # the transform is linear: one does for both
    total = difference.abs().mean(-1)
    for win_length in win_lengths:
        window = _hann(win_length, max(win_length, min_n_fft), difference)
        spectrum = _spectrum(difference, window, hop_samples)
        total = total + spectral_weight * spectrum.abs().mean((-2, -1))
    return total


def mask_inference(
    estimate: Tensor, target: Tensor, mixture: Tensor, *, n_fft: int = 256, hop_length: int = 64
) -> Tensor:
    """L1 between the estimate's magnitudes and what a mask on the mixture's phase could best give of the target.

    That is the target's part in the mixture's phase, from 0 to the mixture's magnitude: the truncated phase-sensitive
    approximation. The estimate's magnitudes are those of its waveform.

    Args:
        estimate: Separated signals, ``(batch, ..., channel, time)``.
        target: Reference signals, as the estimate.
        mixture: ``(batch, channel, time)``.
        n_fft: Samples in a frame, even, under the square root of a Hann window.
        hop_length: Samples from frame to frame.

    Returns:
        One value per signal, ``(batch, ..., channel)``.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Erdogan et al., "Phase-sensitive and recognition-boosted speech separation using deep recurrent neural
        networks", ICASSP 2015; truncated as in Kolbaek et al., TASLP 2017, arXiv:1703.06284.
    """
    check_same_shape(estimate, target)
    batch, *between, channel, time = target.shape
    if mixture.shape != (batch, channel, time):
        raise ValueError(
            f"mixture {tuple(mixture.shape)} must be the (batch, channel, time) of target {tuple(target.shape)}."
        )
    window = _hann(n_fft, n_fft, target).sqrt()
    with torch.no_grad():
        mixed = _spectrum(mixture.reshape(batch, *[1] * len(between), channel, time), window, hop_length)
        ceiling = mixed.abs()
        in_phase = (_spectrum(target, window, hop_length) * mixed.conj()).real / ceiling.clamp_min(SILENCE)
        wanted = torch.minimum(in_phase.clamp_min(0), ceiling)
    return (_spectrum(estimate, window, hop_length).abs() - wanted).abs().mean((-2, -1))


@without_autocast
def deep_clustering(
    embedding: Tensor,
    target: Tensor,
    mixture: Tensor,
    *,
    n_fft: int,
    hop_length: int,
    weighting: Literal["magnitude", "active"] = "magnitude",
    range_db: float = 40.0,
) -> Tensor:
    """How far the similarity of two bins is from whether the same source is the loudest in both.

    The weighted mean, over all pairs of bins, of the squared difference between the product of their vectors and 1 or
    0: from 0, whatever the length and level. The order of the sources does not count. Silence gives 0.

    Args:
        embedding: A vector of unit length for each bin, ``(batch, channel, frame, freq, dim)``.
        target: The sources, ``(batch, source, channel, time)``.
        mixture: ``(batch, channel, time)``.
        n_fft: Of the spectrum that the embedding belongs to.
        hop_length: Of the same.
        weighting: How much a bin counts: its share of the mixture's ``magnitude``; or ``active``, all the same above a
            limit and nothing below.
        range_db: How far below the loudest bin of the mixture that limit is.

    Returns:
        One value per example, ``(batch,)``, the mean of its channels.

    Raises:
        ValueError: If the shapes do not belong to each other.

    References:
        Hershey et al., "Deep clustering", ICASSP 2016, arXiv:1508.04306. Weights: Wang, Le Roux and Hershey,
        "Alternative objective functions for deep clustering", ICASSP 2018.
    """
    vectors, sources = _weighted_bins(embedding, target, mixture, n_fft, hop_length, weighting, range_db)
    own, across, theirs = vectors.mT @ vectors, vectors.mT @ sources, sources.mT @ sources
    values = own.square().sum((1, 2)) - 2 * across.square().sum((1, 2)) + theirs.square().sum((1, 2))
    return values.unflatten(0, embedding.shape[:2]).mean(1)


@without_autocast
def whitened_kmeans(
    embedding: Tensor,
    target: Tensor,
    mixture: Tensor,
    *,
    n_fft: int,
    hop_length: int,
    weighting: Literal["magnitude", "active"] = "magnitude",
    range_db: float = 40.0,
    ridge: float = 1e-4,
) -> Tensor:
    """How far the whitened vectors of each source's bins are from their mean, in squares.

    With D numbers in a vector and C sources that are somewhere the loudest it lies between D - C, where the vectors
    tell the sources apart and nothing else, and D. Any invertible map of the vectors changes nothing, but for the
    ridge. A source that is nowhere the loudest has no say; silence gives D, and no gradient.

    Args:
        embedding: A vector for each bin, ``(batch, channel, frame, freq, dim)``.
        target: The sources, ``(batch, source, channel, time)``.
        mixture: ``(batch, channel, time)``.
        n_fft: Of the spectrum that the embedding belongs to.
        hop_length: Of the same.
        weighting: As `deep_clustering` takes it.
        range_db: As `deep_clustering` takes it.
        ridge: Added to the mean power of every direction before whitening. Vectors that lie in few directions, as the
            best ones do, have no other inverse.

    Returns:
        One value per example, ``(batch,)``, the mean of its channels.

    Raises:
        ValueError: If the shapes do not belong to each other.

    Reference:
        Wang, Le Roux and Hershey, "Alternative objective functions for deep clustering", ICASSP 2018.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge = {ridge} must be above 0.")
    vectors, sources = _weighted_bins(embedding, target, mixture, n_fft, hop_length, weighting, range_db)
    n_dims = vectors.shape[-1]
    power = vectors.mT @ vectors + ridge * torch.eye(n_dims, dtype=vectors.dtype, device=vectors.device)
    root = torch.linalg.cholesky_ex(power)[0]  # one that raises would wait for the device
    whitened = torch.linalg.solve_triangular(root, vectors.mT @ sources, upper=False)
    share = sources.square().sum(1)
    told = whitened.square().sum(1) / share.clamp_min(SILENCE)
    return (n_dims - told.sum(-1)).unflatten(0, embedding.shape[:2]).mean(1)


def _weighted_bins(
    embedding: Tensor, target: Tensor, mixture: Tensor, n_fft: int, hop_length: int, weighting: str, range_db: float
) -> tuple[Tensor, Tensor]:
    """Vectors and one-hot sources of all bins, times the root of the bin's weight; the weights sum to 1.

    Returns:
        ``(batch * channel, bin, dim)`` and ``(batch * channel, bin, source)``, in float32 at least.
    """
    if weighting not in ("magnitude", "active"):
        raise ValueError(f"weighting = {weighting!r} is not one of magnitude, active.")
    if not 0 < range_db < float("inf"):
        raise ValueError(f"range_db = {range_db} must be above 0 dB.")
    if embedding.dim() != 5 or target.dim() != 4 or mixture.shape != (*target.shape[:1], *target.shape[2:]):
        raise ValueError(
            f"embedding {tuple(embedding.shape)}, target {tuple(target.shape)} and mixture {tuple(mixture.shape)} must "
            "be (batch, channel, frame, freq, dim), (batch, source, channel, time) and (batch, channel, time)."
        )
    window = _hann(n_fft, n_fft, target).sqrt()
    with torch.no_grad():
        loudness = _spectrum(target, window, hop_length).abs().transpose(-1, -2)
        magnitude = _spectrum(mixture, window, hop_length).abs().transpose(-1, -2)
        if embedding.shape[:-1] != magnitude.shape:
            raise ValueError(
                f"An embedding of n_fft {n_fft} and hop_length {hop_length} must begin with "
                f"{tuple(magnitude.shape)} here, (batch, channel, frame, freq), not {tuple(embedding.shape[:-1])}."
            )
        n_sources = torch.arange(target.shape[1], device=target.device)
        loudest = rearrange(loudness.argmax(1), "b c l f -> (b c) (l f) 1") == n_sources
        magnitude = magnitude + 0 * loudness.sum(1)  # what is NaN in a source must not get lost in the comparison
        weight = rearrange(magnitude, "b c l f -> (b c) (l f) 1")
        if weighting == "active":
            limit = weight.amax(1, keepdim=True) * 10 ** (-range_db / 20)
            weight = torch.where((weight >= limit) & (limit > 0), 1.0, 0 * weight)
        root = (weight / weight.sum(1, keepdim=True).clamp_min(SILENCE)).sqrt()
    vectors = rearrange(embedding, "b c l f d -> (b c) (l f) d").to(root.dtype)
    return vectors * root, loudest * root


def _spectrum(waveform: Tensor, window: Tensor, hop_length: int) -> Tensor:
    return stft(waveform, n_fft=len(window), hop_length=hop_length, window=window)


def _hann(win_length: int, n_fft: int, like: Tensor) -> Tensor:
    """A Hann window in the middle of a frame, ``(n_fft,)``, where a signal is and as precise."""
    if n_fft % 2 or not 1 <= win_length <= n_fft:
        raise ValueError(f"A frame of {n_fft} samples must be even, and its window of {win_length} at most as long.")
    window = torch.hann_window(win_length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    missing = n_fft - win_length
    return F.pad(window, (missing // 2, missing - missing // 2))


def _power(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(-1)
