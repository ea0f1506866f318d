"""Sources to a mixture on the fly: excerpts, levels, noise at an SNR; audio is judged before anything is made of it."""

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
"""Mean power below which audio counts as silent: a few steps of 16 bit."""

WHOLE_FILE_SECONDS = 60.0
"""Files up to this length are judged whole when they are first drawn; of longer ones only the excerpt is read."""

LENGTH_TOLERANCE_SECONDS = 0.1
"""How much shorter than listed a file may be."""


class Mixture(NamedTuple):
    """What a model hears and what it was made of, all of the same length."""

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
        in_excerpt_only: Nothing is wrong with the file as a whole: this excerpt of it is silent.
    """

    code: EventCode
    path: str
    message: str
    in_excerpt_only: bool = False


class ExcerptError(Exception):
    """An excerpt that must not be trained on."""

    def __init__(self, fault: AudioFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def read_excerpt(
    track: Track, start_seconds: float, n_samples: int, sample_rate: int, *, keep_silent: bool
) -> AudioArray:
    """Read, judge, mix down to one channel, resample, and fit an excerpt of a track.

    Args:
        track: The recording.
        start_seconds: Where the excerpt begins.
        n_samples: Length at the target rate; a shorter recording is padded with zeros.
        sample_rate: Target rate in Hz.
        keep_silent: Whether silence is fine.

    Returns:
        ``(1, n_samples)``, finite.

    Raises:
        ExcerptError: If the file cannot be read, has another sample rate than listed, has samples that are not finite,
            or is silent.
    """
    if (fault := check_file(track, keep_silent=keep_silent)) is not None:
        raise ExcerptError(fault)
    path = str(track.path)
    try:
        audio, rate = read_audio(track.path, start_seconds, n_samples / sample_rate + 0.05)
    except AudioError as error:
        raise ExcerptError(AudioFault("AUDIO_UNREADABLE", path, str(error))) from error
    if (fault := _judge(audio, rate, track, keep_silent=True, start_seconds=start_seconds)) is not None:
        raise ExcerptError(fault)
    mono = audio.mean(axis=0, keepdims=True, dtype=np.float32)
    excerpt = fit_length(resample(mono, rate, sample_rate), n_samples)
    if not keep_silent and _is_silent(excerpt):
        message = f"{path} is silent in the excerpt that was read."
        raise ExcerptError(AudioFault("AUDIO_SILENT", path, message, in_excerpt_only=True))
    return excerpt


@cache
def check_file(track: Track, *, keep_silent: bool) -> AudioFault | None:
    """What is wrong with a whole file of up to `WHOLE_FILE_SECONDS`; None where nothing is, or the file is longer.

    The verdict hangs on the file alone, not on which excerpt was drawn first: so a run with a bad file equals one that
    names the file under ``exclude``, whichever worker draws it.
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
        return AudioFault("AUDIO_TOO_SHORT", path, f"{path} is {missing:.2f} s shorter than it was listed.")
    return _judge(audio, rate, track, keep_silent=keep_silent)


def _judge(
    audio: AudioArray, rate: int, track: Track, *, keep_silent: bool, start_seconds: float = 0.0
) -> AudioFault | None:
    path = str(track.path)
    if audio.size == 0:
        return AudioFault("AUDIO_EMPTY", path, f"{path} holds no samples where it was read.")
    if rate != track.sample_rate:
        return AudioFault(
            "AUDIO_WRONG_RATE", path, f"{path} is at {rate} Hz, but was listed at {track.sample_rate} Hz."
        )
    if (bad := first_bad_sample(audio)) is not None:
        index = bad + round(start_seconds * rate)
        return AudioFault("AUDIO_NONFINITE", path, f"{path} has a sample that is not finite, at index {index}.")
    if not keep_silent and _is_silent(audio):
        return AudioFault("AUDIO_SILENT", path, f"{path} is silent.")
    return None


def _is_silent(audio: AudioArray) -> bool:
    """Whether nothing is left once the channels are mixed down and a constant offset is taken away."""
    mono = audio.mean(axis=0)
    return power_db(mono - mono.mean()) < SILENT_DB


def mix(
    sources: Sequence[AudioArray],
    estimate_levels_db: Sequence[float],
    noise: AudioArray | None = None,
    snr_db: float = 0.0,
) -> Mixture:
    """Add sources up, each at its own level, and noise below them.

    Args:
        sources: Each ``(channel, time)``, of one length.
        estimate_levels_db: Mean power that each source gets, in dB of full scale. Silence stays silence.
        noise: ``(channel, time)``, or None.
        snr_db: Power of the sum of the sources over that of the noise.

    Returns:
        The mixture, which is exactly the sum of its parts; all are turned down together where its peak passed 0.99.
    """
    scaled = np.stack([_at_level(source, level) for source, level in zip(sources, estimate_levels_db, strict=True)])
    total = scaled.sum(axis=0)
    if noise is not None:
        noise = _at_level(noise, power_db(total) - snr_db)
        total = total + noise
    peak = float(np.abs(total).max(initial=0.0))
    if peak > 0.99:
        turned_down = np.float32(0.99 / peak)
        scaled = scaled * turned_down
        noise = None if noise is None else noise * turned_down
        total = scaled.sum(axis=0) if noise is None else scaled.sum(axis=0) + noise
    return Mixture(total, scaled, noise)


def _at_level(audio: AudioArray, level_db: float) -> AudioArray:
    now = power_db(audio)
    return audio if now < SILENT_DB else audio * np.float32(db_to_amplitude(level_db - now))
