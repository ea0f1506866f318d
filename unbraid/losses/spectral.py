"""Losses on spectra: multi-resolution STFT and L1, mask inference, deep clustering, whitened k-means."""

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
    """Return spectral convergence plus L1 of log magnitudes, averaged over several resolutions; lower is better.

    Phase does not count. All powers below the floor count as the floor, so an estimate of digital silence has no
    gradient. Spectral convergence is relative to the target and undefined for a silent one. It is omitted there, and
    the log magnitudes alone push the estimate down.

    Args:
        estimate: Separated signals, ``(..., time)``, of any length from one sample up.
        target: Reference signals, ``(..., time)``.
        n_ffts: Samples in a frame, even, for each resolution.
        hop_lengths: Samples from frame to frame, for each resolution.
        win_lengths: Samples in the Hann window, at most the frame, for each resolution.
        floor: Lower bound of the power of a bin, so that its logarithm stays finite.

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
            "equally long, with one number for each resolution."
        )
    not_silent = target.square().mean(-1) > SILENCE
    losses = []
    for n_fft, hop_length, win_length in zip(n_ffts, hop_lengths, win_lengths, strict=True):
        window = _hann(win_length, n_fft, target)
        # Powers, (..., freq, frame). The floor also keeps the gradients of square root and logarithm finite.
        estimate_power = _power(_spectrum(estimate, window, hop_length)).clamp_min(floor)
        target_power = _power(_spectrum(target, window, hop_length)).clamp_min(floor)
        # vector_norm has a gradient of 0 at 0, for a perfect estimate.
        distance = torch.linalg.vector_norm(estimate_power.sqrt() - target_power.sqrt(), dim=(-2, -1))
        convergence = distance / target_power.sum((-2, -1)).sqrt()
        log_distance = 0.5 * (estimate_power.log() - target_power.log()).abs().mean((-2, -1))  # 0.5: power to magnitude
        losses.append(torch.where(not_silent, convergence, 0.0) + log_distance)
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
    """Return L1 of the waveforms plus L1 of complex spectra, summed over several resolutions; lower is better.

    Phase counts.

    Args:
        estimate: Separated signals, ``(..., time)``, of any length from one sample up.
        target: Reference signals, ``(..., time)``.
        win_lengths: Samples in the Hann window, for each resolution.
        hop_samples: Samples from frame to frame, for all resolutions. A ``hop_length`` would be set to that of the
            model's spectrum.
        min_n_fft: Samples in a frame, even; shorter windows are padded with zeros to this length.
        spectral_weight: Weight of the spectra; the weight of the waveforms is 1.

    Returns:
        One value per signal, ``(...,)``.

    Raises:
        ValueError: If the shapes differ.

    Reference:
        Lu et al., "Music source separation with band-split RoPE Transformer", ICASSP 2024, arXiv:2309.02612.
    """
    check_same_shape(estimate, target)
    difference = estimate - target  # the transform is linear, so one spectrum suffices for both signals
    total = difference.abs().mean(-1)
    for win_length in win_lengths:
        window = _hann(win_length, max(win_length, min_n_fft), difference)
        spectrum = _spectrum(difference, window, hop_samples)
        total = total + spectral_weight * spectrum.abs().mean((-2, -1))
    return total


def mask_inference(
    estimate: Tensor, target: Tensor, mixture: Tensor, *, n_fft: int = 256, hop_length: int = 64
) -> Tensor:
    """Return L1 between the magnitudes of the estimate and those of the best real mask; lower is better.

    The truncated phase-sensitive approximation: a mask that keeps the phase of the mixture can at best give the
    projection of the target on that phase, limited to the range from 0 to the magnitude of the mixture. The magnitudes
    of the estimate are those of its waveform.

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
    batch, *middle, channel, time = target.shape
    if mixture.shape != (batch, channel, time):
        raise ValueError(
            f"mixture {tuple(mixture.shape)} must be the (batch, channel, time) of target {tuple(target.shape)}."
        )
    window = _hann(n_fft, n_fft, target).sqrt()
    with torch.no_grad():
        # (batch, 1, ..., 1, channel, freq, frame), which broadcasts over the sources
        mixture_spectrum = _spectrum(mixture.reshape(batch, *[1] * len(middle), channel, time), window, hop_length)
        mixture_magnitude = mixture_spectrum.abs()
        projection = (_spectrum(target, window, hop_length) * mixture_spectrum.conj()).real
        projection = projection / mixture_magnitude.clamp_min(SILENCE)
        best_magnitude = torch.minimum(projection.clamp_min(0), mixture_magnitude)
    return (_spectrum(estimate, window, hop_length).abs() - best_magnitude).abs().mean((-2, -1))


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
    """Return the deep clustering loss: bins of the same source should have the same vector; 0 is perfect.

    For each pair of bins, the dot product of their vectors should be 1 if the same source is the loudest in both, and
    else 0. The loss is the weighted mean of the squared difference over all pairs. It does not depend on length, level,
    or the order of the sources. Silence gives 0.

    Args:
        embedding: A unit vector for each bin, ``(batch, channel, frame, freq, dim)``.
        target: The sources, ``(batch, source, channel, time)``.
        mixture: ``(batch, channel, time)``.
        n_fft: Samples in a frame of the spectrum of the embedding.
        hop_length: Samples from frame to frame of that spectrum.
        weighting: Weight of a bin: ``magnitude``, its share of the magnitude of the mixture; or ``active``, the same
            for all bins above a threshold, and 0 below.
        range_db: Threshold in dB below the loudest bin of the mixture, for ``active``.

    Returns:
        One value per example, ``(batch,)``, the mean of its channels.

    Raises:
        ValueError: If the shapes do not fit each other, or an option is out of range.

    References:
        Hershey et al., "Deep clustering", ICASSP 2016, arXiv:1508.04306. Weights: Wang, Le Roux and Hershey,
        "Alternative objective functions for deep clustering", ICASSP 2018.
    """
    vectors, sources = _weighted_bins(embedding, target, mixture, n_fft, hop_length, weighting, range_db)
    # ||V V' - Y Y'||^2 from small Gram matrices, without the matrix of all pairs of bins.
    vv = vectors.mT @ vectors
    vy = vectors.mT @ sources
    yy = sources.mT @ sources
    values = vv.square().sum((1, 2)) - 2 * vy.square().sum((1, 2)) + yy.square().sum((1, 2))
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
    """Return the squared distance of the whitened vectors of each source's bins from their mean; lower is better.

    With vectors of size D and C sources that are the loudest in at least one bin, it lies between D - C, where the
    vectors separate the sources and nothing else, and D. Apart from the ridge, an invertible linear map of the vectors
    changes nothing. A source that is nowhere the loudest has no effect. Silence gives D, without a gradient.

    Args:
        embedding: A vector for each bin, ``(batch, channel, frame, freq, dim)``.
        target: The sources, ``(batch, source, channel, time)``.
        mixture: ``(batch, channel, time)``.
        n_fft: Samples in a frame of the spectrum of the embedding.
        hop_length: Samples from frame to frame of that spectrum.
        weighting: Weight of a bin: ``magnitude``, its share of the magnitude of the mixture; or ``active``, the same
            for all bins above a threshold, and 0 below.
        range_db: Threshold in dB below the loudest bin of the mixture, for ``active``.
        ridge: Added to the power in every direction before whitening. The best vectors span few directions, so their
            covariance has no inverse without it.

    Returns:
        One value per example, ``(batch,)``, the mean of its channels.

    Raises:
        ValueError: If the shapes do not fit each other, or an option is out of range.

    Reference:
        Wang, Le Roux and Hershey, "Alternative objective functions for deep clustering", ICASSP 2018.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge = {ridge} must be above 0.")
    vectors, sources = _weighted_bins(embedding, target, mixture, n_fft, hop_length, weighting, range_db)
    n_dims = vectors.shape[-1]
    power = vectors.mT @ vectors + ridge * torch.eye(n_dims, dtype=vectors.dtype, device=vectors.device)
    # torch.linalg.cholesky would wait for the device to check for errors.
    root = torch.linalg.cholesky_ex(power)[0]
    # Whitened sums of the vectors of each source, (batch * channel, dim, source).
    whitened = torch.linalg.solve_triangular(root, vectors.mT @ sources, upper=False)
    source_weight = sources.square().sum(1)
    explained = whitened.square().sum(1) / source_weight.clamp_min(SILENCE)
    return (n_dims - explained.sum(-1)).unflatten(0, embedding.shape[:2]).mean(1)


def _weighted_bins(
    embedding: Tensor, target: Tensor, mixture: Tensor, n_fft: int, hop_length: int, weighting: str, range_db: float
) -> tuple[Tensor, Tensor]:
    """Return vectors and one-hot sources of all bins, times the root of the bin's weight; the weights sum to 1.

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
                f"With n_fft {n_fft} and hop_length {hop_length} the embedding must be (batch, channel, frame, freq, "
                f"dim) with {tuple(magnitude.shape)} before dim, not {tuple(embedding.shape[:-1])}."
            )
        indices = torch.arange(target.shape[1], device=target.device)
        loudest = rearrange(loudness.argmax(1), "b c l f -> (b c) (l f) 1") == indices
        # argmax hides a NaN in a source; put it into the weights, so that the example has a NaN loss.
        magnitude = magnitude + 0 * loudness.sum(1)
        weight = rearrange(magnitude, "b c l f -> (b c) (l f) 1")
        if weighting == "active":
            threshold = weight.amax(1, keepdim=True) * 10 ** (-range_db / 20)
            weight = torch.where((weight >= threshold) & (threshold > 0), 1.0, 0 * weight)  # 0 * weight keeps a NaN
        root = (weight / weight.sum(1, keepdim=True).clamp_min(SILENCE)).sqrt()
    vectors = rearrange(embedding, "b c l f d -> (b c) (l f) d").to(root.dtype)
    return vectors * root, loudest * root


def _spectrum(waveform: Tensor, window: Tensor, hop_length: int) -> Tensor:
    return stft(waveform, n_fft=len(window), hop_length=hop_length, window=window)


def _hann(win_length: int, n_fft: int, like: Tensor) -> Tensor:
    """Return a Hann window centred in a frame, ``(n_fft,)``, on the device of a signal and at least as precise.

    Raises:
        ValueError: If the frame is odd, or the window longer than the frame.
    """
    if n_fft % 2 or not 1 <= win_length <= n_fft:
        raise ValueError(f"n_fft {n_fft} must be even, and the window of {win_length} samples at most as long.")
    window = torch.hann_window(win_length, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    missing = n_fft - win_length
    return F.pad(window, (missing // 2, missing - missing // 2))


def _power(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(-1)
