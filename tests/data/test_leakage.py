"""Recordings in both splits are result, under any name."""

import shutil
from dataclasses import replace

import numpy as np
import soundfile
from conftest import talker

from unbraid.data.folders import list_speakers
from unbraid.data.leakage import compare_splits, find_copies


def split(folder, name, first, n_speakers=3, n_files=2):
    for speaker in range(first, first + n_speakers):
        path = folder / name / f"{name}-{speaker}"
        path.mkdir(parents=True)
        for utterance in range(n_files):
            soundfile.write(path / f"{utterance}.wav", talker(speaker, utterance), 8000)


def tracks_of(folder):
    tracks = list_speakers(folder)
    return [[track for track in tracks if track.split == name] for name in ("train", "valid")]


def test_splits_without_overlap_share_nothing(tmp_path):
    split(tmp_path, "train", 0)
    split(tmp_path, "valid", 3)

    result = compare_splits(*tracks_of(tmp_path))

    assert result["splits"] == {"train": {"files": 6, "speakers": 3}, "valid": {"files": 6, "speakers": 3}}
    assert result["shared"] == {
        "n_files": 0, "files": [], "n_speakers": 0, "speakers": [], "n_copies": 0, "copies": [],
    }  # fmt: skip


def test_a_copy_under_another_name_is_found_and_another_recording_of_the_same_length_is_not(tmp_path):
    split(tmp_path, "train", 0)
    split(tmp_path, "valid", 3)
    original = tmp_path / "train" / "train-1" / "0.wav"
    copy = tmp_path / "valid" / "valid-4" / "copied.wav"
    shutil.copy(original, copy)

    shared = compare_splits(*tracks_of(tmp_path))["shared"]

    assert (shared["n_copies"], shared["copies"]) == (1, [[str(original), str(copy)]])
    assert shared["n_files"] == shared["n_speakers"] == 0


def test_shared_files_and_speakers_are_counted_and_twenty_are_named(tmp_path):
    split(tmp_path, "train", 0, n_speakers=1, n_files=30)
    train, _ = tracks_of(tmp_path)

    shared = compare_splits(train, [replace(track, split="valid") for track in train])["shared"]

    assert (shared["n_files"], shared["n_speakers"], shared["speakers"]) == (30, 1, ["train-0"])
    assert shared["files"] == sorted(str(track.path) for track in train)[:20]
    assert shared["n_copies"] == 0


def test_silence_alone_does_not_make_a_copy(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "silent.wav", np.zeros(40000, np.float32), 8000)

    assert find_copies(*tracks_of(tmp_path)) == []


def test_at_most_max_files_are_compared_with_rare_lengths_first(tmp_path, monkeypatch):
    split(tmp_path, "train", 0, n_files=10)
    split(tmp_path, "valid", 3, n_files=10)
    rare = tmp_path / "train" / "train-0" / "rare.wav"
    soundfile.write(rare, talker(9, 0, seconds=2.0), 8000)
    shutil.copy(rare, tmp_path / "valid" / "valid-3" / "other.wav")
    shutil.copy(tmp_path / "train" / "train-0" / "0.wav", tmp_path / "valid" / "valid-3" / "usual.wav")
    train, valid = tracks_of(tmp_path)

    assert len(find_copies(train, valid)) == 2
    assert [train_path for train_path, _ in find_copies(train, valid, max_files=20)] == [rare]
