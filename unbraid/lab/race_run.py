"""Run a race: train all arms, print the table, draw the figure, write the numbers."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unbraid.console import progress_bar
from unbraid.figures import write_figure
from unbraid.io import write_json
from unbraid.lab.confidence import Interval
from unbraid.lab.race import ArmSummary, plan_race, race_results, summarise_arms
from unbraid.lab.race_figure import race_figure
from unbraid.lab.sweep import dashboard_line, run_sweep, step_overrides, summarise_run, unfinished_lines
from unbraid.plots import check_matplotlib
from unbraid.signals import StopRequest


def run_race(
    recipe: Path,
    over: Sequence[str],
    out: Path,
    *,
    n_steps: int,
    seeds: int,
    overrides: Sequence[str] = (),
    json_file: Path | None = None,
    stop: StopRequest,
) -> list[str]:
    """Train every arm with every seed, print a table, write figure and numbers.

    Args:
        recipe: Recipe that all arms share.
        over: ``--over`` options, the settings to compare.
        out: Folder for runs, figure and numbers.
        n_steps: Number of steps of each run.
        seeds: Number of seeds.
        overrides: ``--set`` options.
        json_file: File for the numbers; ``race.json`` in the folder for None.
        stop: Ends the race early, with a checkpoint.

    Returns:
        Lines to print.

    Raises:
        Interrupted: If a signal arrived.
        UserError: If an option cannot be used.
    """
    # 1. Check everything before the work, not after it.
    check_matplotlib()
    numbers_file = json_file or out / "race.json"
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    overrides = [f"validate.every_steps={max(1, n_steps // 5)}", *overrides, *step_overrides(n_steps)]
    runs, note = plan_race(recipe, over, seeds=seeds, out=out, overrides=overrides)
    console = Console(soft_wrap=True)
    if note:
        console.print(note, markup=False, highlight=False)

    # 2. Train.
    with progress_bar("training", 1.0) as advance:
        ended = list(run_sweep(runs, stop=stop, progress=advance))

    # 3. Summarise: table, numbers, figure.
    summaries = [summarise_run(run, end) for run, end in ended]
    arms = summarise_arms(summaries)
    Console().print(race_table(arms, seeds))
    results = race_results(arms, summaries, note=note)
    write_json(numbers_file, results)
    figure_file = write_figure(race_figure(ended, results["verdict"]), out)
    return [
        *unfinished_lines(ended),
        results["verdict"],
        f"Curves: {figure_file}; numbers: {numbers_file}",
        dashboard_line(out),
    ]


def race_table(arms: Sequence[ArmSummary], n_seeds: int) -> Table:
    """Return a table with a row for each arm: means and standard deviations over the seeds."""
    title = (
        f"Mean ± standard deviation over those of {n_seeds} seed{'s' * (n_seeds > 1)} that finished: training loss "
        "over the last tenth of the steps, median gradient norm, SI-SDRi of the last validation"
    )
    table = Table(title=title, title_justify="left", show_lines=any("," in arm.arm for arm in arms))
    table.add_column("arm", no_wrap=True)
    for name in ("final loss", "norm", "SI-SDRi, dB", "clipped", "skipped"):
        table.add_column(name, justify="right")
    for arm in arms:
        name = "\n".join([*arm.arm.split(","), *arm.unfinished])
        table.add_row(
            name,
            _mean_and_std(arm.loss),
            _mean_and_std(arm.grad_norm, ".3g"),
            _mean_and_std(arm.si_sdri),
            f"{arm.clipped:.0%}",
            str(arm.n_skipped),
        )
    return table


def _mean_and_std(interval: Interval, digits: str = ".2f") -> str:
    if not interval.n:
        return "-"
    return f"{interval.mean:{digits}}" + (f" ± {interval.std:{digits}}" if interval.n > 1 else "")
