"""Rules on faults: steps left out, files behind them, spikes and what they leave in Adam's memory."""

import math
from collections import Counter

import numpy as np

from unbraid.fault_advice import ADVICE
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import episodes, highest, middle, usual
from unbraid.health.series import Series
from unbraid.records import FAULT_OUTCOMES

OF_EXAMPLES = (
    "STEP_RESCUED",
    "STEP_SKIPPED_NONFINITE_LOSS",
    "STEP_SKIPPED_OVER_LIMIT",
    "STEP_SKIPPED_NONFINITE_GRADIENT",
)
"""Events whose files are those of the bad examples."""

SUSTAINED = 9
"""Steps that must be high together: a single batch may be hard."""

ADAM_BETA2 = {"adam": 0.999, "adamw": 0.999, "schedule_free": 0.999}


def faults_in_a_row(series: Series) -> Finding | None:
    """Steps left out one after the other."""
    faults = np.isin(series.outcome, FAULT_OUTCOMES)
    runs = episodes(faults, gap=1)
    if not runs:
        return None
    first, last = max(runs, key=lambda run: run[1] - run[0])
    n = last - first + 1
    if n < 3:
        return None
    outcome, _ = Counter(series.outcome[first : last + 1].tolist()).most_common(1)[0]
    still = last == len(series) - 1
    advice, key = ADVICE.get(outcome, ADVICE["nonfinite_loss"])
    steps = series.of_step["step"]
    named = any(event.get("files") for event in series.events if steps[first] <= event["step"] <= steps[last])
    if still and outcome.startswith("nonfinite") and not named:
        advice, key = (
            "No file is behind them, so that the weights are: begin again with a lower learning rate.",
            "optim.lr",
        )
    return Finding(
        code="FAULTS_IN_A_ROW",
        severity="critical" if still or n >= 10 else "warning",
        what=(f"{n} steps in a row were left out" + (", and it goes on." if still else ".")),
        why=(
            f"Steps {steps[first]:.0f} to {steps[last]:.0f}, most of them by {outcome.replace('_', ' ')}; "
            f"{faults.sum()} of all {len(series)} steps were left out by a fault."
        ),
        advice=advice,
        key=key,
        steps=(int(steps[first]), int(steps[last])),
        confidence=min(1.0, 0.7 + 0.03 * n),
    )


def bad_files(series: Series) -> Finding | None:
    """Files that stand behind several faults, or that were set aside.

    A file that half of all examples hold, as a single noise, says nothing by being there.
    """
    behind: dict[str, set[int]] = {}
    aside: dict[str, int] = {}
    for event in series.events:
        code, step = str(event.get("code", "")), int(event["step"])
        for file in event.get("files") or ():
            if code.startswith("AUDIO_"):
                aside[file] = step
            elif code in OF_EXAMPLES:
                behind.setdefault(file, set()).add(step)
    usual_files = _held_by_half(series)
    suspects = {file: steps for file, steps in behind.items() if file not in usual_files and len(steps) > 1}
    most = max(map(len, suspects.values()), default=0)
    guilty = {file: steps for file, steps in suspects.items() if len(steps) >= 0.6 * most}
    if not guilty and not aside:
        return None
    named = [*sorted(guilty, key=lambda file: -len(guilty[file])), *(file for file in aside if file not in guilty)]
    steps = sorted({*aside.values(), *(step for found in guilty.values() for step in found)})
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    why = [f"{named[0]} was in {most} steps with a fault"] if guilty else []
    why += [f"{len(aside)} could not be used and were set aside"] if aside else []
    return Finding(
        code="BAD_FILES",
        severity="warning" if guilty else "note",
        what=f"There is something wrong with {', '.join(named[:3])}{more}.",
        why="; ".join(why) + ".",
        advice="Mend or remove them, or name them as left out.",
        key="data.exclude",
        steps=(steps[0], steps[-1]),
        confidence=0.8 if guilty else 1.0,
    )


def _held_by_half(series: Series) -> set[str]:
    """Files in half or more of the examples looked at."""
    held = [set(item.get("item", {}).get("files", ())) for items in series.sampled.items for item in items]
    counts = Counter(file for files in held for file in files)
    return {file for file, n in counts.items() if n >= 0.5 * len(held)}


