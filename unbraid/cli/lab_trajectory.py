"""`unbraid lab trajectory`."""

import argparse
import shlex
from pathlib import Path

from unbraid.cli.options import Add, add_set, file_to_write, folder, positive
from unbraid.config.shipped_recipes import find_recipe
from unbraid.errors import EXIT_STOPPED


def trajectory(args: argparse.Namespace) -> int:
    """Step size, loss, gradient norm and smoothness along a training, with and without AutoClip, and how they agree."""
    from unbraid.console import command_name, progress_bar
    from unbraid.lab.trajectory_run import load_experiment, run_arms, write_comparison
    from unbraid.signals import stop_on_signals

    subject = load_experiment(find_recipe(args.recipe), args.set, n_steps=args.steps, every=args.every, clips=args.clip)
    with stop_on_signals() as stop, progress_bar("training", 1.0) as advance:
        options = {"clips": args.clip, "n_steps": args.steps, "every": args.every}
        comparison = run_arms(subject, args.out, **options, stop=stop, progress=advance)
    print("\n".join([*comparison.summary_lines(), *write_comparison(comparison, args.out, args.json)]))
    if stop.signal:
        print(f"Stopped by signal {stop.signal}; go on with: {command_name()} {shlex.join(args.words)}")
    return EXIT_STOPPED + stop.signal if stop.signal else 0


def add_trajectory(add: Add) -> None:
    """Add ``lab trajectory``."""
    command = add("trajectory", trajectory)
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of one of ours")
    add_set(command)
    command.add_argument("--steps", type=positive(int), default=500, metavar="N", help="of each arm (%(default)s)")
    every_help = "measure the smoothness every so many steps; once costs as much as four steps (%(default)s)"
    command.add_argument("--every", type=positive(int), default=5, metavar="N", help=every_help)
    clip_help = "an arm for each: none, autoclip, another clipper, or recipe for the recipe's own (none autoclip)"
    command.add_argument("--clip", nargs="+", default=["none", "autoclip"], metavar="NAME", help=clip_help)
    out_help = "folder for figure, numbers, and what to go on from (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path("trajectory"), metavar="DIR", help=out_help)
    command.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="numbers to write (trajectory.json in the folder)"
    )
