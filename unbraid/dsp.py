"""Resampling, dB, and shape checks on ``(..., time)``."""

import numpy as np
import soxr
from torch import Tensor

from unbraid.audio import Audio

SILENCE = 1e-20
"""Mean power below which a signal counts as silence in a ratio: -200 dB, far under any recording."""


def resample(audio: Audio, from_rate: int, to_rate: int) -> Audio:
    """Change the sample rate of ``(channel, time)``, keeping the duration to the nearest sample above."""
    if from_rate == to_rate or audio.shape[-1] == 0:
        return audio
    n_samples = -(-audio.shape[-1] * to_rate // from_rate)
    return fit_length(np.ascontiguousarray(soxr.resample(audio.T, from_rate, to_rate).T), n_samples)


def fit_length(audio: Audio, n_samples: int) -> Audio:
    """Cut, or pad with zeros at the end, to exactly ``n_samples``."""
    missing = n_samples - audio.shape[-1]
    if missing <= 0:
        return audio[..., :n_samples]
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])


def power_db(audio: Audio) -> float:
    """Mean power in dB of full scale (a square wave of amplitude 1 has 0); silence is -200."""
    return float(10 * np.log10(np.square(audio, dtype=np.float64).mean() + SILENCE))


def to_amplitude(level_db: float) -> float:
    """The factor that changes a level by so many dB."""
    return float(10 ** (level_db / 20))


def check_same_shape(estimate: Tensor, target: Tensor) -> None:
    """Refuse a pair that would only fit by broadcasting.

    Raises:
        ValueError: If the shapes differ.
    """
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} must have the same shape.")
