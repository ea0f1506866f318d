"""Rules on what is learnt: curves of training and validation, schedule, filters, order of the data."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unbraid.health.finding import Finding
from unbraid.health.rolling_median import highest, lowest, middle, where_lowest
from unbraid.health.series import Series
from unbraid.type_aliases import FloatArray


def oscillation(series: Series) -> Finding | None:
    """Validation that goes up and down by more than it gains."""
    loss, steps = series.level(series.of_validation["loss"])[-10:], series.of_validation["step"][-10:]
    moves = np.diff(loss)
    if len(moves) < 5 or not np.isfinite(moves).all():
        return None
    turns = int(np.sum(np.sign(moves[1:]) != np.sign(moves[:-1])))
    swing = float(np.median(np.abs(moves)))
    if turns < 0.7 * (len(moves) - 1) or swing < max(1.0, 2 * abs(loss[-1] - loss[0]) / len(moves)):
        return None
    return Finding(
        code="OSCILLATION",
        severity="warning",
        what="Validation goes up and down instead of getting better.",
        why=(
            f"In the last {len(loss)} validations it turned {turns} times, by {swing:.1f} dB each time, and came from "
            f"{loss[0]:.2f} to {loss[-1]:.2f}."
        ),
        advice="Lower the learning rate, or average the weights (train.ema = 0.999).",
        key="optim.lr",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.8,
    )


def plateau(series: Series) -> Finding | None:
    """Neither training nor validation has moved for the last two fifths of the run, at a learning rate that could."""
    course = series.course
    loss, steps = course.level(course.of_validation["loss"]), course.of_validation["step"]
    lr = course.of_step["lr"]
    best = where_lowest(loss)
    if best is None or len(loss) < 8 or not series.whole or not lr[-1] >= 0.2 * highest(lr):
        return None
    since = steps[best]
    level, share = course.level()[course.trained], course.of_step["step"][course.trained] / course.last_step
    before, after = middle(level[(share > 0.6) & (share <= 0.8)]), middle(level[share > 0.8])
    if since > 0.6 * series.last_step or not after >= before - 0.1 or _overfits(series) is not None:
        return None
    return Finding(
        code="PLATEAU",
        severity="warning",
        what="The run no longer learns anything.",
        why=(
            f"Validation was best at step {since:.0f} of {series.last_step}, and the training loss went from "
            f"{before:.2f} to {after:.2f} dB over the last two fifths, at a learning rate of {lr[-1]:.1e}."
        ),
        advice="Lower the learning rate, take a larger model, or stop here.",
        key="optim.lr",
        steps=(int(since), series.last_step),
        confidence=0.7,
    )


def overfitting(series: Series) -> Finding | None:
    """Validation getting worse while training gets better."""
    found = _overfits(series)
    if found is None:
        return None
    best, worse, better = found
    return Finding(
        code="OVERFITTING",
        severity="warning",
        what="The model learns its training data by heart.",
        why=(
            f"Since step {best} validation got {worse:.2f} dB worse while the training loss got {better:.2f} dB better."
        ),
        advice="Take the best checkpoint; train on more recordings, or a smaller model, or with dropout.",
        key="data.path",
        steps=(best, series.last_step),
        confidence=0.8,
    )


def _overfits(series: Series) -> tuple[int, float, float] | None:
    """The step of the best validation, how much worse it got since, and how much better training.

    Validations are held against each other as medians of three, as the best of many is best by chance.
    """
    course = series.course
    loss, steps = course.level(course.of_validation["loss"]), course.of_validation["step"]
    if len(loss) < 7 or not series.whole:
        return None
    smooth = np.array([middle(loss[place : place + 3]) for place in range(len(loss) - 2)])
    place = where_lowest(smooth)
    if place is None or place + 3 > len(smooth) - 1:
        return None
    level, at = course.level()[course.trained], course.of_step["step"][course.trained]
    best, n = steps[place + 1], max(50, course.last_step // 10)
    before, after = middle(level[(at > best - n) & (at <= best)]), middle(level[at > course.last_step - n])
    worse, better = smooth[-1] - smooth[place], before - after
    swing = middle(np.abs(np.diff(loss)))
    if not worse > max(0.5, 2 * swing) or not better > 0.3:
        return None
    return int(best), float(worse), float(better)


def easy_share(series: Series) -> Finding | None:
    """Filters that take most examples out."""
    easy, trained = (np.nansum(series.of_step[name][-1000:]) for name in ("n_filtered", "n_trained"))
    if len(series) < 100 or easy <= trained:
        return None
    steps = series.of_step["step"][-1000:]
    return Finding(
        code="MOSTLY_FILTERED",
        severity="warning",
        what="Most examples are left out by a filter.",
        why=f"Of {easy + trained:.0f} examples in the last {len(steps)} steps, {easy:.0f} had no weight.",
        advice="Make the filters less strict, or mixtures harder (noise, more talkers).",
        key="filter",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.95,
    )


def rate_never_moved(series: Series) -> Finding | None:
    """The schedule plateau, where it cannot act, or has not although validation has long stopped getting better."""
    if series.said("schedule.name", "plateau") != "plateau" or not series.whole:
        return None
    loss, steps, lr = (series.of_validation[name] for name in ("loss", "step", "lr"))
    best, patience = where_lowest(loss), series.said("schedule.patience", 2)
    first, last = int(series.course.of_step["step"][0]), series.last_step
    if len(loss) == 0 and last >= 2000 and series.said("validate.every_steps", 1) == 0:
        why = f"The schedule waits for validations, and there was none in {last} steps."
        advice, key = "Validate every so many steps.", "validate.every_steps"
    elif best is not None and len(loss) - 1 - best > 2 * (patience + 1) and highest(lr) <= lowest(lr):
        why = f"It is {lr[-1]:.1e} all the time, and validation was best at step {steps[best]:.0f} of {last}."
        advice, key = "Lower the schedule's patience, or its cooldown.", "schedule.patience"
    else:
        return None
    return Finding(
        code="RATE_NEVER_MOVED",
        severity="warning",
        what="The schedule plateau has never changed the learning rate.",
        why=why,
        advice=advice,
        key=key,
        steps=(first, last),
        confidence=0.8,
    )


def worse_than_mixture(series: Series) -> Finding | None:
    """What comes out is further from the sources than what went in."""
    scores, steps = series.of_validation["si_sdri"], series.of_validation["step"]
    if len(scores) < 2 or steps[-1] < 500 or not (scores[-2:] < -0.5).all() or not series.trains_signals:
        return None
    return Finding(
        code="WORSE_THAN_MIXTURE",
        severity="critical",
        what="The outputs are further from the sources than the mixture is.",
        why=f"SI-SDRi was {scores[-2]:+.2f} and {scores[-1]:+.2f} dB at steps {steps[-2]:.0f} and {steps[-1]:.0f}.",
        advice="Look whether targets belong to their mixtures, and whether the learning rate is too high.",
        key="data.path",
        steps=(int(steps[-2]), int(steps[-1])),
        confidence=0.9,
    )


def not_shuffled(series: Series) -> Finding | None:
    """Losses of neighbouring steps that go up and down together: neighbours are alike, as in data in order."""
    trained = np.flatnonzero(series.trained)[200:][-5000:]
    level = series.level()[trained]
    if len(level) < 500:
        return None
    around = sliding_window_view(level, 2 * AROUND + 1)
    rest = (level[AROUND:-AROUND] - np.median(around, axis=1))[np.isfinite(around).all(1)]
    if len(rest) < 400:
        return None
    similarity = _autocorrelation(rest)
    if similarity < 0.5:
        return None
    return Finding(
        code="NOT_SHUFFLED",
        severity="warning",
        what="Neighbouring steps are alike: the data seem to come in order.",
        why=(
            f"What is left of the loss without its trend has a correlation of {similarity:.2f} from step to step, "
            "where shuffled data have none."
        ),
        advice="Shuffle the data set.",
        key="data.name",
        steps=(int(series.of_step["step"][trained[0]]), int(series.of_step["step"][trained[-1]])),
        confidence=0.7,
    )


AROUND = 20
"""Steps on either side that make up the trend."""


def _autocorrelation(values: FloatArray) -> float:
    """Of neighbours, between ranks, so that a few spikes do not make it."""
    ranks = values.argsort().argsort().astype(float)
    ranks -= ranks.mean()
    return float((ranks[1:] * ranks[:-1]).sum() / np.square(ranks).sum())
