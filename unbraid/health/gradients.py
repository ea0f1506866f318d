"""Rules about gradients: norms, clipping, the size of updates, vanishing gradients, the loss scale of fp16."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from unbraid.fault_advice import ADVICE
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import finite_max, finite_median, rolling_median
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray

RECENT_STEPS = 1000

ADAPTIVE_OPTIMIZERS = ("adam", "adamw", "muon", "schedule_free")
"""Optimizers whose step size depends on the learning rate and not on the size of the gradient."""


def norm_spikes(series: Series) -> Finding | None:
    """Find gradients ten times as large as usual, three times in a thousand steps, or a hundred times once."""
    trained = np.flatnonzero(series.trained)[-10 * RECENT_STEPS :]
    steps = series.steps["step"][trained]
    # Norms vary by factors, so medians and deviations are those of the logarithm.
    log_norm = np.log10(np.maximum(series.steps["grad_norm"][trained], 1e-30))
    usual, deviation = rolling_median(log_norm)
    excess = np.where(np.isfinite(usual), log_norm - usual, 0.0)
    spikes = np.flatnonzero(excess > np.maximum(1.0, 8 * np.nan_to_num(deviation)))
    if not len(spikes):
        return None
    n_recent = [int(np.sum((steps[spikes] > step - RECENT_STEPS) & (steps[spikes] <= step))) for step in steps[spikes]]
    worst = spikes[excess[spikes].argmax()]
    if max(n_recent) < 3 and excess[worst] < 2:
        return None
    clipped_norm = series.steps["clipped_grad_norm"][trained]
    were_clipped = bool((clipped_norm[spikes] <= 3 * finite_median(clipped_norm)).all())
    return Finding(
        code="NORM_SPIKES",
        severity="note" if were_clipped else "warning",
        problem=f"The gradient norm was {10 ** excess[worst]:.0f} times the usual one at step {steps[worst]:.0f}.",
        evidence=(
            f"{len(spikes)} steps had ten times the usual norm or more, up to {max(n_recent)} within {RECENT_STEPS} "
            f"steps; the largest norm was {10 ** log_norm[worst]:.3g}, where {10 ** usual[worst]:.3g} was usual."
        ),
        advice=(
            "They were clipped. If they always occur with the same files, check those."
            if were_clipped
            else "Clip closer to the usual norm. If they always occur with the same files, check those."
        ),
        key="clip.name",
        steps=(int(steps[spikes[0]]), int(steps[spikes[-1]])),
        confidence=0.8,
    )


def clipping(series: Series) -> Finding | None:
    """Find a fixed max_norm that clips nearly every gradient, or none."""
    trained = np.flatnonzero(series.trained)[-RECENT_STEPS:]
    if series.recipe_value("clip.name", "fixed") != "fixed" or len(trained) < 500:
        return None
    clipped = series.steps["clipped"][trained]
    if not np.isfinite(clipped).any():
        return None
    share = float(clipped[np.isfinite(clipped)].mean())
    if 0.001 <= share <= 0.9:
        return None
    max_norm = finite_median(series.steps["max_norm"][trained])
    norm = finite_median(series.steps["grad_norm"][trained])
    mostly_clipped = share > 0.9
    action = "Raise max_norm" if mostly_clipped else "If clipping is meant to catch spikes, lower max_norm"
    return Finding(
        code="MOST_STEPS_CLIPPED" if mostly_clipped else "CLIPPING_INACTIVE",
        severity="note",
        problem=(
            "Nearly every gradient is clipped, so max_norm acts as a second learning rate."
            if mostly_clipped
            else "Clipping never takes effect."
        ),
        evidence=(
            f"{share:.1%} of the last {len(trained)} gradients were clipped to {max_norm:g}; "
            f"their median norm is {norm:.3g}."
        ),
        advice=f"{action} to about {2 * norm:.2g}, or use a threshold that adapts to the gradients (autoclip).",
        key="clip.max_norm",
        steps=(int(series.steps["step"][trained[0]]), int(series.steps["step"][trained[-1]])),
        confidence=0.9,
    )


def learning_rate(series: Series) -> Finding | None:
    """Compare the size of updates with the size of the weights; the gradient norm says nothing about the step size.

    With Adam and similar optimizers an update of about 1e-3 of the weights is usual: it was 2e-3 in a run that went
    well, and 1e-2 at thirty times its learning rate. Above 5e-3 it is too large if validation is bad as well; below
    3e-5 it is too small if validation does not improve. Only steps at the full learning rate count.
    """
    # 1. Compute the median update ratio over blocks and steps.
    sampled = series.sampled
    at_full_lr = np.isin(sampled.step, series.steps["step"][series.at_full_lr])
    optimizer = series.recipe_value("optim.name", "adam")
    if at_full_lr.sum() < 5 or not sampled.blocks or optimizer not in ADAPTIVE_OPTIMIZERS:
        return None
    ratio = finite_median(np.array([finite_median(row) for row in sampled.update_ratios[at_full_lr]]))
    first = int(sampled.step[at_full_lr][0])
    last = int(sampled.step[at_full_lr][-1])

    # 2. Decide from validation whether the model learns: 1 dB gained and not lost again, or a rise of 0.3 dB.
    si_sdri = series.validation["si_sdri"][np.isfinite(series.validation["si_sdri"])]
    has_learned = len(si_sdri) > 0 and si_sdri.max() >= 1 and si_sdri[-1] > si_sdri.max() - 1
    improves = len(si_sdri) > 1 and si_sdri[-1] > max(0.0, si_sdri[0] + 0.3)

    # 3. Report an update ratio that does not fit.
    evidence = (
        f"An update changes the weights by {ratio:.1e} of their norm (median over blocks, steps {first} to {last}); "
        f"about 1e-3 is usual.{_validation_sentence(si_sdri)}"
    )
    if ratio > 2e-2 or (ratio > 5e-3 and len(si_sdri) and not has_learned):
        divisor = max(3.0, ratio / 2e-3)
        return Finding(
            code="LR_TOO_HIGH",
            severity="critical",
            problem="The learning rate is too high.",
            evidence=evidence,
            advice=f"Divide it by {divisor:.0f}, to about {finite_max(series.steps['lr']) / divisor:.1g}.",
            key="optim.lr",
            steps=(first, last),
            confidence=0.9 if ratio > 2e-2 else 0.7,
        )
    if ratio < 3e-5 and not improves and not has_learned:
        return Finding(
            code="LR_TOO_LOW",
            severity="warning",
            problem="The learning rate is too low.",
            evidence=evidence,
            advice=f"Multiply it by {min(1000.0, 5e-4 / max(ratio, 1e-9)):.0f}, in a few steps.",
            key="optim.lr",
            steps=(first, last),
            confidence=0.8,
        )
    return None


def _validation_sentence(si_sdri: FloatArray) -> str:
    if not len(si_sdri):
        return ""
    return f" Validation SI-SDRi was {finite_max(si_sdri):+.2f} dB at best and is now {si_sdri[-1]:+.2f} dB."


def vanishing_or_exploding(series: Series) -> Finding | None:
    """Find gradients that shrink or grow by a factor of 1,000 from the last to the first of equal blocks."""
    sampled = series.sampled
    if len(sampled.step) < 5:
        return None
    squares = np.square(sampled.grad_norms[-10:])
    worst_log_ratio = 0.0
    worst_stack = ""
    n_layers = 0
    for stack, layers in _stacks(sampled.blocks).items():
        if len(layers) < 3:
            continue
        first = np.sqrt(squares[:, layers[min(layers)]].sum(1))
        last = np.sqrt(squares[:, layers[max(layers)]].sum(1))
        has_gradient = (first > 0) & (last > 0)  # a frozen block has none
        log_ratio = finite_median(np.log10(first[has_gradient] / last[has_gradient]))
        if np.isfinite(log_ratio) and abs(log_ratio) > abs(worst_log_ratio):
            worst_log_ratio = log_ratio
            worst_stack = stack
            n_layers = len(layers)
    if abs(worst_log_ratio) < 3:
        return None
    vanishing = worst_log_ratio < 0
    return Finding(
        code="GRADIENTS_VANISH" if vanishing else "GRADIENTS_EXPLODE",
        severity="warning",
        problem=f"Gradients {'vanish' if vanishing else 'explode'} on their way to the first blocks of {worst_stack}.",
        evidence=(
            f"The gradient of the first of {n_layers} blocks is {10**worst_log_ratio:.1e} times that of the last "
            "(median of the last samples)."
        ),
        advice=(
            "Add normalization or residual connections between the blocks, or use fewer blocks; adaptive gradient "
            "clipping works block by block."
        ),
        key="",
        steps=(int(sampled.step[-10:][0]), int(sampled.step[-1])),
        confidence=0.8,
    )


def _stacks(blocks: Sequence[str]) -> dict[str, dict[int, list[int]]]:
    """Find stacks of numbered layers in the names of blocks: ``{stack: {layer number: indices of its blocks}}``.

    A block in a nested stack belongs to both stacks. The two directions of a recurrent layer are separate stacks.
    """
    stacks: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, name in enumerate(blocks):
        parts = name.split(".")
        for depth, part in enumerate(parts):
            # "blocks.3" is layer 3 of "blocks"; "lstm.l2_reverse" is layer 2 of "lstm.l_reverse".
            match = re.match(r"(.*?)(\d+)(_reverse)?$", part)
            if match:
                stack = ".".join([*parts[:depth], match[1] + (match[3] or "")]).rstrip(".")
                stacks[stack][int(match[2])].append(index)
    return stacks


def loss_scale_falling(series: Series) -> Finding | None:
    """Find a loss scale of fp16 that has fallen to 1/256: something overflows at any scale."""
    scale = series.steps["loss_scale"]
    steps = series.steps["step"]
    highest = finite_max(scale)
    if not highest > 1 or not scale[-1] <= highest / 256:
        return None
    n_overflows = int((series.outcomes == "fp16_overflow").sum())
    return Finding(
        code="LOSS_SCALE_FALLING",
        severity="critical" if scale[-1] < 4 else "warning",
        problem="fp16 overflows again and again.",
        evidence=f"The loss scale fell from {highest:g} to {scale[-1]:g} in {n_overflows} overflows.",
        advice=ADVICE["fp16_overflow"].text,
        key=ADVICE["fp16_overflow"].key,
        steps=(int(steps[np.flatnonzero(scale == highest)[-1]]), int(steps[-1])),
        confidence=0.95,
    )
