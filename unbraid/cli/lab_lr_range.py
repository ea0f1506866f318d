"""`unbraid lab lr-range`."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.cli.options import Add, add_set, folder
from unbraid.config.shipped_recipes import find_recipe
from unbraid.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from unbraid.lab.lr_range import LrGrid, RangeTest
    from unbraid.signals import StopRequest


def lr_range(args: argparse.Namespace) -> int:
    """Try learning rates that grow from step to step on a recipe's model, and suggest one with its reason."""
    from unbraid.lab.lr_range_figure import range_test_json, write_lr_range
    from unbraid.plots import check_matplotlib
    from unbraid.signals import stop_on_signals

    out = args.out or (None if args.json else Path("lr-range"))
    if out is not None:
        check_matplotlib()
    with stop_on_signals() as stop:
        test, grid = _lr_range_and_grid(args, out, stop)
        drawn = write_lr_range(out, test, grid) if out is not None and len(test.lrs) else None
    if args.json:
        print(json.dumps(range_test_json(test, grid), indent=1, allow_nan=False))
    else:
        print(_lr_range_words(test, grid, drawn, stop))
    return EXIT_STOPPED + stop.signal if stop.signal else 0


def _lr_range_and_grid(
    args: argparse.Namespace, out: Path | None, stop: "StopRequest"
) -> "tuple[RangeTest, LrGrid | None]":
    from unbraid.config.recipe import load_recipe
    from unbraid.console import progress_bar
    from unbraid.lab.experiment import experiment_from_recipe
    from unbraid.lab.lr_range import learning_rates, lr_grid, lr_range, lrs_around

    lrs = learning_rates(args.start, args.end, args.steps)
    experiment = experiment_from_recipe(load_recipe(find_recipe(args.recipe), args.set), args.recipe.stem)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    quiet = nullcontext(lambda _done, _text: None)
    with quiet if args.json else progress_bar("range test", len(lrs)) as advance:
        test = lr_range(experiment, lrs, stop=stop, progress=advance)
    if not args.grid or test.suggestion is None or stop.signal:
        return test, None
    rivals = lrs_around(test.suggestion)
    with quiet if args.json else progress_bar("grid", len(rivals)) as advance:
        found = lr_grid(experiment, rivals, stop=stop, progress=advance)
    return test, found if len(found.lrs) else None


def _lr_range_words(test: "RangeTest", grid: "LrGrid | None", drawn: Path | None, stop: "StopRequest") -> str:
    from unbraid.lab.lr_range import format_lr
    from unbraid.lab.lr_range_figure import summary_sentences

    told = summary_sentences(test, grid)
    if test.suggestion is not None:
        told.append(f"Take: --set optim.lr={format_lr(test.suggestion)}")
    if drawn is not None:
        told.append(f"Figure: {drawn}, and the numbers beside it.")
    if stop.signal:
        told.append(f"Stopped by signal {stop.signal}; the same command begins anew, fewer --steps end sooner.")
    return "\n".join(told)


def add_lr_range(add: Add) -> None:
    """Add ``lab lr-range``."""
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
    command.add_argument("-o", "--out", type=folder, metavar="DIR", help=out_help)
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")
