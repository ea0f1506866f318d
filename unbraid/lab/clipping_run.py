"""What `unbraid lab clipping` does from start to end, and what it prints and writes."""

import argparse
import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from unbraid.config.shipped_recipes import find_recipe
from unbraid.console import ProgressBar, progress_bar
from unbraid.errors import RecipeError, UserError
from unbraid.io import write_atomically, write_json
from unbraid.lab.clipping import (
    CONTESTS,
    PERCENTILES,
    clipping_json,
    clipping_markdown,
    cuts_of,
    plan_clipping,
    reading,
    score,
)
from unbraid.lab.sweep import Interrupted, RunEnd, SweepRun, run_sweep, unfinished_lines
from unbraid.lab.sweep_run import make_folders, side_by_side
from unbraid.signals import StopRequest

TABLE_BEGINS, TABLE_ENDS = "<!-- table: unbraid lab clipping -->", "<!-- end of table -->"
"""Interpolation these a file given as ``--markdown`` gets the table; one without them is the table alone."""


def run_clipping(args: argparse.Namespace, stop: StopRequest) -> list[str]:
    """Train and score every percentile of every loss with every seed; print and write the table.

    Raises:
        Interrupted: If a signal came.
        UserError: If something given cannot be used.
    """
    make_folders(args.json, args.markdown)
    losses = args.losses or list(CONTESTS)
    cells = plan_clipping(
        find_recipe(args.recipe),
        percentiles=PERCENTILES if args.percentiles is None else args.percentiles,
        losses=losses,
        seeds=args.seeds,
        steps=steps_of(args.steps, losses),
        out=args.out,
        overrides=args.set,
    )
    ended = trained_and_tested(cells, stop, args.test_items)
    cuts = cuts_of(ended, n_items=args.test_items)
    date, command = datetime.now(UTC).date().isoformat(), _shown(args.words)
    found = clipping_json(cuts, cells, n_items=args.test_items, date=date, machine=machine(), command=command)
    table = clipping_markdown(found["rows"])
    write_json(args.json or args.out / "clipping.json", found)
    if args.markdown:
        write_table_into(args.markdown, table)
    over = f"mean over {args.seeds} seeds ± half its 95 % interval" if args.seeds > 1 else "one seed"
    about = f"SI-SDRi in dB on {args.test_items} test mixtures: {over}."
    few = "With two seeds Student's t makes it 12.7 standard errors wide." if args.seeds == 2 else ""
    return [
        f"{about} {few}".strip(),
        "",
        table,
        *unfinished_lines(ended),
        *reading(found["rows"]),
        side_by_side(args.out),
    ]


def trained_and_tested(cells: list[SweepRun], stop: StopRequest, n_items: int) -> list[tuple[SweepRun, RunEnd]]:
    """Train and score what is not yet, each run's scores after its training.

    Raises:
        Interrupted: If a signal came.
    """
    ended: list[tuple[SweepRun, RunEnd]] = []
    with progress_bar("training", 1.0) as advance:
        for cell, how in run_sweep(cells, stop=stop, progress=advance):
            if how.how == "finished":
                share = min(0.999, (len(ended) + 1) / len(cells))
                score(cell, n_items=n_items, progress=partial(_beside, advance, stop, share))
            ended.append((cell, how))
        advance(1.0, "")
    return ended


def _beside(advance: ProgressBar, stop: StopRequest, share: float, _: float, text: str) -> None:
    """Say something beside a bar that stays where it is, unless a signal came."""
    if stop.signal:
        raise Interrupted(stop.signal)
    advance(share, text)


def steps_of(given: list[str], losses: list[str]) -> Mapping[str, int] | int | None:
    """``--steps``: one number for all, or one for each loss by its name.

    Raises:
        RecipeError: If it is neither.
    """
    if not given:
        return None
    if len(given) == 1 and given[0].isdigit() and int(given[0]):
        return int(given[0])
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in losses or not number.isdigit() or not int(number) or name in found:
            allowed = f"one number above 0, or one for each of {', '.join(losses)}, such as {losses[0]}=600"
            raise RecipeError(f"--steps {' '.join(given)} must be {allowed}.")
        found[name] = int(number)
    return found


def write_table_into(path: Path, table: str) -> None:
    """Write the table between its marks in a Markdown file, or as a file of its own.

    Raises:
        UserError: If the file is there and has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"{TABLE_BEGINS}\n{TABLE_ENDS}\n"
    before, begins, rest = text.partition(TABLE_BEGINS)
    _, ends, after = rest.partition(TABLE_ENDS)
    if not begins or not ends:
        raise UserError(f"{path} has no lines {TABLE_BEGINS} and {TABLE_ENDS} to write the table between.")
    write_atomically(path, f"{before}{TABLE_BEGINS}\n\n{table}\n{TABLE_ENDS}{after}")


def table_in(text: str) -> str:
    """The table that stands between its marks in a Markdown text."""
    return text.partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0].strip() + "\n"


def _shown(words: list[str]) -> str:
    """The command as others may run it: of paths the name alone."""
    plain = [re.sub(r"(^|=)/\S*/([^/]+)$", r"\1\2", word) for word in words]
    return f"unbraid {shlex.join(plain)}"


def machine() -> str:
    """The processor and how many threads."""
    import platform

    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    n = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{name}, {n} thread{'s' * (n > 1)}"
    return f"{device}, torch {torch.__version__}"
