"""The chapter on gradient descent: its files, numbers and page."""

import json
import math
import os
import re
import signal
from html.parser import HTMLParser

import pytest
from PIL import Image

from unbraid.cli import main as cli
from unbraid.figures import AnimationSpec, FigureSpec
from unbraid.textbook import chapter
from unbraid.textbook.chapter import page, write_chapter


def draw(figure):
    figure.add_subplot().plot([0, 1], [0, 1])


def draw_moving(figure):
    (line,) = figure.add_subplot().plot([0, 1], [0, 1], animated=True)
    return lambda frame: line.set_data([0, frame], [0, 1])


def a_figure(name, *, motion=False, numbers=None, title="A title", caption="What to see.", draw=draw):
    moving = AnimationSpec(3, draw_moving) if motion else None
    return FigureSpec(name, title, caption, {"loss": 0.5} if numbers is None else numbers, draw, (2.0, 1.5), moving)


@pytest.fixture
def plates(monkeypatch):
    """Small plates in place of the chapter's own, and no ffmpeg; returns the calls made for them."""
    asked = []
    line = [a_figure("02-b", motion=True), a_figure("15-d")]
    monkeypatch.setattr(chapter, "line_figures", lambda loss, seed: asked.append((loss, seed)) or line)
    monkeypatch.setattr(chapter, "surface_figures", lambda seed: asked.append(seed) or [a_figure("12-c")])
    monkeypatch.setattr(chapter, "has_ffmpeg", lambda: False)
    return asked


def test_a_chapter_is_every_plate_in_order_with_its_numbers_and_a_page(tmp_path, plates):
    found = write_chapter(tmp_path / "out", loss="huber", seed=7)

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["02-b.gif", "02-b.png", "12-c.png", "15-d.png", "index.html", "numbers.json"]
    assert found == tmp_path / "out" / "index.html"
    assert plates == [("huber", 7), 7]
    told = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert (told["loss"], told["seed"]) == ("huber", 7)
    assert [plate["name"] for plate in told["plates"]] == ["02-b", "12-c", "15-d"]
    assert told["plates"][0] == {
        "name": "02-b",
        "title": "A title",
        "caption": "What to see.",
        "numbers": {"loss": 0.5},
    }
    with Image.open(tmp_path / "out" / "02-b.gif") as moving:
        assert moving.n_frames == 3


def test_without_animation_none_is_written_and_an_older_one_goes(tmp_path, plates):
    (tmp_path / "02-b.gif").write_bytes(b"old")
    (tmp_path / "02-b.mp4").write_bytes(b"old")
    (tmp_path / "mine.gif").write_bytes(b"kept")

    write_chapter(tmp_path, animate=False)

    assert sorted(path.name for path in tmp_path.glob("*.gif")) == ["mine.gif"]
    assert not (tmp_path / "02-b.mp4").exists()
    assert "gif" not in (tmp_path / "index.html").read_text()


def test_videos_are_written_beside_gifs_where_ffmpeg_is(tmp_path, plates, monkeypatch):
    monkeypatch.setattr(chapter, "has_ffmpeg", lambda: True)
    monkeypatch.setattr(chapter, "write_mp4", lambda path, pictures, **_: path.write_bytes(bytes(len(pictures))))

    write_chapter(tmp_path)

    assert (tmp_path / "02-b.mp4").read_bytes() == bytes(3)
    assert 'href="02-b.mp4"' in (tmp_path / "index.html").read_text()


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given["href"]] if "href" in given else []
        self.images += [given["src"]] if "src" in given else []

    def handle_data(self, data):
        self.text += data


def test_all_that_the_page_loads_lies_beside_it(tmp_path, plates):
    write_chapter(tmp_path)

    text = (tmp_path / "index.html").read_text()
    found = Page(text)
    assert found.images == ["02-b.png", "02-b.gif", "12-c.png", "15-d.png"]
    assert all((tmp_path / image).is_file() for image in found.images)
    assert all(link.startswith("#") for link in found.links)
    assert not re.search(r"https?:|url\(|@import", text)


