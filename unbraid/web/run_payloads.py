"""What a run directory says beside its curves, as plain dicts: state, recipe, environment, events, findings."""

import hashlib
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unbraid.errors import UserError
from unbraid.health.rules import examine, verdict
from unbraid.health.series import read_series
from unbraid.records import RunDirectory, json_row, read_rows
from unbraid.web.chart_payloads import finite

Facts = dict[str, Any]

QUIET_SECONDS, VALIDATING_SECONDS = 60.0, 1800.0
"""A run that has written nothing for so long, and for five of its steps, is said to stand still; one that is due to
validate is given more time."""

WHOLE_BYTES = 30 * 2**20
"""Records up to this size are judged whole; of longer ones the last steps and some of all, so that a look is short."""

LOOKED_BACK = 10_000
EVENTS_SHOWN = 300


def run_id(path: Path) -> str:
    """A name for a run in addresses, the same for the same folder."""
    return hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]


def overview(path: Path, *, now: float | None = None) -> Facts:
    """What a list of runs says of one: read from the ends of its files, whatever their length.

    Args:
        path: Its folder.
        now: Seconds since the epoch; the clock's if None.
    """
    run = RunDirectory(path)
    recipe, problem = read_recipe(run)
    rows, _ = read_rows(run.steps, 50)  # the last line may be one that was looked at closely, and long
    last: Mapping[str, Any] = next((row for row in reversed(rows) if isinstance(row.get("step"), int)), {})
    return {
        "id": run_id(path),
        "name": path.name or str(path),
        "folder": str(path.parent),
        "state": state_of(run, last, recipe, time.time() if now is None else now),
        "problem": problem,
        "step": last.get("step", 0),
        "lr": finite(last.get("lr")),
        "elapsed_seconds": finite(last.get("elapsed_seconds")),
        "max_steps": finite(_said(recipe, "train", "max_steps")),
        "max_minutes": finite(_said(recipe, "train", "max_minutes")),
    }


def gains(rows: Sequence[Mapping[str, Any]]) -> Facts:
    """The last SI-SDR improvement among validations, and the best."""
    known = [gain for row in rows if (gain := finite(row.get("si_sdri"))) is not None]
    return {"si_sdri": known[-1] if known else None, "best_si_sdri": max(known, default=None)}


def state_of(run: RunDirectory, last: Mapping[str, Any], recipe: Mapping[str, Any], now: float) -> str:
    """``empty``, ``running``, ``finished`` (its budget is spent) or ``still`` (nothing was written for a while)."""
    if not last:
        return "empty"
    steps, minutes = (finite(_said(recipe, "train", name)) for name in ("max_steps", "max_minutes"))
    step, elapsed, *seconds = (
        finite(last.get(name)) or 0 for name in ("step", "elapsed_seconds", "seconds", "data_seconds")
    )
    if (steps and step >= steps) or (minutes and elapsed >= 60 * minutes):
        return "finished"
    every = finite(_said(recipe, "validate", "every_steps")) or 0
    due = every > 0 and step % every == 0
    quiet = max(QUIET_SECONDS, 5 * sum(seconds), VALIDATING_SECONDS if due else 0.0)
    written = max(log.stat().st_mtime for log in run.logs if log.exists())
    return "running" if now - written < quiet else "still"


def read_recipe(run: RunDirectory) -> tuple[dict[str, Any], str]:
    """A run's recipe, and a sentence on what is wrong with it; empty where nothing is."""
    try:
        return tomllib.loads(run.recipe.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {}, f"It holds no {run.recipe.name}."
    except (OSError, ValueError) as error:
        return {}, f"{run.recipe.name} cannot be read ({error})."


def _said(recipe: Mapping[str, Any], table: str, key: str) -> Any:
    found = recipe.get(table)
    return found.get(key) if isinstance(found, Mapping) else None


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Keys such as ``optim.lr`` with their values as text."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for place, part in enumerate(value):
                found |= flat(part, f"{prefix}{key}.{place}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def about(path: Path) -> Facts:
    """Recipe and environment of a run, key by key, its checkpoints and its incidents."""
    run = RunDirectory(path)
    recipe, problem = read_recipe(run)
    return {
        "recipe": flat(recipe),
        "problem": problem,
        "environment": flat(_read_json(run.environment)),
        "checkpoints": {name: _pointer(run.checkpoints / name) for name in ("best", "last")},
        "incidents": incidents(run),
    }


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _pointer(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:200].strip()
    except (OSError, ValueError):
        return ""


def incidents(run: RunDirectory) -> list[Facts]:
    """The bad steps that were kept, by step: what is to blame, the files, and how to run each again."""
    found = []
    for folder in sorted(run.incidents.glob("step-*")) if run.incidents.is_dir() else []:
        said = _read_json(folder / "incident.json")
        items = [item for item in _list(said.get("items")) if isinstance(item, Mapping)]
        found.append(
            {
                "name": folder.name,
                "step": said.get("step"),
                "outcome": said.get("outcome"),
                "verdict": said.get("verdict"),
                "files": [str(file) for item in items for file in _list(item.get("files"))],
                "command": f"unbraid replay {folder}",
            }
        )
    return found


def events(rows: Sequence[Mapping[str, Any]], n_all: int) -> Facts:
    """The newest events, newest first, and how many there are in all."""
    newest = [
        {name: str(row.get(name) or "") for name in ("code", "message")}
        | {"step": row.get("step"), "files": [str(file) for file in _list(row.get("files"))]}
        for row in reversed(rows[-EVENTS_SHOWN:])
    ]
    return {"n": n_all, "newest": newest}


def _list(value: Any) -> list[Any]:
    """What is a list as it is; nothing of anything else."""
    return value if isinstance(value, list) else []


def of_last_steps(last: Mapping[str, Any], sampled: Mapping[str, Any]) -> Facts:
    """Learning rate of the last step, and the blocks of the last step that was looked at closely.

    Args:
        last: Row of the last step.
        sampled: Row of the last that holds blocks.
    """
    blocks = sampled.get("blocks")
    named = blocks.items() if isinstance(blocks, Mapping) else ()
    rows = [
        {"name": name} | {kind: finite(block.get(kind)) for kind in ("grad_norm", "update_ratio")}
        for name, block in named
        if isinstance(block, Mapping)
    ]
    return {"lr": finite(last.get("lr")), "blocks": {"step": sampled.get("step"), "rows": rows}}


def judged(path: Path) -> Facts:
    """What the doctor says of a run, worst first; a sentence instead where there is nothing to judge."""
    run = RunDirectory(path)
    try:
        whole = not run.steps.exists() or run.steps.stat().st_size <= WHOLE_BYTES
        findings = examine(read_series(path, last=None if whole else LOOKED_BACK, thinned=not whole))
    except UserError as error:
        return {"verdict": "", "problem": str(error), "findings": [], "looked_back": None}
    except Exception as error:  # noqa: BLE001  # of odd records: the curves are shown all the same
        problem = f"The doctor could not look ({type(error).__name__}: {error})."
        return {"verdict": "", "problem": problem, "findings": [], "looked_back": None}
    return {
        "verdict": verdict(findings),
        "problem": "",
        "findings": [json_row(asdict(finding)) for finding in findings],
        "looked_back": None if whole else LOOKED_BACK,
    }
