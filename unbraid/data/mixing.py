"""Mix sources: levels, and noise at an SNR."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unbraid.data.excerpt import SILENT_DB
from unbraid.dsp import db_to_amplitude, power_db
from unbraid.type_aliases import AudioArray


class Mixture(NamedTuple):
    """A mixture and its parts, all of the same length."""

    mixture: AudioArray  # (channel, time)
    sources: AudioArray  # (source, channel, time)
    noise: AudioArray | None  # (channel, time)


def mix(
    sources: Sequence[AudioArray], levels_db: Sequence[float], noise: AudioArray | None = None, snr_db: float = 0.0
) -> Mixture:
    """Mix sources, each at its own level, and noise at an SNR.

    Args:
        sources: Each ``(channel, time)``, all of one length.
        levels_db: Mean power of each source after scaling, in dB of full scale. Silent sources stay silent.
        noise: ``(channel, time)``, or None.
        snr_db: Level of the sum of the sources relative to the noise, in dB.

    Returns:
        The mixture, which is exactly the sum of its parts. If its peak exceeds 0.99, all are scaled down together.
    """
    scaled = np.stack([_scale_to_level(source, level) for source, level in zip(sources, levels_db, strict=True)])
    total = scaled.sum(axis=0)
    if noise is not None:
        noise = _scale_to_level(noise, power_db(total) - snr_db)
        total = total + noise
    peak = float(np.abs(total).max(initial=0.0))
    if peak > 0.99:
        # Scale the parts and add them up again: scaling the sum would differ from the sum of the parts by rounding.
        gain = np.float32(0.99 / peak)
        scaled = scaled * gain
        noise = None if noise is None else noise * gain
        total = scaled.sum(axis=0) if noise is None else scaled.sum(axis=0) + noise
    return Mixture(total, scaled, noise)


def _scale_to_level(audio: AudioArray, level_db: float) -> AudioArray:
    current_db = power_db(audio)
    if current_db < SILENT_DB:  # amplified silence would be quantisation noise
        return audio
    return audio * np.float32(db_to_amplitude(level_db - current_db))
