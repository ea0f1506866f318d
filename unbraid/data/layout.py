"""Refuse folders whose subfolders are not speakers, but parts of ready mixtures or of a corpus."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from unbraid.data.tracks import Track
from unbraid.errors import DataError

MIXTURE_WORDS = re.compile(
    r"mix(ture|tures|ed)?([_-]?(clean|both|single|anechoic|reverb))?"
    r"|noise|noisy|clean|vocals|drums|bass|other|accompaniment|music|effects|sfx"
)
"""Names of folders that hold mixtures, noise or stems, in lower case."""

SOURCE_NUMBERS = re.compile(r"(s|source|src|spk|speaker)?[_-]?\d([_-]?(anechoic|reverb))?")
"""Names of folders that hold the sources of mixtures. Alone they may be speakers, as s1 to s34 in the GRID corpus."""

CORPUS_PARTS = re.compile(r"(train|dev|test|valid|eval)[-_](clean|other|noisy|single|both|\d{2,}h?)([-_]\w+)?")
"""Names such as ``train-clean-100`` in LibriSpeech."""

MIN_LENGTHS = 3
"""So many different lengths must agree before files of the same name count as parts of the same mixtures."""


def check_speaker_folders(root: Path, tracks: Sequence[Track]) -> None:
    """Raise unless the groups of a folder's recordings can be speakers.

    Mixing the parts of ready mixtures with each other would train on nonsense without any other sign of it.

    Args:
        root: The folder, for the message.
        tracks: Its recordings.

    Raises:
        DataError: With the reason, and what to do.
    """
    by_group: dict[str, list[Track]] = defaultdict(list)
    for track in tracks:
        by_group[track.group].append(track)
    names = sorted(by_group)
    advice = "Give a folder with one subfolder per speaker, or a CSV file with the columns path,speaker."

    # 1. By the names of the subfolders.
    words = [name for name in names if MIXTURE_WORDS.fullmatch(name.lower())]
    numbers = [name for name in names if SOURCE_NUMBERS.fullmatch(name.lower())]
    if words and len(words) + len(numbers) == len(names) > 1:
        raise DataError(
            f"The subfolders {_listed(names)} of {root} are parts of ready mixtures, not speakers. Unbraid makes its "
            f"mixtures from recordings of single speakers. {advice}"
        )
    parts = [name for name in names if CORPUS_PARTS.fullmatch(name.lower())]
    if len(parts) == len(names) > 1:
        raise DataError(
            f"The subfolders {_listed(names)} of {root} are parts of a corpus, not speakers. Give one of them, such as "
            f"{root / names[0]}, if its subfolders are speakers. {advice}"
        )

    # 2. By the files: parts of a mixture have the same name and length, and mixtures differ in length.
    if 1 < len(names) <= 8 and _have_equal_files(by_group):
        raise DataError(
            f"The files in the subfolders {_listed(names)} of {root} have the same names and lengths: they are "
            f"parts of ready mixtures, not speakers. {advice}"
        )

    # 3. By the splits: with all speakers in all splits, validation would be on voices known from training.
    splits: dict[str, set[str]] = defaultdict(set)
    for track in tracks:
        splits[track.split].add(track.group)
    if len(splits) > 1 and len(names) > 1 and all(groups == set(names) for groups in splits.values()):
        raise DataError(
            f"All {len(names)} subfolders ({_listed(names)}) are in each of the splits {', '.join(sorted(splits))} of "
            f"{root}, so they are not speakers, or validation would be on voices known from training. Put each speaker "
            "into one split, or assign splits on purpose in the column split of a CSV file."
        )


def _have_equal_files(by_group: Mapping[str, Sequence[Track]]) -> bool:
    lengths: list[dict[tuple[str, str], float]] = [
        {(track.split, track.path.stem): round(track.seconds, 3) for track in tracks} for tracks in by_group.values()
    ]
    return all(each == lengths[0] for each in lengths) and len(set(lengths[0].values())) >= MIN_LENGTHS


def _listed(names: Sequence[str], n_shown: int = 4) -> str:
    return ", ".join(names[:n_shown]) + (", ..." if len(names) > n_shown else "")
