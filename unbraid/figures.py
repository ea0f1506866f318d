"""Figure specifications: numbers, a caption, and a function that draws them, still or animated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.io import atomic_replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AnimationSpec:
    """An animated version of a figure.

    Attributes:
        n_frames: Number of frames.
        draw: Draws into an empty figure once, and returns a function that moves the artists to a frame, 0 first.
        frames_per_second: Playback speed.
    """

    n_frames: int
    draw: "Callable[[Figure], Callable[[int], None]]"
    frames_per_second: int = 15


@dataclass(frozen=True)
class FigureSpec:
    """The result of one experiment, ready to be drawn.

    Attributes:
        name: Stem of its files, such as ``04-brute-force``.
        title: A few words.
        caption: What to see in the figure, with its numbers.
        numbers: Results by name; the same for the same seed.
        draw: Draws into an empty figure.
        figsize: Width and height in inches.
        animation: The same experiment as an animation; None for a still figure.
    """

    name: str
    title: str
    caption: str
    numbers: Mapping[str, float]
    draw: "Callable[[Figure], None]"
    figsize: tuple[float, float] = (6.4, 4.0)
    animation: AnimationSpec | None = None


def draw_figure(spec: FigureSpec) -> "Figure":
    """Return the still figure as a matplotlib figure."""
    # matplotlib is an optional dependency and slow to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=spec.figsize, layout="constrained")
    spec.draw(figure)
    return figure


def write_figure(spec: FigureSpec, folder: Path) -> Path:
    """Write the still figure as ``NAME.png``, all of it or nothing, and return its path."""
    path = folder / f"{spec.name}.png"
    with atomic_replace(path) as temporary:
        # The temporary file has another suffix, so matplotlib cannot infer the format.
        draw_figure(spec).savefig(temporary, dpi=140, format="png")
    return path
