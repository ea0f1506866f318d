"""The run directory: file names, record dataclasses, append and read JSON lines; no torch."""

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from unbraid.errors import CheckpointError

SCHEMA_VERSION = 3
"""Of the run directory. Version 2 had other names for some fields and outcomes; `upgrade_row` translates them."""

_FIELDS_OF_VERSION_2 = {"limit": "max_norm", "norm_after": "clipped_grad_norm", "n_easy": "n_filtered"}
_ITEM_FIELDS_OF_VERSION_2 = {
    "levels_db": "estimate_levels_db",
    "likeness": "similarity",
    "beside_db": "source_residual_db",
}
_OUTCOMES_OF_VERSION_2 = {"all_easy": "all_filtered", "loss_scale": "fp16_overflow"}
_CODES_OF_VERSION_2 = {"STEP_SKIPPED_LOSS_SCALE": "STEP_SKIPPED_FP16_OVERFLOW"}

Outcome = Literal[
    "trained", "all_filtered", "nonfinite_loss", "over_limit", "nonfinite_gradient", "fp16_overflow", "out_of_memory"
]
"""What became of a step: ``trained``, or why it was skipped."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

SKIPPED_OUTCOMES: tuple[Outcome, ...] = tuple(outcome for outcome in OUTCOMES if outcome != "trained")
"""Outcomes of steps that changed no weights."""

FAULT_OUTCOMES: tuple[Outcome, ...] = ("nonfinite_loss", "over_limit", "nonfinite_gradient", "out_of_memory")
"""Outcomes that mean something is wrong. A batch of filtered examples is no fault, nor is an fp16 overflow: the loss
scale is found by overflowing now and then."""

TIMING_FIELDS = frozenset(
    {
        "seconds",
        "data_seconds",
        "examples_per_second",
        "elapsed_seconds",
        "peak_memory_bytes",
        "host_memory_bytes",
    }
)
"""What clock and system say: all else in ``steps.jsonl`` and ``validation.jsonl`` is the same in a resumed run."""


@dataclass(frozen=True, slots=True)
class ItemId:
    """Where an example came from; with the recipe it is enough to make the same example again.

    Attributes:
        purpose: ``train``, ``valid`` or ``test``.
        epoch: Pass over the data, from 0.
        index: Place in the pass, from 0.
        files: The files it was mixed from, sources first, then noise.
    """

    purpose: str
    epoch: int
    index: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One example of a sampled step, as the model left it.

    Attributes:
        item: Where it came from.
        loss: Its loss.
        weight: How much it counted; 0 where a filter took it out.
        order: Which output belongs to each target; empty where the loss does not say.
        estimate_levels_db: Mean power of each output, in dB of full scale.
        similarity: The largest correlation, by absolute value, of two outputs; 1 where they are the same sound.
        residual_db: Power of the mixture less the sum of the outputs over that of the mixture, in dB. A loss that
            ignores level leaves it open.
        source_levels_db: Mean power of each source, in dB of full scale.
        source_residual_db: Power of the mixture minus its sources over that of the mixture, in dB: noise, or
            a mistake.
    """

    item: ItemId
    loss: float | None
    weight: float
    order: tuple[int, ...]
    estimate_levels_db: tuple[float, ...]
    similarity: float | None
    residual_db: float | None
    source_levels_db: tuple[float, ...] = ()
    source_residual_db: float | None = None


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block of the model in a sampled step.

    Attributes:
        grad_norm: L2 norm of its share of the averaged, unscaled gradient, before clipping.
        update_ratio: L2 norm of what the step added to its weights over that of the weights: around 1e-3 is usual.
    """

    grad_norm: float | None
    update_ratio: float | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, or one that was left out.

    Attributes:
        step: Number of the step, from 1; a step left out has a number too.
        epoch: The pass over the data that the first example on the main rank belongs to, from 0.
        outcome: ``trained``, or why it was left out: ``nonfinite_loss``, ``over_limit``, ``all_filtered``,
            ``nonfinite_gradient``, ``loss_scale``, ``out_of_memory``.
        loss: Weighted mean over the examples trained on; where none was, over all examples as they came out, which
            may be NaN.
        grad_norm: L2 norm of the averaged and unscaled gradient, before clipping; NaN or infinite as it came out.
        max_norm:What the clipper allowed; infinite for no limit. None where it was not asked.
        clipped: Whether the step was taken with a gradient longer than that.
        clipped_grad_norm: The gradient's norm after transforms and clipping: what the optimizer got.
        si_sdr: Mean SI-SDR of each source over the examples trained on, in dB; empty where the loss does not say
            which output belongs to which.
        lr: Learning rate of the first parameter group in this step.
        loss_scale: Factor on the loss under fp16; 1 elsewhere.
        n_trained: Examples with weight in the gradient; 0 in a step that was left out.
        n_filtered: Examples a filter took out.
        n_bad: Examples whose loss was not finite or over the limit; where the step was rescued, those set aside.
        bad_items: The examples behind a fault, on this rank: those whose loss or gradient is bad.
        n_micro_batches: Pieces that this rank's examples went through the model in.
        blocks: Each block of the model, in sampled steps.
        items: Each example of this rank, in sampled steps.
        seconds: Wall time of the step, without waiting for data.
        data_seconds: Wall time spent waiting for the batch.
        examples_per_second: Examples through the model in this step over all of its wall time.
        elapsed_seconds: Wall time of the run so far, over all its resumptions.
        peak_memory_bytes: The most memory held so far: on the accelerator, or by this process where there is none.
        host_memory_bytes: The most memory held so far by this process, beside an accelerator too.
    """

    step: int
    epoch: int
    outcome: Outcome
    loss: float | None
    grad_norm: float | None
    max_norm: float | None
    lr: float
    loss_scale: float
    n_trained: int
    n_filtered: int
    n_bad: int
    bad_items: tuple[ItemId, ...] = ()
    clipped: bool = False
    clipped_grad_norm: float | None = None
    si_sdr: tuple[float | None, ...] = ()
    n_micro_batches: int = 1
    blocks: Mapping[str, BlockRecord] = field(default_factory=dict)
    items: tuple[ItemRecord, ...] = ()
    seconds: float = 0.0
    data_seconds: float = 0.0
    examples_per_second: float = 0.0
    elapsed_seconds: float = 0.0
    peak_memory_bytes: int = 0
    host_memory_bytes: int = 0

    @property
    def trained(self) -> bool:
        """Whether the weights moved."""
        return self.outcome == "trained"


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One pass over the validation examples.

    Attributes:
        step: The step after which it was made.
        loss: Mean loss; None where it is not finite, and then never "best".
        si_sdr: Mean SI-SDR of the best-assigned estimates, in dB.
        si_sdri: Mean improvement over the mixture, in dB.
        n_items: Mixtures separated.
        best: Whether it is the best so far, by loss.
        lr: Learning rate after this validation (a plateau schedule may have lowered it).
        elapsed_seconds: Wall time of the run so far.
        seconds: Wall time of this validation.
        orders: Which output was given to each source, for each item; empty where that is not searched for.
        item_si_sdri: Improvement of each item over its mixture, in dB; None where it has no value.
    """

    step: int
    loss: float | None
    si_sdr: float | None
    si_sdri: float | None
    n_items: int
    best: bool
    lr: float
    elapsed_seconds: float = 0.0
    seconds: float = 0.0
    orders: tuple[tuple[int, ...], ...] = ()
    item_si_sdri: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened outside of plain training.

    Attributes:
        code: Stable code, such as ``AUDIO_NONFINITE`` or ``STEP_SKIPPED_NONFINITE_LOSS``.
        step: The step it belongs to.
        rank: The process it happened in.
        message: One sentence in plain words.
        files: The files behind it, where they are known.
        evidence: Figures and positions that show it.
    """

    code: str
    step: int
    rank: int
    message: str
    files: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """The names of the files in a run directory: the only thing that parts of unbraid share about a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, TOML."""
        return self.path / "recipe.toml"

    @property
    def environment(self) -> Path:
        """Versions, device, threads, what "auto" chose, and whether the loss is in dB, JSON."""
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        """How many files and speakers are trained on and validated on, and which are in both, JSON."""
        return self.path / "data.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that may write here."""
        return self.path / "lock"

    @property
    def steps(self) -> Path:
        """One `StepRecord` a line."""
        return self.path / "steps.jsonl"

    @property
    def validation(self) -> Path:
        """One `ValidationRecord` a line."""
        return self.path / "validation.jsonl"

    @property
    def events(self) -> Path:
        """One `Event` a line."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders ``step-NNNNNN``, and the small text files ``best`` and ``last`` that name one of them."""
        return self.path / "checkpoints"

    @property
    def incidents(self) -> Path:
        """Folders that hold what `unbraid replay` needs to run a bad step again."""
        return self.path / "incidents"

    @property
    def audio(self) -> Path:
        """The first validation examples to hear, and folders ``step-NNNNNN`` of what each validation made of them."""
        return self.path / "audio"

    @property
    def logs(self) -> tuple[Path, Path, Path]:
        """The files of JSON lines, which a resumed run cuts back to where its checkpoint stands."""
        return self.steps, self.validation, self.events


