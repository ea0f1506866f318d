"""Listing the recordings in a folder or a manifest."""

import os
from collections import Counter
from pathlib import Path

from unbraid.audio import SUFFIXES, probe_audio
from unbraid.data.layout import check_speaker_folders
from unbraid.data.splits import parse_split
from unbraid.data.tracks import Track, read_manifest
from unbraid.errors import AudioError, DataError

OTHER_AUDIO_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr", ".3gp", ".mka", ".ac3", ".ape"})
"""Audio that libsndfile cannot read. Users who have such files expect them to be used."""

LINK_ADVICE = "links are not followed: move the folders there, or name their files in a CSV"


def list_speakers(path: Path) -> list[Track]:
    """List recordings of single speakers, from a folder ``speaker/**/*.flac|wav|...`` or a CSV manifest.

    If the folder's subfolders are named train, valid (or dev, cv) and test, the speakers' folders are inside those. A
    file that cannot be read is listed as a track with a fault.

    Raises:
        DataError: If the path does not exist, has no recording that can be read, or its subfolders are not speakers.
    """
    tracks = _list_recordings(path, "speakers", "speaker/**/*.flac or .wav")
    if path.is_dir():
        check_speaker_folders(path, tracks)
    return tracks


def list_noises(path: Path) -> list[Track]:
    """List recordings of noise, from any folder of audio files or a CSV manifest with the columns path and class.

    Raises:
        DataError: If the path does not exist, or has no recording that can be read.
    """
    return _list_recordings(path, "noises", "**/*.flac or .wav")


def _list_recordings(path: Path, what: str, pattern: str) -> list[Track]:
    if not path.exists():
        raise DataError(f"{path} does not exist. [data] needs a folder ({pattern}) or a CSV manifest of {what}.")
    if path.is_file():
        if path.suffix.lower() != ".csv":
            raise DataError(f"{path} is neither a folder nor a .csv manifest of {what}.")
        tracks = read_manifest(path)
    else:
        tracks = _list_folder(path)
    if not tracks:
        raise DataError(f"{path} has no {what}: it should contain {pattern}, or be a CSV manifest.")
    if all(track.fault for track in tracks):
        raise DataError(f"None of the {len(tracks)} files in {path} can be used. The first: {tracks[0].fault}")
    return tracks


def files_passed_over(root: Path) -> str:
    """Return what a folder has that looks like audio and is not listed, in a sentence; empty if there is nothing.

    Args:
        root: A folder. Of a manifest nothing is passed over.
    """
    if not root.is_dir():
        return ""
    counts: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root):
        counts[f"linked folders ({LINK_ADVICE})"] += sum(Path(folder, name).is_symlink() for name in subfolders)
        for name in files:
            path = Path(folder, name)
            suffix = path.suffix.lower()
            if suffix in OTHER_AUDIO_SUFFIXES:
                counts[f"{suffix} files (convert them to FLAC or WAV)"] += 1
            elif suffix in SUFFIXES and name.startswith("."):
                counts["hidden files"] += 1
            elif suffix in SUFFIXES and not path.is_file():
                counts["pipes, devices or broken links"] += 1
    listed = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return f"Passed over in {root}: {listed}." if listed else ""


def _list_folder(root: Path) -> list[Track]:
    tracks = []
    # Sorted: the order of a folder differs between machines, and every draw is an index into this list.
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        # The folders are split/speaker/..., speaker/..., or none: then each file is a separate speaker.
        folders = path.relative_to(root).parts[:-1]
        split = parse_split(folders[0]) if folders else ""
        speaker_folders = folders[1:] if split else folders
        group = speaker_folders[0] if speaker_folders else path.stem
        try:
            # As in a manifest, a link must not lead out of the folder.
            if not path.resolve().is_relative_to(root.resolve()):
                raise AudioError(f"{path} is a link to a file outside of {root}. Copy the file into the folder.")
            tracks.append(Track.from_file_info(path, probe_audio(path), group=group, split=split))
        except AudioError as error:
            tracks.append(Track((("audio", path),), group, 0.0, 0, split, fault=str(error)))
    return tracks
