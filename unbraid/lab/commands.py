"""`unbraid lab ...`: each command parses, calls the laboratory, prints. Torch is imported only when one runs."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbraid.arguments import Parser, add_set, add_trust, positive


def gradient_descent(args: argparse.Namespace) -> int:
    """Gradient descent on a line and on surfaces: every figure of the chapter, its numbers, and a page."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    from unbraid.lab.animate import has_ffmpeg
    from unbraid.lab.chapter import write_chapter
    from unbraid.screen import progress_bar

    with progress_bar("drawing", 1.0) as advance:
        page = write_chapter(args.out, loss=args.loss, seed=args.seed, animate=args.animation, progress=advance)
    if args.animation and not has_ffmpeg():
        print("There is no ffmpeg, so what moves is there as GIF and not as MP4.")
    print(f"Figures and numbers are in {args.out}; to see them, open {page}")
    return 0


def landscape(args: argparse.Namespace) -> int:
    """The loss around a trained separator, on the way to another, or in the plane of a run's path."""
    from unbraid.plots import check_matplotlib

    check_matplotlib()
    from unbraid.lab.landscape_report import look, tell, view_of
    from unbraid.lab.subject import of_checkpoint
    from unbraid.screen import progress_bar

    subject = of_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    view = view_of(subject, args)
    with progress_bar("taking the loss", len(view.chart.coefficients)) as advance:
        found, plates = look(subject, view, args.out, n_items=args.items, split=args.split, progress=advance)
    for line in tell(found, plates, args.out, args.items):
        print(line)
    return 128 + found.signal if found.signal else 0


def sharpness(args: argparse.Namespace) -> int:
    """The largest eigenvalue of the Hessian, what it means for the learning rate, and the gradient noise scale."""
    from unbraid.files import write_atomically
    from unbraid.lab.sharpness import sharpness_of, tell
    from unbraid.lab.subject import of_checkpoint
    from unbraid.screen import progress_bar

    subject = of_checkpoint(args.checkpoint, overrides=args.set, trust=args.trust)
    asked = {"n_items": args.items, "n_products": args.iterations, "split": args.split, "seed": args.seed}
    with progress_bar("multiplying", args.iterations) as advance:
        found = sharpness_of(subject, **asked, progress=advance)
    print("\n".join(tell(found)))
    if args.out:
        write_atomically(args.out, json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
    return 128 + found.signal if found.signal else 0


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

    command = add("gradient-descent", gradient_descent)
    out_help = "folder for all of it (%(default)s)"
    command.add_argument("-o", "--out", type=Path, default=Path("gradient-descent"), metavar="DIR", help=out_help)
    command.add_argument("--loss", choices=("l1", "l2", "huber"), default="l2", help="of the line (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (%(default)s)")
    no_help = "leave out what moves, which takes most of the time"
    command.add_argument("--no-animation", dest="animation", action="store_false", help=no_help)
    _add_landscape(add)
    _add_sharpness(add)


def _add_landscape(add: Callable[[str, object], argparse.ArgumentParser]) -> None:
    command = add("landscape", landscape)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    where = command.add_mutually_exclusive_group()
    to_help = "on the straight line to another checkpoint of the same model, and how high the barrier between them is"
    where.add_argument("--to", type=Path, metavar="OTHER", help=to_help)
    plane_help = "in the plane that the checkpoints of the run directory CHECKPOINT lie closest to, with their path"
    where.add_argument("--plane", action="store_true", help=plane_help)
    points_help = "along each axis, odd where the model is in the middle (%(default)s)"
    command.add_argument("--points", type=int, default=21, metavar="N", help=points_help)
    span_help = "how far to go: in lengths of the filters (1), or as a share beyond the way or path (0.25)"
    command.add_argument("--span", type=positive(float), metavar="S", help=span_help)
    items_help = "mixtures that the loss is the mean of (%(default)s)"
    command.add_argument("--items", type=positive(int), default=16, metavar="N", help=items_help)
    command.add_argument("--split", choices=("train", "valid"), default="train", help="their talkers (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the directions (%(default)s)")
    out_help = "folder for all of it (%(default)s)"
    command.add_argument("-o", "--out", type=Path, default=Path("landscape"), metavar="DIR", help=out_help)
    add_set(command, "data.path=FOLDER, where the recordings lie elsewhere")
    add_trust(command)


def _add_sharpness(add: Callable[[str, object], argparse.ArgumentParser]) -> None:
    command = add("sharpness", sharpness)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    iterations_help = "products with the Hessian, at most (%(default)s)"
    command.add_argument("--iterations", type=positive(int), default=200, metavar="N", help=iterations_help)
    items_help = "mixtures that the loss is the mean of, 3 or more (%(default)s)"
    command.add_argument("--items", type=positive(int), default=32, metavar="N", help=items_help)
    command.add_argument("--split", choices=("train", "valid"), default="train", help="their talkers (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the vector to start from (%(default)s)")
    command.add_argument("-o", "--out", type=Path, metavar="FILE", help="JSON file for the numbers")
    add_set(command, "data.path=FOLDER, where the recordings lie elsewhere")
    add_trust(command)
