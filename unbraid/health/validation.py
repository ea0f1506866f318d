"""Rules about validation: finite losses, recordings shared with training, and the order of the outputs."""

import math

import numpy as np

from unbraid.columns import number_column, padded_array
from unbraid.health.finding import Finding
from unbraid.health.outputs import identical_outputs, output_is_mixture
from unbraid.health.series import Series

N_COMPARED = 6
"""Latest validations that are compared with each other."""

SEPARATED_DB = 1.0
"""Below this SI-SDRi the outputs are hardly better than the mixture, so their order means nothing."""


def validation_not_finite(series: Series) -> Finding | None:
    """Find validations whose loss is not finite: none can be the best, and no schedule can use them."""
    rows = series.validation_rows
    # A non-finite loss is stored as null, with "nan" or "inf" in loss_text.
    bad = [index for index, row in enumerate(rows) if "loss_text" in row]
    if not bad:
        return None
    n_at_end = next((n for n, row in enumerate(reversed(rows)) if "loss_text" not in row), len(rows))
    item_si_sdri = rows[bad[-1]].get("item_si_sdri") or []
    bad_items = [index for index, value in enumerate(item_si_sdri) if value is None]
    if bad_items and len(bad_items) == len(item_si_sdri):
        advice = "No output is finite. Start again with a lower learning rate, or in fp32."
        key = "optim.lr"
    elif bad_items:
        advice = "Check the files of those examples."
        key = "data.path"
    else:
        advice = "The outputs are finite, so find out where the loss is undefined for them."
        key = "loss.name"
    listed = f" (the first: {', '.join(map(str, bad_items[:3]))})" if bad_items else ""
    return Finding(
        code="VALIDATION_NOT_FINITE",
        severity="critical" if n_at_end > 1 else "warning",
        problem="The validation loss is not finite.",
        evidence=(
            f"It was not finite in {len(bad)} of the last {len(rows)} validations, {n_at_end} of them at the end; "
            f"{len(bad_items)} of {len(item_si_sdri)} examples had no SI-SDR{listed}."
        ),
        advice=advice,
        key=key,
        steps=(int(rows[bad[0]]["step"]), int(rows[bad[-1]]["step"])),
        confidence=1.0,
    )


def validation_in_training(series: Series) -> Finding | None:
    """Find recordings that are in both training and validation, under the same name or another.

    Speakers in both splits are not reported on their own: some data sets are made that way.
    """
    shared = series.data.get("shared", {})
    n_valid = series.data.get("splits", {}).get("valid", {}).get("files", 0)
    n_files = shared.get("n_files", 0)
    n_copies = shared.get("n_copies", 0)
    if not n_files + n_copies:
        return None
    evidence = []
    if n_files:
        evidence.append(f"{n_files} are in both splits by name, for example {shared['files'][0]}")
    if n_copies:
        train_file, valid_file = shared["copies"][0]
        evidence.append(f"{n_copies} are copies under other names, for example {valid_file} of {train_file}")
    if shared.get("n_speakers"):
        evidence.append(f"{shared['n_speakers']} speakers are in both splits")
    return Finding(
        code="VALIDATION_IN_TRAINING",
        severity="warning" if n_files + n_copies >= 0.01 * n_valid else "note",
        problem=f"{n_files + n_copies} of {n_valid} validation recordings are also in the training data.",
        evidence="; ".join(evidence) + ".",
        advice="Put each speaker in one split only (folders train, valid and test, or a manifest column split).",
        key="data.path",
        steps=(min(1, series.last_step), series.last_step),
        confidence=1.0,
    )


def permutation_flips(series: Series) -> Finding | None:
    """Find items whose outputs still change order from validation to validation, while SI-SDRi does not improve.

    The assignment of outputs to sources differs between items and changes early in a run, but for each item it should
    settle. In healthy runs 0 to 12 % of the separated items change it from one validation to the next. With two
    outputs in random order half of them would. The threshold is half of the random rate.
    """
    # 1. Only late validations at the full learning rate count: a decayed rate settles by itself.
    rows = [row for row in series.validation_rows if row.get("orders") and row.get("item_si_sdri")][-N_COMPARED:]
    lr = series.validation["lr"]
    if len(rows) < N_COMPARED or not lr[-1] >= 0.5 * series.peak_lr:
        return None
    if series.at_full_lr.sum() < 300 or not series.has_signal_loss:
        return None

    # 2. Compare the order of each item with that in the validation before, if it was separated in both.
    orders = np.array([row["orders"] for row in rows])  # (validation, item, source)
    item_si_sdri = padded_array([row["item_si_sdri"] for row in rows])
    comparable = (item_si_sdri[1:] > SEPARATED_DB) & (item_si_sdri[:-1] > SEPARATED_DB)
    changed = (orders[1:] != orders[:-1]).any(2) & comparable
    si_sdri = number_column(rows, "si_sdri")
    gain_db = si_sdri[N_COMPARED // 2 :].mean() - si_sdri[: N_COMPARED // 2].mean()
    if comparable.sum(1).min() < 10 or not gain_db <= 0.3:
        return None

    # 3. Report at least half of the random rate, unless there is a plainer reason for it.
    random_share = 1 - 1 / math.factorial(orders.shape[2])
    share = float(np.median(changed.sum(1) / comparable.sum(1)))
    if share < 0.5 * random_share or output_is_mixture(series) or identical_outputs(series):
        return None
    return Finding(
        code="PERMUTATION_FLIPS",
        severity="warning",
        problem="The order of the outputs does not settle.",
        evidence=(
            f"From one validation to the next, {share:.0%} of the separated examples changed their order (median of "
            f"the last {len(rows) - 1}; {random_share:.0%} in random order), and SI-SDRi rose by {gain_db:.2f} dB."
        ),
        advice="Lower the learning rate, or average the weights (train.ema = 0.999).",
        key="optim.lr",
        steps=(int(rows[0]["step"]), int(rows[-1]["step"])),
        confidence=0.7,
    )
