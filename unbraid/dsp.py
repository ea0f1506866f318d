"""STFT, resampling, dB and shape checks for signals ``(..., time)``, and a guard against autocast."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.type_aliases import AudioArray

P = ParamSpec("P")
R = TypeVar("R")

SILENCE = 1e-20
"""Mean power below which a signal counts as silence: -200 dB, far below any recording."""


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of tensors so that autocast does not apply inside it.

    A product of signals in bfloat16 is accurate to 0.02 dB at best, and can select the wrong order of sources.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(value.device.type for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def resample(audio: AudioArray, from_rate: int, to_rate: int) -> AudioArray:
    """Resample ``(channel, time)`` to another rate in Hz; the duration is rounded up to a whole sample."""
    if from_rate == to_rate or audio.shape[-1] == 0:
        return audio
    # Rounded up; soxr's own rounding can differ by a sample, which fit_length corrects.
    n_samples = -(-audio.shape[-1] * to_rate // from_rate)
    return fit_length(np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate).T), n_samples)


def fit_length(audio: AudioArray, n_samples: int) -> AudioArray:
    """Trim, or pad with zeros at the end, to exactly ``n_samples``."""
    missing = n_samples - audio.shape[-1]
    if missing <= 0:
        return audio[..., :n_samples]
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])


def power_db(audio: AudioArray) -> float:
    """Return the mean power in dB of full scale (0 dB is a square wave of amplitude 1); silence is -200 dB."""
    # In float64: a float32 sum over minutes of samples would lose digits.
    return float(10 * np.log10(np.square(audio, dtype=np.float64).mean() + SILENCE))


def db_to_amplitude(level_db: float) -> float:
    """Return the amplitude factor that changes a level by this many dB."""
    return float(10 ** (level_db / 20))


def stft(waveform: Tensor, *, n_fft: int, hop_length: int, window: Tensor) -> Tensor:
    """Compute the spectrum of centred frames, in float32 (or float64) under autocast too.

    The result equals that of ``torch.stft`` with its centring by reflection. Signals that are too short to be reflected
    are padded with zeros first, so that every length from one sample up has a spectrum.

    Args:
        waveform: ``(..., time)``.
        n_fft: Samples in a frame, even.
        hop_length: Samples from frame to frame.
        window: ``(n_fft,)``, on the waveform's device.

    Returns:
        Complex, ``(..., freq, frame)``, with ``n_fft / 2 + 1`` frequencies and ``time // hop_length + 1`` frames; for
        short signals, as many frames as the padded signal has.
    """
    signals = waveform.to(torch.promote_types(waveform.dtype, torch.float32)).reshape(-1, waveform.shape[-1])
    missing = n_fft // 2 + 1 - signals.shape[-1]  # reflecting n samples needs n + 1
    reflected = F.pad(F.pad(signals, (0, max(0, missing))), (n_fft // 2, n_fft // 2), mode="reflect")
    frames = reflected.unfold(-1, n_fft, hop_length) * window.to(signals.dtype)
    spectrum = torch.fft.rfft(frames).transpose(-1, -2)
    return spectrum.reshape(*waveform.shape[:-1], *spectrum.shape[-2:])


def istft(spectrum: Tensor, *, n_fft: int, hop_length: int, window: Tensor, time: int) -> Tensor:
    """Invert `stft` and return ``time`` samples.

    The result equals that of ``torch.istft``, which would wait for the device to check for gaps between windows.

    Args:
        spectrum: Complex, ``(..., freq, frame)``.
        n_fft: As in `stft`.
        hop_length: As in `stft`; at most half of ``n_fft``.
        window: As in `stft`.
        time: Samples to return; zeros beyond the last frame.

    Returns:
        ``(..., time)``.
    """
    flat = spectrum.reshape(-1, *spectrum.shape[-2:])
    frames = torch.fft.irfft(flat.transpose(-1, -2), n=n_fft) * window.to(flat.real.dtype)
    weights = window.to(flat.real.dtype).square().expand(1, frames.shape[1], n_fft)
    start = n_fft // 2  # where the signal begins, as frames are centred
    overlapped = overlap_add(frames, hop_length)[:, start : start + time]
    weight = overlap_add(weights, hop_length)[:, start : start + time]
    waveform = overlapped / weight.clamp_min(1e-11)
    return F.pad(waveform, (0, time - waveform.shape[-1])).reshape(*spectrum.shape[:-2], time)


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Overlap-add frames ``(batch, frame, sample)``, ``hop_length`` apart, to ``(batch, time)``.

    The time is a whole number of hops, with zeros at the end where the frames are not a multiple of the hop.
    """
    # Split frames into parts as long as the hop. Part i of a frame belongs i hops later, so shift it and add up.
    size = frames.shape[-1]
    parts = F.pad(frames, (0, -size % hop_length)).unflatten(-1, (-1, hop_length)).unbind(2)
    last = len(parts) - 1
    shifted = [F.pad(part, (0, 0, i, last - i)) for i, part in enumerate(parts)]
    return torch.stack(shifted).sum(0).flatten(1)


def check_same_shape(estimate: Tensor, target: Tensor) -> None:
    """Raise an error instead of broadcasting signals of different shapes.

    Raises:
        ValueError: If the shapes differ.
    """
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} must have the same shape.")
