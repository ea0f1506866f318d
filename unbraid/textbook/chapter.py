"""The chapter on gradient descent in a folder: every plate's figure and animation, their numbers, and a page."""

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.figures import FigureSpec, write_figure
from unbraid.io import atomic_replace, finite_or_none, write_atomically, write_json
from unbraid.plots import check_matplotlib
from unbraid.textbook.animation import frames, has_ffmpeg, write_gif, write_mp4
from unbraid.textbook.line_figure import line_figures
from unbraid.textbook.surfaces_figure import surface_figures
from unbraid.type_aliases import ProgressCallback

if TYPE_CHECKING:
    pass


def write_chapter(
    out: Path, *, loss: str = "l2", seed: int = 0, animate: bool = True, progress: ProgressCallback | None = None
) -> Path:
    """Make every plate, and write figures, animations, ``numbers.json`` and ``index.html``.

    A file is whole or not there, also where this is stopped half way; what an earlier call left is replaced, and its
    animations that this one does not make are removed.

    Args:
        out: A folder, made where it is missing.
        loss: That of the line: ``"l1"``, ``"l2"`` or ``"huber"``.
        seed: Of all random numbers.
        animate: Whether to make what moves; it takes most of the time.
        progress: Is told the share done and what comes next.

    Returns:
        The page.

    Raises:
        UserError: If matplotlib is missing, or ffmpeg is there and fails.
        OSError: If the folder cannot be written to.
    """
    check_matplotlib()
    progress = progress or (lambda done, text: None)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # before the work, not after it
    progress(0.0, "computing the line")
    plates = line_figures(loss, seed)
    progress(0.15, "computing the surfaces")
    plates = sorted([*plates, *surface_figures(seed)], key=lambda plate: plate.name)
    videos = animate and has_ffmpeg()
    work = [1 + 5 * (animate and plate.animation is not None) for plate in plates]
    for place, plate in enumerate(plates):
        progress(0.3 + 0.7 * sum(work[:place]) / sum(work), plate.name)
        _write_figure(out, plate, animate=animate, videos=videos)
    told = {"loss": loss, "seed": seed, "plates": [_as_json(plate) for plate in plates]}
    write_json(out / "numbers.json", told)
    write_atomically(out / "index.html", page(plates, loss=loss, seed=seed, animate=animate, videos=videos))
    progress(1.0, "")
    return out / "index.html"


def _write_figure(out: Path, plate: FigureSpec, *, animate: bool, videos: bool) -> None:
    write_figure(plate, out)
    moving = plate.animation if animate else None
    pictures = [] if moving is None else list(frames(moving, plate.figsize))
    for suffix, wanted, write in ((".gif", True, write_gif), (".mp4", videos, write_mp4)):
        if moving is None or not wanted:
            (out / f"{plate.name}{suffix}").unlink(missing_ok=True)
            continue
        with atomic_replace(out / f"{plate.name}{suffix}") as path:
            write(path, pictures, frames_per_second=moving.frames_per_second)


def _as_json(plate: FigureSpec) -> dict[str, Any]:
    """JSON knows no infinity and no NaN: those are null."""
    numbers = {name: finite_or_none(float(value)) for name, value in plate.numbers.items()}
    return {"name": plate.name, "title": plate.title, "caption": plate.caption, "numbers": numbers}


def page(plates: Sequence[FigureSpec], *, loss: str, seed: int, animate: bool, videos: bool) -> str:
    """The page: each plate's figure, animation, caption and numbers, from files beside it and from nowhere else.

    Args:
        plates: In their order.
        loss: That of the line.
        seed: Of all random numbers.
        animate: Whether animations were written.
        videos: Whether there is an MP4 beside each GIF.
    """
    sections = "\n".join(_section(plate, animate=animate, videos=videos) for plate in plates)
    links = "\n".join(f'<li><a href="#{html.escape(p.name)}">{html.escape(p.title)}</a></li>' for p in plates)
    without = "" if videos or not animate else " No ffmpeg was found, so there are GIFs and no MP4s."
    about = f"The line is fitted by the loss {loss}, with seed {seed}; the same seed gives the same numbers.{without}"
    return _PAGE.format(style=_STYLE, about=html.escape(about), links=links, sections=sections)


def _section(plate: FigureSpec, *, animate: bool, videos: bool) -> str:
    name, title = html.escape(plate.name), html.escape(plate.title)
    parts = [f'<img src="{name}.png" alt="{title}" loading="lazy">']
    if animate and plate.animation is not None:
        video = f'<p><a href="{name}.mp4">The same as a video</a></p>' if videos else ""
        moving = f'<img src="{name}.gif" alt="{title}, step by step" loading="lazy">'
        parts.append(f"<details open><summary>Step by step</summary>{moving}{video}</details>")
    caption = f"<figcaption>{html.escape(plate.caption)}</figcaption>"
    return (
        f'<section id="{name}"><h2><span>{name[:2]}</span> {title}</h2>\n<figure>{"".join(parts)}{caption}</figure>\n'
        f"{_table(plate.numbers)}</section>"
    )


def _table(numbers: Mapping[str, float]) -> str:
    if not numbers:
        return ""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{value:.6g}</td></tr>" for name, value in numbers.items())
    return f"<details><summary>Numbers</summary><table>{rows}</table></details>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --ground: #fdfdfb; --faint: #6b6b70; --line: #dcdcd8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --ground: #17181a; --faint: #9a9aa0; --line: #36373b; }
}
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; } h2 span { color: var(--faint); }
a { color: inherit; } ol { list-style: none; padding: 0; columns: 2; font-size: .9rem; }
figure { margin: 0; } figcaption { margin: .6rem 0; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; margin: .4rem 0; background: #fff; border-radius: 4px; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--faint); font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; }
th { text-align: left; font-weight: normal; padding: .15rem 2rem .15rem 0; }
td { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid var(--line); }
@media (max-width: 36rem) { ol { columns: 1; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gradient descent, from a line to a cliff</title>
<style>{style}</style>
</head>
<body>
<h1>Gradient descent, from a line to a cliff</h1>
<p>{about}</p>
<ol>
{links}
</ol>
{sections}
</body>
</html>
"""
