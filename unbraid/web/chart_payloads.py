"""Series to what the page draws: thinned to what a screen can show, as JSON."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unbraid.records import SKIPPED_OUTCOMES
from unbraid.web.downsample import Floats, Thinned
from unbraid.web.step_columns import COLUMNS

SPREAD = ("loss", "grad_norm", "clipped_grad_norm", "si_sdr")
"""Columns whose least and greatest value are drawn beside their mean."""

SCORES = ("step", "loss", "si_sdr", "si_sdri", "best")
"""What is kept of a validation."""


def chart(thinned: Thinned) -> dict[str, Any]:
    """Thinned steps as the page takes them.

    Args:
        thinned: In the columns of `COLUMNS`.

    Returns:
        ``steps`` and ``n_steps`` of each bucket; ``mean`` of each column; ``low`` and ``high`` of those in `SPREAD`;
        and in ``left_out`` how many steps of each bucket were left out, by reason, or ``rescued``. Null where nothing
        is known.
    """
    place = {name: number for number, name in enumerate(COLUMNS)}
    counted = ("rescued", *SKIPPED_OUTCOMES)
    known = [name for name in COLUMNS if name not in counted and np.isfinite(thinned.mean[place[name]]).any()]
    counts = {name: thinned.total[place[name]] for name in counted}
    return {
        "steps": thinned.steps.tolist(),
        "n_steps": thinned.n_steps.tolist(),
        "mean": {name: plain(thinned.mean[place[name]]) for name in known},
        "low": {name: plain(thinned.low[place[name]]) for name in known if name in SPREAD},
        "high": {name: plain(thinned.high[place[name]]) for name in known if name in SPREAD},
        "left_out": {name: count.astype(int).tolist() for name, count in counts.items() if count.any()},
    }


def plain(values: Floats) -> list[float | None]:
    """Five digits of each, null where it is not finite."""
    finite = np.isfinite(values)
    safe = np.where(finite & (values != 0), np.abs(values), 1.0)
    scale = 10.0 ** np.clip(4 - np.floor(np.log10(safe)), -30, 30)
    rounded = np.round(np.where(finite, values, 0.0) * scale) / scale
    return [value if known else None for value, known in zip(rounded.tolist(), finite.tolist(), strict=True)]


def finite(value: Any) -> float | None:
    """A number that JSON can hold; None for anything else."""
    if not isinstance(value, (int, float)):
        return None
    return value if -sys.float_info.max <= value <= sys.float_info.max else None


def scores(rows: Sequence[Mapping[str, Any]], *, n_most: int = 2000) -> dict[str, list[Any]]:
    """Validations, column by column; where there are very many, every second, third ... and the last."""
    every = max(1, -(-len(rows) // n_most))
    kept = [row for place, row in enumerate(rows) if place % every == 0 or place == len(rows) - 1]
    return {name: [row.get(name) for row in kept] for name in SCORES}
