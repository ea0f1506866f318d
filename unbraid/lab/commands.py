"""`unbraid lab ...`: each command parses, calls the laboratory, prints. Torch is imported only when one runs."""

import argparse
from typing import Any

from unbraid.arguments import Parser


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

    del add
