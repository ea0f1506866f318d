"""What several commands share: exit statuses, kinds of numbers, --set and --trust, where recipes are found."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbraid.errors import EXIT_USER_ERROR

Add = Callable[[str, object], argparse.ArgumentParser]
"""Adds a command by its name and function, whose docstring is its help."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print one line and end with status 2."""
        self.exit(EXIT_USER_ERROR, f"unbraid: {message}. See: {self.prog} --help\n")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number above 0, of the kind given."""

    def convert(text: str) -> Any:
        if kind(text) <= 0:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return kind(text)

    convert.__name__ = "number above 0"
    return convert


def folder(text: str) -> Path:
    """A folder to write to, there or not."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, and a folder is needed")
    return path


def file_to_write(text: str) -> Path:
    """A file to write, there or not."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name the file in it")
    return path


def port_number(text: str) -> int:
    """A port to listen at; 0 for any that is free."""
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"port {text} must be from 0, for any that is free, to 65535")
    return port


def add_set(command: argparse.ArgumentParser, example: str = "optim.lr=3e-4") -> None:
    """Let a command take ``--set KEY=VALUE``, over what the recipe says."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"such as {example}")


def add_trust(command: argparse.ArgumentParser) -> None:
    """Let a command run code that a checkpoint names."""
    command.add_argument("--trust", action="store_true", help="let code named by the checkpoint run")
