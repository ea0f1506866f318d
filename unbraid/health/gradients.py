"""Rules on gradients: norms, clipping, the learning rate by what it does to the weights, fp16's scale."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from unbraid.fault_advice import ADVICE
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import highest, middle, usual
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray

RECENT = 1000
LIKE_ADAM = ("adam", "adamw", "muon", "schedule_free")
"""Optimizers whose steps have the size of the learning rate, whatever the gradient's."""


def norm_spikes(series: Series) -> Finding | None:
    """Gradients ten times as long as usual, several times in a thousand steps; or once a hundred times."""
    trained = np.flatnonzero(series.trained)[-10 * RECENT :]
    steps = series.of_step["step"][trained]
    size = np.log10(np.maximum(series.of_step["grad_norm"][trained], 1e-30))
    median, spread = usual(size)
    above = np.where(np.isfinite(median), size - median, 0.0)
    spikes = np.flatnonzero(above > np.maximum(1.0, 8 * np.nan_to_num(spread)))
    if not len(spikes):
        return None
    often = [np.sum((steps[spikes] > steps[one] - RECENT) & (steps[spikes] <= steps[one])) for one in spikes]
    worst = spikes[above[spikes].argmax()]
    if max(often) < 3 and above[worst] < 2:
        return None
    got = series.of_step["clipped_grad_norm"][trained]
    cut = bool((got[spikes] <= 3 * middle(got)).all())
    return Finding(
        code="NORM_SPIKES",
        severity="note" if cut else "warning",
        what=f"The gradient was {10 ** above[worst]:.0f} times as long as usual at step {steps[worst]:.0f}.",
        why=(
            f"{len(spikes)} steps had ten times the usual norm or more, up to {max(often)} within {RECENT} steps; "
            f"a norm of {10 ** size[worst]:.3g} where {10 ** median[worst]:.3g} was usual."
        ),
        advice=(
            "They were clipped; if they come with the same files, look at those."
            if cut
            else "Clip closer to what is usual; if they come with the same files, look at those."
        ),
        key="clip.name",
        steps=(int(steps[spikes[0]]), int(steps[spikes[-1]])),
        confidence=0.8,
    )


def clip_is_the_rate(series: Series) -> Finding | None:
    """A fixed limit that nearly every gradient is cut to, or that none ever reaches."""
    trained = np.flatnonzero(series.trained)[-RECENT:]
    if series.said("clip.name", "fixed") != "fixed" or len(trained) < 500:
        return None
    clipped = series.of_step["clipped"][trained]
    if not np.isfinite(clipped).any():
        return None
    share = float(clipped[np.isfinite(clipped)].mean())
    limit, norm = middle(series.of_step["max_norm"][trained]), middle(series.of_step["grad_norm"][trained])
    span = int(series.of_step["step"][trained[0]]), int(series.of_step["step"][trained[-1]])
    if 0.001 <= share <= 0.9:
        return None
    always = share > 0.9
    how = "Raise the limit" if always else "If it is to catch spikes, lower the limit"
    return Finding(
        code="CLIP_IS_THE_RATE" if always else "CLIP_IDLE",
        severity="note",
        what="Nearly every gradient is clipped: the clip is your learning rate." if always else "The clip never acts.",
        why=(
            f"{share:.1%} of the last {len(trained)} gradients were clipped to {limit:g}; "
            f"their median norm is {norm:.3g}."
        ),
        advice=f"{how} to about {2 * norm:.2g}, or let it follow the gradients (autoclip).",
        key="clip.max_norm",
        steps=span,
        confidence=0.9,
    )


