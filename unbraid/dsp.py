"""STFT, resampling, dB, shape checks on ``(..., time)``, and what autocast must not touch."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.type_aliases import AudioArray

Given = ParamSpec("Given")
Result = TypeVar("Result")

SILENCE = 1e-20
"""Mean power below which a signal counts as silence in a ratio: -200 dB, far under any recording."""


def without_autocast(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function, with its tensors taken in the precision they have, whatever autocast it is called under.

    A product of signals in bfloat16 is right to 0.02 dB at best, and takes another order of sources for the best one.
    """

    @wraps(function)
    def computed(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        kind = next(given.device.type for given in [*args, *kwargs.values()] if isinstance(given, Tensor))
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return computed


def resample(audio: AudioArray, from_rate: int, to_rate: int) -> AudioArray:
    """Change the sample rate of ``(channel, time)``, keeping the duration to the nearest sample above."""
    if from_rate == to_rate or audio.shape[-1] == 0:
        return audio
    n_samples = -(-audio.shape[-1] * to_rate // from_rate)
    return fit_length(np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate).T), n_samples)


def fit_length(audio: AudioArray, n_samples: int) -> AudioArray:
    """Cut, or pad with zeros at the end, to exactly ``n_samples``."""
    missing = n_samples - audio.shape[-1]
    if missing <= 0:
        return audio[..., :n_samples]
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])


def power_db(audio: AudioArray) -> float:
    """Mean power in dB of full scale (a square wave of amplitude 1 has 0); silence is -200."""
    return float(10 * np.log10(np.square(audio, dtype=np.float64).mean() + SILENCE))


def db_to_amplitude(level_db: float) -> float:
    """The factor that changes a level by so many dB."""
    return float(10 ** (level_db / 20))


def stft(waveform: Tensor, *, n_fft: int, hop_length: int, window: Tensor) -> Tensor:
    """Spectrum of centred frames, in float32 (float64 stays) under autocast too.

    It equals ``torch.stft`` with its centring by reflection, but for signals too short to be reflected: these are
    continued with zeros first, so that every length from one sample up has a spectrum.

    Args:
        waveform: ``(..., time)``.
        n_fft: Samples in a frame, even.
        hop_length: Samples from frame to frame.
        window: ``(n_fft,)``, on the waveform's device.

    Returns:
        Complex, ``(..., freq, frame)``, with ``n_fft / 2 + 1`` frequencies and ``time // hop_length + 1`` frames or,
        for short signals, those of the continued signal.
    """
    wide = waveform.to(torch.promote_types(waveform.dtype, torch.float32)).reshape(-1, waveform.shape[-1])
    missing = n_fft // 2 + 1 - wide.shape[-1]
    reflected = F.pad(F.pad(wide, (0, max(0, missing))), (n_fft // 2, n_fft // 2), mode="reflect")
    frames = reflected.unfold(-1, n_fft, hop_length) * window.to(wide.dtype)
    spectrum = torch.fft.rfft(frames).transpose(-1, -2)
    return spectrum.reshape(*waveform.shape[:-1], *spectrum.shape[-2:])


def istft(spectrum: Tensor, *, n_fft: int, hop_length: int, window: Tensor, time: int) -> Tensor:
    """The waveform that a spectrum belongs to: the inverse of `stft`, ``time`` samples long.

    Equals ``torch.istft``, which would wait for the device to see whether the windows leave gaps.

    Args:
        spectrum: Complex, ``(..., freq, frame)``.
        n_fft: As `stft` had it.
        hop_length: As `stft` had it; at most half of ``n_fft``.
        window: As `stft` had it.
        time: Samples wanted; zeros follow where the frames do not reach.

    Returns:
        ``(..., time)``.
    """
    flat = spectrum.reshape(-1, *spectrum.shape[-2:])
    frames = torch.fft.irfft(flat.transpose(-1, -2), n=n_fft) * window.to(flat.real.dtype)
    weights = window.to(flat.real.dtype).square().expand(1, frames.shape[1], n_fft)
    first = n_fft // 2
    summed = overlap_add(frames, hop_length)[:, first : first + time]
    covered = overlap_add(weights, hop_length)[:, first : first + time]
    waveform = summed / covered.clamp_min(1e-11)
    return F.pad(waveform, (0, time - waveform.shape[-1])).reshape(*spectrum.shape[:-2], time)


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Frames, ``(batch, frame, sample)``, laid over each other ``hop_length`` apart and summed: ``(batch, time)``.

    The time is that of whole hops, with zeros at the end where the frames are not a multiple of the hop.
    """
    size = frames.shape[-1]
    parts = F.pad(frames, (0, -size % hop_length)).unflatten(-1, (-1, hop_length)).unbind(2)
    last = len(parts) - 1
    shifted = [F.pad(part, (0, 0, i, last - i)) for i, part in enumerate(parts)]
    return torch.stack(shifted).sum(0).flatten(1)


def check_same_shape(estimate: Tensor, target: Tensor) -> None:
    """Refuse a pair that would only fit by broadcasting.

    Raises:
        ValueError: If the shapes differ.
    """
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} must have the same shape.")
