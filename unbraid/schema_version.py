"""The version of the run directory, and the names of older versions brought to today's."""

from collections.abc import Mapping
from pathlib import Path

from unbraid.io import read_json_lines
from unbraid.type_aliases import Row

SCHEMA_VERSION = 3
"""Version of the run directory. Version 2 had other names for some fields, outcomes and events; see `upgrade_row`."""

# Names of version 2, and their names today.
_FIELDS_OF_VERSION_2 = {"limit": "max_norm", "norm_after": "clipped_grad_norm", "n_easy": "n_filtered"}
_ITEM_FIELDS_OF_VERSION_2 = {
    "levels_db": "estimate_levels_db",
    "likeness": "similarity",
    "beside_db": "source_residual_db",
}
_OUTCOMES_OF_VERSION_2 = {"all_easy": "all_filtered", "loss_scale": "fp16_overflow"}
_CODES_OF_VERSION_2 = {
    "STEP_SKIPPED_LOSS_SCALE": "STEP_SKIPPED_FP16_OVERFLOW",
    "CHECKPOINT_PASSED_OVER": "CHECKPOINT_SKIPPED",
    "CHOSEN": "AUTO_CHOSEN",
    "RUN_BEGUN_AGAIN": "RUN_RESTARTED",
}


def upgrade_outcome(outcome: str) -> str:
    """Return an outcome under today's name, whichever version wrote it."""
    return _OUTCOMES_OF_VERSION_2.get(outcome, outcome)


def upgrade_row(row: Row) -> Row:
    """Return a row of ``steps.jsonl`` or ``events.jsonl`` under today's names, whichever version wrote it."""
    if _is_version_2_step(row):
        row = _rename(row, _FIELDS_OF_VERSION_2)
        outcome = row.get("outcome")
        row["outcome"] = _OUTCOMES_OF_VERSION_2.get(str(outcome), outcome)
        if row.get("items"):
            row["items"] = [_rename(item, _ITEM_FIELDS_OF_VERSION_2) for item in row["items"]]
    elif row.get("code") in _CODES_OF_VERSION_2:
        row["code"] = _CODES_OF_VERSION_2[row["code"]]
    return row


def _is_version_2_step(row: Row) -> bool:
    # Rows carry no version number; every step of version 2 has this field, and no later one.
    return "n_easy" in row


def _rename(row: Row, names: Mapping[str, str]) -> Row:
    # A non-finite value has its text in a second field, NAME_text, which is renamed with it.
    all_names = {**names, **{f"{old}_text": f"{new}_text" for old, new in names.items()}}
    return {all_names.get(name, name): value for name, value in row.items()}


def steps_schema_version(path: Path) -> int:
    """Return the schema version that wrote the first step of a log; the current one if there is none."""
    rows, _ = read_json_lines(path, first=1)
    return 2 if rows and _is_version_2_step(rows[0]) else SCHEMA_VERSION
