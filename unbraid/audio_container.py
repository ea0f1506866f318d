"""Find audio files that end too early, from the sizes in their containers; libsndfile reads them as shorter files."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

OGG_TAIL_BYTES = 2 * 65_307
"""Twice the size of the largest Ogg page: the last page of a file begins within this many bytes of its end."""

STREAMED_WAV_SIZES = frozenset({0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF})
"""What programs write for the size of a WAV that goes to a pipe, because they cannot know it."""


def missing_bytes(path: Path) -> int:
    """Return how many bytes a file's container announces beyond the end of the file; at least that many are lost.

    It knows WAV, RF64, AIFF, Wave64, CAF and Ogg. Any other file gives 0: FLAC and MP3 have no such sizes.

    Raises:
        OSError: If the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(40)
        if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
            return max(0, _wav_end(file, size) - size)
        if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
            return max(0, 8 + int.from_bytes(head[4:8], "big") - size)
        if head[:4] == b"riff" and head[24:28] == b"wave":  # Wave64: a GUID, then the size of the whole file
            return max(0, int.from_bytes(head[16:24], "little") - size)
        if head[:4] == b"caff":
            return max(0, _caf_end(file, size) - size)
        if head[:4] == b"OggS":
            return max(0, _ogg_end(file, size) - size)
    return 0


def _wav_end(file: BinaryIO, size: int) -> int:
    """Return where the samples of a WAV or RF64 file should end; the present end if the header does not say."""
    file.seek(12)
    size_of_rf64_data = 0
    # Walk the chunks (name, length, content padded to an even length) up to the samples.
    while len(chunk_header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk_header)
        if name == b"ds64":  # RF64 keeps 64-bit sizes here: of the file, of the samples
            size_of_rf64_data = int.from_bytes(file.read(16)[8:16], "little")
            file.seek(length - 16, os.SEEK_CUR)
            continue
        if name == b"data":
            if length == 0xFFFFFFFF and size_of_rf64_data:
                return file.tell() + size_of_rf64_data
            return size if length in STREAMED_WAV_SIZES else file.tell() + length
        file.seek(length + length % 2, os.SEEK_CUR)
    return size


def _caf_end(file: BinaryIO, size: int) -> int:
    file.seek(8)
    while len(chunk_header := file.read(12)) == 12:
        name, length = struct.unpack(">4sq", chunk_header)
        if length < 0:  # the samples of a file that is still being written reach to its end
            return size
        if name == b"data":
            return file.tell() + length
        file.seek(length, os.SEEK_CUR)
    return size


def _ogg_end(file: BinaryIO, size: int) -> int:
    """Return where the last page of an Ogg file should end. Pages follow each other without gaps."""
    start = max(0, size - OGG_TAIL_BYTES)
    file.seek(start)
    tail = file.read()
    position = tail.find(b"OggS")
    while position >= 0:
        end = _ogg_page_end(tail, position)
        if end >= len(tail):
            return start + end
        # Bytes that are no page follow only on a false start, in the middle of a page's content.
        position = end if tail.startswith(b"OggS"[: len(tail) - end], end) else tail.find(b"OggS", position + 1)
    return size


def _ogg_page_end(tail: bytes, position: int) -> int:
    """Return where a page should end: after a header of 27 bytes, a table of segment sizes, and the segments."""
    if len(tail) < position + 27:
        return position + 27
    n_segments = tail[position + 26]
    table = tail[position + 27 : position + 27 + n_segments]
    return position + 27 + n_segments + (sum(table) if len(table) == n_segments else 1)
