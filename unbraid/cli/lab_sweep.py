"""`unbraid lab race` and `unbraid lab clipping`, which train a grid of runs."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.cli.options import Add, add_set, file_to_write, folder, positive
from unbraid.config.shipped_recipes import find_recipe
from unbraid.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from unbraid.signals import StopRequest


def race(args: argparse.Namespace) -> int:
    """Several optimizers, clippers or other choices from the same weights on the same batches: who is ahead."""
    from unbraid.lab.race_run import run_race

    return _run_until_stopped(
        lambda stop: run_race(
            find_recipe(args.recipe),
            args.over,
            args.out,
            n_steps=args.steps,
            seeds=args.seeds,
            overrides=args.set,
            json_file=args.json,
            stop=stop,
        ),
        args.words,
    )


def clipping(args: argparse.Namespace) -> int:
    """The AutoClip paper's table in small: percentiles by losses, trained and scored on unseen talkers."""
    from unbraid.lab.clipping_run import run_clipping

    return _run_until_stopped(
        lambda stop: run_clipping(
            find_recipe(args.recipe),
            args.out,
            percentiles=args.percentiles,
            losses=args.losses,
            steps=args.steps,
            seeds=args.seeds,
            n_items=args.test_items,
            overrides=args.set,
            json_file=args.json,
            markdown_file=args.markdown,
            command=args.words,
            stop=stop,
        ),
        args.words,
    )


def _run_until_stopped(run: "Callable[[StopRequest], list[str]]", words: Sequence[str]) -> int:
    """Run a sweep and print its lines; if a signal stops it, print how to resume.

    Returns:
        The exit status: 0, or 128 plus the number of the signal.
    """
    from unbraid.console import command_name
    from unbraid.lab.sweep import Interrupted
    from unbraid.signals import stop_on_signals

    try:
        with stop_on_signals() as stop:
            lines = run(stop)
    except Interrupted as interrupted:
        print(f"Stopped by signal {interrupted.number}. To resume: {command_name()} {shlex.join(words)}")
        return EXIT_STOPPED + interrupted.number
    print("\n".join(lines))
    return 0


def add_race(add: Add) -> None:
    """Add ``lab race``."""
    command = add("race", race)
    over_help = "what the arms differ in, such as optim.name=sgd,adam; several of them are multiplied"
    command.add_argument("--over", action="append", default=[], metavar="KEY=A,B", help=over_help)
    command.add_argument("--steps", type=positive(int), default=300, metavar="N", help="of each run (%(default)s)")
    _add_grid(command, "race", 3)


def add_clipping(add: Add) -> None:
    """Add ``lab clipping``."""
    command = add("clipping", clipping)
    p_help = "of the gradient norms so far, to be cut to; 100 cuts nothing (0 1 10 25 50 90 100)"
    command.add_argument("--percentiles", type=float, nargs="+", metavar="P", help=p_help)
    losses_help = "deep_clustering whitened_kmeans mask_inference snr conv_tasnet sepformer (all of them)"
    command.add_argument("--losses", nargs="+", metavar="NAME", help=losses_help)
    steps_help = "of each run, or of each loss as in snr=600 conv_tasnet=300 (1000)"
    command.add_argument("--steps", nargs="+", default=["1000"], metavar="N", help=steps_help)
    items_help = "mixtures of the test split to score by (%(default)s)"
    command.add_argument("--test-items", type=positive(int), default=100, metavar="N", help=items_help)
    command.add_argument(
        "--markdown", type=file_to_write, metavar="FILE", help="write the table there too, or into its place"
    )
    _add_grid(command, "clipping", 2)


def _add_grid(command: argparse.ArgumentParser, out: str, seeds: int) -> None:
    """What the commands share that train a grid of runs."""
    command.add_argument("recipe", type=Path, help="a TOML file, or the name of one of ours")
    add_set(command)
    command.add_argument("--seeds", type=int, default=seeds, metavar="N", help="of each arm (%(default)s)")
    out_help = "folder for all runs; the same command goes on with what is there (%(default)s)"
    command.add_argument("-o", "--out", type=folder, default=Path(out), metavar="DIR", help=out_help)
    command.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="file for the numbers (a file of the folder)"
    )
