"""Rules about faults: skipped steps, the files behind them, loss spikes and their effect on Adam's second moment."""

import math
from collections import Counter

import numpy as np

from unbraid.fault_advice import ADVICE
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import episodes, finite_max, finite_median, rolling_median
from unbraid.health.series import Series
from unbraid.records import FAULT_OUTCOMES

EXAMPLE_EVENTS = (
    "STEP_RESCUED",
    "STEP_SKIPPED_NONFINITE_LOSS",
    "STEP_SKIPPED_OVER_LIMIT",
    "STEP_SKIPPED_NONFINITE_GRADIENT",
)
"""Events whose files are those of the bad examples."""

SPIKE_STEPS = 9
"""A spike must show in the median of this many steps: a single batch may just be hard."""

ADAM_BETA2 = {"adam": 0.999, "adamw": 0.999, "schedule_free": 0.999}
"""Default decay rate of the second moment, by the recipe's name of the optimizer."""


def consecutive_faults(series: Series) -> Finding | None:
    """Find three or more steps in a row that were skipped because of a fault."""
    faults = np.isin(series.outcomes, FAULT_OUTCOMES)
    groups = episodes(faults, max_gap=1)
    if not groups:
        return None
    first, last = max(groups, key=lambda group: group[1] - group[0])
    n_steps = last - first + 1
    if n_steps < 3:
        return None
    outcome, _ = Counter(series.outcomes[first : last + 1].tolist()).most_common(1)[0]
    at_end = last == len(series) - 1
    steps = series.steps["step"]
    advice, key = ADVICE.get(outcome, ADVICE["nonfinite_loss"])
    has_files = any(event.get("files") for event in series.events if steps[first] <= event["step"] <= steps[last])
    # NaN in every batch, and no example to blame: the weights themselves no longer work.
    if at_end and outcome.startswith("nonfinite") and not has_files:
        advice = "No file causes these faults, so the weights do. Start again with a lower learning rate."
        key = "optim.lr"
    return Finding(
        code="CONSECUTIVE_FAULTS",
        severity="critical" if at_end or n_steps >= 10 else "warning",
        problem=f"{n_steps} steps in a row were skipped" + (", up to the last one." if at_end else "."),
        evidence=(
            f"Steps {steps[first]:.0f} to {steps[last]:.0f}, most of them because of {outcome.replace('_', ' ')}; "
            f"{faults.sum()} of all {len(series)} steps were skipped because of a fault."
        ),
        advice=advice,
        key=key,
        steps=(int(steps[first]), int(steps[last])),
        confidence=min(1.0, 0.7 + 0.03 * n_steps),
    )


def bad_files(series: Series) -> Finding | None:
    """Find files that occur in several faults, and files that could not be used.

    A file that is in half of all examples, such as the only noise recording, is in most faults by chance.
    """
    # 1. Collect the steps of the faults of each file, and the files that were excluded during the run.
    fault_steps: dict[str, set[int]] = {}
    excluded: dict[str, int] = {}
    for event in series.events:
        code = str(event.get("code", ""))
        step = int(event["step"])
        for file in event.get("files") or ():
            if code.startswith("AUDIO_"):
                excluded[file] = step
            elif code in EXAMPLE_EVENTS:
                fault_steps.setdefault(file, set()).add(step)

    # 2. A bad file is mixed with many others. It stands out because it occurs in more faults than its partners.
    common = _common_files(series)
    repeated = {file: steps for file, steps in fault_steps.items() if file not in common and len(steps) > 1}
    most = max(map(len, repeated.values()), default=0)
    bad = {file: steps for file, steps in repeated.items() if len(steps) >= 0.6 * most}
    if not bad and not excluded:
        return None

    # 3. Name the files with most faults first.
    files = sorted(bad, key=lambda file: -len(bad[file])) + [file for file in excluded if file not in bad]
    steps = sorted({*excluded.values(), *(step for file in bad for step in bad[file])})
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    evidence = []
    if bad:
        evidence.append(f"{files[0]} was in {most} steps with a fault")
    if excluded:
        evidence.append(f"{len(excluded)} could not be used and were excluded")
    return Finding(
        code="BAD_FILES",
        severity="warning" if bad else "note",
        problem=f"There is something wrong with {', '.join(files[:3])}{more}.",
        evidence="; ".join(evidence) + ".",
        advice="Fix or remove them, or exclude them in the recipe.",
        key="data.exclude",
        steps=(steps[0], steps[-1]),
        confidence=0.8 if bad else 1.0,
    )


def _common_files(series: Series) -> set[str]:
    """Return the files that are in half of the sampled examples or more."""
    counts: Counter[str] = Counter()
    n_examples = 0
    for items in series.sampled.items:
        for item in items:
            counts.update(set(item.get("item", {}).get("files", ())))
            n_examples += 1
    return {file for file, count in counts.items() if count >= 0.5 * n_examples}


