"""What moves: frames, GIF and MP4."""

import os
import stat
from itertools import pairwise

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from unbraid.errors import UserError
from unbraid.figures import AnimationSpec
from unbraid.textbook.animation import frames, has_ffmpeg, write_gif, write_mp4


def a_walk(*, animated, seen=None):
    """A dot that walks right; says in ``seen`` which frames were asked for."""

    def draw(figure):
        axes = figure.add_subplot()
        axes.set(xlim=(-2, 10), ylim=(-1, 1))
        (dot,) = axes.plot([0], [0], "o", color="red", markersize=10, animated=animated)

        def to(frame):
            dot.set_data([frame], [0])
            if seen is not None:
                seen.append(frame)

        return to

    return AnimationSpec(4, draw, frames_per_second=10)


def centre_of_red(picture):
    red = (picture[..., 0] > 200) & (picture[..., 1] < 60)
    return np.argwhere(red)[:, 1].mean()


def test_frames_have_the_size_asked_for_and_show_what_moves():
    found = list(frames(a_walk(animated=True), (3.0, 2.0), dpi=50))

    assert [picture.shape for picture in found] == [(100, 150, 3)] * 4
    assert all(first.dtype == np.uint8 for first in found)
    steps = np.diff([centre_of_red(picture) for picture in found])
    assert (steps > 5).all()
    np.testing.assert_allclose(steps, steps[0], atol=1)


def test_drawing_only_what_moves_gives_the_same_pictures_as_drawing_all():
    some, whole = (list(frames(a_walk(animated=animated), (3.0, 2.0), dpi=50)) for animated in (True, False))

    assert all(np.array_equal(one, other) for one, other in zip(some, whole, strict=True))


def test_every_frame_is_asked_for_in_order():
    seen = []

    list(frames(a_walk(animated=True, seen=seen), (2.0, 2.0), dpi=40))

    assert seen[-4:] == [0, 1, 2, 3]


def test_a_gif_holds_every_frame_and_rests_on_the_last(tmp_path):
    pictures = [np.full((20, 30, 3), shade, dtype=np.uint8) for shade in (0, 80, 160, 240)]

    write_gif(tmp_path / "x.gif", pictures, frames_per_second=10, hold_seconds=1.5)

    with Image.open(tmp_path / "x.gif") as found:
        durations = []
        for frame in range(found.n_frames):
            found.seek(frame)
            durations.append(found.info["duration"])
        assert found.size == (30, 20)
        assert found.n_frames == 4
        assert found.info["loop"] == 0
    assert durations == [100, 100, 100, 1500]


def test_a_gif_repeats_frames_that_do_not_change(tmp_path):
    pictures = [np.full((8, 8, 3), 9, dtype=np.uint8)] * 3

    write_gif(tmp_path / "x.gif", pictures, frames_per_second=10, hold_seconds=1.0)

    with Image.open(tmp_path / "x.gif") as found:
        total = 0
        for frame in range(found.n_frames):
            found.seek(frame)
            total += found.info["duration"]
    assert total == 1200


def test_gif_colours_are_those_drawn(tmp_path):
    pictures = list(frames(a_walk(animated=True), (3.0, 2.0), dpi=50))

    write_gif(tmp_path / "x.gif", pictures, frames_per_second=10)

    with Image.open(tmp_path / "x.gif") as found:
        for frame, picture in enumerate(pictures):
            found.seek(frame)
            shown = np.asarray(found.convert("RGB")).astype(int)
            assert np.abs(shown - picture).mean() < 3
            assert abs(centre_of_red(shown) - centre_of_red(picture)) < 1


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Puts a program named ffmpeg on an otherwise empty PATH: it runs the shell lines given."""

    def make(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "ffmpeg"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def test_ffmpeg_is_told_the_size_and_given_every_pixel_with_even_sides(tmp_path, fake_ffmpeg):
    fake_ffmpeg(f'echo "$@" > {tmp_path}/told; cat > {tmp_path}/given')

    write_mp4(tmp_path / "x.mp4", [np.full((21, 31, 3), 7, dtype=np.uint8)] * 2, frames_per_second=12)

    told = (tmp_path / "told").read_text().split()
    after = dict(pairwise(told))
    assert after["-s"] == "32x22"
    assert after["-r"] == "12"
    assert told[-1] == str(tmp_path / "x.mp4")
    assert (tmp_path / "given").read_bytes() == bytes([7]) * (2 * 32 * 22 * 3)


def test_what_ffmpeg_says_last_is_told_when_it_fails(tmp_path, fake_ffmpeg):
    fake_ffmpeg("cat > /dev/null; echo first >&2; echo 'Unknown encoder' >&2; exit 1")

    with pytest.raises(UserError, match=r"ffmpeg could not write x\.mp4: Unknown encoder"):
        write_mp4(tmp_path / "x.mp4", [np.zeros((4, 4, 3), dtype=np.uint8)], frames_per_second=12)


def test_without_ffmpeg_a_video_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not has_ffmpeg()
    with pytest.raises(UserError, match="needs ffmpeg"):
        write_mp4(tmp_path / "x.mp4", [np.zeros((4, 4, 3), dtype=np.uint8)], frames_per_second=12)


def test_ffmpeg_writes_a_video(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    write_mp4(tmp_path / "x.mp4", frames(a_walk(animated=True), (3.1, 2.1), dpi=50), frames_per_second=10)

    assert (tmp_path / "x.mp4").read_bytes()[4:8] == b"ftyp"
