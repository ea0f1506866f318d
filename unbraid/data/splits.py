"""Splits: train, valid and test, under their usual names, and assigned by speaker."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from unbraid.errors import DataError

if TYPE_CHECKING:  # tracks.py reads the split of each row, and so imports this file
    from unbraid.data.tracks import Track

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {"train": "train", "tr": "train", "valid": "valid", "validation": "valid", "val": "valid"}
_SPLIT_NAMES |= {"dev": "valid", "cv": "valid", "test": "test", "tt": "test", "eval": "test"}


def parse_split(name: str) -> str:
    """Return ``train``, ``valid`` or ``test`` for any of their usual names (tr, dev, cv, tt ...); empty for others."""
    return _SPLIT_NAMES.get(name.lower(), "")


def assign_splits(tracks: "Sequence[Track]", *, n_sources: int) -> "list[Track]":
    """Assign about 80, 10 and 10 % of the speakers to train, valid and test, unless any track has a split already.

    The assignment follows from a hash of the speakers' names, so it is the same on every machine. All tracks of a
    speaker are in one split, and each split has enough speakers for a mixture.

    Raises:
        DataError: If there are too few speakers for three splits.
    """
    if any(track.split for track in tracks):
        return list(tracks)
    speakers = sorted({track.group for track in tracks}, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    n_per_split = max(n_sources, round(len(speakers) / 10))
    if len(speakers) < 3 * n_sources:
        raise DataError(
            f"{len(speakers)} speaker{'s' * (len(speakers) != 1)} cannot be split into train, valid and test of "
            f"{n_sources} or more each. Add speakers, or assign the splits yourself (folders train/, valid/, test/, or "
            "the column split of a manifest)."
        )
    split_of = dict.fromkeys(speakers[:n_per_split], "valid")
    split_of |= dict.fromkeys(speakers[n_per_split : 2 * n_per_split], "test")
    return [replace(track, split=split_of.get(track.group, "train")) for track in tracks]
