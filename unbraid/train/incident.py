"""The replay bundle: all that is needed to run a bad step again, on another machine too."""

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
from unbraid.records import SCHEMA_VERSION, ItemId, StepRecord
from unbraid.robust.precision import Precision
from unbraid.train.checkpoint import read_verified, write_tensors
from unbraid.train.diagnose import Diagnosis, diagnose
from unbraid.train.state import TrainState


@dataclass(frozen=True)
class Incident:
    """A bad step of one process, as a replay needs it.

    Attributes:
        about: Step, rank, seed, precision, loss scale, limit, outcome, verdict and versions.
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
    """What a replay needs of a step that went wrong, and what is to blame for it.

    Args:
        state: As the step left it.
        record: Of the step.
        batch: All that this process had in it.
        recipe: The resolved recipe, as plain dicts.
    """
    precision = Precision(state.precision.name, scale=record.loss_scale)
    verdict = diagnose(
        state.unwrapped_model,
        state.loss,
        precision,
        batch,
        seed=state.seed,
        step=record.step,
        rank=dist.rank(),
        loss_upper_limit=state.loss_upper_limit,
    )
    batch, noted = _without_folders(batch), verdict
    if verdict.item is not None and verdict.place is not None:
        noted = replace(verdict, item=batch.items[verdict.place])
    moved_on = record.trained or state.step > record.step
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
        "weights_after_step": state.step if moved_on else record.step - 1,
        "verdict": noted.sentence(),
        "torch": torch.__version__,
        "device": state.device.type,
    }
    return Incident(about, _without_paths(recipe), state.unwrapped_model.state_dict(), batch), verdict


def has_custom_code(recipe: Mapping[str, Any]) -> list[str]:
    """Names such as ``my_file:MyModel`` of what a replay would build, in a recipe given as plain dicts."""
    loss = recipe.get("loss", {})
    parts = [recipe.get("model", {}), loss, *loss.get("terms", [])]
    return [name for part in parts if ":" in (name := str(part.get("name")))]


def _without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what only means something on this machine."""
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in recipe.items()}
    for name, key in (("data", "path"), ("data", "noise"), ("data", "exclude"), ("model", "init")):
        if name in tables:
            tables[name].pop(key, None)
    return tables


def _without_folders(batch: Batch) -> Batch:
    """The batch with each file by its name and the folder that it lies in, which is its speaker's."""
    items = [replace(item, files=tuple("/".join(Path(file).parts[-2:]) for file in item.files)) for item in batch.items]
    return replace(batch, items=tuple(items))


_NEEDED = ("step", "rank", "seed", "outcome", "precision", "loss_scale", "loss_upper_limit", "verdict")
"""What a replay asks of `Incident.about`."""


def write_incident(folder: Path, incident: Incident) -> Path:
    """Write a replay bundle, to a temporary name first, with the SHA-256 of each file; nothing where it is already.

    Raises:
        OSError: If the disk refuses; of the bundle nothing stays.
    """
    step, rank = incident.about["step"], incident.about["rank"]
    final = folder / f"step-{step:06d}-rank-{rank}"
    if final.exists():
        return final
    batch = incident.batch
    audio = {"mixture": batch.mixture, "sources": batch.sources, "weight": batch.weight}
    audio |= {} if batch.noise is None else {"noise": batch.noise}
    items = [asdict(item) for item in batch.items]
    about = {"schema": SCHEMA_VERSION, **incident.about, "items": items, "recipe": incident.recipe}
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        tensors = {"model.safetensors": incident.weights, "batch.safetensors": audio}
        about["sha256"] = {name: write_tensors(temporary / name, some) for name, some in tensors.items()}
        write_json(temporary / ABOUT, to_json_row(about))
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


ABOUT = "incident.json"


def read_incident(path: Path) -> Incident:
    """Read a replay bundle and verify it.

    Raises:
        CheckpointError: If it is none, or is damaged.
    """
    if not (path / ABOUT).is_file():
        raise CheckpointError(f"{path} is no incident: give one of the folders in the incidents of a run directory.")
    try:
        about = json.loads((path / ABOUT).read_bytes())
        if about["schema"] != SCHEMA_VERSION:
            raise CheckpointError(f"{path} has schema {about['schema']}; this version reads {SCHEMA_VERSION}.")
        if missing := [name for name in _NEEDED if name not in about]:
            raise CheckpointError(f"{path} is not a whole incident: {ABOUT} does not say {missing[0]}.")
        files = {name: read_verified(path / name, digest) for name, digest in about["sha256"].items()}
        audio = safetensors.torch.load(files["batch.safetensors"])
        items = [ItemId(**item | {"files": tuple(item["files"])}) for item in about["items"]]
        batch = Batch(audio["mixture"], audio["sources"], audio["weight"], audio.get("noise"), tuple(items))
        return Incident(about, about["recipe"], safetensors.torch.load(files["model.safetensors"]), batch)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole incident ({type(error).__name__}: {error}).") from error


def join_batches(parts: Sequence[Batch]) -> Batch:
    """Micro-batches as one batch; noise stays only where all have it."""
    if len(parts) == 1:
        return parts[0]
    tensors = [torch.cat([getattr(part, name) for part in parts]) for name in ("mixture", "sources", "weight")]
    noises = [part.noise for part in parts if part.noise is not None]
    noise = torch.cat(noises) if len(noises) == len(parts) else None
    return Batch(tensors[0], tensors[1], tensors[2], noise, tuple(item for part in parts for item in part.items))
