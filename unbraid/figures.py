"""A plate of the laboratory: numbers, a caption that says what to see, and how to draw it; still or moving."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.io import atomic_replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AnimationSpec:
    """A figure that moves.

    Attributes:
        n_frames: How many.
        draw: Draws everything that stays into an empty figure once, and returns what moves the rest to a frame.
        frames_per_second: How fast.
    """

    n_frames: int
    draw: "Callable[[Figure], Callable[[int], None]]"
    frames_per_second: int = 15


@dataclass(frozen=True)
class FigureSpec:
    """One experiment's outcome.

    Attributes:
        name: The stem of its files, such as ``04-brute-force``.
        title: A few words.
        caption: What to see, with the figures in it.
        numbers: What it comes to, by name; the same for the same seed.
        draw: Draws it into an empty figure.
        size: Of the figure, in inches.
        motion: The same as an animation; None where nothing moves.
    """

    name: str
    title: str
    caption: str
    numbers: Mapping[str, float]
    draw: "Callable[[Figure], None]"
    size: tuple[float, float] = (6.4, 4.0)
    motion: AnimationSpec | None = field(default=None)


def figure_of(plate: FigureSpec) -> "Figure":
    """A plate's still figure, drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=plate.size, layout="constrained")
    plate.draw(figure)
    return figure


def write_figure(plate: FigureSpec, folder: Path) -> Path:
    """Write a plate's still figure as ``NAME.png``, whole or not at all."""
    path = folder / f"{plate.name}.png"
    with atomic_replace(path) as temporary:
        figure_of(plate).savefig(temporary, dpi=140, format="png")
    return path