def loss_spike(series: Series) -> Finding | None:
    """The loss far above what was usual just before for several steps, and whether it came back.

    The median of nine steps above that of the hundred before by 6 dB, and by six times their median distance from it.
    One that came back and is long past is no more than a note.
    """
    trained = np.flatnonzero(series.trained)
    if len(trained) < 50:
        return None
    level, steps = series.level()[trained], series.of_step["step"][trained]
    median, spread = usual(level)
    padded = np.concatenate([level, np.full(SUSTAINED, np.nan)])
    ahead = usual(padded, n_before=SUSTAINED, at_least=SUSTAINED // 2 + 1)[0][SUSTAINED:]
    above = np.where(np.isfinite(ahead), ahead - median, -np.inf)
    found = episodes(above > np.maximum(6.0, 6 * spread), gap=50)
    if not found:
        return None
    first, last = max(found, key=lambda episode: (episode[1] - episode[0], highest(above[episode[0] : episode[1] + 1])))
    peak = highest(above[first : last + 1])
    after = level[last + SUSTAINED : last + SUSTAINED + 100]
    back = bool(middle(after) - median[first] < max(1.0, 2 * spread[first])) if len(after) >= 20 else None
    past = bool(back) and steps[-1] - steps[last] > 1000
    fate = {True: "It came back", False: "It has not come back", None: "Whether it comes back is not known yet"}[back]
    return Finding(
        code="LOSS_SPIKE",
        severity="critical" if back is False else "note" if past else "warning",
        what=f"The loss jumped by {peak:.1f} dB at step {steps[first]:.0f}. {fate}.",
        why=(
            f"It was {median[first]:.1f} dB before, give or take {spread[first]:.1f}, and up to "
            f"{highest(level[first : last + 1]):.1f} dB in steps {steps[first]:.0f} to {steps[last]:.0f}; "
            f"{len(found)} such episodes in all."
        ),
        advice=(
            "Begin a new run from a checkpoint before it (model.init), with a lower learning rate."
            if back is False
            else "If it comes again, lower the learning rate."
        ),
        key="optim.lr",
        steps=(int(steps[first]), int(steps[last])),
        confidence=0.9 if last > first else 0.6,
    )


def adam_remembers(series: Series) -> Finding | None:
    """A gradient so long that Adam's mean of squares hides later ones, and for how many steps.

    Where one is ``r`` times as long as is usual, steps are ``sqrt(1 + (1 - beta2) r**2)`` times as short after it, and
    it is forgotten after ``log((1 - beta2) r**2) / -log(beta2)`` steps.
    """
    beta2 = ADAM_BETA2.get(str(series.said("optim.name", "adam")))
    betas = series.said("optim.betas")
    beta2 = float(betas[1]) if beta2 and isinstance(betas, list) and len(betas) == 2 else beta2
    trained = np.flatnonzero(series.trained)
    if beta2 is None or not 0 < beta2 < 1 or not len(trained):
        return None
    norm, steps = series.of_step["clipped_grad_norm"][trained], series.of_step["step"][trained]
    median, _ = usual(norm)
    share = (1 - beta2) * np.square(norm / np.maximum(median, 1e-30))
    share = np.where(np.isfinite(share) & (steps > 100), share, 0.0)  # before that Adam's own correction rules
    left_of_each = np.log(np.maximum(share, 1.0)) / -math.log(beta2) - (series.last_step - steps)
    remembered = np.where(left_of_each > 0, share, 0.0)
    place = int(remembered.argmax()) if remembered.max() >= 3 else int(share.argmax())
    if share[place] < 3:  # steps half as long
        return None
    shorter, n_steps = math.sqrt(1 + share[place]), math.ceil(math.log(share[place]) / -math.log(beta2))
    left = int(steps[place]) + n_steps - series.last_step
    return Finding(
        code="ADAM_REMEMBERS",
        severity="warning" if left > 0 else "note",
        what=(
            f"One gradient made Adam's steps {shorter:.1f} times as short"
            + (f", for {left} more steps." if left > 0 else f" for {n_steps} steps.")
        ),
        why=(
            f"At step {steps[place]:.0f} it got a norm of {norm[place]:.3g}, {norm[place] / median[place]:.0f} "
            f"times the usual {median[place]:.3g}; with beta2 = {beta2:g} its square fades in {n_steps} steps."
        ),
        advice="Clip closer to what is usual: autoclip with a lower percentile, or fixed with a lower max_norm.",
        key="clip.name",
        steps=(int(steps[place]), int(steps[place]) + n_steps),
        confidence=0.9,
    )


def ranks_differ(series: Series) -> Finding | None:
    """Processes that came to hold different weights."""
    found = [event for event in series.events if event.get("code") == "RANKS_DIFFER"]
    if not found:
        return None
    step, first = int(found[-1]["step"]), found[-1].get("evidence", {}).get("first", "unknown")
    return Finding(
        code="RANKS_DIFFER",
        severity="critical",
        what="The processes do not hold the same weights.",
        why=f"At step {step} they differed, first in {first}; the run ended there.",
        advice=(
            "Go on from the last checkpoint (--resume); a model that changes its weights outside of the optimizer, or "
            "draws numbers of its own on each process, makes them differ."
        ),
        key="",
        steps=(int(found[0]["step"]), step),
        confidence=1.0,
    )
