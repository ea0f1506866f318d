"""What the page asks for, as dicts ready for JSON: curves, state, recipe, environment, incidents, events, findings."""

import hashlib
import json
import os
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.errors import UserError
from unbraid.health.rules import run_rules, summary
from unbraid.health.series import read_series
from unbraid.io import finite_or_none, to_json_row
from unbraid.records import FAULT_OUTCOMES, read_rows
from unbraid.run_directory import RunDirectory
from unbraid.type_aliases import FloatArray
from unbraid.web.downsample import Downsampled
from unbraid.web.step_columns import COLUMNS, STEP_FLAGS

WITH_RANGE = ("loss", "grad_norm", "si_sdr")
"""Columns drawn with their range, from smallest to largest value, around the mean."""

VALIDATION_COLUMNS = ("step", "loss", "si_sdr", "si_sdri", "best")

IDLE_SECONDS = 60.0
"""A run that has written nothing for this long, and for five of its steps, is shown as idle."""

VALIDATING_SECONDS = 1800.0
"""The same for a run that is due to validate, which writes nothing until it is done."""

DIAGNOSE_FULLY_BYTES = 30 * 2**20
"""Records up to this size are diagnosed whole. Of longer ones, the last `DIAGNOSED_STEPS` and a sample of the rest."""

DIAGNOSED_STEPS = 10_000
EVENTS_SHOWN = 300

NO_IMPROVEMENT: Mapping[str, float | None] = {"si_sdri": None, "best_si_sdri": None}


# ---- Curves


def chart(buckets: Downsampled) -> dict[str, Any]:
    """Return downsampled steps as the page draws them.

    Args:
        buckets: In the columns of `COLUMNS`.

    Returns:
        ``steps`` and ``n_steps`` of each bucket; ``mean`` of each column that has values; ``low`` and ``high`` of those
        in `WITH_RANGE`; ``flags``, the number of steps of each bucket that were skipped or rescued, by reason; and
        ``flag_names``, every reason there is, with whether it is a fault. Null where there is no value.
    """
    index = {name: row for row, name in enumerate(COLUMNS)}
    with_values = [name for name in COLUMNS if name not in STEP_FLAGS and np.isfinite(buckets.mean[index[name]]).any()]
    with_range = [name for name in with_values if name in WITH_RANGE]
    flags = {name: buckets.total[index[name]] for name in STEP_FLAGS}
    return {
        "steps": buckets.steps.tolist(),
        "n_steps": buckets.n_steps.tolist(),
        "mean": {name: rounded(buckets.mean[index[name]]) for name in with_values},
        "low": {name: rounded(buckets.low[index[name]]) for name in with_range},
        "high": {name: rounded(buckets.high[index[name]]) for name in with_range},
        "flags": {name: counts.astype(int).tolist() for name, counts in flags.items() if counts.any()},
        "flag_names": [{"name": name, "is_fault": name in FAULT_OUTCOMES} for name in STEP_FLAGS],
    }


def rounded(values: FloatArray) -> list[float | None]:
    """Return values to five significant digits, to keep the JSON small; None where a value is not finite."""
    is_finite = np.isfinite(values)
    magnitude = np.where(is_finite & (values != 0), np.abs(values), 1.0)
    # Powers beyond 1e30 would overflow; values that small or large keep more or fewer digits.
    scale = 10.0 ** np.clip(4 - np.floor(np.log10(magnitude)), -30, 30)
    result = np.round(np.where(is_finite, values, 0.0) * scale) / scale
    return [value if finite else None for value, finite in zip(result.tolist(), is_finite.tolist(), strict=True)]


