"""What the commands that train a grid of runs share: run it to its end, or say how to go on."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from unbraid.console import command_name
from unbraid.errors import EXIT_STOPPED
from unbraid.lab.sweep import Interrupted
from unbraid.signals import StopRequest, stop_on_signals

Run = Callable[[argparse.Namespace, StopRequest], list[str]]


def run_to_end(args: argparse.Namespace, run: Run) -> int:
    """Run a grid; where a signal stops it, say how to go on.

    Returns:
        The exit status: 0, or 128 and the signal.
    """
    try:
        with stop_on_signals() as stop:
            told = run(args, stop)
    except Interrupted as interrupted:
        words = shlex.join(args.words)
        say(f"Stopped by signal {interrupted.number}; the same command goes on: {command_name()} {words}")
        return EXIT_STOPPED + interrupted.number
    for line in told:
        say(line)
    return 0


def make_folders(*files: Path | None) -> None:
    """Make the folders that files will be written to, before the work and not after it."""
    for file in files:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)


def say(line: str) -> None:
    """Print a line as it is, however long."""
    Console(soft_wrap=True).print(line, markup=False, highlight=False)


def side_by_side(out: Path) -> str:
    """The command that shows the runs beside each other."""
    return f"All runs side by side: {command_name()} dashboard {shlex.quote(str(out))}"
