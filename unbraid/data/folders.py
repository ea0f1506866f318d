"""Listing the recordings in a folder or a manifest."""

from pathlib import Path

from unbraid.audio import SUFFIXES, probe_audio
from unbraid.data.splits import parse_split
from unbraid.data.tracks import Track, read_manifest
from unbraid.errors import AudioError, DataError


def list_speakers(path: Path) -> list[Track]:
    """List recordings of single speakers, from a folder ``speaker/**/*.flac|wav|...`` or a CSV manifest.

    If the folder's subfolders are named train, valid (or dev, cv) and test, the speakers' folders are inside those. A
    file that cannot be read is listed as a track with a fault.

    Raises:
        DataError: If the path does not exist, or has no recording that can be read.
    """
    return _list_recordings(path, "speakers", "speaker/**/*.flac or .wav")


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
