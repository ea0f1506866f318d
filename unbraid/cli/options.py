"""Options, types of arguments and the end of a stopped command, shared by several commands."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unbraid.errors import EXIT_STOPPED, EXIT_USER_ERROR
from unbraid.printable import say

Add = Callable[[str, object], argparse.ArgumentParser]
"""Adds a command, given its name and function; the docstring of the function is the help text."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error on one line, without the usage before it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and exit with status 2."""
        self.exit(EXIT_USER_ERROR, f"unbraid: {message}. See: {self.prog} --help\n")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argument type for numbers above 0; ``kind`` is int or float."""

    def convert(text: str) -> Any:
        if kind(text) <= 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return kind(text)

    # argparse names the type in its message: "invalid number above 0 value: 'x'".
    convert.__name__ = "number above 0"
    return convert


def folder(text: str) -> Path:
    """Return the path of a folder to write to, which need not exist yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file; name a folder")
    return path


def file_to_write(text: str) -> Path:
    """Return the path of a file to write, which need not exist yet."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return path


def port_number(text: str) -> int:
    """Return a port number; 0 stands for any free port."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"port {text} must be from 0 (any free port) to 65535")
    return port


def add_set(command: argparse.ArgumentParser, example: str = "optim.lr=3e-4") -> None:
    """Add ``--set KEY=VALUE``, which overrides a key of the recipe."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key of the recipe, such as {example}",
    )


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add ``--trust``, which allows code that a checkpoint names to run."""
    command.add_argument("--trust", action="store_true", help="run code that the checkpoint names")


def exit_status(signal_number: int, advice: str = "") -> int:
    """Return 0, or 128 plus the number of the signal that stopped a command, and print what to do next.

    Args:
        signal_number: The signal; 0 if the command was not stopped.
        advice: How to continue; nothing is printed if it is empty.
    """
    if not signal_number:
        return 0
    if advice:
        say(f"Stopped by signal {signal_number}. {advice}")
    return EXIT_STOPPED + signal_number


def resume_advice(argv: Sequence[str]) -> str:
    """Return a sentence with the command that resumes a stopped one, given the arguments of that command."""
    from unbraid.console import command_name  # imported late: it loads rich

    return f"To resume: {command_name()} {shlex.join(argv)}"