def to_json_row(record: Any) -> dict[str, Any]:
    """A record dataclass as a dict that is valid JSON: a value that is not finite is null, with its text beside it."""
    return json_row(asdict(record))


def json_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `to_json_row`, of a mapping."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        row[name] = _finite(value)
        if isinstance(value, float) and not math.isfinite(value):
            row[f"{name}_text"] = str(value)
    return row


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return json_row(value)
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def append_record(path: Path, record: Any) -> None:
    """Append one record as one line, in a single write; of a line that a full disk cuts short nothing stays.

    Raises:
        OSError: If the disk refuses.
    """
    line = (json.dumps(to_json_row(record), allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_rows(
    path: Path, last: int | None = None, *, first: int | None = None, begin: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """Read JSON lines; a line that cannot be read (the torn last one of a killed run) is counted, not raised.

    Args:
        path: The file; one that is not there is empty.
        last: Read no more than about so many lines of its end, so that a long file costs no more; all if None.
        first: Read no more than so many lines; all if None.
        begin: Byte to begin at; what is left of a line there is passed over.

    Returns:
        The rows, and how many lines were left out.
    """
    rows: list[dict[str, Any]] = []
    torn = 0
    if not path.exists():
        return rows, torn
    if last is not None:
        begin = max(begin, path.stat().st_size - last * _BYTES_A_LINE)
    for some, n_torn in row_blocks(path, first=first, last=last, begin=begin):
        rows += some
        torn += n_torn
    return rows, torn


def row_blocks(
    path: Path, *, first: int | None = None, last: int | None = None, begin: int = 0, size: int = 4096
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """As `read_rows`, some lines at a time: the rows of each block, and how many of its lines were left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(begin)
        if begin:
            file.readline()  # the rest of a line
        lines = islice(file, first) if last is None else iter(deque(islice(file, first), last))
        while block := list(islice(lines, size)):
            parsed = [_parsed(line) for line in block]
            rows = [row for row in parsed if isinstance(row, dict)]
            yield rows, len(parsed) - len(rows)


def _parsed(line: bytes) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return upgrade_row(row) if isinstance(row, dict) else row


def upgrade_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of ``steps.jsonl`` or ``events.jsonl`` under today's names, whichever version wrote it."""
    if "n_easy" in row:  # a step of version 2
        row = _renamed(row, _FIELDS_OF_VERSION_2)
        row["outcome"] = _OUTCOMES_OF_VERSION_2.get(str(row.get("outcome")), row.get("outcome"))
        if row.get("items"):
            row["items"] = [_renamed(item, _ITEM_FIELDS_OF_VERSION_2) for item in row["items"]]
    elif row.get("code") in _CODES_OF_VERSION_2:
        row["code"] = _CODES_OF_VERSION_2[row["code"]]
    return row


def _renamed(row: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    # the text of a value that is not finite stands beside it, under the same name with a suffix
    texts = {f"{old}_text": f"{new}_text" for old, new in names.items()}
    return {names.get(name) or texts.get(name) or name: value for name, value in row.items()}


_BYTES_A_LINE = 2000
"""More than a step that is not looked at closely takes."""


def read_steps(path: Path) -> list[StepRecord]:
    """The steps of a run; a null whose text stands beside it comes back as the NaN or infinity that it was."""
    return [_from_row(StepRecord, row) for row in read_rows(path)[0]]


def read_validation(path: Path) -> list[ValidationRecord]:
    """The validations of a run, as `read_steps`."""
    return [_from_row(ValidationRecord, row) for row in read_rows(path)[0]]


def _from_row(kind: type[Any], row: dict[str, Any]) -> Any:
    names = [f.name for f in fields(kind) if f.name in row]
    values: dict[str, Any] = {
        name: float(row[f"{name}_text"]) if f"{name}_text" in row else row[name] for name in names
    }
    if "bad_items" in values:
        values["bad_items"] = tuple(map(_item_id, values["bad_items"]))
        values["si_sdr"] = tuple(values.get("si_sdr", ()))
        values["blocks"] = {name: _from_row(BlockRecord, block) for name, block in values.get("blocks", {}).items()}
        values["items"] = tuple(map(_item_record, values.get("items", ())))
    if kind is ValidationRecord:
        values["orders"] = tuple(map(tuple, values.get("orders", ())))
        values["item_si_sdri"] = tuple(values.get("item_si_sdri", ()))
    return kind(**values)


def _item_id(row: Mapping[str, Any]) -> ItemId:
    return ItemId(**{**row, "files": tuple(row["files"])})


def _item_record(row: dict[str, Any]) -> ItemRecord:
    tuples = {name: tuple(row.get(name, ())) for name in ("order", "estimate_levels_db", "source_levels_db")}
    return replace(_from_row(ItemRecord, row), item=_item_id(row["item"]), **tuples)


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Hold the run directory's lock, so that two runs never write into one; a killed owner leaves it free.

    Raises:
        CheckpointError: If another process holds it.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{run.path} cannot be the run directory ({error.strerror}); give another.") from error
    with run.lock.open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise CheckpointError(
                f"{run.path} is being written by another run (process {owner}); wait for it, or give another --run."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
