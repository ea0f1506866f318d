import shutil

import pytest

from unbraid.data.folders import files_passed_over, list_noises, list_speakers
from unbraid.errors import DataError


def test_each_folder_is_a_speaker(speaker_folder):
    tracks = list_speakers(speaker_folder(n_speakers=3, n_files=2))

    assert [(track.group, track.path.name) for track in tracks] == [
        (f"speaker-{speaker:02d}", f"{file:02d}.wav") for speaker in range(3) for file in range(2)
    ]
    assert {(track.seconds, track.sample_rate, track.split, track.fault) for track in tracks} == {(1.5, 8000, "", "")}


def test_deeper_folders_belong_to_the_same_speaker(speaker_folder, tmp_path):
    speaker_folder(n_speakers=1, root=tmp_path / "all" / "anna" / "chapter 1")
    speaker_folder(n_speakers=1, root=tmp_path / "all" / "anna" / "chapter 2")

    assert [track.group for track in list_speakers(tmp_path / "all")] == ["anna"] * 4


def test_folders_named_like_splits_contain_the_speakers_of_each_split(speaker_folder, tmp_path):
    folders = {"train": ("anna", "ben"), "dev": ("cleo",), "tt": ("dora", "emil")}
    for name, speakers in folders.items():
        for speaker in speakers:
            speaker_folder(n_speakers=1, n_files=1, root=tmp_path / "all" / name / speaker)

    splits = {split: [] for split in ("train", "valid", "test")}
    for track in list_speakers(tmp_path / "all"):
        splits[track.split].append(track.group)
    assert splits == {"train": ["anna", "ben"], "valid": ["cleo"], "test": ["dora", "emil"]}


def test_each_file_without_a_folder_is_its_own_speaker(speaker_folder):
    root = speaker_folder(n_speakers=1, n_files=3)

    assert [track.group for track in list_speakers(root / "speaker-00")] == ["00", "01", "02"]


def test_files_that_are_not_audio_are_ignored(speaker_folder):
    root = speaker_folder(n_speakers=1, n_files=1)
    for name in ("notes.txt", ".DS_Store", "._00.wav", "00.lab"):
        (root / "speaker-00" / name).write_bytes(b"x")
    (root / "folder.wav").mkdir()

    assert [track.path.name for track in list_speakers(root)] == ["00.wav"]


def test_suffixes_may_be_in_capitals(speaker_folder):
    root = speaker_folder(n_speakers=1, n_files=1)
    (root / "speaker-00" / "00.wav").rename(root / "speaker-00" / "00.WAV")

    assert len(list_speakers(root)) == 1


def test_every_unreadable_file_stays_listed_with_its_fault(speaker_folder):
    root = speaker_folder(n_speakers=3, n_files=1)
    (root / "speaker-00" / "00.wav").write_bytes(b"")
    (root / "speaker-01" / "00.wav").write_bytes(b"random" * 100)

    tracks = list_speakers(root)

    assert [str(track.path) in track.fault for track in tracks] == [True, True, False]
    assert [track.group for track in tracks] == ["speaker-00", "speaker-01", "speaker-02"]


def test_every_unreadable_file_of_a_manifest_stays_listed_with_its_row(speaker_folder):
    root = speaker_folder(n_speakers=2, n_files=1)
    (root / "speaker-01" / "00.wav").write_bytes(b"")
    rows = ["path,speaker,split", "speaker-00/00.wav,anna,tr", "speaker-01/00.wav,bob,tr", "gone.wav,carl,tt"]
    (root / "all.csv").write_text("\n".join(rows))

    tracks = list_speakers(root / "all.csv")

    assert [(track.group, track.split) for track in tracks] == [("anna", "train"), ("bob", "train"), ("carl", "test")]
    assert tracks[0].fault == ""
    assert "row 3" in tracks[1].fault
    assert "row 4" in tracks[2].fault


def test_a_link_out_of_the_folder_is_a_fault_and_is_not_opened(speaker_folder, tmp_path):
    root = speaker_folder(n_speakers=2, n_files=1)
    outside = shutil.move(root / "speaker-00" / "00.wav", tmp_path / "outside.wav")
    (root / "speaker-00" / "00.wav").symlink_to(outside)

    faults = [track.fault for track in list_speakers(root)]

    assert "outside of" in faults[0]
    assert faults[1] == ""


def test_a_manifest_may_be_named_instead_of_a_folder(speaker_folder):
    root = speaker_folder(n_speakers=1, n_files=1)
    (root / "all.csv").write_text("path,speaker\nspeaker-00/00.wav,anna\n")

    assert [track.group for track in list_speakers(root / "all.csv")] == ["anna"]


@pytest.mark.parametrize("kind", ["missing", "empty", "other file", "nothing usable", "table of nothing"])
@pytest.mark.parametrize("read", [list_speakers, list_noises])
def test_a_path_without_usable_recordings_is_refused_by_name(tmp_path, kind, read):
    path = tmp_path / {"other file": "audio.zip", "table of nothing": "all.csv"}.get(kind, "speech")
    if kind == "other file":
        path.touch()
    elif kind == "table of nothing":
        path.write_text("path,speaker\n")
    elif kind != "missing":
        path.mkdir()
    if kind == "nothing usable":
        (path / "a.wav").touch()

    with pytest.raises(DataError) as error:
        read(path)

    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_passed_over_in_a_folder_is_counted_with_the_reason(speaker_folder, tmp_path):
    root = speaker_folder(n_speakers=2, n_files=1)
    assert files_passed_over(root) == ""
    for name in ("speaker-00/a.m4a", "speaker-00/b.M4A", "speaker-01/._00.wav", "notes.txt", "c.wma"):
        (root / name).write_bytes(b"x")
    elsewhere = speaker_folder(n_speakers=1, root=tmp_path / "elsewhere")
    (root / "linked").symlink_to(elsewhere / "speaker-00")
    (root / "speaker-01" / "broken.wav").symlink_to(tmp_path / "nowhere.wav")

    sentence = files_passed_over(root)

    assert sentence.startswith(f"Passed over in {root}: ")
    for part in (
        "2 .m4a files",
        "1 .wma files",
        "1 hidden files",
        "1 linked folders",
        "1 pipes, devices or broken links",
    ):
        assert part in sentence
    assert "txt" not in sentence
