"""Folders whose subfolders are no speakers are refused with the reason; those of speakers are not."""

import numpy as np
import pytest
import soundfile

from unbraid.data.folders import list_speakers
from unbraid.errors import DataError


def write(root, *names, seconds=None):
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        length = round(8000 * (seconds if seconds is not None else rng.uniform(0.2, 2)))
        soundfile.write(path, 0.1 * rng.standard_normal(length), 8000)
    return root


def mixtures(root, splits, parts, n_files=4):
    """Write ready mixtures: each file has the same length in all parts."""
    rng = np.random.default_rng(0)
    for split in splits:
        for number in range(n_files):
            seconds = rng.uniform(0.2, 2)
            write(root, *(f"./{split}/{part}/{number}.wav" for part in parts), seconds=seconds)
    return root


@pytest.mark.parametrize(
    "parts",
    [("mix", "s1", "s2"), ("mix_clean", "s1", "s2", "noise"), ("noisy", "clean"), ("vocals", "drums", "bass", "other")],
)
@pytest.mark.parametrize("splits", [("tr", "cv", "tt"), ("",)])
def test_parts_of_ready_mixtures_are_no_speakers(tmp_path, splits, parts):
    with pytest.raises(DataError, match=r"parts of ready mixtures, not speakers.*one subfolder per speaker"):
        list_speakers(mixtures(tmp_path / "data", splits, parts))


def test_parts_of_a_corpus_are_no_speakers(tmp_path):
    root = write(tmp_path / "LibriSpeech", "train-clean-100/19/198/a.flac", "dev-clean/84/121/b.flac")

    with pytest.raises(DataError, match=r"dev-clean, train-clean-100 .* are parts of a corpus.*Give one of them"):
        list_speakers(root)


def test_files_of_equal_names_and_lengths_are_parts_of_mixtures(tmp_path):
    with pytest.raises(DataError, match=r"files in the subfolders anna, ben .* have the same names and lengths"):
        list_speakers(mixtures(tmp_path / "data", ("",), ("anna", "ben")))


def test_the_same_speakers_in_all_splits_are_refused(tmp_path):
    names = [f"{split}/{speaker}/{split}-{speaker}.wav" for split in ("train", "test") for speaker in ("anna", "ben")]

    with pytest.raises(DataError, match=r"All 2 subfolders \(anna, ben\) are in each of the splits test, train"):
        list_speakers(write(tmp_path / "data", *names))


@pytest.mark.parametrize(
    "names",
    [
        ["anna/0.wav", "anna/1.wav", "anna/2.wav", "ben/0.wav", "ben/1.wav", "ben/2.wav"],
        ["1/a.wav", "2/a.wav", "3/a.wav"],
        ["s12/a.wav", "anna/a.wav"],
        [f"s{number}/a.wav" for number in range(1, 35)],
        ["speaker1/a.wav", "speaker2/a.wav", "speaker3/b.wav"],
        ["spk_1/a.wav", "spk_2/a.wav"],
        ["music/a.wav", "anna/a.wav"],
        ["train/anna/a.wav", "train/ben/b.wav", "valid/cleo/c.wav", "valid/anna/d.wav"],
        ["test-anna/a.wav", "ben/a.wav"],
        ["anna.wav", "ben.wav", "cleo.wav"],
    ],
    ids=[
        "same names",
        "numbers",
        "a word and s12",
        "the GRID corpus",
        "numbered speakers",
        "numbered spk",
        "one kind of sound",
        "one speaker in two splits",
        "one name like a part",
        "no folders",
    ],
)
def test_speakers_are_accepted(tmp_path, names):
    assert len(list_speakers(write(tmp_path / "data", *names))) == len(names)


def test_speakers_that_all_read_sentences_of_one_length_are_accepted(tmp_path):
    names = [f"{speaker}/{number}.wav" for speaker in ("anna", "ben") for number in range(4)]

    assert len(list_speakers(write(tmp_path / "data", *names, seconds=1.5))) == 8
