"""Write and read checkpoints: atomic, hashed, verified before use; which is the last and the best. No pickle."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from unbraid.errors import CheckpointError
from unbraid.io import write_atomically
from unbraid.run_directory import RunDirectory
from unbraid.schema_version import SCHEMA_VERSION
from unbraid.train.state import first_nan

MANIFEST = "manifest.json"
POINTERS = ("last", "best")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read completely and verified.

    Attributes:
        path: Its folder.
        state: From `TrainState.state_dict`.
        recipe: The resolved recipe, as plain dicts.
        log_bytes: Length of each file of JSON lines at that step.
        choices: What "auto" chose.
    """

    path: Path
    state: dict[str, Any]
    recipe: dict[str, Any]
    log_bytes: dict[str, int]
    choices: dict[str, Any]


def save_checkpoint(
    run: RunDirectory, state: dict[str, Any], *, recipe: dict[str, Any], choices: dict[str, Any], best: bool, keep: int
) -> Path:
    """Write the state as ``checkpoints/step-NNNNNN``. At any instant either all of it or nothing is there.

    Order: a temporary folder, each file fsynced, the manifest with every file's SHA-256 last, rename, fsync of the
    parent; then the pointers ``last`` and ``best``; then old ones are removed.

    Args:
        run: The run directory.
        state: From `TrainState.state_dict`.
        recipe: The resolved recipe, so that the folder alone is enough to load the model.
        choices: What "auto" chose.
        best: Whether its validation loss is the lowest so far. The manifest says so: it decides which one is the best.
        keep: How many of the newest to keep; the best is kept as well.

    Raises:
        CheckpointError: If anything in the state is NaN.
        OSError: If the disk refuses; older checkpoints are intact.
    """
    step = int(state["progress"]["step"])
    name = first_nan(state)
    if name is not None:
        raise CheckpointError(f"The state of step {step} is not finite: {name} has a NaN. It was not saved.")

    # 1. Everything goes into a temporary folder, each file fsynced, the manifest last.
    final = run.checkpoints / f"step-{step:06d}"
    temporary = run.checkpoints / f".{final.name}.{os.getpid()}.tmp"
    replaced = run.checkpoints / f".{final.name}.{os.getpid()}.old.tmp"
    for log in run.logs:
        _sync(log)
    log_bytes = {log.name: log.stat().st_size if log.exists() else 0 for log in run.logs}
    tensors: dict[str, Tensor] = {}
    tree = _pack({name: part for name, part in state.items() if name != "model"}, "", tensors)
    about = {"schema": SCHEMA_VERSION, "recipe": recipe, "choices": choices, "log_bytes": log_bytes, "state": tree}
    try:
        temporary.mkdir(parents=True)
        hashes = {
            "model.safetensors": write_tensors(temporary / "model.safetensors", state["model"]),
            "optimizer.safetensors": write_tensors(temporary / "optimizer.safetensors", tensors),
            "state.json": _write(temporary / "state.json", json.dumps(about, indent=1).encode()),
        }
        manifest = {
            "schema": SCHEMA_VERSION,
            "step": step,
            "best": best,
            "best_step": int(state["progress"].get("best_step", 0)),  # an imported model has none
            "torch": torch.__version__,
            "sha256": hashes,
        }
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(temporary)

        # 2. Rename. The folder exists already if the run was stopped here, and is now saved again after a validation.
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        _sync(run.checkpoints)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    # 3. The files "last" and "best" are for people. A run that is killed before this line loses nothing.
    _write_pointers(run)
    _remove_old(run, keep)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder into memory and verify every byte of it.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        schema = manifest["schema"]
        if schema not in (2, SCHEMA_VERSION):
            raise CheckpointError(f"{path} has schema {schema}. This version reads 2 and {SCHEMA_VERSION}.")
        files = {name: read_verified(path / name, digest) for name, digest in manifest["sha256"].items()}
        about = json.loads(files["state.json"])
        model = safetensors.torch.load(files["model.safetensors"])
        state = _unpack(about["state"], safetensors.torch.load(files["optimizer.safetensors"])) | {"model": model}
        if schema == 2 and "average" in state:
            state["ema"] = state.pop("average")
        return Checkpoint(path, state, about["recipe"], about["log_bytes"], about["choices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a complete checkpoint ({type(error).__name__}: {error}).") from error


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a path leads to.

    Args:
        path: A checkpoint folder; ``checkpoints/best`` or ``checkpoints/last`` of a run; or a run directory: its best
            checkpoint, or its last if it was never validated.

    Raises:
        CheckpointError: If it leads to no checkpoint, or the best one is missing.
    """
    if (path / MANIFEST).is_file():
        return path

    # The files "best" and "last" are not read: a run that was killed may not have written them, and in a folder that
    # was sent by others they could lead anywhere.
    pointer = path.name if path.name in ("best", "last") else ""
    folders = [path.parent] if pointer else [path / "checkpoints", path]
    for folder in folders:
        complete = _complete(folder)
        best = _best(complete)
        if complete and pointer == "last":
            return complete[-1]
        if best is not None:
            return best
        if complete and _best_step(complete[-1]):
            raise CheckpointError(
                f"The best checkpoint of {folder}, of step {_best_step(complete[-1])}, is missing. For the "
                f"newest one, {complete[-1].name}, give {folder / 'last'}."
            )
        if complete and not pointer:
            return complete[-1]
    raise CheckpointError(
        f"{path} is no checkpoint. Give a run directory, its checkpoints/best or checkpoints/last, or a folder "
        "step-NNNNNN."
    )


def newest_checkpoint(run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, or None.

    Returns:
        The checkpoint; and a sentence for each newer or partial one that was skipped.
    """
    _undo_interrupted_replacement(run)
    skipped = [f"{path} is a partial checkpoint of a run that was killed." for path in _partial(run)]
    for path in reversed(checkpoint_folders(run)):
        try:
            return read_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def _undo_interrupted_replacement(run: RunDirectory) -> None:
    """Restore a checkpoint whose replacement was killed between its two renames."""
    for path in run.checkpoints.glob(".step-*.old.tmp"):
        final = run.checkpoints / path.name[1:].split(".")[0]
        if not final.exists():
            path.rename(final)


def repair_checkpoints(run: RunDirectory, resumed: Checkpoint | None) -> None:
    """Tidy up after a run that was killed, before a resumed run writes.

    Partial checkpoints are removed, damaged ones are renamed to ``*.damaged``, and ``last`` and ``best`` are written
    again from the checkpoints that are there.

    Args:
        run: The run directory.
        resumed: The checkpoint to resume from; newer ones did not verify.
    """
    for path in (*_partial(run), *run.incidents.glob(".step-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
    for name in POINTERS:
        for path in run.checkpoints.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)
    for path in checkpoint_folders(run):
        if resumed is not None and _step_of(path) > _step_of(resumed.path):
            path.rename(path.with_name(f"{path.name}.damaged"))
    _write_pointers(run)


def truncate_logs(run: RunDirectory, log_bytes: dict[str, int]) -> None:
    """Truncate the files of JSON lines to their length at a checkpoint: the steps after it will be done again."""
    for log in run.logs:
        if log.exists() and log.stat().st_size > log_bytes.get(log.name, 0):
            os.truncate(log, log_bytes.get(log.name, 0))


def checkpoint_folders(run: RunDirectory) -> list[Path]:
    """Return the checkpoint folders of a run, the oldest first, without reading them."""
    return _folders(run.checkpoints)


def _folders(folder: Path) -> list[Path]:
    folders = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(folders, key=_step_of)


def _complete(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if (path / MANIFEST).is_file()]


def _best(complete: Sequence[Path]) -> Path | None:
    """Return the newest checkpoint that was the best when it was written: its loss is the lowest of all."""
    return next((path for path in reversed(complete) if _was_best(path)), None)


def _was_best(path: Path) -> bool:
    about = _manifest(path)
    return bool(about["best"]) if "best" in about else _best_step(path) == _step_of(path)


def _best_step(path: Path) -> int:
    """Return the step of the lowest validation loss by the time of a checkpoint; 0 if there was no validation."""
    about = _manifest(path)
    if "best_step" in about:
        return int(about["best_step"])
    # Earlier versions wrote it only among the state.
    try:
        state = dict(json.loads((path / "state.json").read_bytes())["state"]["dict"])
        return int(dict(state["progress"]["dict"])["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _manifest(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _write_pointers(run: RunDirectory) -> None:
    """Write the names of the last and the best checkpoint as text files: not all file systems have links."""
    complete = _complete(run.checkpoints)
    targets = {"last": complete[-1] if complete else None, "best": _best(complete)}
    for name, target in targets.items():
        if target is not None:
            write_atomically(run.checkpoints / name, target.name + "\n")


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _partial(run: RunDirectory) -> Iterator[Path]:
    yield from sorted(run.checkpoints.glob(".step-*.tmp"))


def _remove_old(run: RunDirectory, keep: int) -> None:
    best = _best(_complete(run.checkpoints))
    for path in checkpoint_folders(run)[: -max(1, keep)]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, fsynced, and return the file's SHA-256."""
    on_host = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return _write(path, safetensors.torch.save(on_host))


def _write(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def read_verified(path: Path, digest: str) -> bytes:
    """Return the bytes of a file after comparing their SHA-256.

    Raises:
        CheckpointError: If it differs.
        OSError: If the file cannot be read.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the recorded one.")
    return content


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # no such log yet; or a folder on Windows, which cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested state as JSON. Tensors go into ``tensors`` under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(part, f"{name}/{index}", tensors) for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "float" in tree:
        return float(tree["float"])
    return {key: _unpack(part, tensors) for key, part in tree["dict"]}
