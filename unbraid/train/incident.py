"""Incidents: bundles with everything needed to repeat a bad step, on another machine too."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.errors import CheckpointError
from unbraid.io import to_json_row, write_json
from unbraid.records import ItemId, StepRecord
from unbraid.robust.precision import Precision
from unbraid.schema_version import SCHEMA_VERSION, upgrade_outcome
from unbraid.train.checkpoint import read_verified, write_tensors
from unbraid.train.diagnose import Diagnosis, diagnose
from unbraid.train.state import TrainState


@dataclass(frozen=True)
class Incident:
    """A bad step of one process, as a replay needs it.

    Attributes:
        about: Step, rank, seed, precision, loss scale, limit, outcome, diagnosis and versions.
        recipe: The resolved recipe, as plain dicts.
        weights: Of the model.
        batch: The examples of the process.
    """

    about: Mapping[str, Any]
    recipe: Mapping[str, Any]
    weights: dict[str, Tensor]
    batch: Batch


def make_incident(
    state: TrainState, record: StepRecord, batch: Batch, recipe: Mapping[str, Any]
) -> tuple[Incident, Diagnosis]:
    """Return the incident of a step that went wrong, and its diagnosis.

    Args:
        state: After the step.
        record: Of the step.
        batch: All examples of this process.
        recipe: The resolved recipe, as plain dicts.
    """
    precision = Precision(state.precision.name, scale=record.loss_scale)
    diagnosis = diagnose(
        state.unwrapped_model,
        state.loss,
        precision,
        batch,
        seed=state.seed,
        step=record.step,
        rank=dist.rank(),
        loss_upper_limit=state.loss_upper_limit,
    )
    # A bundle is sent to others: it keeps a file's name and its speaker's folder, but no paths of this machine.
    batch = _without_folders(batch)
    sent_diagnosis = diagnosis
    if diagnosis.item is not None and diagnosis.index is not None:
        sent_diagnosis = replace(diagnosis, item=batch.items[diagnosis.index])
    # A later step may have been launched meanwhile, and have changed the weights.
    weights_moved_on = record.trained or state.step > record.step
    about = {
        "step": record.step,
        "rank": dist.rank(),
        "world_size": dist.world_size(),
        "seed": state.seed,
        "outcome": record.outcome,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "precision": precision.name,
        "loss_scale": record.loss_scale,
        "loss_upper_limit": state.loss_upper_limit,
        "weights_after_step": state.step if weights_moved_on else record.step - 1,
        "diagnosis": sent_diagnosis.sentence(),
        "torch": torch.__version__,
        "device": state.device.type,
    }
    return Incident(about, _without_paths(recipe), state.unwrapped_model.state_dict(), batch), diagnosis


def has_custom_code(recipe: Mapping[str, Any]) -> list[str]:
    """Return the names such as ``my_file:MyModel`` that a replay would import, of a recipe given as plain dicts."""
    loss = recipe.get("loss", {})
    tables = [recipe.get("model", {}), loss, *loss.get("terms", [])]
    names = [str(table.get("name")) for table in tables]
    return [name for name in names if ":" in name]


def _without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in recipe.items()}
    for name, key in (("data", "path"), ("data", "noise"), ("data", "exclude"), ("model", "init")):
        if name in tables:
            tables[name].pop(key, None)
    return tables


def _without_folders(batch: Batch) -> Batch:
    items = [replace(item, files=tuple("/".join(Path(file).parts[-2:]) for file in item.files)) for item in batch.items]
    return replace(batch, items=tuple(items))


ABOUT = "incident.json"

_REQUIRED = ("step", "rank", "seed", "outcome", "precision", "loss_scale", "loss_upper_limit", "diagnosis")
"""The keys of `Incident.about` that a replay reads."""


def write_incident(folder: Path, incident: Incident) -> Path:
    """Write a replay bundle with the SHA-256 of each file, unless it exists; return its folder.

    It is written under a temporary name and renamed, so an incomplete bundle never has its final name.

    Raises:
        OSError: If the disk refuses; then nothing of the bundle stays.
    """
    about = incident.about
    final = folder / f"step-{about['step']:06d}-rank-{about['rank']}"
    # A step that is done again after a roll-back fails in the same way.
    if final.exists():
        return final
    batch = incident.batch
    audio = {"mixture": batch.mixture, "sources": batch.sources, "weight": batch.weight}
    audio |= {} if batch.noise is None else {"noise": batch.noise}
    items = [asdict(item) for item in batch.items]
    about = {"schema": SCHEMA_VERSION, **about, "items": items, "recipe": incident.recipe}
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        tensors = {"model.safetensors": incident.weights, "batch.safetensors": audio}
        about["sha256"] = {name: write_tensors(temporary / name, parts) for name, parts in tensors.items()}
        write_json(temporary / ABOUT, to_json_row(about))
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def read_incident(path: Path) -> Incident:
    """Read a replay bundle and verify it.

    Raises:
        CheckpointError: If it is not a replay bundle, or damaged.
    """
    if not (path / ABOUT).is_file():
        raise CheckpointError(f"{path} is no incident. Give one of the folders in the incidents of a run directory.")
    try:
        about = json.loads((path / ABOUT).read_bytes())
        if about["schema"] not in (2, SCHEMA_VERSION):
            raise CheckpointError(f"{path} has schema {about['schema']}. This version reads 2 and {SCHEMA_VERSION}.")
        if about["schema"] == 2:
            about["diagnosis"] = about.pop("verdict", None)
            about["outcome"] = upgrade_outcome(about["outcome"])
        missing = [name for name in _REQUIRED if name not in about]
        if missing:
            raise CheckpointError(f"{path} is not a complete incident: {ABOUT} lacks {missing[0]}.")
        files = {name: read_verified(path / name, digest) for name, digest in about["sha256"].items()}
        audio = safetensors.torch.load(files["batch.safetensors"])
        items = [ItemId(**item | {"files": tuple(item["files"])}) for item in about["items"]]
        batch = Batch(audio["mixture"], audio["sources"], audio["weight"], audio.get("noise"), tuple(items))
        return Incident(about, about["recipe"], safetensors.torch.load(files["model.safetensors"]), batch)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a complete incident ({type(error).__name__}: {error}).") from error


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Join micro-batches to one batch; its noise is None unless all of them have noise."""
    if len(batches) == 1:
        return batches[0]
    noises = [batch.noise for batch in batches if batch.noise is not None]
    return Batch(
        mixture=torch.cat([batch.mixture for batch in batches]),
        sources=torch.cat([batch.sources for batch in batches]),
        weight=torch.cat([batch.weight for batch in batches]),
        noise=torch.cat(noises) if len(noises) == len(batches) else None,
        items=tuple(item for batch in batches for item in batch.items),
    )
