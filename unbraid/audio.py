"""Read, write and probe audio files, by seconds; numpy only."""

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from unbraid.errors import AudioError
from unbraid.type_aliases import AudioArray

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".w64", ".caf", ".opus"})


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file's header says."""

    n_samples: int
    sample_rate: int
    n_channels: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.n_samples / self.sample_rate


def probe_audio(path: Path) -> AudioInfo:
    """Read a file's header.

    Raises:
        AudioError: If the file is missing, empty, not audio, or shorter than its header says.
    """
    try:
        info = soundfile.info(str(path))
        _refuse_cut_wav(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise AudioError(_unreadable(path, error)) from error
    if info.frames == 0:
        raise AudioError(f"{path} holds no samples.")
    return AudioInfo(info.frames, info.samplerate, info.channels)


def read_audio(path: Path, start_seconds: float = 0.0, duration_seconds: float | None = None) -> tuple[AudioArray, int]:
    """Read a file, or only an excerpt of it.

    Args:
        path: Any format that libsndfile reads.
        start_seconds: Where the excerpt begins.
        duration_seconds: How much to read; to the end where None. A file that ends before gives less.

    Returns:
        The audio, ``(channel, time)``, float32, and its sample rate in Hz.

    Raises:
        AudioError: If the file cannot be read, or breaks off in the middle, be it behind the excerpt.
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            start = min(round(start_seconds * file.samplerate), file.frames)
            wanted = file.frames - start
            if duration_seconds is not None:
                wanted = min(wanted, round(duration_seconds * file.samplerate))
            file.seek(start)
            audio = file.read(wanted, dtype="float32", always_2d=True)
            rate = int(file.samplerate)
        _refuse_cut_wav(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise AudioError(_unreadable(path, error)) from error
    if len(audio) < wanted:
        raise AudioError(f"{path} breaks off after {len(audio)} of {wanted} samples.")
    return np.ascontiguousarray(audio.T), rate


def write_audio(path: Path, audio: AudioArray, sample_rate: int) -> Path:
    """Write a file with its level kept: WAV as 32-bit float, so that nothing clips; other formats as 24 or 16 bit.

    Args:
        path: Its suffix names the format; missing folders are made.
        audio: ``(channel, time)`` or ``(time,)``.
        sample_rate: In Hz.

    Returns:
        The path written.

    Raises:
        AudioError: If a sample is not finite (as 16 bit it would become full scale), or over full scale in a format
            that cannot hold it, or the file cannot be written.
    """
    audio = np.atleast_2d(audio)
    if not np.isfinite(audio).all():
        raise AudioError(f"{path} was not written: its audio has samples that are not finite.")
    suffix = path.suffix.lower()
    if suffix != ".wav" and audio.size and np.abs(audio).max() > 1:
        raise AudioError(f"{path} was not written: its peak is over full scale, which only .wav keeps here.")
    subtype = {".wav": "FLOAT", ".flac": "PCM_24"}.get(suffix)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(temporary), audio.T, sample_rate, subtype=subtype)
        temporary.replace(path)
    except (soundfile.LibsndfileError, OSError, ValueError, TypeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise AudioError(f"{path} cannot be written: {error}") from error
    return path


def first_bad_sample(audio: AudioArray) -> int | None:
    """Index in time of the first sample that is not finite, over all channels; None where all are."""
    finite = np.isfinite(audio).all(axis=0)
    return None if finite.all() else int(finite.argmin())


def _unreadable(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"{path} does not exist."
    if path.is_dir():
        return f"{path} is a folder, not an audio file."
    if path.stat().st_size == 0:
        return f"{path} is an empty file."
    reason = str(error).rsplit(": ", 1)[-1].strip().rstrip(".")
    return f"{path} cannot be read as audio ({reason})."


def _refuse_cut_wav(path: Path) -> None:
    if (missing := _missing_wav_bytes(path)) > 0:
        raise AudioError(f"{path} is cut short: its header promises {missing} bytes more than the file has.")


def _missing_wav_bytes(path: Path) -> int:
    """How many bytes of sample data a RIFF header promises beyond the end of the file (libsndfile says nothing)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        while len(chunk := file.read(8)) == 8:
            name, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if name == b"data":
                streamed = length in (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)  # written by a pipe that knew no length
                return 0 if streamed else file.tell() + length - size
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0
