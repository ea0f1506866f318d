"""What a run directory says beside its curves, as plain dicts: state, recipe, environment, events, findings."""

import hashlib
import json
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unbraid.errors import UserError
from unbraid.health.rules import examine, verdict
from unbraid.health.series import read_series
from unbraid.records import RunDirectory, read_rows

Facts = dict[str, Any]

QUIET_SECONDS = 60.0
"""A run that has written no step for so long, and for five of its steps, is said to stand still."""

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
    scores, _ = read_rows(run.validation)
    improvements = [row["si_sdri"] for row in scores if isinstance(row.get("si_sdri"), (int, float))]
    last: Mapping[str, Any] = rows[-1] if rows else {}
    return {
        "id": run_id(path),
        "name": path.name or str(path),
        "folder": str(path.parent),
        "state": state_of(run, last, recipe, time.time() if now is None else now),
        "problem": problem,
        "step": last.get("step", 0),
        "elapsed_seconds": last.get("elapsed_seconds"),
        "max_steps": _said(recipe, "train", "max_steps"),
        "max_minutes": _said(recipe, "train", "max_minutes"),
        "si_sdri": improvements[-1] if improvements else None,
        "best_si_sdri": max(improvements, default=None),
    }


def state_of(run: RunDirectory, last: Mapping[str, Any], recipe: Mapping[str, Any], now: float) -> str:
    """``empty``, ``running``, ``finished`` (its budget is spent) or ``still`` (nothing was written for a while)."""
    if not last:
        return "empty"
    steps, minutes = _said(recipe, "train", "max_steps"), _said(recipe, "train", "max_minutes")
    elapsed = last.get("elapsed_seconds") or 0.0
    if (steps and last.get("step", 0) >= steps) or (minutes and elapsed >= 60 * minutes):
        return "finished"
    quiet = max(QUIET_SECONDS, 5 * ((last.get("seconds") or 0.0) + (last.get("data_seconds") or 0.0)))
    return "running" if now - run.steps.stat().st_mtime < quiet else "still"


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
        items = [item for item in said.get("items") or () if isinstance(item, Mapping)]
        found.append(
            {
                "name": folder.name,
                "step": said.get("step"),
                "outcome": said.get("outcome"),
                "verdict": said.get("verdict"),
                "files": [str(file) for item in items for file in item.get("files") or ()],
                "command": f"unbraid replay {folder}",
            }
        )
    return found


def events(rows: Sequence[Mapping[str, Any]], n_all: int) -> Facts:
    """The newest events, newest first, how many there are in all, and how many of each code among those kept."""
    return {
        "n": n_all,
        "of_code": dict(Counter(str(row.get("code")) for row in rows).most_common()),
        "newest": [
            {name: row.get(name) for name in ("code", "step", "rank", "message", "files")}
            for row in reversed(rows[-EVENTS_SHOWN:])
        ],
    }


def of_last_steps(last: Mapping[str, Any], sampled: Mapping[str, Any]) -> Facts:
    """The last step without its details, and the blocks of the last step that was looked at closely.

    Args:
        last: Row of the last step.
        sampled: Row of the last that holds blocks.
    """
    blocks = sampled.get("blocks")
    named = blocks.items() if isinstance(blocks, Mapping) else ()
    rows = [
        {"name": name, "grad_norm": block.get("grad_norm"), "update_ratio": block.get("update_ratio")}
        for name, block in named
        if isinstance(block, Mapping)
    ]
    plain = {key: value for key, value in last.items() if key not in ("blocks", "items", "bad_items")}
    return {"last": plain, "blocks": {"step": sampled.get("step"), "rows": rows}}


def judged(path: Path) -> Facts:
    """What the doctor says of a run, worst first; a sentence instead where there is nothing to judge."""
    run = RunDirectory(path)
    try:
        whole = not run.steps.exists() or run.steps.stat().st_size <= WHOLE_BYTES
        findings = examine(read_series(path, last=None if whole else LOOKED_BACK, thinned=not whole))
    except UserError as error:
        return {"verdict": "", "problem": str(error), "findings": [], "looked_back": None}
    return {
        "verdict": verdict(findings),
        "problem": "",
        "findings": [asdict(finding) for finding in findings],
        "looked_back": None if whole else LOOKED_BACK,
    }
