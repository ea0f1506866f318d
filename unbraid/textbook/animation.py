"""What moves in a plate as frames, and frames as a GIF, or as an MP4 where ffmpeg is installed."""

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


def frames(motion: AnimationSpec, size: tuple[float, float], *, dpi: int = 80) -> Iterator[Frame]:
    """Draw each frame of what moves.

    Where the motion's artists are made with ``animated=True``, all else is drawn once and they are drawn over it; where
    none is, every frame is drawn from new, which takes several times as long.

    Args:
        motion: What moves.
        size: In inches.
        dpi: Dots an inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib leaves its methods untyped
    to_frame = motion.draw(figure)
    to_frame(0)
    canvas.draw()
    figure.set_layout_engine("none")
    moving = sorted(
        (artist for axes in figure.axes for artist in axes.findobj() if artist.get_animated()),
        key=lambda artist: artist.get_zorder(),
    )
    still = canvas.copy_from_bbox(figure.bbox)
    for frame in range(motion.n_frames):
        to_frame(frame)
        if moving:
            canvas.restore_region(still)
            for artist in moving:
                artist.draw(canvas.get_renderer())
        else:
            canvas.draw()
        yield _pixels(canvas)


def _pixels(canvas: Any) -> Frame:
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_gif(path: Path, pictures: Iterable[Frame], *, frames_per_second: int, hold_seconds: float = 2.0) -> None:
    """Write frames as a GIF that repeats, and rests on the last one.

    All share one palette, made from a few of them, so that nothing flickers.

    Args:
        path: To write.
        pictures: At least one, all of one size.
        frames_per_second: How fast; a GIF counts hundredths of a second.
        hold_seconds: How long the last one stays.
    """
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    some = [images[place] for place in sorted({len(images) * part // 4 for part in range(4)} | {len(images) - 1})]
    sheet = Image.fromarray(np.concatenate([np.asarray(image) for image in some]))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    each = 10 * max(2, round(100 / frames_per_second))
    durations = [each] * (len(drawn) - 1) + [round(1000 * hold_seconds)]
    drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=False
    )


def has_ffmpeg() -> bool:
    """Whether there is an ffmpeg to write videos with."""
    return shutil.which("ffmpeg") is not None


def write_mp4(path: Path, pictures: Iterable[Frame], *, frames_per_second: int) -> None:
    """Write frames as a video that browsers play (H.264, 4:2:0), by ffmpeg.

    Raises:
        UserError: If ffmpeg is missing, or fails.
    """
    if not has_ffmpeg():
        raise UserError("A video needs ffmpeg, which is not installed; the GIF shows the same.")
    shown = [_even(picture) for picture in pictures]
    height, width, _ = shown[0].shape
    made = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(frames_per_second), "-i", "-"]
    coded = ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]
    ran = subprocess.run(
        ["ffmpeg", "-y", "-loglevel", "error", *made, *coded, str(path)],
        input=b"".join(picture.tobytes() for picture in shown),
        capture_output=True,
        check=False,
    )
    if ran.returncode:
        told = ran.stderr.decode(errors="replace").strip().splitlines() or [f"status {ran.returncode}"]
        raise UserError(f"ffmpeg could not write {path.name}: {told[-1]}")


def _even(picture: Frame) -> Frame:
    """H.264 with half the colours wants even sides: the last row and column are repeated where they are odd."""
    height, width, _ = picture.shape
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
