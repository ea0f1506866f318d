"""Rules about outputs and targets: silent or identical outputs, unseparated mixtures, targets that do not fit."""

import numpy as np

from unbraid.columns import padded_array
from unbraid.health.finding import Finding
from unbraid.health.rolling_median import finite_max, finite_median
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray, Row

SILENT_DB = -180.0
BELOW_LOUDEST_DB = 80.0
"""An output is silent below -180 dB or 80 dB below the loudest one; a loss that ignores level permits faint outputs."""

SILENT_SOURCE_DB = -100.0
N_LATEST = 5
"""Sampled steps whose examples show the present state of the model."""


def _latest_items(series: Series) -> list[Row]:
    return [item for items in series.sampled.items[-N_LATEST:] for item in items]


def _latest_span(series: Series) -> tuple[int, int]:
    steps = series.sampled.step[-N_LATEST:]
    return int(steps[0]), int(steps[-1])


def _sampled_span(series: Series) -> tuple[int, int]:
    return int(series.sampled.step[0]), int(series.sampled.step[-1])


def dead_output(series: Series) -> Finding | None:
    """Find an output that is silent for every mixture."""
    levels = [item["estimate_levels_db"] for item in _latest_items(series) if item.get("estimate_levels_db")]
    # With inactive_weight the loss asks for silence where a source is silent.
    if len(series.sampled.step) < 3 or len(levels) < 3 or series.recipe_value("loss.inactive_weight", 0):
        return None
    levels_db = padded_array(levels)  # (example, output)
    threshold = np.maximum(SILENT_DB, levels_db.max(1, keepdims=True) - BELOW_LOUDEST_DB)
    dead = np.flatnonzero((levels_db < threshold).all(0))
    if not len(dead):
        return None
    numbers = " and ".join(str(index + 1) for index in dead)
    return Finding(
        code="DEAD_OUTPUT",
        severity="critical",
        problem=f"Output {numbers} of the model is silent for every mixture.",
        evidence=(
            f"In the last {len(levels)} sampled examples its level was at most {levels_db[:, dead].max():.0f} dB; "
            f"that of the loudest output was {levels_db.max():.0f} dB."
        ),
        advice=(
            "Start again with another seed or a lower learning rate: a loss based on ratios has no gradient at silence."
        ),
        key="data.seed",
        steps=_latest_span(series),
        confidence=0.95,
    )


def identical_outputs(series: Series) -> Finding | None:
    """Find outputs that contain the same sound."""
    similarity = np.array([item["similarity"] for item in _latest_items(series) if item.get("similarity") is not None])
    n_full_lr = int(series.at_full_lr.sum())
    if len(series.sampled.step) < N_LATEST or n_full_lr < 300 or not finite_median(similarity) > 0.99:
        return None
    return Finding(
        code="IDENTICAL_OUTPUTS",
        severity="critical" if n_full_lr > 2000 else "warning",
        problem="The outputs contain the same sound.",
        evidence=(
            f"In the last {len(similarity)} sampled examples, two outputs had a correlation of "
            f"{finite_median(similarity):.3f} (median)."
        ),
        advice=(
            "Start again with a lower learning rate or another seed, and check that the loss uses the best assignment "
            "(permutation)."
        ),
        key="loss.assign",
        steps=_latest_span(series),
        confidence=0.9,
    )


def output_is_mixture(series: Series) -> Finding | None:
    """Find a model that does not separate: its outputs are as far from the sources as the mixture is."""
    si_sdri = series.validation["si_sdri"]
    steps = series.validation["step"]
    if len(si_sdri) < 3 or steps[-1] < 500 or not (np.abs(si_sdri[-3:]) < 0.3).all() or not series.has_signal_loss:
        return None
    last_three = ", ".join(f"{value:+.2f}" for value in si_sdri[-3:])
    return Finding(
        code="OUTPUT_IS_MIXTURE",
        severity="warning",
        problem="Nothing is separated yet: the outputs are no better than the mixture.",
        evidence=f"SI-SDRi was {last_three} dB in the last three validations.",
        advice=(
            "Check that the learning rate is neither too low nor too high, and that the loss uses the best assignment."
        ),
        key="optim.lr",
        steps=(int(steps[-3]), int(steps[-1])),
        confidence=0.8,
    )


