"""Reading, writing and probing audio files; positions are in seconds, arrays are NumPy."""

import contextlib
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from unbraid.errors import AudioError
from unbraid.type_aliases import AudioArray

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".w64", ".caf", ".opus"})


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """The length, sample rate and number of channels in a file's header."""

    n_samples: int
    sample_rate: int
    n_channels: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.n_samples / self.sample_rate


def probe_audio(path: Path) -> AudioInfo:
    """Read a file's header.

    Raises:
        AudioError: If the file is missing, empty, not audio, or shorter than its header says.
    """
    try:
        info = soundfile.info(_encoded(path))
        _check_wav_complete(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise AudioError(_read_error_message(path, error)) from error
    if info.frames == 0:
        raise AudioError(f"{path} has no samples.")
    return AudioInfo(info.frames, info.samplerate, info.channels)


def read_audio(path: Path, start_seconds: float = 0.0, duration_seconds: float | None = None) -> tuple[AudioArray, int]:
    """Read a file, or only an excerpt of it.

    Args:
        path: Any format that libsndfile reads.
        start_seconds: Start of the excerpt.
        duration_seconds: Length of the excerpt; None reads to the end. If the file ends before, the excerpt is shorter.

    Returns:
        The audio, ``(channel, time)``, float32, and its sample rate in Hz.

    Raises:
        AudioError: If the file cannot be read, or is truncated, even after the excerpt.
    """
    try:
        with soundfile.SoundFile(_encoded(path)) as file:
            start = min(round(start_seconds * file.samplerate), file.frames)
            n_samples = file.frames - start
            if duration_seconds is not None:
                n_samples = min(n_samples, round(duration_seconds * file.samplerate))
            file.seek(start)
            audio = file.read(n_samples, dtype="float32", always_2d=True)
            rate = int(file.samplerate)
        _check_wav_complete(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise AudioError(_read_error_message(path, error)) from error
    if len(audio) < n_samples:  # libsndfile returns what it could decode, without an error
        raise AudioError(f"{path} is truncated: only {len(audio)} of {n_samples} samples could be read.")
    return np.ascontiguousarray(audio.T), rate


def write_audio(path: Path, audio: AudioArray, sample_rate: int) -> Path:
    """Write audio without changing its level: WAV as 32-bit float, which cannot clip; other formats as 24 or 16 bit.

    Args:
        path: The suffix determines the format; missing folders are created.
        audio: ``(channel, time)`` or ``(time,)``.
        sample_rate: In Hz.

    Returns:
        The path written.

    Raises:
        AudioError: If a sample is not finite (as 16 bit it would become full scale) or exceeds full scale in a format
            that would clip it, or if the file cannot be written.
    """
    audio = np.atleast_2d(audio)
    if not np.isfinite(audio).all():
        raise AudioError(f"{path} was not written, because some of its samples are not finite.")
    suffix = path.suffix.lower()
    if suffix != ".wav" and audio.size and np.abs(audio).max() > 1:
        raise AudioError(
            f"{path} was not written, because it exceeds full scale and would be clipped. Write a .wav file instead."
        )
    subtype = {".wav": "FLOAT", ".flac": "PCM_24"}.get(suffix)
    # Write to a temporary name and rename, so that a reader never sees half a file. The suffix stays: it is the format.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(_encoded(temporary), audio.T, sample_rate, subtype=subtype)
        temporary.replace(path)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise AudioError(f"{path} cannot be written: {error}") from error
    return path


def first_bad_sample(audio: AudioArray) -> int | None:
    """Return the time index of the first sample that is not finite in any channel; None if all are finite."""
    finite = np.isfinite(audio).all(axis=0)
    return None if finite.all() else int(finite.argmin())


def _encoded(path: Path) -> str | bytes:
    """Return a path as soundfile opens it: names that are not UTF-8 must be bytes, except on Windows, which has none."""
    return str(path) if sys.platform == "win32" else os.fsencode(path)


def _read_error_message(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"{path} does not exist."
    if path.is_dir():
        return f"{path} is a folder, not an audio file."
    if path.stat().st_size == 0:
        return f"{path} is an empty file."
    # libsndfile's messages are "Error opening 'path': reason."
    reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
    return f"{path} cannot be read as audio ({reason})."


def _check_wav_complete(path: Path) -> None:
    n_missing = _missing_wav_bytes(path)
    if n_missing > 0:
        raise AudioError(f"{path} is truncated: its header announces {n_missing} bytes more than the file has.")


def _missing_wav_bytes(path: Path) -> int:
    """Return how many bytes of sample data a RIFF header announces beyond the end of the file.

    libsndfile silently reads such a file as a shorter one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        # Walk the chunks (name, length, content padded to an even length) up to the samples.
        while len(chunk_header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk_header)
            if name == b"data":
                # A program that wrote to a pipe could not know the length, and left one of these instead.
                is_streamed = length in (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)
                return 0 if is_streamed else file.tell() + length - size
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0
