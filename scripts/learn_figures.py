"""The figures of docs/learn/gradient-descent.md, each with the caption and the numbers it was made with inside it.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/learn_figures.py [FOLDER]

tests/textbook/test_learn_page.py makes the plates again and compares: a figure that is out of date fails there,
and so does a number in the text that its figure does not have.
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
DPI, N_COLORS = 120, 128


def all_figures() -> list[FigureSpec]:
    """Every plate of the chapter, by its number, as ``unbraid lab gradient-descent`` makes them."""
    return sorted([*line_figures(), *surface_figures(seed=0)], key=lambda plate: plate.name)


def drawn(plate: FigureSpec) -> Image.Image:
    """A plate's still figure, in few colours: a figure of lines looks the same, at half the bytes."""
    with io.BytesIO() as held:
        draw_figure(plate).savefig(held, dpi=DPI, format="png")
        picture = Image.open(held).convert("RGB")
    return picture.quantize(N_COLORS, dither=Image.Dither.NONE)


def write_figure(plate: FigureSpec, folder: Path) -> Path:
    """Write a plate's figure with its title, caption and numbers as text in the PNG."""
    told = PngInfo()
    told.add_itxt("Title", plate.title)
    told.add_itxt("Caption", plate.caption)
    told.add_itxt("Numbers", json.dumps({name: float(value) for name, value in plate.numbers.items()}))
    out = folder / f"{plate.name}.png"
    with atomic_replace(out) as path:
        drawn(plate).save(path, format="png", optimize=True, pnginfo=told)
    return out


def write_figures(folder: Path) -> Iterator[Path]:
    """Make every plate, and write each as a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for plate in all_figures():
        yield write_figure(plate, folder)


def main() -> None:
    """Write all figures, and say how large they are together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FIGURES)
    written = list(write_figures(parser.parse_args().folder))
    print(f"{len(written)} figures, {sum(path.stat().st_size for path in written):,} bytes, in {written[0].parent}")


if __name__ == "__main__":
    main()
