"""Write the figures of docs/learn/gradient-descent.md as PNG, with caption and numbers as text inside each file.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/learn_figures.py [FOLDER]

tests/textbook/test_learn_page.py makes the figures again and compares. It fails if a committed figure is out of date,
or if a number in the text is not in its figure.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unbraid.figures import FigureSpec, draw_figure
from unbraid.io import atomic_replace
from unbraid.textbook.line_figure import line_figures
from unbraid.textbook.surfaces_figure import surface_figures

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "learn" / "figures"
DPI = 120
N_COLORS = 128


def all_figures() -> list[FigureSpec]:
    """Return every figure of the chapter in order, as ``unbraid lab gradient-descent`` makes them."""
    return sorted([*line_figures(), *surface_figures(seed=0)], key=lambda figure: figure.name)


def render(figure: FigureSpec) -> Image.Image:
    """Return the still figure with few colours: line drawings look the same, and the file is half as large."""
    with io.BytesIO() as buffer:
        draw_figure(figure).savefig(buffer, dpi=DPI, format="png")
        picture = Image.open(buffer).convert("RGB")
    return picture.quantize(N_COLORS, dither=Image.Dither.NONE)


def write_png(figure: FigureSpec, folder: Path) -> Path:
    """Write a figure with title, caption and numbers as text in the PNG, and return its path."""
    text = PngInfo()
    text.add_itxt("Title", figure.title)
    text.add_itxt("Caption", figure.caption)
    text.add_itxt("Numbers", json.dumps({name: float(value) for name, value in figure.numbers.items()}))
    path = folder / f"{figure.name}.png"
    with atomic_replace(path) as temporary:
        render(figure).save(temporary, format="png", optimize=True, pnginfo=text)
    return path


def write_figures(folder: Path) -> Iterator[Path]:
    """Write every figure, and yield its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in all_figures():
        yield write_png(figure, folder)


def main() -> None:
    """Write all figures, and print their total size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FIGURES)
    paths = list(write_figures(parser.parse_args().folder))
    # The repository's limit on the total size is in the test.
    print(f"{len(paths)} figures, {sum(path.stat().st_size for path in paths):,} bytes, in {paths[0].parent}")


if __name__ == "__main__":
    main()
