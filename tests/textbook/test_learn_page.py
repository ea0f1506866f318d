"""The chapter as a page is true: its figures are those the plates make now, its numbers those of its figures.

Two steps: the text is held against what stands in the committed figures (fast, and exact); those are held against the
plates made again here, within what another processor or another matplotlib may change.
"""

import contextlib
import importlib.util
import io
import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unbraid.train.validation_audio import MAX_FOLDERS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "learn" / "gradient-descent.md"
TEXT = PAGE.read_text(encoding="utf-8")
FIGURES = PAGE.parent / "figures"
SEPARATOR = "A separator that is heard getting better"

ALLOWED = {
    "": (0,),  # the seed
    "14. AutoClip": (10.3, 8.3, 10.8, 10.2, 11.0),  # Seetharaman et al. 2020, table 1
    "16. Warm-up and decay": (1000, 4000),  # the published recipes
    SEPARATOR: (MAX_FOLDERS, 1),  # 1 kHz
}
"""Numbers of a section that no figure has."""

NUMBER = re.compile(r"(?<![\w.^])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?:\s%)?(?![\w^])")
SECTION = re.compile(r"\b[Ss]ection\s+(\d+)")
POWER_OF_TEN = re.compile(r"(\d+(?:\.\d+)?)\s\\cdot\s10\^\{?(-?\d+)\}?")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Section:
    heading: str
    text: str

    @cached_property
    def figures(self):
        return re.findall(r"!\[[^\]]+\]\(figures/([\w-]+)\.png\)", self.text)

    @cached_property
    def captions(self):
        """What stands under each figure, by its name; line ends are spaces."""
        found = re.findall(r"!\[[^\]]+\]\(figures/([\w-]+)\.png\)\n\n((?:> .*\n)+)", self.text)
        return {name: " ".join(line[2:] for line in lines.splitlines()) for name, lines in found}

    @cached_property
    def numbers_said(self):
        """Every number of the prose; of formulas those with a point, and powers of ten."""
        prose = re.sub(
            r"```.*?```|^> .*?$|!?\[[^\]]*\]\([^)]*\)|`[^`]*`", " ", self.text, flags=re.DOTALL | re.MULTILINE
        )
        powers = [f"{number}e{power}" for number, power in POWER_OF_TEN.findall(prose)]
        prose = SECTION.sub(" ", POWER_OF_TEN.sub(" ", prose))
        formulas = " ".join(part.strip("$") for part in re.findall(r"\$\$.*?\$\$|\$[^$]*\$", prose, flags=re.DOTALL))
        prose = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", " ", prose, flags=re.DOTALL)
        return powers + NUMBER.findall(prose) + [number for number in NUMBER.findall(formulas) if "." in number]


def sections(text=TEXT):
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return [Section("", parts[0]), *(Section(*pair) for pair in zip(parts[1::2], parts[2::2], strict=True))]


@cache
def inside(name):
    """Title, caption and numbers of a committed figure."""
    with Image.open(FIGURES / f"{name}.png") as picture:
        told = picture.text
    return told["Title"], told["Caption"], json.loads(told["Numbers"])


def known_to(section):
    """What a section may quote: the numbers of its figures, and those in their captions."""
    known = list(ALLOWED.get(section.heading, ()))
    for name in section.figures:
        if name != "separator":
            _, caption, numbers = inside(name)
            known += numbers.values()
            known += [value_of(number) for number in NUMBER.findall(caption)]
    if section.heading == SEPARATOR:
        known += numbers_in(json.loads((FIGURES / "separator.json").read_text()))
    return known


def numbers_in(told):
    if isinstance(told, dict):
        return [number for key, value in told.items() for number in (*numbers_in(key), *numbers_in(value))]
    return [float(told)] if re.fullmatch(r"-?\d+(\.\d+)?", str(told)) else []


def value_of(number):
    """What a printed number is: 1,000 or 98.4 %."""
    value = float(number.rstrip("%").strip().replace(",", ""))
    return value / 100 if number.endswith("%") else value


def says(number, value):
    """Whether a printed number is a value, rounded to as many digits as are printed."""
    digits, _, power = number.rstrip("%").strip().replace(",", "").partition("e")
    n_places = len(digits.partition(".")[2])
    if power:
        return float(f"{abs(value):.{n_places}e}") == float(f"{digits}e{power}")
    return f"{abs(100 * value if number.endswith('%') else value):.{n_places}f}" == digits


def wrong_numbers(section):
    known = known_to(section)
    return [number for number in section.numbers_said if not any(says(number, value) for value in known)]


# What the text says


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.heading or "introduction")
def test_every_number_in_the_text_is_one_of_its_figures(section):
    assert wrong_numbers(section) == []


def test_every_figure_stands_once_in_order_with_its_own_caption_under_it():
    shown = [name for section in sections() for name in section.figures if name != "separator"]
    captions = {name: told for section in sections() for name, told in section.captions.items()}

    assert shown == sorted(path.stem for path in FIGURES.glob("[0-9]*.png"))
    assert {name: captions.get(name) for name in shown} == {name: inside(name)[1] for name in shown}


