"""The chapter on gradient descent: its files, numbers, page and command."""

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
from unbraid.textbook.chapter import render_page, write_chapter


def draw(figure):
    figure.add_subplot().plot([0, 1], [0, 1])


def draw_animation(figure):
    (line,) = figure.add_subplot().plot([0, 1], [0, 1], animated=True)
    return lambda frame: line.set_data([0, frame], [0, 1])


def a_figure(name, *, animated=False, numbers=None, title="A title", caption="What to see.", draw=draw):
    animation = AnimationSpec(3, draw_animation) if animated else None
    return FigureSpec(name, title, caption, {"loss": 0.5} if numbers is None else numbers, draw, (2.0, 1.5), animation)


@pytest.fixture
def calls(monkeypatch):
    """Replace the chapter's figures by small ones, hide ffmpeg, and return the arguments of the calls for figures."""
    calls = []
    line = [a_figure("02-b", animated=True), a_figure("15-d")]
    monkeypatch.setattr(chapter, "line_figures", lambda loss, seed: calls.append((loss, seed)) or line)
    monkeypatch.setattr(chapter, "surface_figures", lambda seed: calls.append(seed) or [a_figure("12-c")])
    monkeypatch.setattr(chapter, "has_ffmpeg", lambda: False)
    return calls


def test_chapter_is_every_figure_in_order_with_numbers_and_a_page(tmp_path, calls):
    page = write_chapter(tmp_path / "out", loss="huber", seed=7)

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["02-b.gif", "02-b.png", "12-c.png", "15-d.png", "index.html", "numbers.json"]
    assert page == tmp_path / "out" / "index.html"
    assert calls == [("huber", 7), 7]
    written = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert (written["loss"], written["seed"]) == ("huber", 7)
    assert [figure["name"] for figure in written["figures"]] == ["02-b", "12-c", "15-d"]
    assert written["figures"][0] == {
        "name": "02-b",
        "title": "A title",
        "caption": "What to see.",
        "numbers": {"loss": 0.5},
    }
    with Image.open(tmp_path / "out" / "02-b.gif") as gif:
        assert gif.n_frames == 3


def test_without_animation_none_is_written_and_old_ones_are_removed(tmp_path, calls):
    (tmp_path / "02-b.gif").write_bytes(b"old")
    (tmp_path / "02-b.mp4").write_bytes(b"old")
    (tmp_path / "mine.gif").write_bytes(b"not ours")

    write_chapter(tmp_path, animate=False)

    assert sorted(path.name for path in tmp_path.glob("*.gif")) == ["mine.gif"]
    assert not (tmp_path / "02-b.mp4").exists()
    assert "gif" not in (tmp_path / "index.html").read_text()


