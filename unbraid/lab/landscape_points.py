"""Compute the loss at many points, with progress; an interrupted computation resumes from a file."""

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
from unbraid.io import write_json
from unbraid.lab.landscape import LossFunction, WeightPoints
from unbraid.signals import StopRequest
from unbraid.type_aliases import FloatArray

SAVE_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class PointLosses:
    """Losses at the points computed so far.

    Attributes:
        losses: Loss at each point, ``(point,)``; NaN where it was not computed yet.
        n_done: Number of points computed, in this call and before.
        n_new: Number of points computed in this call.
        seconds: Time that the new points took.
        signal: Number of the signal that stopped the computation; 0 for none.
    """

    losses: FloatArray
    n_done: int
    n_new: int
    seconds: float
    signal: int = 0

    @property
    def points_per_second(self) -> float:
        """Speed of this call; NaN if it computed nothing."""
        return self.n_new / self.seconds if self.n_new else math.nan


def evaluate_points(
    points: WeightPoints,
    loss: LossFunction,
    path: Path,
    key: Mapping[str, Any],
    *,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> PointLosses:
    """Compute the loss at each point, and save the losses to a file however the computation ends.

    Args:
        points: Points in weight space.
        loss: Loss as a function of the weights.
        path: File of the losses, written every ten seconds and at the end. Losses in it are not computed again.
        key: Everything that decides the losses, as JSON values; it is saved in the file.
        stop: Ends the computation after the current point.
        progress: Receives the number of points done and the speed.

    Raises:
        UserError: If the file holds other points, or cannot be read.
    """
    stop = stop or StopRequest()
    losses = read_points(path, key)
    n_before = len(losses)
    n_points = len(points.coefficients)
    start = time.monotonic()
    saved_at = start
    try:
        for value in points.losses(loss, n_before):
            losses.append(value)
            now = time.monotonic()
            progress(len(losses), f"{(len(losses) - n_before) / (now - start):.1f} points/s")
            if now - saved_at >= SAVE_EVERY_SECONDS:
                write_points(path, key, losses)
                saved_at = now
            if stop.signal:
                break
    finally:
        # Also after a second Ctrl-C, which raises KeyboardInterrupt here.
        if len(losses) > n_before:
            write_points(path, key, losses)
    seconds = time.monotonic() - start
    # A signal during the very last point stops nothing.
    signal = stop.signal if len(losses) < n_points else 0
    # NaN for the points that are still missing.
    padded = np.full(n_points, math.nan)
    padded[: len(losses)] = losses
    return PointLosses(padded, len(losses), len(losses) - n_before, seconds, signal)


def points_file_name(key: Mapping[str, Any]) -> str:
    """Return the file name for points with this key; each key has its own file, so none is overwritten."""
    return f"points-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.json"


def write_points(path: Path, key: Mapping[str, Any], losses: list[float]) -> None:
    """Write losses to a JSON file; NaN and infinity, which JSON lacks, are written as text."""
    values = [loss if math.isfinite(loss) else str(loss) for loss in losses]
    write_json(path, {"key": key, "losses": values}, indent=None)


def read_points(path: Path, key: Mapping[str, Any]) -> list[float]:
    """Return the losses in a file; an empty list if there is no file.

    Raises:
        UserError: If the file has another key, or cannot be read.
    """
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        losses = [float(loss) for loss in table["losses"]]
        same_key = table["key"] == key
    except (ValueError, KeyError, TypeError):
        # Not overwritten silently: the file may be anything of the user's.
        raise UserError(f"{path} holds no readable points; remove it, and they are computed again.") from None
    if not same_key:
        raise UserError(f"{path} holds points of something else; remove it, or choose another folder with --out.")
    return losses
