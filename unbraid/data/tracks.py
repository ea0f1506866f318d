"""Tracks: recordings with their metadata; reading and writing manifests."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unbraid.audio import AudioInfo, probe_audio
from unbraid.data.splits import SPLITS, parse_split
from unbraid.errors import AudioError, DataError, nearest

DELIMITERS = ",;\t"

_COLUMNS = ("path", "speaker", "seconds", "sample_rate", "split", "kind")


@dataclass(frozen=True, slots=True)
class Track:
    """One recording, or several simultaneous ones (stems).

    Attributes:
        stems: Pairs of name and file; an ordinary recording has one stem, ``"audio"``.
        group: The speaker, or the class of a noise. The sources of a mixture all have different groups.
        seconds: Duration in seconds.
        sample_rate: Sample rate in Hz.
        split: ``train``, ``valid`` or ``test``; empty if not assigned.
        kind: Kind of sound, such as ``speech`` or ``music``; empty if unknown.
        fault: Why the recording cannot be used, if that was noticed while listing; else empty. A faulty recording stays
            in the list, so that a run with it draws the same as one that names it under ``exclude``.
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
        """The file of the first stem."""
        return self.stems[0][1]

    @classmethod
    def from_file_info(cls, path: Path, info: AudioInfo, *, group: str, split: str = "", kind: str = "") -> "Track":
        """Create an ordinary recording from what the file's header says."""
        return cls((("audio", path),), group, info.seconds, info.sample_rate, split, kind)


def read_manifest(path: Path) -> list[Track]:
    """Read a CSV manifest, separated by commas, semicolons or tabs.

    The columns ``path`` and ``speaker`` are required (``class`` instead of ``speaker`` for noises). The columns
    ``seconds``, ``sample_rate``, ``split`` and ``kind`` are optional, others are ignored. Paths are relative to the
    manifest's folder and must not leave it. If seconds or sample_rate is missing, empty or 0, the file's header is
    read; a file that cannot be read becomes a track with a fault.

    Raises:
        DataError: If the file is not such a table; the message names the row and the column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Spreadsheets of many countries write semicolons; some tools write tabs.
            header = file.readline()
            file.seek(0)
            delimiter = max(DELIMITERS, key=header.count)
            table = csv.DictReader(file, strict=True, delimiter=delimiter)
            columns = tuple(table.fieldnames or ())
            group = next((name for name in ("speaker", "class") if name in columns), None)
            if "path" not in columns or group is None:
                raise DataError(
                    f"{path} needs the columns path and speaker, but has {', '.join(columns) or 'none'}."
                    + nearest("speaker", columns)
                )
            root = path.parent.resolve()
            # The header is row 1, as a spreadsheet counts.
            return [_read_row(path, root, number, row, group) for number, row in enumerate(table, start=2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV table in UTF-8 ({error}).") from error


def _read_row(manifest: Path, root: Path, number: int, row: dict[str, str], group: str) -> Track:
    if None in row or None in row.values():  # how csv.DictReader marks fields too many and too few
        raise DataError(f"{manifest}, row {number}, has more or fewer fields than the header.")
    audio = root / row["path"]
    if not row["path"] or not _is_below(audio, root):
        raise DataError(f"{manifest}, row {number}: path {row['path']!r} must name a file below {root}.")
    split = parse_split(row.get("split", ""))
    if row.get("split") and not split:
        raise DataError(f"{manifest}, row {number}: split {row['split']!r} is not one of {', '.join(SPLITS)}.")
    try:
        seconds = float(row.get("seconds") or 0)
        sample_rate = float(row.get("sample_rate") or 0)
    except ValueError:
        seconds = sample_rate = math.nan  # refused below, like numbers out of range
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
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a link to itself
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


def group_tracks(tracks: Iterable[Track]) -> dict[str, list[Track]]:
    """Return the tracks of each speaker, in the order of the input."""
    groups: dict[str, list[Track]] = defaultdict(list)
    for track in tracks:
        groups[track.group].append(track)
    return dict(groups)
