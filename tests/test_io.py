"""Files that are written whole or not at all."""

import os

import pytest

from unbraid.io import atomic_replace, write_atomically


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "last"
    write_atomically(path, "old, and longer\n")
    write_atomically(path, "n\u00e9w\n")

    assert path.read_text(encoding="utf-8") == "n\u00e9w\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "last"
    write_atomically(path, "old")

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def stopped_half_way():
        with atomic_replace(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()

    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["x.txt"]
