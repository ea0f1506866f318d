"""`unbraid lab ...`: each command parses, calls the laboratory, prints. Torch is imported only when one runs."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.arguments import EXIT_STOPPED, Parser, add_set, find_recipe

if TYPE_CHECKING:
    from unbraid.lab.lr_range import Grid, RangeTest
    from unbraid.train.stop import StopRequest


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


def lr_range(args: argparse.Namespace) -> int:
    """Try learning rates that grow from step to step on a recipe's model, and suggest one with its reason."""
    from unbraid.lab.lr_range_plate import numbers, write_lr_range
    from unbraid.plots import check_matplotlib
    from unbraid.train.stop import stop_on_signals

    out = args.out or (None if args.json else Path("lr-range"))
    if out is not None:
        check_matplotlib()
    with stop_on_signals() as stop:
        test, grid = _lr_range_and_grid(args, out, stop)
        drawn = write_lr_range(out, test, grid) if out is not None and len(test.lrs) else None
    print(json.dumps(numbers(test, grid), indent=1) if args.json else _lr_range_words(test, grid, drawn, stop))
    return EXIT_STOPPED + stop.signal if stop.signal else 0


def _lr_range_and_grid(
    args: argparse.Namespace, out: Path | None, stop: "StopRequest"
) -> "tuple[RangeTest, Grid | None]":
    from unbraid.lab.lr_range import around, grid, lr_range, rates
    from unbraid.lab.subject import of_recipe
    from unbraid.recipe import load_recipe
    from unbraid.screen import progress_bar

    lrs = rates(args.start, args.end, args.steps)
    subject = of_recipe(load_recipe(find_recipe(args.recipe), args.set), args.recipe.stem)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    quiet = nullcontext(lambda _done, _text: None)
    with quiet if args.json else progress_bar("range test", len(lrs)) as advance:
        test = lr_range(subject, lrs, stop=stop, progress=advance)
    if not args.grid or test.suggestion is None or stop.signal:
        return test, None
    rivals = around(test.suggestion)
    with quiet if args.json else progress_bar("grid", len(rivals)) as advance:
        found = grid(subject, rivals, stop=stop, progress=advance)
    return test, found if len(found.lrs) else None


def _lr_range_words(test: "RangeTest", grid: "Grid | None", drawn: Path | None, stop: "StopRequest") -> str:
    from unbraid.lab.lr_range import short
    from unbraid.lab.lr_range_plate import words

    told = words(test, grid)
    if test.suggestion is not None:
        told.append(f"Take: --set optim.lr={short(test.suggestion)}")
    if drawn is not None:
        told.append(f"Figure: {drawn}, and the numbers beside it.")
    if stop.signal:
        told.append(f"Stopped by signal {stop.signal}; the same command begins anew, fewer --steps end sooner.")
    return "\n".join(told)


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

    _add_lr_range(add)


def _add_lr_range(add: Callable[[str, object], argparse.ArgumentParser]) -> None:
    command = add("lr-range", lr_range)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of one of ours")
    add_set(command)
    rate: Any = {"type": float, "metavar": "LR"}
    command.add_argument("--from", dest="start", default=1e-7, help="learning rate to begin with (%(default)s)", **rate)
    command.add_argument(
        "--to", dest="end", default=10.0, help="and to end with, if the loss lasts (%(default)s)", **rate
    )
    command.add_argument("--steps", type=int, default=200, metavar="N", help="from one to the other (%(default)s)")
    grid_help = "check the suggestion by 50 steps with each of seven rates about it"
    command.add_argument("--grid", action="store_true", help=grid_help)
    out_help = "folder for figure and numbers (lr-range; with --json none)"
    command.add_argument("-o", "--out", type=Path, metavar="DIR", help=out_help)
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")