def validation_chart(rows: Sequence[Mapping[str, Any]], *, max_rows: int) -> dict[str, list[Any]]:
    """Return validations column by column; of very many, every n-th and the last."""
    stride = max(1, -(-len(rows) // max_rows))
    shown = list(rows[::stride])
    if rows and (len(rows) - 1) % stride:
        shown.append(rows[-1])
    return {name: [row.get(name) for row in shown] for name in VALIDATION_COLUMNS}


# ---- The list of runs


def make_run_id(path: Path) -> str:
    """Return a short id for use in URLs; the same folder always has the same one."""
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]


def overview(path: Path, *, now: float | None = None) -> dict[str, Any]:
    """Return a run's entry in the list of runs, read from the ends of its files whatever their length.

    Args:
        path: Run directory.
        now: Seconds since the epoch; the current time if None.
    """
    run = RunDirectory(path)
    recipe, problem = read_recipe(run)
    rows, _ = read_rows(run.steps, 50)  # more than one: a sampled step is long and may not fit in the bytes read
    last_row: Mapping[str, Any] = next((row for row in reversed(rows) if isinstance(row.get("step"), int)), {})
    return {
        "id": make_run_id(path),
        "name": path.name or str(path),
        "folder": str(path.parent),
        "state": run_state(run, last_row, recipe, time.time() if now is None else now),
        "problem": problem,
        "step": last_row.get("step", 0),
        "lr": finite_or_none(last_row.get("lr")),
        "elapsed_seconds": finite_or_none(last_row.get("elapsed_seconds")),
        "max_steps": finite_or_none(_recipe_value(recipe, "train", "max_steps")),
        "max_minutes": finite_or_none(_recipe_value(recipe, "train", "max_minutes")),
    }


def run_state(run: RunDirectory, last_row: Mapping[str, Any], recipe: Mapping[str, Any], now: float) -> str:
    """Return ``empty``, ``running``, ``finished`` (its budget is used up) or ``idle`` (nothing written for a while)."""
    if not last_row:
        return "empty"
    max_steps = finite_or_none(_recipe_value(recipe, "train", "max_steps"))
    max_minutes = finite_or_none(_recipe_value(recipe, "train", "max_minutes"))
    step = finite_or_none(last_row.get("step")) or 0
    elapsed_seconds = finite_or_none(last_row.get("elapsed_seconds")) or 0
    if (max_steps and step >= max_steps) or (max_minutes and elapsed_seconds >= 60 * max_minutes):
        return "finished"

    # Allow for slow steps and for validation before calling a silent run idle.
    step_seconds = sum(finite_or_none(last_row.get(name)) or 0 for name in ("seconds", "data_seconds"))
    every_steps = finite_or_none(_recipe_value(recipe, "validate", "every_steps")) or 0
    is_validation_due = every_steps > 0 and step % every_steps == 0
    allowed_seconds = max(IDLE_SECONDS, 5 * step_seconds, VALIDATING_SECONDS if is_validation_due else 0.0)
    last_written = max(log.stat().st_mtime for log in run.logs if log.exists())
    return "running" if now - last_written < allowed_seconds else "idle"


def read_recipe(run: RunDirectory) -> tuple[dict[str, Any], str]:
    """Return a run's recipe, and a sentence about what is wrong with it or an empty string."""
    try:
        return tomllib.loads(run.recipe.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {}, f"This run has no {run.recipe.name}."
    except (OSError, ValueError) as error:
        return {}, f"{run.recipe.name} cannot be read ({error})."


def _recipe_value(recipe: Mapping[str, Any], table: str, key: str) -> Any:
    values = recipe.get(table)
    return values.get(key) if isinstance(values, Mapping) else None


def update_improvement(
    improvement: Mapping[str, float | None], validations: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Return the last and the best SI-SDR improvement in dB after some more validations."""
    last = improvement["si_sdri"]
    best = improvement["best_si_sdri"]
    for row in validations:
        value = finite_or_none(row.get("si_sdri"))
        if value is not None:
            last = value
            best = value if best is None else max(best, value)
    return {"si_sdri": last, "best_si_sdri": best}


# ---- Details of one run


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested tables as dotted keys such as ``optim.lr``, with their values as text."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                flat |= flatten(item, f"{prefix}{key}.{index}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def run_details(path: Path) -> dict[str, Any]:
    """Return a run's recipe and environment key by key, its checkpoints and its incidents."""
    run = RunDirectory(path)
    recipe, problem = read_recipe(run)
    return {
        "recipe": flatten(recipe),
        "problem": problem,
        "environment": flatten(_read_json(run.environment)),
        "checkpoints": {name: _read_pointer(run.checkpoints / name) for name in ("best", "last")},
        "incidents": incidents(run),
    }


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _read_pointer(path: Path) -> str:
    # "best" and "last" are small files that hold the name of a checkpoint. In a folder that was sent by others they may
    # be links to any file of this machine, and the page must not show its contents.
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 100:
            return ""
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return name if re.fullmatch(r"step-\d+", name) else ""


def incidents(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the bad steps that were saved, by step: verdict, files, and the command that replays each."""
    if not run.incidents.is_dir():
        return []
    result = []
    for folder in sorted(run.incidents.glob("step-*")):
        incident = _read_json(folder / "incident.json")
        items = [item for item in _list(incident.get("items")) if isinstance(item, Mapping)]
        result.append(
            {
                "name": folder.name,
                "step": incident.get("step"),
                "outcome": incident.get("outcome"),
                "verdict": incident.get("verdict"),
                "files": [str(file) for item in items for file in _list(item.get("files"))],
                "command": f"unbraid replay {folder}",
            }
        )
    return result


def events(rows: Sequence[Mapping[str, Any]], n_events: int) -> dict[str, Any]:
    """Return the newest events, newest first, and how many there are in all."""
    newest = [
        {
            "code": str(row.get("code") or ""),
            "message": str(row.get("message") or ""),
            "step": row.get("step"),
            "files": [str(file) for file in _list(row.get("files"))],
        }
        for row in reversed(rows[-EVENTS_SHOWN:])
    ]
    return {"n": n_events, "newest": newest}


def _list(value: Any) -> list[Any]:
    """Return a list as it is, and an empty list for anything else."""
    return value if isinstance(value, list) else []


def last_steps(last_row: Mapping[str, Any], last_sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the current learning rate, and the model's blocks in the last sampled step.

    Args:
        last_row: Row of the last step.
        last_sampled: Row of the last step that has ``blocks``; empty if there is none.
    """
    blocks = last_sampled.get("blocks")
    rows = []
    for name, block in blocks.items() if isinstance(blocks, Mapping) else ():
        if isinstance(block, Mapping):
            values = {key: finite_or_none(block.get(key)) for key in ("grad_norm", "update_ratio")}
            rows.append({"name": name} | values)
    return {"lr": finite_or_none(last_row.get("lr")), "blocks": {"step": last_sampled.get("step"), "rows": rows}}


def diagnosis(path: Path) -> dict[str, Any]:
    """Return the findings of `unbraid doctor` on a run, worst first; a ``problem`` in words if it cannot be diagnosed.

    ``notes`` are sentences about how the records were read. ``n_last_steps`` is how many of the last steps were read in
    full; None if all of them were.
    """
    run = RunDirectory(path)
    problem = ""
    findings = []
    notes = []
    n_last_steps = None
    try:
        if run.steps.exists() and run.steps.stat().st_size > DIAGNOSE_FULLY_BYTES:
            n_last_steps = DIAGNOSED_STEPS
        series = read_series(path, last=n_last_steps, thinned=n_last_steps is not None)
        findings = run_rules(series)
        notes = series.reading_notes
    except UserError as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001  # damaged records must not hide the curves
        problem = f"This run could not be diagnosed ({type(error).__name__}: {error})."
    return {
        "verdict": "" if problem else summary(findings),
        "problem": problem,
        "findings": [to_json_row(asdict(finding)) for finding in findings],
        "notes": notes,
        "n_last_steps": None if problem else n_last_steps,
    }
