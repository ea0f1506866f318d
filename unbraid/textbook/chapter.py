"""Write the chapter on gradient descent to a folder: every figure and animation, their numbers, and a page."""

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from unbraid.figures import FigureSpec, write_figure
from unbraid.io import atomic_replace, finite_or_none, write_atomically, write_json
from unbraid.plots import check_matplotlib
from unbraid.textbook.animation import has_ffmpeg, render_frames, write_gif, write_mp4
from unbraid.textbook.line_figure import line_figures
from unbraid.textbook.surfaces_figure import surface_figures
from unbraid.type_aliases import ProgressCallback, Row


def write_chapter(
    out: Path, *, loss: str = "l2", seed: int = 0, animate: bool = True, progress: ProgressCallback | None = None
) -> Path:
    """Run every experiment, and write figures, animations, ``numbers.json`` and ``index.html``.

    Each file is written completely or not at all, even if this is interrupted. Files of an earlier call are replaced,
    and its animations are removed if this call makes none.

    Args:
        out: Output folder, created if it does not exist.
        loss: Loss of the line: ``"l1"``, ``"l2"`` or ``"huber"``.
        seed: Seed of all random numbers.
        animate: Write animations; they take most of the time.
        progress: Called with the fraction done and what comes next.

    Returns:
        Path of the page.

    Raises:
        UserError: If matplotlib is missing, or ffmpeg is installed and fails.
        OSError: If the folder cannot be written to.
    """
    # Find out now, and not after minutes of work, that the folder cannot be written to.
    check_matplotlib()
    progress = progress or (lambda done, text: None)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()

    # 1. Run the experiments.
    progress(0.0, "computing the line")
    figures = line_figures(loss, seed)
    progress(0.15, "computing the surfaces")
    figures = sorted([*figures, *surface_figures(seed)], key=lambda figure: figure.name)

    # 2. Draw them. An animation takes about five times as long as a still figure.
    videos = animate and has_ffmpeg()
    costs = [6 if animate and figure.animation is not None else 1 for figure in figures]
    for index, figure in enumerate(figures):
        progress(0.3 + 0.7 * sum(costs[:index]) / sum(costs), figure.name)
        write_figure(figure, out)
        _write_animations(figure, out, animate=animate, videos=videos)

    # 3. Numbers and page last: they name all other files.
    write_json(out / "numbers.json", {"loss": loss, "seed": seed, "figures": [_to_json(figure) for figure in figures]})
    page = render_page(figures, loss=loss, seed=seed, animate=animate, videos=videos)
    write_atomically(out / "index.html", page)
    progress(1.0, "")
    return out / "index.html"


def _write_animations(figure: FigureSpec, out: Path, *, animate: bool, videos: bool) -> None:
    gif = out / f"{figure.name}.gif"
    mp4 = out / f"{figure.name}.mp4"
    # An old animation next to a new figure would show other numbers.
    if figure.animation is None or not animate:
        gif.unlink(missing_ok=True)
        mp4.unlink(missing_ok=True)
        return
    frames = list(render_frames(figure.animation, figure.figsize))
    with atomic_replace(gif) as temporary:
        write_gif(temporary, frames, frames_per_second=figure.animation.frames_per_second)
    if not videos:
        mp4.unlink(missing_ok=True)
        return
    with atomic_replace(mp4) as temporary:
        write_mp4(temporary, frames, frames_per_second=figure.animation.frames_per_second)


def _to_json(figure: FigureSpec) -> Row:
    numbers = {name: finite_or_none(float(value)) for name, value in figure.numbers.items()}
    return {"name": figure.name, "title": figure.title, "caption": figure.caption, "numbers": numbers}


def render_page(figures: Sequence[FigureSpec], *, loss: str, seed: int, animate: bool, videos: bool) -> str:
    """Return the page as HTML: each figure with animation, caption and numbers. It loads files of its own folder only.

    Args:
        figures: In the chapter's order.
        loss: Loss of the line.
        seed: Seed of all random numbers.
        animate: Show animations.
        videos: Link to an MP4 next to each GIF.
    """
    sections = "\n".join(_section(figure, animate=animate, videos=videos) for figure in figures)
    links = "\n".join(f'<li><a href="#{html.escape(f.name)}">{html.escape(f.title)}</a></li>' for f in figures)
    about = f"The line is fitted with the loss {loss} and seed {seed}; the same seed gives the same numbers."
    if animate and not videos:
        about += " ffmpeg is not installed, so there are GIFs and no MP4s."
    return _PAGE.format(style=_STYLE, about=html.escape(about), links=links, sections=sections)


def _section(figure: FigureSpec, *, animate: bool, videos: bool) -> str:
    name = html.escape(figure.name)
    title = html.escape(figure.title)
    pictures = [f'<img src="{name}.png" alt="{title}" loading="lazy">']
    if animate and figure.animation is not None:
        video = f'<p><a href="{name}.mp4">The same as a video</a></p>' if videos else ""
        gif = f'<img src="{name}.gif" alt="{title}, step by step" loading="lazy">'
        pictures.append(f"<details open><summary>Step by step</summary>{gif}{video}</details>")
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>"
    return (
        f'<section id="{name}"><h2><span>{name[:2]}</span> {title}</h2>\n'
        f"<figure>{''.join(pictures)}{caption}</figure>\n"
        f"{_numbers_table(figure.numbers)}</section>"
    )


def _numbers_table(numbers: Mapping[str, float]) -> str:
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
