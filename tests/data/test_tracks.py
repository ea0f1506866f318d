import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.data.folders import list_speakers
from unbraid.data.splits import assign_splits
from unbraid.data.tracks import Track, group_tracks, read_manifest, write_manifest
from unbraid.errors import DataError


def manifest(folder, text):
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def tracks_of(n_speakers, n_files=2, split=""):
    return [
        Track((("audio", Path(f"{s}/{i}.wav")),), f"speaker {s}", 2.0, 8000, split)
        for s in range(n_speakers)
        for i in range(n_files)
    ]


def test_a_written_manifest_reads_back(speaker_folder):
    tracks = assign_splits(list_speakers(speaker_folder()), n_sources=2)
    write_manifest(tracks[0].path.parents[1] / "all.csv", tracks)

    assert read_manifest(tracks[0].path.parents[1] / "all.csv") == tracks


def test_faulty_tracks_survive_writing_and_reading(speaker_folder):
    root = speaker_folder(n_speakers=2, n_files=1)
    (root / "speaker-01" / "00.wav").write_bytes(b"")
    write_manifest(root / "all.csv", list_speakers(root))

    assert [bool(track.fault) for track in read_manifest(root / "all.csv")] == [False, True]


@pytest.mark.parametrize("text", ["path,speaker\n{},anna", "path,speaker,seconds,sample_rate\n{},anna,,0"])
def test_a_manifest_without_durations_is_completed_from_the_files(speaker_folder, text):
    root = speaker_folder(n_speakers=1, n_files=1)
    path = manifest(root, text.format("speaker-00/00.wav"))

    assert read_manifest(path) == [Track((("audio", root / "speaker-00/00.wav"),), "anna", 1.5, 8000)]


def test_other_columns_their_order_and_a_byte_order_mark_do_not_matter(tmp_path):
    text = "\ufeffnote,split,sample_rate,path,seconds,speaker\n'hi',dev,16000,a.wav,2.5,anna\n"

    assert read_manifest(manifest(tmp_path, text)) == [
        Track((("audio", tmp_path / "a.wav"),), "anna", 2.5, 16000, "valid")
    ]


def test_an_index_column_without_a_name_is_another_column(tmp_path):
    """pandas writes such a column by default."""
    (track,) = read_manifest(manifest(tmp_path, ",path,speaker,seconds,sample_rate\n0,a.wav,anna,2,8000\n"))

    assert track.group == "anna"


def test_the_column_class_stands_for_speaker(tmp_path):
    (track,) = read_manifest(manifest(tmp_path, "path,class,seconds,sample_rate\na.wav,rain,2,8000\n"))

    assert track.group == "rain"


@pytest.mark.parametrize("path", ["../outside.wav", "/etc/passwd", "a/../../outside.wav", "loop.wav", ""])
def test_a_path_out_of_the_manifests_folder_is_refused_with_its_row(tmp_path, path):
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.wav").touch()
    (tmp_path / "data" / "loop.wav").symlink_to("loop.wav")
    text = f"path,speaker,seconds,sample_rate\na.wav,anna,2,8000\n{path},bob,2,8000\n"

    with pytest.raises(DataError, match="row 3"):
        read_manifest(manifest(tmp_path / "data", text))


def test_a_link_out_of_the_manifests_folder_is_refused_with_its_row(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.wav").touch()
    (tmp_path / "data" / "a.wav").symlink_to(tmp_path / "outside.wav")

    with pytest.raises(DataError, match="row 2"):
        read_manifest(manifest(tmp_path / "data", "path,speaker,seconds,sample_rate\na.wav,anna,2,8000\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.wav,anna,2", "fields"),
        ("a.wav,anna,2,8000,train,more", "fields"),
        ("a.wav,anna,two,8000,train", "numbers"),
        ("a.wav,anna,2,8 kHz,train", "numbers"),
        ("a.wav,anna,nan,8000,train", "numbers"),
        ("a.wav,anna,inf,8000,train", "numbers"),
        ("a.wav,anna,-2,8000,train", "numbers"),
        ("a.wav,anna,2,inf,train", "numbers"),
        ("a.wav,anna,2,nan,train", "numbers"),
        ("a.wav,anna,2,8000,holdout", "split"),
        ("a\0.wav,anna,2,8000,train", "path"),
    ],
)
def test_an_invalid_row_is_refused_with_its_number(tmp_path, row, message):
    text = f"path,speaker,seconds,sample_rate,split\na.wav,anna,2,8000,train\n{row}\n"

    with pytest.raises(DataError, match=rf"row 3\b.*{message}"):
        read_manifest(manifest(tmp_path, text))


@pytest.mark.parametrize("text", ["", "file,speaker\na.wav,anna\n", "path,talker\na.wav,anna\n"])
def test_a_table_without_required_columns_is_refused_with_its_columns(tmp_path, text):
    with pytest.raises(DataError, match="needs the columns path and speaker"):
        read_manifest(manifest(tmp_path, text))


def test_a_binary_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="UTF-8"):
        read_manifest(manifest(tmp_path, b"\xff\xfe\x00path,speaker"))


CELL = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.lists(CELL, max_size=6).map(",".join), max_size=4).map("\n".join))
def test_any_rows_give_tracks_or_a_one_line_error(text):
    with tempfile.TemporaryDirectory() as folder:
        path = manifest(Path(folder), "path,speaker,seconds,sample_rate,split\n" + text)
        try:
            tracks = read_manifest(path)
        except DataError:
            return

    for track in tracks:
        assert track.path.resolve().is_relative_to(path.parent.resolve())
        assert track.fault or (math.isfinite(track.seconds) and track.seconds > 0 and track.sample_rate > 0)


def test_groups_keep_every_track_in_order():
    tracks = tracks_of(3)[::-1]

    groups = group_tracks(tracks)

    assert list(groups) == ["speaker 2", "speaker 1", "speaker 0"]
    assert [track for group in groups.values() for track in group] == tracks


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_commas_semicolons_and_tabs_separate_columns(tmp_path, delimiter):
    rows = [("path", "speaker", "seconds", "sample_rate"), ("a.wav", "anna; b, c", "2.5", "8000")]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)

    [track] = read_manifest(manifest(tmp_path, text))

    assert (track.path.name, track.group, track.seconds) == ("a.wav", "anna; b, c", 2.5)
