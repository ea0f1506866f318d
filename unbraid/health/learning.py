"""Rules about learning: training and validation curves, the schedule, filters, the order of the data."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unbraid.health.finding import Finding
from unbraid.health.rolling_median import finite_argmin, finite_max, finite_median, finite_min
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray

TREND_STEPS = 20
"""Steps on either side whose median is the trend of the loss."""


def oscillation(series: Series) -> Finding | None:
    """Find a validation loss that goes up and down by more than it improves."""
    loss_db = series.loss_to_db(series.validation["loss"])[-10:]
    steps = series.validation["step"][-10:]
    changes = np.diff(loss_db)
    if len(changes) < 5 or not np.isfinite(changes).all():
        return None
    # Pure noise changes direction two times in three, so the size of the swing has to decide as well.
    n_turns = int(np.sum(np.sign(changes[1:]) != np.sign(changes[:-1])))
    swing_db = float(np.median(np.abs(changes)))
    trend_db = abs(loss_db[-1] - loss_db[0]) / len(changes)
    if n_turns < 0.7 * (len(changes) - 1) or swing_db < max(1.0, 2 * trend_db):
        return None
    return Finding(
        code="OSCILLATION",
        severity="warning",
        problem="The validation loss goes up and down instead of improving.",
        evidence=(
            f"In the last {len(loss_db)} validations it changed direction {n_turns} times, by {swing_db:.1f} dB each "
            f"time, and went from {loss_db[0]:.2f} to {loss_db[-1]:.2f} dB."
        ),
        advice="Lower the learning rate, or average the weights (train.ema = 0.999).",
        key="optim.lr",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.8,
    )


def plateau(series: Series) -> Finding | None:
    """Find a run in which neither loss has improved for the last two fifths, at a learning rate that could do so."""
    overview = series.overview
    validation_db = overview.loss_to_db(overview.validation["loss"])
    steps = overview.validation["step"]
    lr = overview.steps["lr"]
    best = finite_argmin(validation_db)
    if best is None or len(validation_db) < 8 or not series.covers_start or not lr[-1] >= 0.2 * finite_max(lr):
        return None
    best_step = steps[best]
    # The training loss of the last fifth is compared with that of the fifth before.
    training_db = overview.loss_to_db()[overview.trained]
    progress = overview.steps["step"][overview.trained] / overview.last_step
    before = finite_median(training_db[(progress > 0.6) & (progress <= 0.8)])
    after = finite_median(training_db[progress > 0.8])
    if best_step > 0.6 * series.last_step or not after >= before - 0.1 or _measure_overfitting(series) is not None:
        return None
    return Finding(
        code="PLATEAU",
        severity="warning",
        problem="The run has stopped improving.",
        evidence=(
            f"Validation was best at step {best_step:.0f} of {series.last_step}, and the training loss went from "
            f"{before:.2f} to {after:.2f} dB over the last two fifths, at a learning rate of {lr[-1]:.1e}."
        ),
        advice="Lower the learning rate, use a larger model, or stop here.",
        key="optim.lr",
        steps=(int(best_step), series.last_step),
        confidence=0.7,
    )


def overfitting(series: Series) -> Finding | None:
    """Find a validation loss that rises while the training loss falls."""
    measured = _measure_overfitting(series)
    if measured is None:
        return None
    best_step, rise_db, fall_db = measured
    return Finding(
        code="OVERFITTING",
        severity="warning",
        problem="The model overfits its training data.",
        evidence=(
            f"Since step {best_step} the validation loss rose by {rise_db:.2f} dB while the training loss fell by "
            f"{fall_db:.2f} dB."
        ),
        advice="Use the best checkpoint. Train on more recordings, with a smaller model, or with dropout.",
        key="data.path",
        steps=(best_step, series.last_step),
        confidence=0.8,
    )


def _measure_overfitting(series: Series) -> tuple[int, float, float] | None:
    """Return the step of the best validation, the rise of the validation loss since, and the fall of the training loss.

    Validations are compared as medians of three, because the best of many is best by chance.
    """
    overview = series.overview
    validation_db = overview.loss_to_db(overview.validation["loss"])
    steps = overview.validation["step"]
    if len(validation_db) < 7 or not series.covers_start:
        return None
    # 1. Find the best validation; three later ones at least must show that the loss rises.
    smooth = np.array([finite_median(validation_db[first : first + 3]) for first in range(len(validation_db) - 2)])
    best = finite_argmin(smooth)
    if best is None or best + 3 > len(smooth) - 1:
        return None
    best_step = steps[best + 1]  # the middle of the three
    # 2. Compare the training loss before it with that of the end, each over a tenth of the run.
    training_db = overview.loss_to_db()[overview.trained]
    training_steps = overview.steps["step"][overview.trained]
    n_steps = max(50, overview.last_step // 10)
    before = finite_median(training_db[(training_steps > best_step - n_steps) & (training_steps <= best_step)])
    after = finite_median(training_db[training_steps > overview.last_step - n_steps])
    rise_db = smooth[-1] - smooth[best]
    fall_db = before - after
    # The rise must exceed the noise from one validation to the next.
    noise_db = finite_median(np.abs(np.diff(validation_db)))
    if not rise_db > max(0.5, 2 * noise_db) or not fall_db > 0.3:
        return None
    return int(best_step), float(rise_db), float(fall_db)


def mostly_filtered(series: Series) -> Finding | None:
    """Find filters that drop more than half of the examples."""
    # A single batch may be filtered as a whole, so this counts examples over a thousand steps.
    n_filtered = np.nansum(series.steps["n_filtered"][-1000:])
    n_trained = np.nansum(series.steps["n_trained"][-1000:])
    if len(series) < 100 or n_filtered <= n_trained:
        return None
    steps = series.steps["step"][-1000:]
    return Finding(
        code="MOSTLY_FILTERED",
        severity="warning",
        problem="Most examples are dropped by a filter.",
        evidence=(
            f"Of {n_filtered + n_trained:.0f} examples in the last {len(steps)} steps, {n_filtered:.0f} had no weight."
        ),
        advice="Make the filters less strict, or the mixtures harder (noise, more speakers).",
        key="filter",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.95,
    )


def lr_never_reduced(series: Series) -> Finding | None:
    """Find a plateau schedule that cannot act, or did not although validation stopped improving long ago."""
    if series.recipe_value("schedule.name", "plateau") != "plateau" or not series.covers_start:
        return None
    loss = series.validation["loss"]
    lr = series.validation["lr"]
    best = finite_argmin(loss)
    patience = series.recipe_value("schedule.patience", 2)
    first_step = int(series.overview.steps["step"][0])
    last_step = series.last_step
    if len(loss) == 0 and last_step >= 2000 and series.recipe_value("validate.every_steps", 1) == 0:
        evidence = f"The schedule waits for validations, and there was none in {last_step} steps."
        advice = "Turn validation on."
        key = "validate.every_steps"
    elif best is not None and len(loss) - 1 - best > 2 * (patience + 1) and finite_max(lr) <= finite_min(lr):
        best_step = series.validation["step"][best]
        evidence = f"It stayed at {lr[-1]:.1e}, and validation was best at step {best_step:.0f} of {last_step}."
        advice = "Lower the patience or the cooldown of the schedule."
        key = "schedule.patience"
    else:
        return None
    return Finding(
        code="LR_NEVER_REDUCED",
        severity="warning",
        problem="The plateau schedule has never changed the learning rate.",
        evidence=evidence,
        advice=advice,
        key=key,
        steps=(first_step, last_step),
        confidence=0.8,
    )


def worse_than_mixture(series: Series) -> Finding | None:
    """Find outputs that are further from the sources than the mixture is."""
    si_sdri = series.validation["si_sdri"]
    steps = series.validation["step"]
    if len(si_sdri) < 2 or steps[-1] < 500 or not (si_sdri[-2:] < -0.5).all() or not series.has_signal_loss:
        return None
    return Finding(
        code="WORSE_THAN_MIXTURE",
        severity="critical",
        problem="The outputs are further from the sources than the mixture is.",
        evidence=(
            f"SI-SDRi was {si_sdri[-2]:+.2f} and {si_sdri[-1]:+.2f} dB at steps {steps[-2]:.0f} and {steps[-1]:.0f}."
        ),
        advice="Check that the targets belong to their mixtures, and that the learning rate is not too high.",
        key="data.path",
        steps=(int(steps[-2]), int(steps[-1])),
        confidence=0.9,
    )


def not_shuffled(series: Series) -> Finding | None:
    """Find losses of neighbouring steps that rise and fall together, as they do when the data is in order."""
    trained = np.flatnonzero(series.trained)[200:][-5000:]
    loss_db = series.loss_to_db()[trained]
    if len(loss_db) < 500:
        return None
    # Learning itself makes neighbours alike, so the trend is subtracted first.
    windows = sliding_window_view(loss_db, 2 * TREND_STEPS + 1)
    is_complete = np.isfinite(windows).all(1)
    residual = (loss_db[TREND_STEPS:-TREND_STEPS] - np.median(windows, axis=1))[is_complete]
    if len(residual) < 400:
        return None
    correlation = _rank_autocorrelation(residual)
    if correlation < 0.5:
        return None
    return Finding(
        code="NOT_SHUFFLED",
        severity="warning",
        problem="Neighbouring steps have similar losses: the data seems to come in order.",
        evidence=(
            f"Without its trend, the loss has a correlation of {correlation:.2f} from step to step; with shuffled data "
            "it has none."
        ),
        advice="Shuffle the data set.",
        key="data.name",
        steps=(int(series.steps["step"][trained[0]]), int(series.steps["step"][trained[-1]])),
        confidence=0.7,
    )


def _rank_autocorrelation(values: FloatArray) -> float:
    """Compute the lag-1 autocorrelation of ranks, which a few spikes cannot dominate."""
    ranks = values.argsort().argsort().astype(float)
    ranks -= ranks.mean()
    return float((ranks[1:] * ranks[:-1]).sum() / np.square(ranks).sum())
