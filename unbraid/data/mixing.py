"""Reading excerpts and mixing them: levels, noise at an SNR, and checks of the audio before it is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from unbraid.audio import first_bad_sample, read_audio
from unbraid.data.tracks import Track
from unbraid.dsp import db_to_amplitude, fit_length, power_db, resample
from unbraid.errors import AudioError
from unbraid.records import EventCode
from unbraid.type_aliases import AudioArray

SILENT_DB = -80.0
"""Mean power in dB of full scale below which audio counts as silent: a few quantisation steps of 16-bit audio."""

WHOLE_FILE_SECONDS = 60.0
"""Files up to this length are checked as a whole when they are first drawn; of longer ones only the excerpt is read."""

LENGTH_TOLERANCE_SECONDS = 0.1
"""How much shorter than listed a file may be; durations in manifests are rounded."""


class Mixture(NamedTuple):
    """A mixture and its parts, all of the same length."""

    mixture: AudioArray  # (channel, time)
    sources: AudioArray  # (source, channel, time)
    noise: AudioArray | None  # (channel, time)


@dataclass(frozen=True, slots=True)
class AudioFault:
    """Why a file cannot be used.

    Attributes:
        code: Event code, such as ``AUDIO_NONFINITE``.
        path: The file.
        message: One sentence.
        in_excerpt_only: True if the file itself can be used, and only this excerpt of it cannot.
    """

    code: EventCode
    path: str
    message: str
    in_excerpt_only: bool = False


class ExcerptError(Exception):
    """Raised for an excerpt that must not be trained on; ``fault`` says why."""

    def __init__(self, fault: AudioFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def read_excerpt(
    track: Track, start_seconds: float, n_samples: int, sample_rate: int, *, keep_silent: bool
) -> AudioArray:
    """Read an excerpt of a track, check it, mix it down to one channel, and resample it.

    Args:
        track: The recording.
        start_seconds: Where the excerpt begins.
        n_samples: Length at the target rate; a recording that ends before is padded with zeros.
        sample_rate: Target rate in Hz.
        keep_silent: Whether to return silent excerpts instead of raising.

    Returns:
        ``(1, n_samples)``, finite.

    Raises:
        ExcerptError: If the file cannot be read, has another sample rate than listed, has samples that are not finite,
            or is silent.
    """
    fault = check_file(track, keep_silent=keep_silent)
    if fault is not None:
        raise ExcerptError(fault)
    path = str(track.path)
    try:
        # 50 ms more than needed, so that rounding cannot leave the end short.
        audio, rate = read_audio(track.path, start_seconds, n_samples / sample_rate + 0.05)
    except AudioError as error:
        raise ExcerptError(AudioFault("AUDIO_UNREADABLE", path, str(error))) from error
    # Long files have not been checked yet, and a file may change while a run reads it.
    fault = _check_samples(audio, rate, track, keep_silent=True, start_seconds=start_seconds)
    if fault is not None:
        raise ExcerptError(fault)
    mono = audio.mean(axis=0, keepdims=True, dtype=np.float32)
    excerpt = fit_length(resample(mono, rate, sample_rate), n_samples)
    if not keep_silent and _is_silent(excerpt):
        message = f"{path} is silent in the excerpt that was read."
        raise ExcerptError(AudioFault("AUDIO_SILENT", path, message, in_excerpt_only=True))
    return excerpt


@cache
def check_file(track: Track, *, keep_silent: bool) -> AudioFault | None:
    """Check a file of up to `WHOLE_FILE_SECONDS` as a whole; return its fault, or None.

    The result depends on the file alone, not on the excerpt that was drawn first. So a run with a bad file draws the
    same as a run that names the file under ``exclude``, whichever worker draws it. Cached: each worker checks a file
    once. A longer file gives None; its excerpts are still checked one by one.
    """
    path = str(track.path)
    if track.fault:
        return AudioFault("AUDIO_UNREADABLE", path, track.fault)
    if track.seconds > WHOLE_FILE_SECONDS:
        return None
    try:
        audio, rate = read_audio(track.path)
    except AudioError as error:
        return AudioFault("AUDIO_UNREADABLE", path, str(error))
    missing = track.seconds - audio.shape[-1] / rate
    if audio.size and missing > LENGTH_TOLERANCE_SECONDS and rate == track.sample_rate:
        return AudioFault("AUDIO_TOO_SHORT", path, f"{path} is {missing:.2f} s shorter than listed.")
    return _check_samples(audio, rate, track, keep_silent=keep_silent)


def _check_samples(
    audio: AudioArray, rate: int, track: Track, *, keep_silent: bool, start_seconds: float = 0.0
) -> AudioFault | None:
    """Return what is wrong with audio that was read from a track, from ``start_seconds`` on; None if nothing is."""
    path = str(track.path)
    if audio.size == 0:
        return AudioFault("AUDIO_EMPTY", path, f"{path} has no samples where it was read.")
    if rate != track.sample_rate:
        return AudioFault("AUDIO_WRONG_RATE", path, f"{path} is at {rate} Hz, but is listed at {track.sample_rate} Hz.")
    bad_index = first_bad_sample(audio)
    if bad_index is not None:
        index = bad_index + round(start_seconds * rate)
        return AudioFault("AUDIO_NONFINITE", path, f"{path} has a sample that is not finite, at index {index}.")
    if not keep_silent and _is_silent(audio):
        return AudioFault("AUDIO_SILENT", path, f"{path} is silent.")
    return None


def _is_silent(audio: AudioArray) -> bool:
    """Return True if nothing audible is left after mixing down to one channel and removing a constant offset."""
    # In this order: opposite channels cancel, and an offset has power but no sound.
    mono = audio.mean(axis=0)
    return power_db(mono - mono.mean()) < SILENT_DB


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
