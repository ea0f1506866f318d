"""Rules on validation itself: whether it is finite, held out, and keeps outputs and sources together."""

import math

import numpy as np

from unbraid.columns import numbers, rows_of
from unbraid.health.finding import Finding
from unbraid.health.outputs import collapsed_outputs, output_is_mixture
from unbraid.health.series import Series

N_ORDERS = 6
"""So many of the last validations are held against each other."""

SEPARATED_DB = 1.0
"""An item whose outputs are as good as its mixture has no order of its own."""


def validation_not_finite(series: Series) -> Finding | None:
    """Validations whose loss is not finite: none of them can be the best, and no schedule hears of them."""
    rows = series.validations
    bad = [place for place, row in enumerate(rows) if "loss_text" in row]
    if not bad:
        return None
    at_end = next((n for n, row in enumerate(reversed(rows)) if "loss_text" not in row), len(rows))
    scores = rows[bad[-1]].get("item_si_sdri") or []
    without = [place for place, score in enumerate(scores) if score is None]
    if without and len(without) == len(scores):
        advice, key = "Nothing finite comes out: begin again with a lower learning rate, or in fp32.", "optim.lr"
    elif without:
        advice, key = "See what the files of those examples hold.", "data.path"
    else:
        advice, key = "See where the loss is not defined: outputs and sources may be finite all the same.", "loss.name"
    named = f" (the first: {', '.join(map(str, without[:3]))})" if without else ""
    return Finding(
        code="VALIDATION_NOT_FINITE",
        severity="critical" if at_end > 1 else "warning",
        what="The loss of validation is not finite.",
        why=(
            f"It was not in {len(bad)} of the last {len(rows)} validations, {at_end} of them at the end; "
            f"{len(without)} of {len(scores)} examples had no SI-SDR{named}."
        ),
        advice=advice,
        key=key,
        steps=(int(rows[bad[0]]["step"]), int(rows[bad[-1]]["step"])),
        confidence=1.0,
    )


def validation_in_training(series: Series) -> Finding | None:
    """Recordings that are validated on and trained on, by the same name or another.

    Speakers in both splits alone are no fault: some data sets are made so.
    """
    shared, n_valid = series.data.get("shared", {}), series.data.get("splits", {}).get("valid", {}).get("files", 0)
    n_files, n_copies = shared.get("n_files", 0), shared.get("n_copies", 0)
    if not n_files + n_copies:
        return None
    why = [f"{n_files} are in both splits by name, {shared['files'][0]} the first"] if n_files else []
    if n_copies:
        trained, validated = shared["copies"][0]
        why += [f"{n_copies} are copies under other names: {validated} of {trained}"]
    if shared.get("n_speakers"):
        why += [f"{shared['n_speakers']} speakers are in both"]
    return Finding(
        code="VALIDATION_IN_TRAINING",
        severity="warning" if n_files + n_copies >= 0.01 * n_valid else "note",
        what=f"{n_files + n_copies} of {n_valid} recordings that are validated on are trained on as well.",
        why="; ".join(why) + ".",
        advice="Give each speaker one split (folders train, valid and test, or a manifest's column split).",
        key="data.path",
        steps=(min(1, series.last_step), series.last_step),
        confidence=1.0,
    )


def permutation_flips(series: Series) -> Finding | None:
    """Items whose outputs change places from validation to validation, late, while nothing gets better.

    Which output belongs to which source differs from item to item, and changes early in a run; the order of one item
    should settle. In healthy runs 0 to 12 % of the items that are separated at all change it from one validation to the
    next; of two outputs dealt out at random half do. What is told is half of that.
    """
    rows = [row for row in series.validations if row.get("orders") and row.get("item_si_sdri")][-N_ORDERS:]
    lr, top = series.of_validation["lr"], series.top_rate
    if len(rows) < N_ORDERS or not lr[-1] >= 0.5 * top or series.at_full_rate.sum() < 300 or not series.trains_signals:
        return None
    orders, separated = np.array([row["orders"] for row in rows]), rows_of([row["item_si_sdri"] for row in rows])
    judged = (separated[1:] > SEPARATED_DB) & (separated[:-1] > SEPARATED_DB)
    changed = (orders[1:] != orders[:-1]).any(2) & judged
    at_random = 1 - 1 / math.factorial(orders.shape[2])
    scores = numbers(rows, "si_sdri")
    gain = scores[N_ORDERS // 2 :].mean() - scores[: N_ORDERS // 2].mean()
    if judged.sum(1).min() < 10 or not gain <= 0.3:
        return None
    share = float(np.median(changed.sum(1) / judged.sum(1)))
    if share < 0.5 * at_random or output_is_mixture(series) or collapsed_outputs(series):
        return None
    return Finding(
        code="PERMUTATION_FLIPS",
        severity="warning",
        what="Outputs keep changing places: which of them gives which source does not settle.",
        why=(
            f"From one validation to the next {share:.0%} of the examples that are separated changed their order "
            f"(median of the last {len(rows) - 1}; dealt out at random {at_random:.0%} would), and SI-SDRi went up by "
            f"{gain:.2f} dB."
        ),
        advice="Lower the learning rate, or average the weights (train.ema = 0.999).",
        key="optim.lr",
        steps=(int(rows[0]["step"]), int(rows[-1]["step"])),
        confidence=0.7,
    )