def loss_spike(series: Series) -> Finding | None:
    """Find a loss far above its recent level for several steps, and report whether it recovered.

    A spike is a median of nine steps that exceeds the median of the hundred steps before by 6 dB and by six times
    their median absolute deviation. One that recovered over 1,000 steps ago is only a note.
    """
    # 1. Compare the median of the next steps with that of the steps before.
    trained = np.flatnonzero(series.trained)
    if len(trained) < 50:
        return None
    loss_db = series.loss_to_db()[trained]
    steps = series.steps["step"][trained]
    level, deviation = rolling_median(loss_db)
    padded = np.concatenate([loss_db, np.full(SPIKE_STEPS, np.nan)])
    next_level, _ = rolling_median(padded, window=SPIKE_STEPS, min_count=SPIKE_STEPS // 2 + 1)
    next_level = next_level[SPIKE_STEPS:]
    rise = np.where(np.isfinite(next_level), next_level - level, -np.inf)
    spikes = episodes(rise > np.maximum(6.0, 6 * deviation), max_gap=50)
    if not spikes:
        return None

    # 2. Report the longest one; among equals the highest.
    first, last = max(spikes, key=lambda spike: (spike[1] - spike[0], finite_max(rise[spike[0] : spike[1] + 1])))
    height = finite_max(rise[first : last + 1])

    # 3. It has recovered if the next hundred steps are at the old level again. That takes 20 steps to tell.
    after = loss_db[last + SPIKE_STEPS : last + SPIKE_STEPS + 100]
    recovered: bool | None = None
    if len(after) >= 20:
        recovered = bool(finite_median(after) - level[first] < max(1.0, 2 * deviation[first]))
    if recovered is None:
        fate = "It is too early to tell whether it recovers"
    else:
        fate = "It recovered" if recovered else "It has not recovered"
    is_old = steps[-1] - steps[last] > 1000
    return Finding(
        code="LOSS_SPIKE",
        severity="critical" if recovered is False else "note" if recovered and is_old else "warning",
        problem=f"The loss jumped by {height:.1f} dB at step {steps[first]:.0f}. {fate}.",
        evidence=(
            f"It was {level[first]:.1f} dB before, with a median deviation of {deviation[first]:.1f} dB, and up to "
            f"{finite_max(loss_db[first : last + 1]):.1f} dB in steps {steps[first]:.0f} to {steps[last]:.0f}; "
            f"number of spikes: {len(spikes)}."
        ),
        advice=(
            "Start a new run from a checkpoint before the spike (model.init), with a lower learning rate."
            if recovered is False
            else "If it happens again, lower the learning rate."
        ),
        key="optim.lr",
        steps=(int(steps[first]), int(steps[last])),
        confidence=0.9 if last > first else 0.6,
    )


def adam_second_moment(series: Series) -> Finding | None:
    """Find a gradient so large that it inflated Adam's second moment and so shortened the steps after it.

    After a gradient ``r`` times as large as usual, steps are shorter by a factor of ``sqrt(1 + (1 - beta2) r**2)``.
    The effect fades after ``log((1 - beta2) r**2) / -log(beta2)`` steps.
    """
    # 1. Find beta2: the recipe's, or the default of the optimizer.
    beta2 = ADAM_BETA2.get(str(series.recipe_value("optim.name", "adam")))
    betas = series.recipe_value("optim.betas")
    if beta2 and isinstance(betas, list) and len(betas) == 2:
        beta2 = float(betas[1])
    trained = np.flatnonzero(series.trained)
    if beta2 is None or not 0 < beta2 < 1 or not len(trained):
        return None

    # 2. Compute by how much each gradient inflated the second moment, relative to its usual value.
    norm = series.steps["clipped_grad_norm"][trained]
    steps = series.steps["step"][trained]
    usual_norm, _ = rolling_median(norm)
    inflation = (1 - beta2) * np.square(norm / np.maximum(usual_norm, 1e-30))
    # In the first 100 steps Adam's bias correction dominates.
    inflation = np.where(np.isfinite(inflation) & (steps > 100), inflation, 0.0)

    # 3. Report the largest one that still has an effect, or else the largest one. At 3, steps are half as long.
    steps_left = np.log(np.maximum(inflation, 1.0)) / -math.log(beta2) - (series.last_step - steps)
    active = np.where(steps_left > 0, inflation, 0.0)
    index = int(active.argmax()) if active.max() >= 3 else int(inflation.argmax())
    if inflation[index] < 3:
        return None
    factor = math.sqrt(1 + inflation[index])
    n_steps = math.ceil(math.log(inflation[index]) / -math.log(beta2))
    n_left = int(steps[index]) + n_steps - series.last_step
    duration = f"for {n_left} more steps" if n_left > 0 else f"for {n_steps} steps"
    return Finding(
        code="ADAM_SECOND_MOMENT",
        severity="warning" if n_left > 0 else "note",
        problem=f"One large gradient made Adam's steps {factor:.1f} times as short, {duration}.",
        evidence=(
            f"At step {steps[index]:.0f} Adam received a gradient norm of {norm[index]:.3g}, "
            f"{norm[index] / usual_norm[index]:.0f} times the usual {usual_norm[index]:.3g}; with beta2 = {beta2:g} "
            f"its square fades in {n_steps} steps."
        ),
        advice="Clip closer to the usual norm: autoclip with a lower percentile, or fixed with a lower max_norm.",
        key="clip.name",
        steps=(int(steps[index]), int(steps[index]) + n_steps),
        confidence=0.9,
    )


def ranks_differ(series: Series) -> Finding | None:
    """Report processes whose weights became different."""
    events = [event for event in series.events if event.get("code") == "RANKS_DIFFER"]
    if not events:
        return None
    step = int(events[-1]["step"])
    parameter = events[-1].get("evidence", {}).get("first", "unknown")
    return Finding(
        code="RANKS_DIFFER",
        severity="critical",
        problem="The processes do not have the same weights.",
        evidence=f"At step {step} they differed, first in {parameter}; the run ended there.",
        advice=(
            "Resume from the last checkpoint (--resume). Weights differ if a model changes them outside of the "
            "optimizer, or draws random numbers independently in each process."
        ),
        key="",
        steps=(int(events[0]["step"]), step),
        confidence=1.0,
    )