def test_a_decimal_that_is_changed_is_found():
    """The check itself, on each decimal with each other last digit; some of these are another number of the figure."""
    tried, missed = 0, []
    for section in sections():
        for number in filter(re.compile(r"\d+\.\d+$").match, section.numbers_said):
            for changed in {number[:-1] + digit for digit in "0123456789"} - {number}:
                text = re.sub(rf"(?<![\w.]){re.escape(number)}(?!\w)", changed, section.text)
                tried += 1
                missed += [] if changed in wrong_numbers(Section(section.heading, text)) else [(number, changed)]
    assert tried > 9 * 50
    assert len(missed) < 0.1 * tried  # of those with one or two digits


def test_sections_that_are_spoken_of_are_there():
    numbers = {section.heading.partition(".")[0] for section in sections()}
    assert set(SECTION.findall(TEXT)) <= numbers


def test_links_pictures_and_sounds_are_there():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    anchors = {re.sub(r"[^\w -]", "", section.heading.lower()).replace(" ", "-") for section in sections()}

    assert targets
    assert [target for target in targets if target.startswith("#") and target[1:] not in anchors] == []
    files = [target.partition("#")[0] for target in targets if not target.startswith("#")]
    assert [file for file in files if not (PAGE.parent / file).exists()] == []


def test_the_snippets_run_in_their_order_and_print_what_stands_beside():
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
    expected = re.findall(r"print\(.*\)  # (.*)", code)

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, PAGE.name, "exec"), {})

    assert expected
    assert printed.getvalue().splitlines() == expected


def test_figures_and_sounds_are_small_enough_for_git():
    pictures, sounds = sorted(FIGURES.glob("*.png")), sorted(FIGURES.glob("*.ogg"))

    assert sum(path.stat().st_size for path in pictures) < 1_200_000
    assert len(sounds) == 3
    assert sum(path.stat().st_size for path in sounds) < 60_000
    assert {(soundfile.info(path).samplerate, soundfile.info(path).duration) for path in sounds} == {(8000, 2.0)}


# What the figures say


@pytest.fixture(scope="module")
def made():
    """Every plate, made anew, and what draws it."""
    figures = script("learn_figures")
    return figures.drawn, {plate.name: plate for plate in figures.all_figures()}


MEND = "a plate is not what it was; run scripts/learn_figures.py, put its caption into the page, read the text again"

ROUNDING = 1e-8
"""Numbers below are what rounding left of 0, and other processors round elsewhere."""

UNSTABLE = {("12-race-spiky-surface", "RMSprop: loss at the end"): 0.02}
"""It swings between dents for good: 1e-14 more at the start changes this by 0.4 %."""


def same_number(a, b, rel):
    return abs(a - b) <= rel * max(abs(a), abs(b)) or max(abs(a), abs(b)) < ROUNDING


def same_words(a, b):
    """Whether captions are the same but for the last digit of their numbers, which may be rounded either way."""
    pairs = zip(*([value_of(number) for number in NUMBER.findall(one)] for one in (a, b)), strict=False)
    return NUMBER.sub("#", a) == NUMBER.sub("#", b) and all(same_number(*pair, rel=0.1) for pair in pairs)


@pytest.mark.slow
def test_the_committed_figures_hold_what_the_plates_come_to_now(made):
    _, plates = made
    assert sorted(plates) == sorted(path.stem for path in FIGURES.glob("[0-9]*.png"))
    for name, plate in plates.items():
        title, caption, numbers = inside(name)
        assert title == plate.title
        assert same_words(caption, plate.caption), f"{name}: {MEND}"
        assert list(numbers) == list(plate.numbers), name
        off = {
            key: (numbers[key], float(value))
            for key, value in plate.numbers.items()
            if not same_number(numbers[key], float(value), UNSTABLE.get((name, key), 1e-4))
        }
        assert off == {}, f"{name}: {MEND}"


@pytest.mark.slow
def test_drawn_again_the_figures_look_the_same(made):
    """Of blocks of 16 by 16 pixels, hardly any is off by more than 20 of 255 in a colour.

    Letters rendered otherwise, and a path that is unstable, put up to 0.7 in a thousand off; another seed, 24 and more.
    """
    draw, plates = made
    for name, plate in plates.items():
        with Image.open(FIGURES / f"{name}.png") as committed:
            before = blocks(committed)
        now = blocks(draw(plate))
        assert now.shape == before.shape, name
        assert (np.abs(now - before).max(-1) > 20).mean() < 0.005, f"{name}: {MEND}"


def blocks(picture, size=16):
    """The mean colour of each block, ``(row, column, 3)``."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    rows, columns = (length // size for length in pixels.shape[:2])
    return pixels[: rows * size, : columns * size].reshape(rows, size, columns, size, 3).mean((1, 3))
