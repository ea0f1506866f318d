"""Race: compare optimizers, clippers or other settings of a recipe from the same weights on the same batches."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbraid.config.recipe import load_recipe
from unbraid.config.schema import parse_override
from unbraid.errors import RecipeError
from unbraid.io import to_json_row
from unbraid.lab.confidence import Interval, mean_interval
from unbraid.lab.sweep import Arm, RunSummary, SweepRun, arms_from_options, plan_runs
from unbraid.train.optim import OPTIMIZERS


@dataclass(frozen=True)
class ArmSummary:
    """Summary of an arm over its seeds.

    Attributes:
        arm: Name of the arm.
        loss: Mean training loss over the last tenth of the steps, over the seeds that finished.
        grad_norm: Median gradient norm of each seed.
        si_sdri: SI-SDR improvement of each seed's last validation, in dB.
        n_skipped: Number of skipped steps, over all seeds.
        clipped: Share of the steps that were clipped, mean over seeds.
        unfinished: A note on each seed that did not finish.
    """

    arm: str
    loss: Interval
    grad_norm: Interval
    si_sdri: Interval
    n_skipped: int
    clipped: float
    unfinished: tuple[str, ...]


def plan_race(
    recipe: Path, over: Sequence[str], *, seeds: int, out: Path, overrides: Sequence[str] = ()
) -> tuple[list[SweepRun], str]:
    """Return the runs of a race, and a note about learning rates.

    The recipe's learning rate suits the recipe's optimizer. Any other optimizer gets its own default, unless the
    options set a learning rate.

    Returns:
        The runs, and the note; it is empty if no learning rate was changed.

    Raises:
        UserError: If the recipe, a key or a value cannot be used.
    """
    arms, note = _set_default_lrs(recipe, arms_from_options(over), overrides)
    if len(arms) < 2:
        raise RecipeError(f"--over {over[0]} has only one value, and a race needs two, such as optim.name=sgd,adam.")
    return plan_runs(recipe, arms, seeds=seeds, out=out, overrides=overrides), note


def _set_default_lrs(recipe: Path, arms: Sequence[Arm], overrides: Sequence[str]) -> tuple[list[Arm], str]:
    arm_overrides = itertools.chain.from_iterable(arm.overrides for arm in arms)
    if any(parse_override(text)[0] == "optim.lr" for text in (*overrides, *arm_overrides)):
        return list(arms), ""
    recipe_optimizer = load_recipe(recipe, overrides).optim.name
    lrs: dict[str, Any] = {}
    changed = []
    for arm in arms:
        optimizer = dict(parse_override(text) for text in arm.overrides).get("optim.name", recipe_optimizer)
        # Custom optimizers are not in the registry; they keep the recipe's learning rate.
        lr = inspect.signature(OPTIMIZERS[optimizer]).parameters["lr"].default if optimizer in OPTIMIZERS else None
        if optimizer == recipe_optimizer or lr is None:
            changed.append(arm)
            continue
        lrs[optimizer] = lr
        changed.append(replace(arm, overrides=(*arm.overrides, f"optim.lr={lr}")))
    if not lrs:
        return changed, ""
    listed = ", ".join(f"{name} at {lr:g}" for name, lr in lrs.items())
    return changed, (
        f"Learning rates: the recipe's is meant for {recipe_optimizer}; the others use their defaults, {listed}. These "
        "are not tuned: set them with --over optim.lr=... or --set optim.lr=..."
    )


def summarise_arms(summaries: Sequence[RunSummary]) -> list[ArmSummary]:
    """Return the summary of each arm over its seeds, in the order of the arms."""
    by_arm: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        by_arm.setdefault(summary.arm, []).append(summary)
    arms = []
    for arm, runs in by_arm.items():
        # Norms, skips and clipping are known of every run; a loss at the end only of those that finished.
        finished = [run for run in runs if run.ended.how == "finished"]
        arms.append(
            ArmSummary(
                arm=arm,
                loss=mean_interval([run.loss for run in finished if run.loss is not None]),
                grad_norm=mean_interval([run.grad_norm for run in runs if run.grad_norm is not None]),
                si_sdri=mean_interval([run.si_sdri for run in finished if run.si_sdri is not None]),
                n_skipped=sum(run.n_skipped for run in runs),
                clipped=sum(run.clipped for run in runs) / len(runs),
                unfinished=unfinished_notes(runs),
            )
        )
    return arms


def unfinished_notes(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return a note on each run that did not finish, such as ``seed 1 diverged at step 10``."""
    return tuple(
        f"seed {run.seed} {run.ended.how} at step {run.ended.step}" for run in runs if run.ended.how != "finished"
    )


def verdict_sentence(summaries: Sequence[RunSummary]) -> str:
    """Return sentences that name the arm with the highest SI-SDRi and say whether its lead may be chance.

    The lead over the next arm is computed seed by seed, because both saw the same mixtures: a seed that is easy for
    one is easy for the other. An arm that did not finish with every seed ranks behind all that did.
    """
    # Scores of each arm by seed; an arm is complete if it has one for every seed.
    scores: dict[str, dict[int, float]] = {}
    seeds = {run.seed for run in summaries}
    for run in summaries:
        if run.si_sdri is not None:
            scores.setdefault(run.arm, {})[run.seed] = run.si_sdri
    complete = {arm: by_seed for arm, by_seed in scores.items() if set(by_seed) == seeds}
    n_incomplete = len({run.arm for run in summaries}) - len(complete)
    incomplete = f" {n_incomplete} of the arms did not finish with every seed." if n_incomplete else ""
    if not complete:
        return "There is nothing to compare: no arm finished with every seed."
    if len(complete) == 1:
        return f"There is nothing to compare: only {next(iter(complete))} finished with every seed."

    # Differences between paired values vary much less than the values themselves.
    first, second = sorted(complete, key=lambda arm: -sum(complete[arm].values()))[:2]
    lead = mean_interval([complete[first][seed] - complete[second][seed] for seed in sorted(seeds)])
    verdict = f"{first} is ahead, by {lead.mean:.2f} dB of validation SI-SDRi over {second}."
    if lead.n < 2:
        return f"{verdict} One seed cannot show how much of that is chance; use --seeds 3 or more.{incomplete}"
    paired = (
        f"seed by seed the lead is {lead.mean:.2f} ± {lead.std:.2f} dB, with a 95 % interval from {lead.low:.2f} to "
        f"{lead.high:.2f}"
    )
    if lead.low > 0:
        return f"{verdict} That is more than the spread over {lead.n} seeds: {paired}.{incomplete}"
    return f"{verdict} That may be chance over {lead.n} seeds: {paired}, which includes 0.{incomplete}"


def race_results(arms: Sequence[ArmSummary], summaries: Sequence[RunSummary], *, note: str) -> dict[str, Any]:
    """Return all results as JSON values."""
    return {
        "arms": [to_json_row(arm) for arm in arms],
        "runs": [to_json_row(run) for run in summaries],
        "verdict": verdict_sentence(summaries),
        "learning_rates": note,
    }