def test_hostile_words_on_the_page_are_words():
    bad = '<script>alert("1")</script>&<img src=x onerror=y>'
    plate = a_figure("01-a", title=bad, caption=bad, numbers={bad: 1.0})

    found = Page(page([plate], loss="l2", seed=0, animate=True, videos=False))

    assert "script" not in found.tags
    assert found.images == ["01-a.png"]
    assert found.text.count(bad) == 4  # contents, heading, caption, number


def test_numbers_without_a_value_are_null_in_json_and_named_on_the_page(tmp_path, plates, monkeypatch):
    lost = {"lost": math.inf, "unknown": math.nan, "kept": 2.0}
    monkeypatch.setattr(chapter, "surface_figures", lambda seed: [a_figure("12-c", numbers=lost)])

    write_chapter(tmp_path, animate=False)

    told = json.loads((tmp_path / "numbers.json").read_text(), parse_constant=pytest.fail)
    assert told["plates"][1]["numbers"] == {"lost": None, "unknown": None, "kept": 2.0}
    assert "<td>inf</td>" in (tmp_path / "index.html").read_text()


def test_progress_rises_from_0_to_1_and_names_the_figures(tmp_path, plates):
    heard = []

    write_chapter(tmp_path, progress=lambda done, text: heard.append((done, text)))

    done = [share for share, _ in heard]
    assert done[0] == 0
    assert done[-1] == 1
    assert done == sorted(done)
    assert {"02-b", "12-c", "15-d"} <= {text for _, text in heard}


def test_ctrl_c_ends_with_130_and_leaves_whole_files_only(tmp_path, plates, monkeypatch, capsys):
    def struck(figure):
        os.kill(os.getpid(), signal.SIGINT)
        draw(figure)

    monkeypatch.setattr(chapter, "surface_figures", lambda seed: [a_figure("12-c", draw=struck)])

    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path)]) == 130

    assert sorted(path.name for path in tmp_path.iterdir()) == ["02-b.gif", "02-b.png"]
    for name in ("02-b.gif", "02-b.png"):
        with Image.open(tmp_path / name) as found:
            found.load()


def test_the_command_passes_its_options_and_says_where_the_page_is(tmp_path, plates, capsys):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "l1", "--seed", "3"]) == 0

    assert plates == [("l1", 3), 3]
    told = capsys.readouterr().out
    assert str(tmp_path / "index.html") in told
    assert "no ffmpeg" in told


def test_no_animation_says_nothing_of_ffmpeg(tmp_path, plates, capsys):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--no-animation"]) == 0

    assert "ffmpeg" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.gif"))


def test_an_unknown_loss_is_refused_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "l3"])

    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(word in told for word in ("l3", "l1", "l2", "huber"))


def test_a_folder_that_is_a_file_ends_in_one_sentence_before_any_work(tmp_path, plates, capsys):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "gradient-descent", "-o", str(tmp_path / "out")])

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1
    assert "out" in told
    assert plates == []
    assert (tmp_path / "out").read_text() == "mine"


def test_without_matplotlib_the_command_says_how_to_get_it(tmp_path, plates, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path / "out")]) == 2

    assert capsys.readouterr().err == 'unbraid: The picture needs matplotlib: pip install "unbraid[demo]".\n'
    assert plates == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_leaves_every_experiment_with_what_moves_of_it(tmp_path):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "huber"]) == 0

    told = json.loads((tmp_path / "numbers.json").read_text())["plates"]
    found = Page((tmp_path / "index.html").read_text())
    assert {int(plate["name"][:2]) for plate in told} == set(range(1, 17))
    assert {f"{plate['name']}.png" for plate in told} <= set(found.images)
    assert all(plate["caption"] for plate in told)
    assert [image for image in found.images if not (tmp_path / image).is_file()] == []
    for name in ("09-descent-by-hand", "10-six-learning-rates", "12-race-narrow-valley", "13-cliff"):
        with Image.open(tmp_path / f"{name}.gif") as moving:
            assert moving.n_frames > 20
    assert list(tmp_path.glob(".*")) == []