def source_not_learned(series: Series) -> Finding | None:
    """Find a source that did not improve while another one did."""
    overview = series.overview
    si_sdr = overview.si_sdr[overview.trained]  # (step, source)
    if si_sdr.shape[1] < 2 or len(si_sdr) < 600 or not series.covers_start:
        return None
    early = _source_medians(si_sdr[:200])
    late = _source_medians(si_sdr[-500:])
    gain = late - early
    measured = np.flatnonzero(np.isfinite(gain))  # a source that is always silent has no SI-SDR
    if len(measured) < 2:
        return None
    worst = int(measured[gain[measured].argmin()])
    best = int(measured[gain[measured].argmax()])
    if gain[best] < 3 or gain[worst] > 0.5 or late[worst] > late[best] - 6:
        return None
    return Finding(
        code="SOURCE_NOT_LEARNED",
        severity="critical",
        problem=f"Source {worst + 1} is never separated.",
        evidence=(
            f"Its SI-SDR went from {early[worst]:.1f} to {late[worst]:.1f} dB, that of source {best + 1} from "
            f"{early[best]:.1f} to {late[best]:.1f} dB."
        ),
        advice="Check whether its files are silent or belong to other mixtures.",
        key="data.path",
        steps=(int(overview.steps["step"][0]), series.last_step),
        confidence=0.85,
    )


def targets_unrelated(series: Series) -> Finding | None:
    """Find targets that have nothing in common with the outputs, from the first step on."""
    overview = series.overview
    si_sdr = overview.si_sdr[overview.trained]
    if not si_sdr.shape[1] or series.at_full_lr.sum() < 300 or not series.covers_start:
        return None
    early = finite_max(_source_medians(si_sdr[:100]))
    late = finite_max(_source_medians(si_sdr[-100:]))
    if not (early < -15 and late < -15):
        return None
    # A learning rate that is far too low, or a silent output, explains such an SI-SDR as well.
    ratios = series.sampled.update_ratios[np.isfinite(series.sampled.update_ratios)]
    if (len(ratios) and np.median(ratios) < 1e-4) or dead_output(series) is not None:
        return None
    return Finding(
        code="TARGETS_UNRELATED",
        severity="critical",
        problem="The targets have nothing in common with the mixtures.",
        evidence=(
            f"The best source had a median SI-SDR of {early:.1f} dB over the first hundred steps and {late:.1f} dB "
            "over the last; the mixture itself as output would score about 0 dB."
        ),
        advice="Check that each target belongs to its mixture: file names, order and start times.",
        key="data.path",
        steps=(int(overview.steps["step"][0]), series.last_step),
        confidence=0.9,
    )


def silent_sources(series: Series) -> Finding | None:
    """Find examples with a silent source, unless the recipe asks for them."""
    levels = [
        item["source_levels_db"] for items in series.sampled.items for item in items if item.get("source_levels_db")
    ]
    if len(levels) < 20 or series.recipe_value("data.silent") == "keep":
        return None
    if series.recipe_value("loss.inactive_weight", 0):
        return None
    silent = padded_array(levels) < SILENT_SOURCE_DB  # (example, source)
    share = float(silent.any(1).mean())
    source_shares = silent.mean(0)
    if share < 0.1:
        return None
    return Finding(
        code="SILENT_SOURCES",
        severity="warning",
        problem="Many examples have a silent source.",
        evidence=(
            f"This is so in {share:.0%} of {len(levels)} sampled examples, most often for source "
            f"{source_shares.argmax() + 1} ({source_shares.max():.0%})."
        ),
        advice="Check whether files are empty, or belong to other mixtures.",
        key="data.path",
        steps=_sampled_span(series),
        confidence=0.95,
    )


def sources_do_not_sum(series: Series) -> Finding | None:
    """Find sources that do not add up to the mixture, although the recipe adds no noise."""
    residual_db = np.array(
        [
            item["source_residual_db"]
            for items in series.sampled.items
            for item in items
            if item.get("source_residual_db") is not None
        ]
    )
    if len(residual_db) < 20 or series.recipe_value("data.noise") or not finite_median(residual_db) > -30:
        return None
    return Finding(
        code="SOURCES_DO_NOT_SUM",
        severity="warning",
        problem="The sources do not add up to the mixture.",
        evidence=(
            f"The mixture minus its sources has {finite_median(residual_db):.1f} dB of the mixture's power "
            f"(median of {len(residual_db)} examples)."
        ),
        advice=(
            "Check whether gain, start time or files of the sources differ from those in the mixture. If the mixtures "
            "contain noise, ignore this."
        ),
        key="data.path",
        steps=_sampled_span(series),
        confidence=0.9,
    )


def _source_medians(si_sdr: FloatArray) -> FloatArray:
    return np.array([finite_median(column) for column in si_sdr.T])
