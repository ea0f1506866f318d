"""`unbraid lab ...`: each command parses, calls the laboratory, prints. Torch is imported only when one runs."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbraid.arguments import EXIT_STOPPED, Parser, add_set, find_recipe, positive


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


def trajectory(args: argparse.Namespace) -> int:
    """Step size, loss, gradient norm and smoothness along a training, with and without AutoClip, and how they agree."""
    from unbraid.lab.trajectory_run import prepare, run_arms, write_course
    from unbraid.screen import program, progress_bar
    from unbraid.train.stop import stop_on_signals

    subject = prepare(find_recipe(args.recipe), args.set, n_steps=args.steps, every=args.every, clips=args.clip)
    with stop_on_signals() as stop, progress_bar("training", 1.0) as advance:
        options = {"clips": args.clip, "n_steps": args.steps, "every": args.every}
        course = run_arms(subject, args.out, **options, stop=stop, progress=advance)
    print("\n".join([*course.sentences(), *write_course(course, args.out, args.json)]))
    if stop.signal:
        print(f"Stopped by signal {stop.signal}; go on with: {program()} {shlex.join(args.words)}")
    return EXIT_STOPPED + stop.signal if stop.signal else 0


def _add_trajectory(add: Callable[[str, object], argparse.ArgumentParser]) -> None:
    command = add("trajectory", trajectory)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of one of ours")
    add_set(command)
    command.add_argument("--steps", type=positive(int), default=500, metavar="N", help="of each arm (%(default)s)")
    every_help = "measure the smoothness every so many steps; once costs as much as four steps (%(default)s)"
    command.add_argument("--every", type=positive(int), default=5, metavar="N", help=every_help)
    clip_help = "an arm for each: none, autoclip, another clipper, or recipe for the recipe's own (none autoclip)"
    command.add_argument("--clip", nargs="+", default=["none", "autoclip"], metavar="NAME", help=clip_help)
    out_help = "folder for figure, numbers, and what to go on from (%(default)s)"
    command.add_argument("-o", "--out", type=Path, default=Path("trajectory"), metavar="DIR", help=out_help)
    command.add_argument("--json", type=Path, metavar="FILE", help="numbers to write (trajectory.json in the folder)")


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

    _add_trajectory(add)
