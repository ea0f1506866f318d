"""The README: short, and it says first what this is. Its commands, code and figures are checked in tests/docs."""

from pathlib import Path

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_its_first_sentence_says_what_the_library_is_for():
    first_sentence = TEXT.split("\n\n")[1].split(". ")[0]

    assert "source separation" in first_sentence.replace("\n", " ")


def test_it_shows_one_picture():
    assert TEXT.count("![") == 1
