"""Reading, writing and probing audio files; positions are in seconds, arrays are NumPy."""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from unbraid.audio_container import missing_bytes
from unbraid.errors import AudioError
from unbraid.type_aliases import AudioArray

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".w64", ".caf", ".opus"})

UNKNOWN_LENGTH = 2**62
"""libsndfile's length of a FLAC file without a sample count, as from a pipe, is above this."""

MAX_SAMPLES_PER_BYTE = 16_384
"""No format stores more: a FLAC frame has at most 65,535 samples, and its header takes more than four bytes."""

BLOCK_VALUES = 2**22
"""Values to read at a time, over all channels: 16 MiB."""


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
    _check_regular(path)
    try:
        with soundfile.SoundFile(_encoded(path)) as file:
            n_samples = file.frames
            rate = int(file.samplerate)
            n_channels = int(file.channels)
        _check_complete(path)
        _check_plausible(path, n_samples)
        if n_samples >= UNKNOWN_LENGTH:
            n_samples = _count_samples(path)
    except AudioError:
        raise
    except Exception as error:  # a damaged file may raise anything in a decoder
        raise AudioError(_read_error_message(path, error)) from error
    if n_samples == 0:
        raise AudioError(f"{path} has no samples.")
    return AudioInfo(n_samples, rate, n_channels)


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
    _check_regular(path)
    try:
        with soundfile.SoundFile(_encoded(path)) as file:
            rate = int(file.samplerate)
            length_is_known = file.frames < UNKNOWN_LENGTH
            _check_plausible(path, file.frames)
            start = min(round(start_seconds * rate), file.frames)
            n_samples = file.frames - start
            if duration_seconds is not None:
                n_samples = min(n_samples, round(duration_seconds * rate))
            try:
                file.seek(start)
            except soundfile.LibsndfileError:
                if length_is_known:
                    raise
                n_samples = 0  # the start lies beyond the end
            audio = _read_blocks(file, n_samples)
        _check_complete(path)
    except AudioError:
        raise
    except Exception as error:  # a damaged file may raise anything in a decoder
        raise AudioError(_read_error_message(path, error)) from error
    if length_is_known and len(audio) < n_samples:  # libsndfile returns what it could decode, without an error
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
    """Return a path as soundfile opens it: as bytes, because a name may not be UTF-8; on Windows as text."""
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


def _check_complete(path: Path) -> None:
    n_missing = missing_bytes(path)
    if n_missing > 0:
        raise AudioError(f"{path} is truncated: its header announces {n_missing} bytes more than the file has.")


def _check_regular(path: Path) -> None:
    # Opening a pipe would wait for somebody to write to it.
    if path.exists() and not path.is_file() and not path.is_dir():
        raise AudioError(f"{path} is not a regular file but a pipe or a device.")


def _check_plausible(path: Path, n_samples: int) -> None:
    size = path.stat().st_size
    if n_samples < UNKNOWN_LENGTH and n_samples > MAX_SAMPLES_PER_BYTE * size:
        raise AudioError(
            f"{path} is damaged: its header announces {n_samples} samples, which {size} bytes cannot hold."
        )


def _read_blocks(file: soundfile.SoundFile, n_samples: int) -> AudioArray:
    """Read from the present position, and allocate no more memory than there are samples; ``(time, channel)``."""
    block_samples = BLOCK_VALUES // file.channels
    blocks = []
    n_left = n_samples
    while n_left > 0:
        n_block = min(n_left, block_samples)
        if file.frames < UNKNOWN_LENGTH:
            block = file.read(n_block, dtype="float32", always_2d=True)
        else:
            block = _read_up_to_end(file, n_block)
        blocks.append(block)
        n_left -= len(block)
        if len(block) < n_block:
            break
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros((0, file.channels), np.float32), *blocks])


def _read_up_to_end(file: soundfile.SoundFile, n_samples: int) -> AudioArray:
    """Read from a FLAC file of unknown length, up to its end; ``(time, channel)``.

    After a read that reaches the end, soundfile seeks to there, and libsndfile refuses that without a length. The
    samples are in the buffer by then. What is still NaN was not written: FLAC holds integers.
    """
    audio = np.full((n_samples, file.channels), np.nan, np.float32)
    with contextlib.suppress(soundfile.LibsndfileError):
        file.read(out=audio)
    n_read = n_samples - int(np.isnan(audio[:, 0]).sum())
    return audio[:n_read]


def _count_samples(path: Path) -> int:
    """Return the length of a file whose header does not say it, by reading it once."""
    n_samples = 0
    with soundfile.SoundFile(_encoded(path)) as file:
        block_samples = BLOCK_VALUES // file.channels
        while True:
            n_read = len(_read_up_to_end(file, block_samples))
            n_samples += n_read
            if n_read < block_samples:
                return n_samples
