"""Folders and manifests of speakers: each a function from a path to tracks."""

from pathlib import Path

from unbraid.audio import SUFFIXES, probe_audio
from unbraid.data.tracks import Track, parse_split, read_manifest
from unbraid.errors import AudioError, DataError


def list_speakers(path: Path) -> list[Track]:
    """Recordings of single speakers, from a folder ``speaker/**/*.flac|wav|...`` or a CSV manifest.

    A folder whose subfolders are named train, valid (or dev, cv) and test holds the speakers in those.

    A file that cannot be read is a track with a fault.

    Raises:
        DataError: If there is nothing there, or no recording that can be read.
    """
    return _recordings(path, "speakers", "speaker/**/*.flac or .wav")


def list_noises(path: Path) -> list[Track]:
    """Recordings of noise, from any folder of audio files or a CSV manifest with the columns path and class.

    Raises:
        DataError: As `speakers`.
    """
    return _recordings(path, "noises", "**/*.flac or .wav")


def _recordings(path: Path, what: str, pattern: str) -> list[Track]:
    if not path.exists():
        raise DataError(f"{path} does not exist; [data] needs a folder ({pattern}) or a CSV manifest of {what}.")
    if path.is_file():
        if path.suffix.lower() != ".csv":
            raise DataError(f"{path} is neither a folder nor a .csv manifest of {what}.")
        tracks = read_manifest(path)
    else:
        tracks = _from_folder(path)
    if not tracks:
        raise DataError(f"No {what} found in {path}: it should hold {pattern}, or be a CSV manifest.")
    if all(track.fault for track in tracks):
        raise DataError(f"None of the {len(tracks)} files in {path} can be used; the first: {tracks[0].fault}")
    return tracks


def _from_folder(root: Path) -> list[Track]:
    tracks = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        folders = path.relative_to(root).parts[:-1]
        split = parse_split(folders[0]) if folders else ""
        own_folders = folders[1:] if split else folders
        group = own_folders[0] if own_folders else path.stem
        try:
            if not path.resolve().is_relative_to(root.resolve()):
                raise AudioError(f"{path} leads outside of {root}; copy it there, or name it in a CSV.")
            tracks.append(Track.from_file_info(path, probe_audio(path), group=group, split=split))
        except AudioError as error:
            tracks.append(Track((("audio", path),), group, 0.0, 0, split, fault=str(error)))
    return tracks
