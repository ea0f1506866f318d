"""Render animations as frames, and write them as GIF, or as MP4 if ffmpeg is installed."""

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.errors import UserError
from unbraid.figures import AnimationSpec

Frame = npt.NDArray[np.uint8]
"""``(height, width, 3)``, red, green and blue."""


def render_frames(animation: AnimationSpec, figsize: tuple[float, float], *, dpi: int = 80) -> Iterator[Frame]:
    """Render each frame of an animation.

    If some artists have ``animated=True``, everything else is drawn once and they are drawn on top. Otherwise each
    frame is redrawn, which is several times slower.

    Args:
        animation: What to render.
        figsize: Width and height in inches.
        dpi: Dots per inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=dpi, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib leaves its methods untyped
    go_to_frame = animation.draw(figure)
    go_to_frame(0)
    canvas.draw()
    # The layout is settled by the first frame; a new one for each frame would make the axes jump.
    figure.set_layout_engine("none")
    moving_artists = sorted(
        (artist for axes in figure.axes for artist in axes.findobj() if artist.get_animated()),
        key=lambda artist: artist.get_zorder(),
    )
    background = canvas.copy_from_bbox(figure.bbox)
    for frame in range(animation.n_frames):
        go_to_frame(frame)
        if moving_artists:
            canvas.restore_region(background)
            for artist in moving_artists:
                artist.draw(canvas.get_renderer())
        else:
            canvas.draw()
        # Without a copy all frames would share the canvas's buffer.
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_gif(path: Path, frames: Iterable[Frame], *, frames_per_second: int, hold_seconds: float = 2.0) -> None:
    """Write frames as a GIF that repeats and pauses on the last frame.

    Args:
        path: File to write.
        frames: At least one, all of the same size.
        frames_per_second: Playback speed, rounded to the hundredths of a second that a GIF counts in.
        hold_seconds: How long the last frame stays.
    """
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    # Browsers slow down frames shorter than 2 hundredths of a second.
    frame_milliseconds = 10 * max(2, round(100 / frames_per_second))
    durations = [frame_milliseconds] * (len(images) - 1) + [round(1000 * hold_seconds)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def has_ffmpeg() -> bool:
    """Return True if ffmpeg is installed."""
    return shutil.which("ffmpeg") is not None


def write_mp4(path: Path, frames: Iterable[Frame], *, frames_per_second: int) -> None:
    """Write frames as a video that browsers play (H.264, 4:2:0), with ffmpeg.

    Raises:
        UserError: If ffmpeg is missing or fails.
    """
    if not has_ffmpeg():
        raise UserError("An MP4 needs ffmpeg, which is not installed. The GIF shows the same.")
    even_frames = [_pad_to_even(frame) for frame in frames]
    height, width, _ = even_frames[0].shape
    input_options = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    input_options += ["-r", str(frames_per_second), "-i", "-"]
    # The format is named because the temporary file has another suffix.
    output_options = ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]
    result = subprocess.run(
        ["ffmpeg", "-y", "-loglevel", "error", *input_options, *output_options, str(path)],
        input=b"".join(frame.tobytes() for frame in even_frames),
        capture_output=True,
        check=False,
    )
    if result.returncode:
        messages = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
        raise UserError(f"ffmpeg could not write {path.name}: {messages[-1]}")


def _pad_to_even(frame: Frame) -> Frame:
    """Repeat the last row and column where a side is odd: H.264 in 4:2:0 needs even sides."""
    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
