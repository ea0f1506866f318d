"""Run a clipping sweep: train and score all runs, write the table and the numbers."""

import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from unbraid.console import progress_bar
from unbraid.errors import RecipeError, UserError
from unbraid.io import write_atomically, write_json
from unbraid.lab.clipping import (
    ARMS,
    PERCENTILES,
    clipping_markdown,
    clipping_results,
    conclusions,
    plan_clipping,
    score_run,
    table_rows,
)
from unbraid.lab.sweep import Interrupted, RunEnd, SweepRun, dashboard_line, run_sweep, unfinished_lines
from unbraid.signals import StopRequest

TABLE_BEGINS = "<!-- table: unbraid lab clipping -->"
TABLE_ENDS = "<!-- end of table -->"
"""The table goes between these lines of a Markdown file; a new file consists of them and the table."""


def run_clipping(
    recipe: Path,
    out: Path,
    *,
    percentiles: Sequence[float] | None = None,
    losses: Sequence[str] | None = None,
    steps: Sequence[str] = (),
    seeds: int = 2,
    n_items: int = 100,
    overrides: Sequence[str] = (),
    json_file: Path | None = None,
    markdown_file: Path | None = None,
    command: Sequence[str] = (),
    stop: StopRequest,
) -> list[str]:
    """Train and score every percentile of every loss with every seed, and write the table.

    Args:
        recipe: Recipe of the data, the optimizer and the schedule.
        out: Folder for all runs.
        percentiles: AutoClip percentiles; None for the paper's.
        losses: Names in `ARMS`; None for all.
        steps: ``--steps`` options, as `parse_steps` takes them.
        seeds: Number of seeds.
        n_items: Number of test mixtures that each run is scored on.
        overrides: ``--set`` options.
        json_file: File for the numbers; ``clipping.json`` in the folder for None.
        markdown_file: File for the table; see `write_table_into`.
        command: The command line, recorded with the numbers.
        stop: Ends the sweep early, with a checkpoint.

    Returns:
        Lines to print.

    Raises:
        Interrupted: If a signal arrived.
        UserError: If an option cannot be used.
    """
    # 1. Check everything before the work, not after it.
    for file in (json_file, markdown_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    losses = losses or list(ARMS)
    runs = plan_clipping(
        recipe,
        percentiles=PERCENTILES if percentiles is None else percentiles,
        losses=losses,
        seeds=seeds,
        steps=parse_steps(steps, losses),
        out=out,
        overrides=overrides,
    )

    # 2. Train and score.
    ended = train_and_score(runs, stop, n_items)

    # 3. Write the numbers and the table.
    rows = table_rows(ended, n_items=n_items)
    results = clipping_results(
        rows,
        runs,
        n_items=n_items,
        date=datetime.now(UTC).date().isoformat(),
        machine=describe_machine(),
        command=_without_folders(command),
    )
    write_json(json_file or out / "clipping.json", results)
    table = clipping_markdown(rows)
    if markdown_file:
        write_table_into(markdown_file, table)
    heading = f"SI-SDRi in dB on {n_items} test mixtures: "
    heading += f"mean over {seeds} seeds ± half its 95 % interval." if seeds > 1 else "one seed."
    if seeds == 2:
        heading += " With two seeds Student's t makes it 12.7 standard errors wide."
    return [heading, "", *table.splitlines(), *unfinished_lines(ended), *conclusions(rows), dashboard_line(out)]


def train_and_score(runs: list[SweepRun], stop: StopRequest, n_items: int) -> list[tuple[SweepRun, RunEnd]]:
    """Train the runs that have not ended, and score each after its training unless it is scored already.

    Raises:
        Interrupted: If a signal arrived.
    """
    ended: list[tuple[SweepRun, RunEnd]] = []
    with progress_bar("training", 1.0) as advance:

        def report_scoring(_: float, text: str) -> None:
            # Scoring shows its text next to a bar that stands still, and stops between two mixtures.
            if stop.signal:
                raise Interrupted(stop.signal)
            advance(min(0.999, (len(ended) + 1) / len(runs)), text)

        for run, end in run_sweep(runs, stop=stop, progress=advance):
            if end.how == "finished":
                score_run(run, n_items=n_items, progress=report_scoring)
            ended.append((run, end))
        advance(1.0, "")
    return ended


def parse_steps(options: Sequence[str], losses: Sequence[str]) -> Mapping[str, int] | int | None:
    """Return ``--steps`` as one number for all runs, or as numbers by loss; None without options.

    Raises:
        RecipeError: If the options are neither.
    """
    if not options:
        return None
    # isdigit and a nonzero int: a positive whole number, without sign or exponent.
    if len(options) == 1 and options[0].isdigit() and int(options[0]):
        return int(options[0])
    steps: dict[str, int] = {}
    for option in options:
        name, _, number = option.partition("=")
        if name not in losses or name in steps or not number.isdigit() or not int(number):
            raise RecipeError(
                f"--steps {' '.join(options)} must be one number above 0, or one for each of {', '.join(losses)}, such "
                f"as {losses[0]}=600."
            )
        steps[name] = int(number)
    return steps


def write_table_into(path: Path, table: str) -> None:
    """Write the table between its marks in a Markdown file, or to a new file.

    Raises:
        UserError: If the file exists and has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"{TABLE_BEGINS}\n{TABLE_ENDS}\n"
    before, begins, rest = text.partition(TABLE_BEGINS)
    _, ends, after = rest.partition(TABLE_ENDS)
    if not begins or not ends:
        raise UserError(f"{path} needs the lines {TABLE_BEGINS} and {TABLE_ENDS}; the table goes between them.")
    write_atomically(path, f"{before}{TABLE_BEGINS}\n\n{table}\n{TABLE_ENDS}{after}")


def extract_table(text: str) -> str:
    """Return the table between its marks in a Markdown text."""
    return text.partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0].strip() + "\n"


def _without_folders(command: Sequence[str]) -> str:
    """Return the command with file names instead of absolute paths, which mean nothing on other machines."""
    words = [re.sub(r"(^|=)/\S*/([^/]+)$", r"\1\2", word) for word in command]
    return f"unbraid {shlex.join(words)}"


def describe_machine() -> str:
    """Return the GPU's name, or the processor's with the number of threads, and the version of torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    try:
        cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu_info = ""
    # /proc/cpuinfo exists only on Linux, and has no such line on some processors.
    names = re.findall(r"^model name\s*:\s*(.+)$", cpu_info, re.MULTILINE)
    n_threads = torch.get_num_threads()
    threads = f"{n_threads} thread{'s' * (n_threads > 1)}"
    return f"{names[0] if names else platform.machine()}, {threads}, torch {torch.__version__}"
