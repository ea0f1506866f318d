"""Records of a run: steps, validations and events; their outcomes and codes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from unbraid.io import append_row, json_line_blocks, read_json_lines, to_json_row
from unbraid.schema_version import upgrade_row
from unbraid.type_aliases import Row

Outcome = Literal[
    "trained", "all_filtered", "nonfinite_loss", "over_limit", "nonfinite_gradient", "fp16_overflow", "out_of_memory"
]
"""``trained`` if the step updated the weights, else the reason why it was skipped."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

SKIPPED_OUTCOMES: tuple[Outcome, ...] = tuple(outcome for outcome in OUTCOMES if outcome != "trained")

FAULT_OUTCOMES: tuple[Outcome, ...] = ("nonfinite_loss", "over_limit", "nonfinite_gradient", "out_of_memory")
"""Outcomes that mean that something is wrong. A batch of filtered examples is not a fault, nor is an fp16 overflow:
dynamic loss scaling finds its scale by overflowing now and then."""

EventCode = Literal[
    # audio files
    "AUDIO_EMPTY",
    "AUDIO_EXCLUDED",
    "AUDIO_NONFINITE",
    "AUDIO_SILENT",
    "AUDIO_TOO_SHORT",
    "AUDIO_UNREADABLE",
    "AUDIO_WRONG_RATE",
    "DATA_PASSED_OVER",
    "DATA_UNUSABLE",
    "DATA_WORKER_LOST",
    # steps
    "OUT_OF_MEMORY",
    "RANKS_DIFFER",
    "SLOW_RANK",
    "STEP_RAISED",
    "STEP_RESCUED",
    "STEP_SKIPPED_FP16_OVERFLOW",
    "STEP_SKIPPED_NONFINITE_GRADIENT",
    "STEP_SKIPPED_NONFINITE_LOSS",
    "STEP_SKIPPED_OUT_OF_MEMORY",
    "STEP_SKIPPED_OVER_LIMIT",
    "WEIGHTS_NONFINITE",
    # what could not be written
    "AUDIO_NOT_SAVED",
    "CHECKPOINT_FAILED",
    "INCIDENT_FAILED",
    "LOGGER_FAILED",
    "LOG_FAILED",
    # starting and resuming
    "AUTO_CHOSEN",
    "CHECKPOINT_SKIPPED",
    "RECIPE_CHANGED",
    "RUN_RESTARTED",
    "RUN_RESUMED",
]
"""Code of an event; stable, so that scripts can rely on it."""

EVENT_CODES: tuple[EventCode, ...] = get_args(EventCode)


def skip_code(outcome: Outcome) -> EventCode:
    """Return the code of the event for a step that was skipped with this outcome."""
    return cast(EventCode, f"STEP_SKIPPED_{outcome.upper()}")


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
"""Measurements of time and memory. Every other field of ``steps.jsonl`` and ``validation.jsonl`` is bit-identical in a
resumed run."""


