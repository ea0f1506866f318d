"""unbraid keys: every key of a recipe; and which of them an unknown option was meant to be."""

import argparse
from collections.abc import Sequence

from unbraid.errors import UserError, nearest
from unbraid.printable import say


def keys(args: argparse.Namespace) -> int:
    """List every key of a recipe with its type, default and meaning."""
    from unbraid.config.reference import recipe_keys

    listed = recipe_keys()
    tables = list(dict.fromkeys(key.table for key in listed))
    if args.table is not None and args.table not in tables:
        hint = nearest(args.table, tables)
        raise UserError(f"There is no table {args.table!r}. The tables are {', '.join(tables)}.{hint}")

    # Headings: the table, and the entry of the registry that has the keys below.
    table = ""
    component = ""
    for key in listed:
        if args.table not in (None, key.table):
            continue
        if key.table != table:
            say(*[""] * bool(table), f"[{key.table}]")
            component = ""
        if key.component != component:
            say(f"  name = {key.component!r}:")
        table = key.table
        component = key.component
        indent = "    " if component else "  "
        default = f" = {key.default}" if key.default else ""
        say(f"{indent}{key.key}{default}  ({key.type})", f"{indent}    {key.meaning}")
    return 0


def unknown_options(unknown: Sequence[str], args: argparse.Namespace) -> str:
    """Return what to do about options that a command does not have; many are keys of the recipe."""
    message = f"unrecognized arguments: {' '.join(unknown)}."
    if not hasattr(args, "set") or not unknown[0].startswith("--"):
        return f"{message} See: unbraid {args.command} --help"
    from unbraid.config.reference import recipe_keys  # imported late: it loads torch

    option, equals, value = unknown[0].removeprefix("--").partition("=")
    if not equals:
        value = unknown[1] if len(unknown) > 1 else "VALUE"
    key_name = option.replace("-", "_")
    names = dict.fromkeys(f"{key.table}.{key.key}" for key in recipe_keys())
    meant = [name for name in names if key_name in (name, name.rpartition(".")[2])]
    if not meant:
        return f"{message} Keys of the recipe are set with --set TABLE.KEY=VALUE; unbraid keys lists them."
    return f"{message} It is a key of the recipe: {' or '.join(f'--set {name}={value}' for name in meant)}"
