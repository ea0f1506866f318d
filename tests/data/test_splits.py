from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.data.splits import assign_splits, parse_split
from unbraid.data.tracks import Track
from unbraid.errors import DataError


def tracks_of(n_speakers, n_files=2, split=""):
    return [
        Track((("audio", Path(f"{s}/{i}.wav")),), f"speaker {s}", 2.0, 8000, split)
        for s in range(n_speakers)
        for i in range(n_files)
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [("tr", "train"), ("TRAIN", "train"), ("dev", "valid"), ("cv", "valid"), ("Validation", "valid"), ("tt", "test")],
)
def test_usual_names_of_splits_are_recognised(name, split):
    assert parse_split(name) == split


@pytest.mark.parametrize("name", ["", "speaker", "trainer", "tests"])
def test_other_names_are_no_split(name):
    assert parse_split(name) == ""


@given(st.integers(2, 4), st.integers(0, 60))
def test_each_speaker_is_in_one_split_and_each_split_can_make_a_mixture(n_sources, more):
    tracks = assign_splits(tracks_of(3 * n_sources + more), n_sources=n_sources)

    splits = {track.group: {other.split for other in tracks if other.group == track.group} for track in tracks}
    sizes = Counter(split for of_speaker in splits.values() for split in of_speaker)
    assert all(len(of_speaker) == 1 for of_speaker in splits.values())
    assert min(sizes["train"], sizes["valid"], sizes["test"]) >= n_sources


def test_80_percent_of_many_speakers_are_for_training():
    splits = Counter(track.split for track in assign_splits(tracks_of(200, n_files=1), n_sources=2))

    assert splits == {"train": 160, "valid": 20, "test": 20}


@given(st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order_of_the_files(random):
    tracks = tracks_of(12)
    shuffled = random.sample(tracks, len(tracks))

    assert set(assign_splits(shuffled, n_sources=2)) == set(assign_splits(tracks, n_sources=2))


def test_existing_splits_are_kept():
    tracks = [*tracks_of(3, split="train"), *tracks_of(2, split="test")]

    assert assign_splits(tracks, n_sources=2) == tracks


def test_too_few_speakers_for_three_splits_are_refused_with_their_number():
    with pytest.raises(DataError, match="5 speakers cannot be split"):
        assign_splits(tracks_of(5), n_sources=2)