def test_videos_are_written_if_ffmpeg_is_installed(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(chapter, "has_ffmpeg", lambda: True)
    monkeypatch.setattr(chapter, "write_mp4", lambda path, frames, **_: path.write_bytes(bytes(len(frames))))

    write_chapter(tmp_path)

    assert (tmp_path / "02-b.mp4").read_bytes() == bytes(3)
    assert 'href="02-b.mp4"' in (tmp_path / "index.html").read_text()


class ParsedPage(HTMLParser):
    """Links, images, tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.images = []
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.images += [attributes["src"]] if "src" in attributes else []

    def handle_data(self, data):
        self.text += data


def test_page_loads_only_files_next_to_it(tmp_path, calls):
    write_chapter(tmp_path)

    text = (tmp_path / "index.html").read_text()
    page = ParsedPage(text)
    assert page.images == ["02-b.png", "02-b.gif", "12-c.png", "15-d.png"]
    assert all((tmp_path / image).is_file() for image in page.images)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|url\(|@import", text)


def test_markup_in_titles_captions_and_numbers_is_escaped():
    bad = '<script>alert("1")</script>&<img src=x onerror=y>'
    figure = a_figure("01-a", title=bad, caption=bad, numbers={bad: 1.0})

    page = ParsedPage(render_page([figure], loss="l2", seed=0, animate=True, videos=False))

    assert "script" not in page.tags
    assert page.images == ["01-a.png"]
    assert page.text.count(bad) == 4  # contents, heading, caption, number


def test_nonfinite_numbers_are_null_in_json_and_shown_on_the_page(tmp_path, calls, monkeypatch):
    nonfinite = {"infinite": math.inf, "unknown": math.nan, "finite": 2.0}
    monkeypatch.setattr(chapter, "surface_figures", lambda seed: [a_figure("12-c", numbers=nonfinite)])

    write_chapter(tmp_path, animate=False)

    written = json.loads((tmp_path / "numbers.json").read_text(), parse_constant=pytest.fail)
    assert written["figures"][1]["numbers"] == {"infinite": None, "unknown": None, "finite": 2.0}
    assert "<td>inf</td>" in (tmp_path / "index.html").read_text()


def test_progress_rises_from_0_to_1_and_names_the_figures(tmp_path, calls):
    updates = []

    write_chapter(tmp_path, progress=lambda done, text: updates.append((done, text)))

    done = [fraction for fraction, _ in updates]
    assert done[0] == 0
    assert done[-1] == 1
    assert done == sorted(done)
    assert {"02-b", "12-c", "15-d"} <= {text for _, text in updates}


def test_ctrl_c_exits_with_130_and_leaves_complete_files_only(tmp_path, calls, monkeypatch, capsys):
    def interrupted(figure):
        os.kill(os.getpid(), signal.SIGINT)
        draw(figure)

    monkeypatch.setattr(chapter, "surface_figures", lambda seed: [a_figure("12-c", draw=interrupted)])

    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path)]) == 130

    assert sorted(path.name for path in tmp_path.iterdir()) == ["02-b.gif", "02-b.png"]
    for name in ("02-b.gif", "02-b.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


def test_command_passes_its_options_and_prints_the_path_of_the_page(tmp_path, calls, capsys):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "l1", "--seed", "3"]) == 0

    assert calls == [("l1", 3), 3]
    printed = capsys.readouterr().out
    assert str(tmp_path / "index.html") in printed
    assert "ffmpeg is not installed" in printed


def test_no_animation_does_not_mention_ffmpeg(tmp_path, calls, capsys):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--no-animation"]) == 0

    assert "ffmpeg" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.gif"))


def test_unknown_loss_is_refused_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "l3"])

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ("l3", "l1", "l2", "huber"))


def test_output_folder_that_is_a_file_is_one_line_of_error_before_any_work(tmp_path, calls, capsys):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(SystemExit) as exit_info:
        cli.main(["lab", "gradient-descent", "-o", str(tmp_path / "out")])

    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.count("\n") == 1
    assert "out" in error
    assert calls == []
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_matplotlib_is_an_error_that_says_how_to_install_it(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path / "out")]) == 2

    assert capsys.readouterr().err == 'unbraid: The figures need matplotlib: pip install "unbraid[demo]".\n'
    assert calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_writes_every_figure_and_animation(tmp_path):
    assert cli.main(["lab", "gradient-descent", "-o", str(tmp_path), "--loss", "huber"]) == 0

    figures = json.loads((tmp_path / "numbers.json").read_text())["figures"]
    page = ParsedPage((tmp_path / "index.html").read_text())
    assert {int(figure["name"][:2]) for figure in figures} == set(range(1, 17))
    assert {f"{figure['name']}.png" for figure in figures} <= set(page.images)
    assert all(figure["caption"] for figure in figures)
    assert [image for image in page.images if not (tmp_path / image).is_file()] == []
    for name in ("09-descent-by-hand", "10-six-learning-rates", "12-race-narrow-valley", "13-cliff"):
        with Image.open(tmp_path / f"{name}.gif") as gif:
            assert gif.n_frames > 20
    assert list(tmp_path.glob(".*")) == []
