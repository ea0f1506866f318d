"""What training and validation split have in common: files, speakers, and copies under other names."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from unbraid.data.tracks import Track

N_NAMED = 20
"""So many files or speakers are named; all are counted."""

N_LOOKED_AT = 5000
"""So many files at most are looked at for copies: those whose length is the rarest."""

PIECE = 2**14
"""Bytes that two files of one size are held against each other by, from the middle, as many begin with silence."""


def compare_splits(train: Sequence[Track], valid: Sequence[Track], *, n_looked_at: int = N_LOOKED_AT) -> dict[str, Any]:
    """What a run directory says about its data: how much there is, and what is validated on that is trained on as well.

    A recording that is there under two names is told by its length, its size in bytes and a piece of its content.

    Args:
        train: Recordings trained on.
        valid: Recordings validated on.
        n_looked_at: How many files may be opened for that.

    Returns:
        Counts of ``files`` and ``speakers`` by split, and under ``shared`` those in both: their counts, the first
        names, and pairs of ``copies``, trained on and validated on.
    """
    files = _in_both(train, valid, lambda track: str(track.path))
    groups = _in_both(train, valid, lambda track: track.group)
    copies = find_copies(train, valid, n_looked_at=n_looked_at)
    return {
        "splits": {"train": _counts(train), "valid": _counts(valid)},
        "shared": {
            "n_files": len(files),
            "files": files[:N_NAMED],
            "n_speakers": len(groups),
            "speakers": groups[:N_NAMED],
            "n_copies": len({copy for _, copy in copies}),
            "copies": [[str(one), str(other)] for one, other in copies[:N_NAMED]],
        },
    }


def _counts(tracks: Sequence[Track]) -> dict[str, int]:
    return {"files": len({track.path for track in tracks}), "speakers": len({track.group for track in tracks})}


def _in_both(train: Iterable[Track], valid: Iterable[Track], name: Callable[[Track], str]) -> list[str]:
    return sorted({name(track) for track in train} & {name(track) for track in valid})


def find_copies(
    train: Sequence[Track], valid: Sequence[Track], *, n_looked_at: int = N_LOOKED_AT
) -> list[tuple[Path, Path]]:
    """Recordings of the training split that are validated on under another name: pairs of files.

    Only files of one length are looked at, rare lengths first, so that a large data set costs no more than a small one.
    """
    of_train, of_valid = (_by_length(tracks) for tracks in (train, valid))
    candidates = [of_train[length] + of_valid[length] for length in of_train.keys() & of_valid.keys()]
    found, n_left = list[tuple[Path, Path]](), n_looked_at
    trained, validated = ({track.path for track in tracks} for tracks in (train, valid))
    for paths in sorted(candidates, key=lambda some: (len(some), some)):
        n_left -= len(paths)
        if n_left < 0:
            break
        for alike in (same for sizes in _grouped(paths, _size) for same in _grouped(sizes, _middle)):
            found += [(a, b) for a in alike if a in trained for b in alike if b in validated and b != a]
    return found


def _by_length(tracks: Iterable[Track]) -> dict[tuple[float, int], list[Path]]:
    lengths: dict[tuple[float, int], list[Path]] = defaultdict(list)
    for track in tracks:
        if not track.fault:
            lengths[round(track.seconds, 3), track.sample_rate].append(track.path)
    return lengths


def _grouped(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    """Files with one key, two or more together; those that have none are left out."""
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        groups[key(path)].append(path)
    return [some for value, some in groups.items() if value is not None and len(some) > 1]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _middle(path: Path) -> bytes | None:
    """A hash of a piece from the middle; None where it is one value all along, or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, (path.stat().st_size - PIECE) // 2))
            piece = file.read(PIECE)
    except OSError:
        return None
    return hashlib.sha256(piece).digest() if len(set(piece)) > 1 else None
