"""`unbraid lab ...`: each command parses, calls the laboratory, prints. Torch is imported only when one runs."""

import argparse
from pathlib import Path
from typing import Any

from unbraid.cli.lab_landscape import add_landscape
from unbraid.cli.lab_lr_range import add_lr_range
from unbraid.cli.lab_sharpness import add_sharpness
from unbraid.cli.lab_sweep import add_clipping, add_race
from unbraid.cli.lab_trajectory import add_trajectory
from unbraid.cli.options import Add, Parser, folder


def add_lab(commands: Any) -> None:
    """Add ``lab`` and its commands to those of the command line."""
    text = "Experiments: gradient descent on a line, and the same instruments on separators."
    lab = commands.add_parser("lab", help=text, description=text, allow_abbrev=False)
    experiments = lab.add_subparsers(metavar="EXPERIMENT", required=True, parser_class=Parser)

    def add(name: str, function: object) -> argparse.ArgumentParser:
        words = (function.__doc__ or "").strip()
        command: argparse.ArgumentParser = experiments.add_parser(
            name, help=words, description=words, allow_abbrev=False
        )
        command.set_defaults(function=function)
        return command

    _add_gradient_descent(add)
    add_lr_range(add)
    add_race(add)
    add_trajectory(add)
    add_clipping(add)
    add_landscape(add)
    add_sharpness(add)


def gradient_descent(args: argparse.Namespace) -> int:
    """Gradient descent on a line and on surfaces: every figure of the chapter, its numbers, and a page."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    from unbraid.console import progress_bar
    from unbraid.textbook.animation import has_ffmpeg
    from unbraid.textbook.chapter import write_chapter

    with progress_bar("drawing", 1.0) as advance:
        page = write_chapter(args.out, loss=args.loss, seed=args.seed, animate=args.animation, progress=advance)
    if args.animation and not has_ffmpeg():
        print("There is no ffmpeg, so what moves is there as GIF and not as MP4.")
    print(f"Figures and numbers are in {args.out}; to see them, open {page}")
    return 0


def _add_gradient_descent(add: Add) -> None:
    command = add("gradient-descent", gradient_descent)
    out_help = "folder for all of it (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path("gradient-descent"), metavar="DIR", help=out_help)
    command.add_argument("--loss", choices=("l1", "l2", "huber"), default="l2", help="of the line (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (%(default)s)")
    no_help = "leave out what moves, which takes most of the time"
    command.add_argument("--no-animation", dest="animation", action="store_false", help=no_help)
