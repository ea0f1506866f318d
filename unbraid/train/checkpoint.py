"""Write to a temporary name and rename; hashes; keep last and best; resume. No pickle anywhere."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from unbraid.errors import CheckpointError
from unbraid.io import write_atomically
from unbraid.records import SCHEMA_VERSION
from unbraid.run_directory import RunDirectory

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole and verified.

    Attributes:
        path: Its folder.
        state: What `TrainState.state_dict` gave.
        recipe: The resolved recipe, as plain dicts.
        log_bytes: How long each file of JSON lines was.
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
    """Write the state as ``checkpoints/step-NNNNNN``, so that at any instant either all of it or nothing is there.

    Order: a temporary folder, each file fsynced, the manifest with every file's SHA-256 last, rename, fsync of the
    parent; then the pointers ``last`` and ``best``; then old ones are removed.

    Args:
        run: Where.
        state: What `TrainState.state_dict` gives.
        recipe: The resolved recipe, so that the folder alone is enough to load the model.
        choices: What "auto" chose.
        best: Whether ``best`` shall lead here.
        keep: How many to keep; the best is kept beside them.

    Raises:
        CheckpointError: If the model is not finite.
        OSError: If the disk refuses; what was there before is whole.
    """
    step = int(state["progress"]["step"])
    if (name := first_nan_tensor(state["model"] | state.get("training_weights", {}))) is not None:
        raise CheckpointError(f"The model is not finite at step {step} (first in {name}); it was not saved.")
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
        manifest = {"schema": SCHEMA_VERSION, "step": step, "torch": torch.__version__, "sha256": hashes}
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync(temporary)
        if final.exists():  # written when the run was stopped here, and now again with the last validation
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
    write_atomically(run.checkpoints / "last", final.name + "\n")
    if best:
        write_atomically(run.checkpoints / "best", final.name + "\n")
    _remove_old(run, keep)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder into memory and verify every byte of it.

    Raises:
        CheckpointError: If a file is missing, or is not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["schema"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} was written with schema {manifest['schema']}; this version reads {SCHEMA_VERSION}."
            )
        files = {name: read_verified(path / name, digest) for name, digest in manifest["sha256"].items()}
        about = json.loads(files["state.json"])
        model = safetensors.torch.load(files["model.safetensors"])
        state = _unpack(about["state"], safetensors.torch.load(files["optimizer.safetensors"])) | {"model": model}
        return Checkpoint(path, state, about["recipe"], about["log_bytes"], about["choices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error}).") from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path stands for.

    Args:
        path: A checkpoint folder, one of the files ``best`` and ``last``, or a run directory (its best, else its last).

    Raises:
        CheckpointError: If it leads to none.
    """
    candidates = [path, path / "checkpoints" / "best", path / "checkpoints" / "last", path / "best", path / "last"]
    for candidate in candidates:
        if (candidate / MANIFEST).is_file():
            return candidate
        if candidate.is_file() and candidate.stat().st_size < 200:
            named = candidate.parent / candidate.read_text(encoding="utf-8", errors="replace").strip()
            if named.parent == candidate.parent and (named / MANIFEST).is_file():
                return named
    raise CheckpointError(
        f"{path} is no checkpoint: give a run directory, its checkpoints/best or /last, or a folder step-NNNNNN."
    )


def newest_checkpoint(run: RunDirectory) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies.

    Returns:
        It, or None; and a sentence for each newer or partial one that was passed over.
    """
    _give_back_replaced(run)
    passed_over = [f"{path} is a partial checkpoint, left by a run that was killed." for path in _partial(run)]
    for path in reversed(complete_checkpoints(run)):
        try:
            return read_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def _give_back_replaced(run: RunDirectory) -> None:
    """Undo a replacement that was killed between its two renames."""
    for path in run.checkpoints.glob(".step-*.old.tmp"):
        final = run.checkpoints / path.name[1:].split(".")[0]
        if not final.exists():
            path.rename(final)


def remove_partial_checkpoints(run: RunDirectory, taken: Checkpoint | None) -> None:
    """Make room before a resumed run writes: remove what was left half-written, set damaged checkpoints aside.

    Args:
        run: Where.
        taken: The checkpoint to go on from; whatever is newer than it did not verify.
    """
    for path in (*_partial(run), *run.incidents.glob(".step-*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
    for path in complete_checkpoints(run):
        if taken is not None and _step_of(path) > _step_of(taken.path):
            path.rename(path.with_name(f"{path.name}.damaged"))


def truncate_logs(run: RunDirectory, log_bytes: dict[str, int]) -> None:
    """Cut the files of JSON lines back to where a checkpoint stands; what came after will be written again."""
    for log in run.logs:
        if log.exists() and log.stat().st_size > log_bytes.get(log.name, 0):
            os.truncate(log, log_bytes.get(log.name, 0))


def first_nan_tensor(model: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN; infinity may be meant, as in a mask."""
    return next((name for name, tensor in model.items() if bool(tensor.isnan().any())), None)


def complete_checkpoints(run: RunDirectory) -> list[Path]:
    """The checkpoint folders of a run, the oldest first; none is read, nor verified."""
    found = [path for path in run.checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _partial(run: RunDirectory) -> Iterator[Path]:
    yield from sorted(run.checkpoints.glob(".step-*.tmp"))


def _remove_old(run: RunDirectory, keep: int) -> None:
    best = run.checkpoints / "best"
    kept = {best.read_text(encoding="utf-8").strip()} if best.exists() else set()
    for path in complete_checkpoints(run)[: -max(1, keep)]:
        if path.name not in kept:
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
    """The bytes of a file whose SHA-256 is known.

    Raises:
        CheckpointError: If it is another one.
        OSError: If the file cannot be read.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that was written down.")
    return content


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # no such log yet; or a folder on Windows, which cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON; tensors are put aside under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(part, f"{name}/{place}", tensors) for place, part in enumerate(value)]
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
