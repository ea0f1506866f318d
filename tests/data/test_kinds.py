"""One source of each kind, in the order the recipe names."""

from dataclasses import replace

import pytest

from unbraid.data.dataset import DataSettings, Key, make_dataset
from unbraid.data.folders import list_speakers
from unbraid.dsp import power_db
from unbraid.errors import DataError

SETTINGS = DataSettings(excerpt_seconds=0.5, kinds=("low", "high"))


@pytest.fixture
def tracks(speaker_folder):
    tracks = list_speakers(speaker_folder(n_speakers=6))
    kinds = ("high", "low", "other")
    return [replace(track, split="train", kind=kinds[int(track.group[-2:]) % 3]) for track in tracks]


def kind_of(tracks, file):
    return next(track.kind for track in tracks if str(track.path) == file)


def test_sources_come_in_the_order_of_the_kinds_and_other_kinds_never(tracks):
    dataset = make_dataset(tracks, SETTINGS, "train")

    for index in range(20):
        assert [kind_of(tracks, file) for file in dataset[Key(0, index)].item.files] == ["low", "high"]


def test_neither_kind_is_always_louder(tracks):
    dataset = make_dataset(tracks, SETTINGS, "train")
    levels = [[power_db(source) for source in dataset[Key(0, index)].audio.sources] for index in range(20)]

    assert {low > high for low, high in levels} == {True, False}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (replace(SETTINGS, kinds=("low", "shrill")), "has no recordings of kind 'shrill'.*high, low, other"),
        (replace(SETTINGS, kinds=("low",)), "must name 2 different kinds"),
    ],
)
def test_invalid_kinds_are_refused_by_name(tracks, settings, words):
    with pytest.raises(DataError, match=words):
        make_dataset(tracks, settings, "train")
