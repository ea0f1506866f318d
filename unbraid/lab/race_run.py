"""What `unbraid lab race` does from start to end, and what it prints and writes."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from unbraid.config.shipped_recipes import find_recipe
from unbraid.console import progress_bar
from unbraid.figures import write_figure
from unbraid.io import write_atomically
from unbraid.lab.confidence import Interval
from unbraid.lab.race import ArmSummary, plan_race, race_results, summarise_arms, verdict_sentence
from unbraid.lab.race_figure import race_figure
from unbraid.lab.sweep import RunEnd, SweepRun, run_sweep, step_overrides, summarise_run, unfinished_lines
from unbraid.lab.sweep_run import make_folders, say, side_by_side
from unbraid.plots import check_matplotlib
from unbraid.signals import StopRequest


def run_race(args: argparse.Namespace, stop: StopRequest) -> list[str]:
    """Train every arm with every seed, print the table, draw the figure, say who is ahead.

    Raises:
        Interrupted: If a signal came.
        UserError: If something given cannot be used.
    """
    check_matplotlib()
    make_folders(args.json)
    overrides = [f"validate.every_steps={max(1, args.steps // 5)}", *args.set, *step_overrides(args.steps)]
    cells, notes = plan_race(find_recipe(args.recipe), args.over, seeds=args.seeds, out=args.out, overrides=overrides)
    if notes:
        say(notes)
    ended = _trained(cells, stop)
    outcomes = [summarise_run(cell, how) for cell, how in ended]
    entries = summarise_arms(outcomes)
    Console().print(race_table(entries, args.seeds))
    numbers = args.json or args.out / "race.json"
    write_atomically(
        numbers, json.dumps(race_results(entries, outcomes, notes=notes), indent=1, allow_nan=False) + "\n"
    )
    verdict = verdict_sentence(outcomes)
    picture = write_figure(race_figure(ended, verdict), args.out)
    return [*unfinished_lines(ended), verdict, f"Curves: {picture}; numbers: {numbers}", side_by_side(args.out)]


def _trained(cells: list[SweepRun], stop: StopRequest) -> list[tuple[SweepRun, RunEnd]]:
    with progress_bar("training", 1.0) as advance:
        return list(run_sweep(cells, stop=stop, progress=advance))


def race_table(entries: Sequence[ArmSummary], n_seeds: int) -> Table:
    """A row for each arm: mean and standard deviation over the seeds."""
    title = (
        f"Mean ± standard deviation over those of {n_seeds} seed{'s' * (n_seeds > 1)} that finished: training loss "
        "over the last tenth of the steps, median gradient norm, SI-SDRi of the last validation"
    )
    table = Table(title=title, title_justify="left", show_lines=any("," in entry.arm for entry in entries))
    table.add_column("arm", no_wrap=True)
    for name in ("loss at the end", "norm", "SI-SDRi, dB", "clipped", "left out"):
        table.add_column(name, justify="right")
    for entry in entries:
        norm = _with_spread(entry.grad_norm, ".3g")
        numbers = [_with_spread(entry.loss), norm, _with_spread(entry.si_sdri)]
        arm = "\n".join([*entry.arm.split(","), *entry.fallen])
        table.add_row(arm, *numbers, f"{entry.clipped:.0%}", str(entry.left_out))
    return table


def _with_spread(found: Interval, digits: str = ".2f") -> str:
    if not found.n:
        return "-"
    return f"{found.mean:{digits}}" + (f" ± {found.spread:{digits}}" if found.n > 1 else "")
