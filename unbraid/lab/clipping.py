"""Clipping sweep: AutoClip percentiles for several losses, scored on unseen talkers like the paper's table.

The losses with their models, and the published table, are in ``recipes/sweeps/autoclip_percentiles.toml``.
"""

import inspect
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from unbraid.build import list_tracks, load_model
from unbraid.config.recipe import load_recipe
from unbraid.config.schema import parse_override
from unbraid.config.shipped_recipes import recipes_folder
from unbraid.data.dataset import make_dataset
from unbraid.errors import CheckpointError, RecipeError, nearest
from unbraid.evaluate import evaluate
from unbraid.io import write_json
from unbraid.lab.clustering import ClusteredSeparation
from unbraid.lab.confidence import mean_interval
from unbraid.lab.race import unfinished_notes
from unbraid.lab.sweep import Arm, RunEnd, SweepRun, plan_runs, step_overrides, summarise_run
from unbraid.models import MODELS
from unbraid.type_aliases import ProgressCallback, Row

SCORES_FILE = "tested.json"
"""File in a run directory with the SI-SDRi of each test mixture, in dB, once the run has been scored."""

_TABLE = tomllib.loads((recipes_folder() / "sweeps" / "autoclip_percentiles.toml").read_text(encoding="utf-8"))
ARMS: dict[str, dict[str, Any]] = _TABLE["arms"]
PERCENTILES: list[float] = _TABLE["percentiles"]
PAPER: dict[str, dict[str, float]] = _TABLE["paper"]


def plan_clipping(
    recipe: Path,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    losses: Sequence[str] = tuple(ARMS),
    seeds: int = 2,
    steps: Mapping[str, int] | int | None = None,
    out: Path,
    overrides: Sequence[str] = (),
) -> list[SweepRun]:
    """Return the runs of a clipping sweep: all losses and percentiles of one seed before the next seed.

    Args:
        recipe: Recipe of the data, the optimizer, the schedule and the budget.
        percentiles: Percentiles of the gradient norms, from 0 to 100.
        losses: Names in `ARMS`.
        seeds: Number of seeds.
        steps: Number of steps of each run, or by name of the loss; None for the recipe's budget.
        out: Folder for all runs.
        overrides: ``--set`` options. A model option goes to each network that has it.

    Raises:
        UserError: If the recipe, a loss or a percentile cannot be used.
    """
    _check_options(percentiles, losses)
    recipe_model = load_recipe(recipe, overrides).model.name
    runs: list[SweepRun] = []
    for name in losses:
        own = dict(ARMS[name]["overrides"])
        network = own["model"]["name"]
        if ARMS[name].get("keep_model") and network == recipe_model:
            del own["model"]
        arms = [
            Arm(f"{name},percentile={p:g}", (f"clip={_inline_toml({'name': 'autoclip', 'percentile': float(p)})}",))
            for p in percentiles
        ]
        arm_overrides = [
            *(f"{key}={_inline_toml(value)}" for key, value in own.items()),
            *step_overrides(steps.get(name) if isinstance(steps, Mapping) else steps),
            *_applicable(overrides, network),
        ]
        runs += plan_runs(recipe, arms, seeds=seeds, out=out, overrides=arm_overrides)
    return sorted(runs, key=lambda run: run.seed)  # the sort is stable: within a seed the order stays


def _applicable(overrides: Sequence[str], network: str) -> list[str]:
    """Return the overrides without options of other arms' networks; an option that no network has stays, an error."""
    # Arms have different networks, so one --set model.hidden=8 cannot be valid for all of them.
    own = _model_keys(network)
    any_network = set().union(*(_model_keys(arm["overrides"]["model"]["name"]) for arm in ARMS.values()))
    keys = [parse_override(text)[0] for text in overrides]
    return [text for text, key in zip(overrides, keys, strict=True) if key in own or key not in any_network]


def _model_keys(network: str) -> set[str]:
    return {f"model.{parameter}" for parameter in inspect.signature(MODELS[network]).parameters}


