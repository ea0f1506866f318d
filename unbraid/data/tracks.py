"""Track and its stems; manifests written and read; splits by speaker."""

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unbraid.audio import AudioInfo, probe_audio
from unbraid.errors import AudioError, DataError, nearest

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {"train": "train", "tr": "train", "valid": "valid", "validation": "valid", "val": "valid"}
_SPLIT_NAMES |= {"dev": "valid", "cv": "valid", "test": "test", "tt": "test", "eval": "test"}
_COLUMNS = ("path", "speaker", "seconds", "sample_rate", "split", "kind")


@dataclass(frozen=True, slots=True)
class Track:
    """One recording, or several of the same moment.

    Attributes:
        stems: Name to file; a plain recording has the one stem ``"audio"``.
        group: Who or what is heard: sources of one mixture are never of the same group. A speaker, or a noise class.
        seconds: Duration.
        sample_rate: In Hz.
        split: ``train``, ``valid``, ``test``, or empty where nobody has said.
        kind: What sort of sound it is, such as ``speech`` or ``music``; empty where nobody has said.
        fault: Why it cannot be used, found while listing; empty for a sound one. It stays listed, so that a run with it
            draws the same as one that names it under ``exclude``.
    """

    stems: tuple[tuple[str, Path], ...]
    group: str
    seconds: float
    sample_rate: int
    split: str = ""
    kind: str = ""
    fault: str = ""

    @property
    def path(self) -> Path:
        """The first stem's file."""
        return self.stems[0][1]

    @classmethod
    def from_file_info(cls, path: Path, info: AudioInfo, *, group: str, split: str = "", kind: str = "") -> "Track":
        """A plain recording."""
        return cls((("audio", path),), group, info.seconds, info.sample_rate, split, kind)


def parse_split(name: str) -> str:
    """``train``, ``valid`` or ``test`` for any of the usual names (tr, dev, cv, tt ...); empty for any other."""
    return _SPLIT_NAMES.get(name.lower(), "")


def read_manifest(path: Path) -> list[Track]:
    """Read a CSV manifest with the columns ``path, speaker`` and, better, ``seconds, sample_rate, split``; or ``kind``.

    Paths are relative to the manifest's folder and stay below it. ``class`` stands in for ``speaker`` in a manifest of
    noises. Other columns are left alone. Where seconds or sample_rate is missing, empty or 0, the file is asked; one
    that cannot be read is a track with a fault.

    Raises:
        DataError: If the file is not such a table; the message names row and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            columns = tuple(table.fieldnames or ())
            group = next((name for name in ("speaker", "class") if name in columns), None)
            if "path" not in columns or group is None:
                raise DataError(
                    f"{path} needs the columns path and speaker; it has {', '.join(columns) or 'none'}."
                    + nearest("speaker", columns)
                )
            root = path.parent.resolve()
            return [_read_row(path, root, number, row, group) for number, row in enumerate(table, 2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV table in UTF-8 ({error}).") from error


def _read_row(manifest: Path, root: Path, number: int, row: dict[str, str], group: str) -> Track:
    if None in row or None in row.values():
        raise DataError(f"{manifest}, row {number}, has more or fewer fields than the header.")
    audio = root / row["path"]
    if not row["path"] or not _is_below(audio, root):
        raise DataError(f"{manifest}, row {number}: path {row['path']!r} must lead to a file below {root}.")
    split = parse_split(row.get("split", ""))
    if row.get("split") and not split:
        raise DataError(f"{manifest}, row {number}: split {row['split']!r} is not one of {', '.join(SPLITS)}.")
    try:
        seconds, sample_rate = (float(row.get(name) or 0) for name in ("seconds", "sample_rate"))
    except ValueError:
        seconds = sample_rate = math.nan
    if not (0 <= seconds < math.inf and 0 <= sample_rate < math.inf):
        raise DataError(f"{manifest}, row {number}: seconds and sample_rate must be numbers above 0, or empty.")
    kind = row.get("kind", "")
    if seconds and int(sample_rate):
        return Track((("audio", audio),), row[group], seconds, int(sample_rate), split, kind)
    try:
        return Track.from_file_info(audio, probe_audio(audio), group=row[group], split=split, kind=kind)
    except AudioError as error:
        fault = f"{manifest}, row {number}: {error}"
        return Track((("audio", audio),), row[group], 0.0, 0, split, kind, fault=fault)


def _is_below(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a link to itself
        return False


def write_manifest(path: Path, tracks: Iterable[Track]) -> None:
    """Write tracks as a CSV manifest; their files must lie below its folder."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        for track in tracks:
            relative = track.path.resolve().relative_to(path.parent.resolve()).as_posix()
            table.writerow(
                [relative, track.group, track.seconds or "", track.sample_rate or "", track.split, track.kind]
            )


def assign_splits(tracks: Sequence[Track], *, n_sources: int) -> list[Track]:
    """Give every track a split where none has one: about 80, 10 and 10 % of the speakers, chosen by their names' hash.

    A speaker is in one split only, and each split has enough speakers for a mixture. Tracks that have splits keep them.

    Raises:
        DataError: If there are too few speakers for three such splits.
    """
    if any(track.split for track in tracks):
        return list(tracks)
    speakers = sorted({track.group for track in tracks}, key=lambda name: hashlib.sha256(name.encode()).digest())
    n_held_out = max(n_sources, round(len(speakers) / 10))
    if len(speakers) < 3 * n_sources:
        raise DataError(
            f"{len(speakers)} speaker{'s' * (len(speakers) != 1)} cannot be split into train, valid and test of "
            f"{n_sources} or more each: "
            "add speakers, or name the splits yourself (folders train/, valid/, test/, or a manifest's column split)."
        )
    held_out = dict.fromkeys(speakers[:n_held_out], "valid")
    held_out |= dict.fromkeys(speakers[n_held_out : 2 * n_held_out], "test")
    return [replace(track, split=held_out.get(track.group, "train")) for track in tracks]


def group_tracks(tracks: Iterable[Track]) -> dict[str, list[Track]]:
    """Tracks of each speaker, in the order they came."""
    groups: dict[str, list[Track]] = defaultdict(list)
    for track in tracks:
        groups[track.group].append(track)
    return dict(groups)
