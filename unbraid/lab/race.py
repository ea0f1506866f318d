"""Several optimizers, clippers or whatever a recipe names, from the same weights on the same batches; who is ahead."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbraid.config.recipe import load_recipe
from unbraid.config.schema import assignment
from unbraid.errors import RecipeError
from unbraid.io import to_json_row
from unbraid.lab.confidence import Interval, mean_interval
from unbraid.lab.sweep import Arm, RunSummary, SweepRun, arms_from_options, plan_runs
from unbraid.train.optim import OPTIMIZERS


@dataclass(frozen=True)
class ArmSummary:
    """An arm of a race over its seeds.

    Attributes:
        arm: Its name.
        loss: Mean training loss over the last tenth of the steps, over the seeds that finished.
        grad_norm: Median gradient norm of each seed.
        si_sdri: Of each seed's last validation, in dB.
        left_out: Steps left out, over all seeds.
        clipped: Share of the steps that were clipped, mean over seeds.
        fallen: What is said of each seed that did not finish.
    """

    arm: str
    loss: Interval
    grad_norm: Interval
    si_sdri: Interval
    left_out: int
    clipped: float
    fallen: tuple[str, ...]


def plan_race(
    recipe: Path, over: Sequence[str], *, seeds: int, out: Path, overrides: Sequence[str] = ()
) -> tuple[list[SweepRun], str]:
    """The runs of a race.

    An optimizer other than the recipe's gets the learning rate that it has by default, unless one is given: the
    recipe's is meant for its own.

    Returns:
        The runs, and what was done about learning rates; empty where nothing was.

    Raises:
        UserError: If recipe, keys or values cannot be used.
    """
    arms, notes = _with_rates(recipe, arms_from_options(over), overrides)
    if len(arms) < 2:
        raise RecipeError(f"--over {over[0]} has one value alone, and a race needs two: such as optim.name=sgd,adam.")
    return plan_runs(recipe, arms, seeds=seeds, out=out, overrides=overrides), notes


def _with_rates(recipe: Path, arms: Sequence[Arm], overrides: Sequence[str]) -> tuple[list[Arm], str]:
    base = load_recipe(recipe, overrides).optim
    given = {assignment(text)[0] for text in (*overrides, *itertools.chain(*(arm.overrides for arm in arms)))}
    if "optim.lr" in given:
        return list(arms), ""
    rates: dict[str, Any] = {}
    changed = []
    for arm in arms:
        name = next((assignment(text)[1] for text in arm.overrides if assignment(text)[0] == "optim.name"), base.name)
        lr = inspect.signature(OPTIMIZERS[name]).parameters["lr"].default if name in OPTIMIZERS else None
        if name == base.name or lr is None:
            changed.append(arm)
            continue
        rates[name] = lr
        changed.append(replace(arm, overrides=(*arm.overrides, f"optim.lr={lr}")))
    if not rates:
        return changed, ""
    listed = ", ".join(f"{name} at {lr:g}" for name, lr in rates.items())
    return changed, (
        f"Learning rates: the recipe's is meant for {base.name}; the others run at their own defaults, {listed}. "
        "That is no search: --over optim.lr=... or --set optim.lr=... says otherwise."
    )


def summarise_arms(outcomes: Sequence[RunSummary]) -> list[ArmSummary]:
    """Each arm over its seeds, in the order of the arms."""
    by_arm: dict[str, list[RunSummary]] = {}
    for outcome in outcomes:
        by_arm.setdefault(outcome.arm, []).append(outcome)
    return [_entry(arm, of_arm) for arm, of_arm in by_arm.items()]


def _entry(arm: str, of_arm: Sequence[RunSummary]) -> ArmSummary:
    finished = [one for one in of_arm if one.ended.how == "finished"]
    fallen = [one for one in of_arm if one.ended.how != "finished"]
    return ArmSummary(
        arm=arm,
        loss=mean_interval([one.loss for one in finished if one.loss is not None]),
        grad_norm=mean_interval([one.grad_norm for one in of_arm if one.grad_norm is not None]),
        si_sdri=mean_interval([one.si_sdri for one in finished if one.si_sdri is not None]),
        left_out=sum(one.left_out for one in of_arm),
        clipped=sum(one.clipped for one in of_arm) / len(of_arm),
        fallen=tuple(f"seed {one.seed} {one.ended.how} at step {one.ended.step}" for one in fallen),
    )


def verdict_sentence(outcomes: Sequence[RunSummary]) -> str:
    """A sentence: which arm has the highest SI-SDRi, and whether its lead over the next is more than chance.

    The lead is taken seed by seed, as both saw the same mixtures: what makes a seed easy for one makes it easy for the
    other. An arm that did not finish with every seed is behind all that did.
    """
    scores: dict[str, dict[int, float]] = {}
    seeds = {one.seed for one in outcomes}
    for one in outcomes:
        if one.si_sdri is not None:
            scores.setdefault(one.arm, {})[one.seed] = one.si_sdri
    whole = {arm: of_arm for arm, of_arm in scores.items() if set(of_arm) == seeds}
    fallen = len({one.arm for one in outcomes}) - len(whole)
    besides = f" {fallen} of the arms did not finish with every seed." if fallen else ""
    if len(whole) < 2:
        only = f"{next(iter(whole))} alone finished with every seed." if whole else "No arm finished with every seed."
        return f"Nobody to compare: {only}"
    first, second = sorted(whole, key=lambda arm: -sum(whole[arm].values()))[:2]
    lead = mean_interval([whole[first][seed] - whole[second][seed] for seed in sorted(seeds)])
    told = f"Ahead is {first}, by {lead.mean:.2f} dB of valid SI-SDRi before {second}."
    return f"{told} {_weighed(lead)}{besides}"


def _weighed(lead: Interval) -> str:
    if lead.n < 2:
        return "With one seed nobody knows how much of that is chance: --seeds 3 or more shows it."
    paired = f"seed by seed the lead is {lead.mean:.2f} ± {lead.spread:.2f} dB"
    paired += f", its 95 % interval {lead.low:.2f} to {lead.high:.2f}"
    if lead.low > 0:
        return f"That is more than the spread over {lead.n} seeds: {paired}."
    return f"That is not more than chance over {lead.n} seeds may give: {paired}, which includes 0."


def race_results(entries: Sequence[ArmSummary], outcomes: Sequence[RunSummary], *, notes: str) -> dict[str, Any]:
    """All of it, for ``--json``."""
    return {
        "arms": [to_json_row(entry) for entry in entries],
        "runs": [to_json_row(outcome) for outcome in outcomes],
        "verdict": verdict_sentence(outcomes),
        "learning_rates": notes,
    }
