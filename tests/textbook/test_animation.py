"""Animations as frames, GIF and MP4."""

import os
import stat
from itertools import pairwise

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from unbraid.errors import UserError
from unbraid.figures import AnimationSpec
from unbraid.textbook.animation import has_ffmpeg, render_frames, write_gif, write_mp4


def moving_dot(*, animated, seen=None):
    """Return an animation of a dot that moves right; each frame number is appended to ``seen``."""

    def draw(figure):
        axes = figure.add_subplot()
        axes.set(xlim=(-2, 10), ylim=(-1, 1))
        (dot,) = axes.plot([0], [0], "o", color="red", markersize=10, animated=animated)

        def go_to_frame(frame):
            dot.set_data([frame], [0])
            if seen is not None:
                seen.append(frame)

        return go_to_frame

    return AnimationSpec(4, draw, frames_per_second=10)


def centre_of_red(frame):
    red = (frame[..., 0] > 200) & (frame[..., 1] < 60)
    return np.argwhere(red)[:, 1].mean()


def test_frames_have_the_requested_size_and_show_the_movement():
    frames = list(render_frames(moving_dot(animated=True), (3.0, 2.0), dpi=50))

    assert [frame.shape for frame in frames] == [(100, 150, 3)] * 4
    assert all(frame.dtype == np.uint8 for frame in frames)
    steps = np.diff([centre_of_red(frame) for frame in frames])
    assert (steps > 5).all()
    np.testing.assert_allclose(steps, steps[0], atol=1)


def test_redrawing_only_moving_artists_equals_redrawing_everything():
    moving_only = list(render_frames(moving_dot(animated=True), (3.0, 2.0), dpi=50))
    everything = list(render_frames(moving_dot(animated=False), (3.0, 2.0), dpi=50))

    assert all(np.array_equal(a, b) for a, b in zip(moving_only, everything, strict=True))


def test_frames_are_rendered_in_order():
    seen = []

    list(render_frames(moving_dot(animated=True, seen=seen), (2.0, 2.0), dpi=40))

    assert seen[-4:] == [0, 1, 2, 3]


def test_gif_has_every_frame_and_holds_the_last(tmp_path):
    frames = [np.full((20, 30, 3), shade, dtype=np.uint8) for shade in (0, 80, 160, 240)]

    write_gif(tmp_path / "x.gif", frames, frames_per_second=10, hold_seconds=1.5)

    with Image.open(tmp_path / "x.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        assert gif.size == (30, 20)
        assert gif.n_frames == 4
        assert gif.info["loop"] == 0
    assert durations == [100, 100, 100, 1500]


def test_gif_keeps_its_duration_when_frames_do_not_change(tmp_path):
    frames = [np.full((8, 8, 3), 9, dtype=np.uint8)] * 3

    write_gif(tmp_path / "x.gif", frames, frames_per_second=10, hold_seconds=1.0)

    with Image.open(tmp_path / "x.gif") as gif:
        total = 0
        for frame in range(gif.n_frames):
            gif.seek(frame)
            total += gif.info["duration"]
    assert total == 1200


def test_gif_colours_are_close_to_those_rendered(tmp_path):
    frames = list(render_frames(moving_dot(animated=True), (3.0, 2.0), dpi=50))

    write_gif(tmp_path / "x.gif", frames, frames_per_second=10)

    with Image.open(tmp_path / "x.gif") as gif:
        for frame, picture in enumerate(frames):
            gif.seek(frame)
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(shown - picture).mean() < 3
            assert abs(centre_of_red(shown) - centre_of_red(picture)) < 1


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Return a function that puts a shell script named ffmpeg first on PATH."""

    def make(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "ffmpeg"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def test_ffmpeg_receives_the_size_and_every_pixel_with_even_sides(tmp_path, fake_ffmpeg):
    fake_ffmpeg(f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/input')

    write_mp4(tmp_path / "x.mp4", [np.full((21, 31, 3), 7, dtype=np.uint8)] * 2, frames_per_second=12)

    arguments = (tmp_path / "arguments").read_text().split()
    options = dict(pairwise(arguments))
    assert options["-s"] == "32x22"
    assert options["-r"] == "12"
    assert arguments[-1] == str(tmp_path / "x.mp4")
    assert (tmp_path / "input").read_bytes() == bytes([7]) * (2 * 32 * 22 * 3)


def test_ffmpegs_last_message_is_in_the_error(tmp_path, fake_ffmpeg):
    fake_ffmpeg("cat > /dev/null; echo first >&2; echo 'Unknown encoder' >&2; exit 1")

    with pytest.raises(UserError, match=r"ffmpeg could not write x\.mp4: Unknown encoder"):
        write_mp4(tmp_path / "x.mp4", [np.zeros((4, 4, 3), dtype=np.uint8)], frames_per_second=12)


def test_missing_ffmpeg_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not has_ffmpeg()
    with pytest.raises(UserError, match="needs ffmpeg"):
        write_mp4(tmp_path / "x.mp4", [np.zeros((4, 4, 3), dtype=np.uint8)], frames_per_second=12)


def test_ffmpeg_writes_a_video(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    write_mp4(tmp_path / "x.mp4", render_frames(moving_dot(animated=True), (3.1, 2.1), dpi=50), frames_per_second=10)

    assert (tmp_path / "x.mp4").read_bytes()[4:8] == b"ftyp"
