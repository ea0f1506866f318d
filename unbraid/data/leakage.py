"""Leakage between the training and the validation split: shared files, shared speakers, copies under other names."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from unbraid.data.tracks import Track

MAX_NAMES = 20
"""How many shared files or speakers are named; all of them are counted."""

MAX_FILES_COMPARED = 5000
"""How many files are compared at most to find copies: those with the rarest lengths."""

N_BYTES_COMPARED = 2**14
"""How much of two files of one size is compared, from the middle because many recordings begin with silence."""


def compare_splits(
    train: Sequence[Track], valid: Sequence[Track], *, max_files: int = MAX_FILES_COMPARED
) -> dict[str, Any]:
    """Count files and speakers of both splits, and find what is in both.

    A copy under another name is recognised by its duration, its size in bytes and a part of its content.

    Args:
        train: Recordings of the training split.
        valid: Recordings of the validation split.
        max_files: How many files may be compared to find copies.

    Returns:
        Under ``splits`` the number of ``files`` and ``speakers`` of each split; under ``shared`` the number of those in
        both, the first names, and pairs of ``copies`` (training file, validation file).
    """
    files = sorted({str(track.path) for track in train} & {str(track.path) for track in valid})
    speakers = sorted({track.group for track in train} & {track.group for track in valid})
    copies = find_copies(train, valid, max_files=max_files)
    return {
        "splits": {"train": _counts(train), "valid": _counts(valid)},
        "shared": {
            "n_files": len(files),
            "files": files[:MAX_NAMES],
            "n_speakers": len(speakers),
            "speakers": speakers[:MAX_NAMES],
            "n_copies": len({valid_path for _, valid_path in copies}),
            "copies": [[str(train_path), str(valid_path)] for train_path, valid_path in copies[:MAX_NAMES]],
        },
    }


def _counts(tracks: Sequence[Track]) -> dict[str, int]:
    return {"files": len({track.path for track in tracks}), "speakers": len({track.group for track in tracks})}


def find_copies(
    train: Sequence[Track], valid: Sequence[Track], *, max_files: int = MAX_FILES_COMPARED
) -> list[tuple[Path, Path]]:
    """Return pairs (training file, validation file) that are copies of each other under different names.

    Only files of the same duration are compared, rare durations first, so that a large data set costs no more than
    ``max_files`` comparisons.
    """
    # Candidates: files of a duration that occurs in both splits.
    train_by_duration = _group_by_duration(train)
    valid_by_duration = _group_by_duration(valid)
    shared_durations = train_by_duration.keys() & valid_by_duration.keys()
    candidates = [train_by_duration[duration] + valid_by_duration[duration] for duration in shared_durations]

    # Compare sizes first, which costs no reading; then contents.
    train_paths = {track.path for track in train}
    valid_paths = {track.path for track in valid}
    copies: list[tuple[Path, Path]] = []
    n_files = 0
    for paths in sorted(candidates, key=lambda paths: (len(paths), paths)):
        n_files += len(paths)
        if n_files > max_files:
            break
        for same_size in _group_equal(paths, _size):
            for same_content in _group_equal(same_size, _hash_middle):
                for train_path in same_content:
                    if train_path in train_paths:
                        copies += [
                            (train_path, path) for path in same_content if path in valid_paths and path != train_path
                        ]
    return copies


def _group_by_duration(tracks: Iterable[Track]) -> dict[tuple[float, int], list[Path]]:
    paths: dict[tuple[float, int], list[Path]] = defaultdict(list)
    for track in tracks:
        if not track.fault:
            paths[round(track.seconds, 3), track.sample_rate].append(track.path)
    return paths


def _group_equal(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    """Return groups of two or more files with equal keys; files with the key None are skipped."""
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        groups[key(path)].append(path)
    return [group for value, group in groups.items() if value is not None and len(group) > 1]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _hash_middle(path: Path) -> bytes | None:
    """Return a hash of the middle of a file; None if the file cannot be read or its middle is digital silence."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, (path.stat().st_size - N_BYTES_COMPARED) // 2))
            content = file.read(N_BYTES_COMPARED)
    except OSError:
        return None
    # One byte repeated is silence, in which different recordings of one length are alike.
    return hashlib.sha256(content).digest() if len(set(content)) > 1 else None