def _check_options(percentiles: Sequence[float], losses: Sequence[str]) -> None:
    for percentile in percentiles:
        if not 0 <= percentile <= 100:
            raise RecipeError(
                f"--percentiles {percentile:g} must be from 0 (the smallest norm so far) to 100 (which never clips)."
            )
    for name in losses:
        if name not in ARMS:
            raise RecipeError(f"--losses {name!r} is not one of {', '.join(ARMS)}.{nearest(name, ARMS)}")
    for option, values in (("percentiles", [f"{p:g}" for p in percentiles]), ("losses", list(losses))):
        if not values:
            raise RecipeError(f"--{option} needs at least one value.")
        for index, value in enumerate(values):
            if value in values[:index]:
                raise RecipeError(f"--{option} has {value} twice; remove one.")


def _inline_toml(value: Any) -> str:
    """Return a table or list as ``--set`` takes it; JSON and TOML agree on strings, numbers and lists."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {json.dumps(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def score_run(run: SweepRun, *, n_items: int, progress: ProgressCallback | None = None) -> list[float]:
    """Return the SI-SDRi of a run's last weights on mixtures of the test split, in dB; saved in the run directory.

    Every run is scored on the mixtures of seed 0, so that all runs are compared on the same ones.

    Raises:
        UserError: If the data has no test split, or a file of the run cannot be read.
    """
    # Scores of an earlier call, if they are of as many mixtures.
    path = run.directory.path / SCORES_FILE
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["n_items"] == n_items:
                return [float(value) for value in saved["si_sdri"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}); remove it, and the run is scored again."
            ) from error

    # The sweep's recipe is the user's own, so its custom code may run: trust.
    model, recipe = load_model(run.directory.checkpoints / "last", trust=True)
    if ARMS[_loss_name(run.arm.name)].get("clustered"):
        model = ClusteredSeparation(model, n_sources=recipe.data.n_sources)
    tracks, noise = list_tracks(recipe)
    test_set = make_dataset(tracks, replace(recipe.data, seed=0), "test", noises=noise)
    scores = []
    for row, _ in evaluate(model, test_set, recipe, n_items=n_items):
        scores.append(row["si_sdri"])
        if progress is not None:
            text = f"{run.arm.name} seed {run.seed}  scored on {len(scores)} of {n_items}"
            progress(len(scores) / n_items, text)
    known = [float(value) for value in scores if value is not None]
    write_json(path, {"n_items": n_items, "si_sdri": known}, indent=None)
    return known


def _loss_name(arm: str) -> str:
    return arm.partition(",percentile=")[0]


def table_rows(ended: Sequence[tuple[SweepRun, RunEnd]], *, n_items: int) -> list[Row]:
    """Return a row for each loss and percentile, over its seeds; runs that are not scored yet are scored.

    A row has the loss, the percentile, of each finished seed the mean SI-SDRi over the test mixtures and the final
    training loss, the share of clipped steps, and a note on each seed that did not finish.
    """
    by_arm: dict[str, list[tuple[SweepRun, RunEnd]]] = {}
    for run, end in ended:
        by_arm.setdefault(run.arm.name, []).append((run, end))
    rows = []
    for arm, runs in by_arm.items():
        summaries = [summarise_run(run, end) for run, end in runs]
        finished = [summary for summary in summaries if summary.ended.how == "finished"]
        scores = [score_run(run, n_items=n_items) for run, end in runs if end.how == "finished"]
        rows.append(
            {
                "loss": _loss_name(arm),
                "percentile": float(arm.partition(",percentile=")[2]),
                "si_sdri": [sum(values) / len(values) for values in scores if values],
                "clipped": sum(summary.clipped for summary in summaries) / len(summaries),
                "final_loss": [summary.loss for summary in finished if summary.loss is not None],
                "unfinished": list(unfinished_notes(summaries)),
            }
        )
    return rows


def clipping_results(
    rows: Sequence[Row], runs: Sequence[SweepRun], *, n_items: int, date: str, machine: str, command: str
) -> Row:
    """Return all results as JSON values: what was run, and the rows of the table."""
    recipe = runs[0].recipe
    recipes = {_loss_name(run.arm.name): run.recipe for run in runs}
    given = {
        "command": command,
        "table": Path(recipe.data.path or "").name,
        "steps": {loss: own.train.max_steps for loss, own in recipes.items()},
        "seeds": len({run.seed for run in runs}),
        "test_items": n_items,
        "excerpt_seconds": recipe.data.excerpt_seconds,
        "batch_size": recipe.data.batch_size,
        "optimizer": {"name": recipe.optim.name, **recipe.optim.options},
        "schedule": {"name": recipe.schedule.name, **recipe.schedule.options},
        "models": {loss: asdict(own.model) for loss, own in recipes.items()},
    }
    return {"date": date, "machine": machine, "given": given, "rows": list(rows)}


def clipping_markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table: percentiles down, losses across, each with the paper's column if there is one.

    Args:
        rows: As `table_rows` returns them.
    """
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    percentiles = sorted({row["percentile"] for row in rows})
    by_cell = {(row["loss"], row["percentile"]): row for row in rows}
    # Header: a column for each loss, and the paper's column next to it.
    titles = ["p"]
    for loss in losses:
        titles.append(loss)
        if "paper_column" in ARMS[loss]:
            titles.append(f"paper, {ARMS[loss]['paper_column']}")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    # One row per percentile; a dash where nothing was run or published.
    for percentile in percentiles:
        cells = [f"{percentile:g}"]
        for loss in losses:
            row = by_cell.get((loss, percentile))
            cells.append("; ".join([mean_interval(row["si_sdri"]).text(), *row["unfinished"]]) if row else "-")
            if "paper_column" in ARMS[loss]:
                published = PAPER[ARMS[loss]["paper_column"]].get(f"{percentile:g}")
                cells.append("-" if published is None else f"{published:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def conclusions(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each loss that compares its best percentile with no clipping, seed by seed."""
    losses = dict.fromkeys(row["loss"] for row in rows)
    return [_conclusion(loss, [row for row in rows if row["loss"] == loss]) for loss in losses]


def _conclusion(loss: str, rows: Sequence[Row]) -> str:
    # Percentile 100 never clips: it is the baseline.
    baseline = next((row for row in rows if row["percentile"] == 100), None)
    clipped = [row for row in rows if row["percentile"] != 100 and row["si_sdri"]]
    if baseline is None or not baseline["si_sdri"] or not clipped:
        return f"{loss}: nothing to compare with training without clipping."
    best = max(clipped, key=lambda row: mean_interval(row["si_sdri"]).mean)
    percentile = f"p = {best['percentile']:g}"
    if len(best["si_sdri"]) != len(baseline["si_sdri"]) or best["unfinished"] or baseline["unfinished"]:
        return f"{loss}: {percentile} scored highest; not every seed finished, so seeds cannot be paired."

    # Picking the best of several percentiles favours it by chance, so the interval is widened (Bonferroni).
    gains = [own - without for own, without in zip(best["si_sdri"], baseline["si_sdri"], strict=True)]
    gain = mean_interval(gains, level=1 - 0.05 / len(clipped))
    subject = f"of the clipped runs, {percentile} scored highest" if len(clipped) > 1 else percentile
    rounded = round(gain.mean, 2) + 0.0  # + 0.0 turns -0.0 into 0.0, which prints as +0.00
    difference = f"{loss}: {subject}, {rounded:+.2f} dB compared with no clipping"
    if gain.n < 2:
        return f"{difference}, from one seed."
    if gain.low > 0:
        verdict = "above 0"
    elif gain.high < 0:
        verdict = "below 0"
    else:
        verdict = "which includes 0: no difference is shown"
    widened = f" (widened, as the best of {len(clipped)} was picked)" if len(clipped) > 1 else ""
    return (
        f"{difference}; paired by seed over {gain.n} seeds, the 95 % interval{widened} is {gain.low:.2f} to "
        f"{gain.high:.2f} dB, {verdict}."
    )
