"""The loss at many points, one after another: with progress, stopped at any of them, and gone on with."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.errors import UserError
from unbraid.io import write_atomically
from unbraid.lab.landscape import Chart, Measure
from unbraid.lab.weight_directions import Floats
from unbraid.signals import StopRequest

KEEP_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Surveyed:
    """What a survey came to.

    Attributes:
        losses: At each point, ``(point,)``; those that were not come to are NaN.
        n_done: How many were come to, in this survey and before.
        n_new: How many of them in this one.
        seconds: How long those took.
        signal: What stopped it; 0 for nothing.
    """

    losses: Floats
    n_done: int
    n_new: int
    seconds: float
    signal: int = 0

    @property
    def points_per_second(self) -> float:
        """Of this survey; NaN where all were known."""
        return self.n_new / self.seconds if self.n_new else math.nan


def survey(
    chart: Chart,
    measure: Measure,
    kept: Path,
    key: Mapping[str, Any],
    *,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> Surveyed:
    """Take the loss at each point, and keep what there is, however it ends.

    Args:
        chart: The points.
        measure: The loss.
        kept: File for the losses so far: written every ten seconds, and at the end; those that are there are not
            taken again.
        key: What decides the losses, as JSON holds it; it stands in the file.
        stop: Ends it after the point at hand.
        progress: Is told how many points are done, and how fast it goes.

    Raises:
        UserError: If the file holds other points, or no points at all.
    """
    stop, losses = stop or StopRequest(), read_points(kept, key)
    n_known, n_points, began = len(losses), len(chart.coefficients), time.monotonic()
    written = began
    try:
        for loss in chart.losses(measure, tuple(losses)):
            losses.append(loss)
            now = time.monotonic()
            progress(len(losses), f"{(len(losses) - n_known) / (now - began):.1f} points/s")
            if now - written >= KEEP_EVERY_SECONDS:
                write_points(kept, key, losses)
                written = now
            if stop.signal:
                break
    finally:  # also after a second Ctrl-C, which is not held back
        if len(losses) > n_known:
            write_points(kept, key, losses)
    seconds = time.monotonic() - began
    stopped = stop.signal if len(losses) < n_points else 0
    filled = np.array([*losses, *[math.nan] * (n_points - len(losses))])
    return Surveyed(filled, len(losses), len(losses) - n_known, seconds, stopped)


def kept_name(key: Mapping[str, Any]) -> str:
    """The name of the file for points with this key: others go to a file of their own, and none is overwritten."""
    return f"points-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.json"


def write_points(path: Path, key: Mapping[str, Any], losses: list[float]) -> None:
    """Write losses whole; JSON knows no infinity and no NaN, so those are text."""
    told = [loss if math.isfinite(loss) else str(loss) for loss in losses]
    write_atomically(path, json.dumps({"key": key, "losses": told}) + "\n")


def read_points(path: Path, key: Mapping[str, Any]) -> list[float]:
    """The losses that a file holds; none where there is no file.

    Raises:
        UserError: If they are those of another key, or it is no such file.
    """
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        losses = [float(loss) for loss in held["losses"]]
        same = held["key"] == key
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no points that can be read; remove it, and they are taken again.") from None
    if not same:
        raise UserError(f"{path} holds points of something else; remove it, or give another folder by --out.")
    return losses
