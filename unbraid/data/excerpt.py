"""Read excerpts of recordings, and check the audio before anything is made of it."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from unbraid.audio import first_bad_sample, probe_audio, read_audio
from unbraid.data.tracks import Track
from unbraid.dsp import fit_length, power_db, resample
from unbraid.errors import AudioError
from unbraid.records import EventCode
from unbraid.type_aliases import AudioArray

SILENT_DB = -80.0
"""Mean power in dB of full scale below which audio counts as silent: a few quantisation steps of 16-bit audio."""

WHOLE_FILE_SECONDS = 60.0
"""Shorter files are checked as a whole when they are first drawn; of others only the excerpt is read."""

LENGTH_TOLERANCE_SECONDS = 0.1
"""How much shorter than listed a file may be; durations in manifests are rounded."""


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
    """Check a file shorter than `WHOLE_FILE_SECONDS` as a whole; return its fault, or None.

    The result depends on the file alone, not on the excerpt that was drawn first. So a run with a bad file draws the
    same as a run that names the file under ``exclude``, whichever worker draws it. Cached: each worker checks a file
    once. A longer file gives None; its excerpts are still checked one by one.
    """
    path = str(track.path)
    if track.fault:
        return AudioFault("AUDIO_UNREADABLE", path, track.fault)
    if track.seconds >= WHOLE_FILE_SECONDS:
        return _check_length(track)
    try:
        audio, rate = read_audio(track.path, 0.0, WHOLE_FILE_SECONDS)
    except AudioError as error:
        return AudioFault("AUDIO_UNREADABLE", path, str(error))
    # A manifest may list a long file as a short one. It is not checked as a whole either.
    if audio.shape[-1] >= round(WHOLE_FILE_SECONDS * rate):
        return None
    missing = track.seconds - audio.shape[-1] / rate
    if audio.size and missing > LENGTH_TOLERANCE_SECONDS and rate == track.sample_rate:
        return AudioFault("AUDIO_TOO_SHORT", path, _too_short(track, audio.shape[-1], rate))
    return _check_samples(audio, rate, track, keep_silent=keep_silent)


def _check_length(track: Track) -> AudioFault | None:
    """Compare the listed length of a long file with its header."""
    try:
        info = probe_audio(track.path)
    except AudioError as error:
        return AudioFault("AUDIO_UNREADABLE", str(track.path), str(error))
    if track.seconds - info.seconds > LENGTH_TOLERANCE_SECONDS and info.sample_rate == track.sample_rate:
        return AudioFault("AUDIO_TOO_SHORT", str(track.path), _too_short(track, info.n_samples, info.sample_rate))
    return None


def _too_short(track: Track, n_samples: int, rate: int) -> str:
    seconds = n_samples / rate
    if abs(track.seconds - n_samples) < 2:
        hint = " That is its number of samples: the column seconds must be in seconds."
    else:
        hint = ""
    return f"{track.path} has {seconds:.2f} s, but is listed with {track.seconds:.2f} s.{hint}"


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
