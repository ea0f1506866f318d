"""Rules on what the model gives: dead or equal outputs, the mixture again, a source that never comes."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unbraid.columns import rows_of
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import highest, middle
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray

SILENT_DB, BELOW_LOUDEST_DB = -180.0, 80.0
"""An output counts as silent below either: a loss that ignores level lets all of them be faint."""

SILENT_SOURCE_DB = -100.0
LAST_SAMPLES = 5


def _last_items(series: Series) -> Iterator[Mapping[str, Any]]:
    for items in series.sampled.items[-LAST_SAMPLES:]:
        yield from items


def _span(series: Series) -> tuple[int, int]:
    steps = series.sampled.step[-LAST_SAMPLES:]
    return int(steps[0]), int(steps[-1])


def dead_output(series: Series) -> Finding | None:
    """An output that is silent whatever the mixture."""
    levels = [item["estimate_levels_db"] for item in _last_items(series) if item.get("estimate_levels_db")]
    if len(series.sampled.step) < 3 or len(levels) < 3 or series.said("loss.inactive_weight", 0):
        return None
    table = rows_of(levels)
    floor = np.maximum(SILENT_DB, table.max(1, keepdims=True) - BELOW_LOUDEST_DB)
    dead = np.flatnonzero((table < floor).all(0))
    if not len(dead):
        return None
    listed = " and ".join(str(place + 1) for place in dead)
    return Finding(
        code="DEAD_OUTPUT",
        severity="critical",
        what=f"Output {listed} of the model is silent whatever the mixture.",
        why=(
            f"In the last {len(levels)} examples looked at its level was {table[:, dead].max():.0f} dB at most, "
            f"the loudest output's {table.max():.0f} dB."
        ),
        advice="Begin again with another seed or a lower learning rate: a loss of ratios has no gradient at silence.",
        key="data.seed",
        steps=_span(series),
        confidence=0.95,
    )


def collapsed_outputs(series: Series) -> Finding | None:
    """Outputs that are the same sound."""
    similarity = np.array([item["similarity"] for item in _last_items(series) if item.get("similarity") is not None])
    n_full = int(series.at_full_rate.sum())
    if len(series.sampled.step) < LAST_SAMPLES or n_full < 300 or not middle(similarity) > 0.99:
        return None
    return Finding(
        code="OUTPUTS_ALIKE",
        severity="critical" if n_full > 2000 else "warning",
        what="The outputs are the same sound.",
        why=(
            f"In the last {len(similarity)} examples looked at, two outputs had a correlation of "
            f"{middle(similarity):.3f} (median)."
        ),
        advice=(
            "Begin again with a lower learning rate or another seed; see that the loss takes the best order "
            "(permutation)."
        ),
        key="loss.assign",
        steps=_span(series),
        confidence=0.9,
    )


def output_is_mixture(series: Series) -> Finding | None:
    """Nothing is separated: the outputs are as far from the sources as the mixture is."""
    scores, steps = series.of_validation["si_sdri"], series.of_validation["step"]
    if len(scores) < 3 or steps[-1] < 500 or not (np.abs(scores[-3:]) < 0.3).all() or not series.trains_signals:
        return None
    return Finding(
        code="OUTPUT_IS_MIXTURE",
        severity="warning",
        what="Nothing is separated yet: the outputs are as good as the mixture itself.",
        why=f"SI-SDRi was {', '.join(f'{score:+.2f}' for score in scores[-3:])} dB in the last three validations.",
        advice="See that the learning rate is neither too low nor too high, and that the loss takes the best order.",
        key="optim.lr",
        steps=(int(steps[-3]), int(steps[-1])),
        confidence=0.8,
    )


def source_left_behind(series: Series) -> Finding | None:
    """One source that got no better while another did."""
    course = series.course
    trained = course.si_sdr[course.trained]
    if trained.shape[1] < 2 or len(trained) < 600 or not series.whole:
        return None
    early, late = _by_source(trained[:200]), _by_source(trained[-500:])
    gain = late - early
    known = np.flatnonzero(np.isfinite(gain))  # of a source that never sounds nothing is known
    if len(known) < 2:
        return None
    worst, best = int(known[gain[known].argmin()]), int(known[gain[known].argmax()])
    if gain[best] < 3 or gain[worst] > 0.5 or late[worst] > late[best] - 6:
        return None
    return Finding(
        code="SOURCE_LEFT_BEHIND",
        severity="critical",
        what=f"Source {worst + 1} is never separated.",
        why=(
            f"Its SI-SDR went from {early[worst]:.1f} to {late[worst]:.1f} dB, that of source {best + 1} from "
            f"{early[best]:.1f} to {late[best]:.1f} dB."
        ),
        advice="See whether its files are silent or belong to other mixtures.",
        key="data.path",
        steps=(int(course.of_step["step"][0]), series.last_step),
        confidence=0.85,
    )


def foreign_targets(series: Series) -> Finding | None:
    """Targets that have nothing in common with what comes out, from the first step on."""
    course = series.course
    trained = course.si_sdr[course.trained]
    if not trained.shape[1] or series.at_full_rate.sum() < 300 or not series.whole:
        return None
    early, late = (highest(_by_source(part)) for part in (trained[:100], trained[-100:]))
    moved = series.sampled.ratios[np.isfinite(series.sampled.ratios)]
    if not (early < -15 and late < -15) or (len(moved) and np.median(moved) < 1e-4):
        return None
    if dead_output(series) is not None:  # which has nothing in common with any target either
        return None
    return Finding(
        code="FOREIGN_TARGETS",
        severity="critical",
        what="The targets have nothing in common with the mixtures.",
        why=(
            f"The best source had a median SI-SDR of {early:.1f} dB over the first hundred steps and {late:.1f} over "
            "the last; an output that is the mixture itself would have about 0."
        ),
        advice="See that each target belongs to its mixture: names, order and start of the files.",
        key="data.path",
        steps=(int(course.of_step["step"][0]), series.last_step),
        confidence=0.9,
    )


def silent_sources(series: Series) -> Finding | None:
    """Examples in which a source is silent, where nobody asked for such."""
    levels = [
        item["source_levels_db"] for items in series.sampled.items for item in items if item.get("source_levels_db")
    ]
    if len(levels) < 20 or series.said("data.silent") == "keep" or series.said("loss.inactive_weight", 0):
        return None
    table = rows_of(levels)
    silent = table < SILENT_SOURCE_DB
    share, of_each = float(silent.any(1).mean()), silent.mean(0)
    if share < 0.1:
        return None
    return Finding(
        code="SILENT_SOURCES",
        severity="warning",
        what="In many examples a source is silent.",
        why=(
            f"In {share:.0%} of {len(table)} examples looked at; source {of_each.argmax() + 1} most often "
            f"({of_each.max():.0%})."
        ),
        advice="See whether files are empty, or belong to other mixtures.",
        key="data.path",
        steps=(int(series.sampled.step[0]), int(series.sampled.step[-1])),
        confidence=0.95,
    )


def foreign_sum(series: Series) -> Finding | None:
    """Sources that do not add up to the mixture, where no noise was asked for."""
    beside = np.array(
        [
            item["source_residual_db"]
            for items in series.sampled.items
            for item in items
            if item.get("source_residual_db") is not None
        ]
    )
    if len(beside) < 20 or series.said("data.noise") or not middle(beside) > -30:
        return None
    return Finding(
        code="FOREIGN_SUM",
        severity="warning",
        what="The sources do not add up to the mixture.",
        why=f"What the mixture holds beside them is {middle(beside):.1f} dB of it (median of {len(beside)} examples).",
        advice="See whether gain, start or files of the sources differ from those in the mixture; noise may be meant.",
        key="data.path",
        steps=(int(series.sampled.step[0]), int(series.sampled.step[-1])),
        confidence=0.9,
    )


def _by_source(values: FloatArray) -> FloatArray:
    return np.array([middle(column) for column in values.T])