@dataclass(frozen=True, slots=True)
class ItemId:
    """Identity of an example; together with the recipe it is enough to make the same example again.

    Attributes:
        purpose: ``train``, ``valid`` or ``test``.
        epoch: Pass over the data, from 0.
        index: Position in the pass, from 0.
        files: The files that were mixed, sources first, then noise.
    """

    purpose: str
    epoch: int
    index: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One example of a sampled step, with measurements of the model's output.

    Attributes:
        item: Identity of the example.
        loss: Loss of the example.
        weight: Weight in the gradient; 0 if a filter dropped it.
        order: Index of the output assigned to each target; empty if the loss has no assignment.
        estimate_levels_db: Mean power of each output in dB of full scale.
        similarity: Largest absolute correlation between two outputs; 1 if they contain the same sound.
        residual_db: Power of the mixture minus the sum of the outputs, relative to the mixture, in dB. It means nothing
            with a loss that ignores level.
        source_levels_db: Mean power of each source in dB of full scale.
        source_residual_db: Power of the mixture minus its sources, relative to the mixture, in dB. Noise, or an error
            in the data, makes it large.
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
        grad_norm: L2 norm of the block's part of the averaged, unscaled gradient, before clipping.
        update_ratio: L2 norm of the update of the block's weights over that of the weights; about 1e-3 is usual.
    """

    grad_norm: float | None
    update_ratio: float | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, taken or skipped.

    Attributes:
        step: Number of the step, from 1; skipped steps are numbered too.
        epoch: Pass over the data, from 0, of the first example on the main rank.
        outcome: ``trained``, or why the step was skipped; see `Outcome`.
        loss: Weighted mean over the trained examples. If there are none, the mean over all examples, which may be NaN.
        grad_norm: L2 norm of the averaged and unscaled gradient, before clipping; may be NaN or infinite.
        max_norm: Threshold of the clipper; infinite for no limit, None if the clipper did not run.
        lr: Learning rate of the first parameter group in this step.
        loss_scale: Loss scale of fp16; 1 in other precisions.
        n_trained: Examples with weight in the gradient; 0 in a skipped step.
        n_filtered: Examples dropped by a filter.
        n_bad: Examples whose loss was not finite or over the limit. In a rescued step, the excluded examples.
        bad_items: The bad examples of this rank, by loss or by gradient.
        clipped: True if the step was taken and its gradient was clipped.
        clipped_grad_norm: Gradient norm after transforms and clipping, as the optimizer received it.
        si_sdr: Mean SI-SDR of each source over the trained examples, in dB; empty if the loss has no assignment of
            outputs to sources.
        n_micro_batches: Micro-batches into which this rank's examples were divided.
        blocks: Statistics of each block of the model, in sampled steps.
        items: Each example of this rank, in sampled steps.
        seconds: Wall time of the step, without waiting for data.
        data_seconds: Wall time spent waiting for the batch.
        examples_per_second: Examples of this step over all of its wall time.
        elapsed_seconds: Wall time of the run so far, over all resumes.
        peak_memory_bytes: Peak memory so far of the accelerator, or of this process if there is none.
        host_memory_bytes: Peak memory so far of this process, with or without an accelerator.
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
        """True if the step updated the weights."""
        return self.outcome == "trained"


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One pass over the validation examples.

    Attributes:
        step: The step after which it ran.
        loss: Mean loss. None if it is not finite; such a validation is never the best.
        si_sdr: Mean SI-SDR of the best-assigned estimates, in dB.
        si_sdri: Mean improvement over the mixture, in dB.
        n_items: Number of mixtures.
        n_undefined: How many of them have no improvement, and do not count in its mean: their references are silent, or
            alone in the mixture.
        best: True if its loss is the lowest so far.
        lr: Learning rate after this validation; a plateau schedule may have lowered it.
        elapsed_seconds: Wall time of the run so far.
        seconds: Wall time of this validation.
        orders: Index of the output assigned to each source, for each item; empty if the loss has no assignment.
        item_si_sdri: Improvement of each item over its mixture in dB; None if it is undefined.
    """

    step: int
    loss: float | None
    si_sdr: float | None
    si_sdri: float | None
    n_items: int
    best: bool
    lr: float
    n_undefined: int = 0
    elapsed_seconds: float = 0.0
    seconds: float = 0.0
    orders: tuple[tuple[int, ...], ...] = ()
    item_si_sdri: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened outside of ordinary training.

    Attributes:
        code: One of `EVENT_CODES`.
        step: The step it belongs to.
        rank: The rank of the process it happened in.
        message: One sentence for the user.
        files: The files involved, if they are known.
        evidence: Numbers and positions that show it.
    """

    code: EventCode
    step: int
    rank: int
    message: str
    files: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


def append_record(path: Path, record: Any) -> None:
    """Append one record to a file of JSON lines.

    Raises:
        OSError: If the line cannot be written.
    """
    append_row(path, to_json_row(record))


def read_rows(
    path: Path, last: int | None = None, *, first: int | None = None, begin: int = 0
) -> tuple[list[Row], int]:
    """Read the rows of a log under today's field names, as `unbraid.io.read_json_lines` does."""
    rows, n_torn = read_json_lines(path, last, first=first, begin=begin)
    return [upgrade_row(row) for row in rows], n_torn


def row_blocks(path: Path, *, size: int = 4096) -> Iterator[tuple[list[Row], int]]:
    """Yield the rows of a log block by block under today's field names, as `unbraid.io.json_line_blocks` does."""
    for rows, n_torn in json_line_blocks(path, size=size):
        yield [upgrade_row(row) for row in rows], n_torn


def read_steps(path: Path) -> list[StepRecord]:
    """Return the steps of a run; a number stored as null and text becomes the original NaN or infinity."""
    return [_from_row(StepRecord, row) for row in read_rows(path)[0]]


def read_validation(path: Path) -> list[ValidationRecord]:
    """Return the validations of a run, with NaN and infinity restored as in `read_steps`."""
    return [_from_row(ValidationRecord, row) for row in read_rows(path)[0]]


def _from_row(kind: type[Any], row: Row) -> Any:
    # Fields that this version does not know are ignored; fields that the row does not have keep their defaults.
    names = [f.name for f in fields(kind) if f.name in row]
    values: dict[str, Any] = {
        name: float(row[f"{name}_text"]) if f"{name}_text" in row else row[name] for name in names
    }
    # JSON has lists only; the records hold tuples and nested records.
    if kind is StepRecord:
        values["bad_items"] = tuple(map(_item_id, values.get("bad_items", ())))
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