def learning_rate(series: Series) -> Finding | None:
    """How far a step moves the weights, as a share of them: the norm of the gradient does not tell.

    Around 1e-3 is usual with Adam and its like: 2e-3 in a run that went well, 1e-2 at thirty times its learning rate.
    Above 5e-3 it is too much where validation says so as well, below 3e-5 too little where validation gains nothing.
    What counts are the steps at the full learning rate.
    """
    sampled, full = series.sampled, series.of_step["step"][series.at_full_rate]
    at_full = np.isin(sampled.step, full)
    if at_full.sum() < 5 or not sampled.blocks or series.said("optim.name", "adam") not in LIKE_ADAM:
        return None
    ratio = middle(np.array([middle(row) for row in sampled.ratios[at_full]]))
    span = int(sampled.step[at_full][0]), int(sampled.step[at_full][-1])
    rate = highest(series.of_step["lr"])
    scores = series.of_validation["si_sdri"][np.isfinite(series.of_validation["si_sdri"])]
    learnt = len(scores) > 0 and scores.max() >= 1 and scores[-1] > scores.max() - 1
    gains = len(scores) > 1 and scores[-1] > max(0.0, scores[0] + 0.3)
    figures = (
        f"A step moves the weights by {ratio:.1e} of themselves (median over blocks, steps {span[0]} to {span[1]}); "
        "around 1e-3 is usual."
    )
    if ratio > 2e-2 or (ratio > 5e-3 and len(scores) and not learnt):
        return Finding(
            code="LR_TOO_HIGH",
            severity="critical",
            what="The learning rate is too high.",
            why=(figures + _scores(scores)),
            advice=f"Divide it by {max(3.0, ratio / 2e-3):.0f}: about {rate / max(3.0, ratio / 2e-3):.1g}.",
            key="optim.lr",
            steps=span,
            confidence=0.9 if ratio > 2e-2 else 0.7,
        )
    if ratio < 3e-5 and not gains and not learnt:
        return Finding(
            code="LR_TOO_LOW",
            severity="warning",
            what="The learning rate is too low.",
            why=(figures + _scores(scores)),
            advice=f"Multiply it by {min(1000.0, 5e-4 / max(ratio, 1e-9)):.0f}, in a few steps.",
            key="optim.lr",
            steps=span,
            confidence=0.8,
        )
    return None


def _scores(scores: FloatArray) -> str:
    return f" Validation came to {highest(scores):+.2f} dB at best and is at {scores[-1]:+.2f}." if len(scores) else ""


def first_blocks(series: Series) -> Finding | None:
    """Gradients that vanish or explode on their way back to the first of many blocks alike."""
    sampled = series.sampled
    if len(sampled.step) < 5:
        return None
    squares = np.square(sampled.norms[-10:])
    worst: tuple[float, str, int] = (0.0, "", 0)
    for stack, layers in _stacks(sampled.blocks).items():
        if len(layers) >= 3:
            first, last = (np.sqrt(squares[:, layers[number]].sum(1)) for number in (min(layers), max(layers)))
            moved = (first > 0) & (last > 0)  # a block that is not trained has none
            ratio = middle(np.log10(first[moved] / last[moved]))
            if np.isfinite(ratio) and abs(ratio) > abs(worst[0]):
                worst = ratio, stack, len(layers)
    ratio, stack, n = worst
    if abs(ratio) < 3:
        return None
    vanishing = ratio < 0
    return Finding(
        code=("GRADIENTS_VANISH" if vanishing else "GRADIENTS_EXPLODE"),
        severity="warning",
        what=f"Gradients {'vanish' if vanishing else 'explode'} on their way to the first blocks of {stack}.",
        why=(
            f"The first of {n} blocks has {10**ratio:.1e} times the gradient of the last (median of the last samples)."
        ),
        advice=(
            "Put a norm or a residual connection between the blocks, or take fewer; adaptive clipping acts "
            "block by block."
        ),
        key="",
        steps=(int(sampled.step[-10:][0]), int(sampled.step[-1])),
        confidence=0.8,
    )


def _stacks(blocks: Sequence[str]) -> dict[str, dict[int, list[int]]]:
    """Layers that follow each other: the places of the blocks in each of them, by the stack's name and their number.

    A block in a stack inside another belongs to both; the two directions of a recurrent layer are stacks of their own.
    """
    stacks: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, name in enumerate(blocks):
        words = name.split(".")
        for depth, word in enumerate(words):
            if found := re.match(r"(.*?)(\d+)(_reverse)?$", word):
                stack = ".".join([*words[:depth], found[1] + (found[3] or "")]).rstrip(".")
                stacks[stack][int(found[2])].append(place)
    return stacks


def loss_scale_sinks(series: Series) -> Finding | None:
    """fp16's scale going down and down: something overflows at any scale."""
    scale, steps = series.of_step["loss_scale"], series.of_step["step"]
    top = highest(scale)
    if not top > 1 or not scale[-1] <= top / 256:
        return None
    overflows = int((series.outcome == "fp16_overflow").sum())
    return Finding(
        code="LOSS_SCALE_SINKS",
        severity="critical" if scale[-1] < 4 else "warning",
        what="fp16 overflows again and again.",
        why=f"The loss scale sank from {top:g} to {scale[-1]:g} in {overflows} overflows.",
        advice=ADVICE["fp16_overflow"].words,
        key=ADVICE["fp16_overflow"].key,
        steps=(int(steps[np.flatnonzero(scale == top)[-1]]), int(steps[-1])),
        confidence=0.95,
    )
