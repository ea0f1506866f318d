"""Rows of ``steps.jsonl`` as columns, collected block by block: the rows of a long run are never all in memory."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.type_aliases import FloatArray, Row

NUMBER_FIELDS = (
    "step",
    "loss",
    "grad_norm",
    "max_norm",
    "clipped_grad_norm",
    "lr",
    "loss_scale",
    "n_trained",
    "n_filtered",
    "clipped",
    "seconds",
    "data_seconds",
    "examples_per_second",
    "peak_memory_bytes",
    "host_memory_bytes",
)


@dataclass(frozen=True)
class SampledSteps:
    """Steps with statistics per block and per example. Of a long run these are some of them, and all of the last.

    Attributes:
        step: ``(sample,)``.
        blocks: Names of the model's blocks, in its order.
        grad_norms: L2 norm of each block's gradient, ``(sample, block)``.
        update_ratios: Norm of each block's update over the norm of its weights, ``(sample, block)``.
        items: The examples of each sampled step, as rows of `unbraid.records.ItemRecord`.
    """

    step: FloatArray
    blocks: tuple[str, ...]
    grad_norms: FloatArray
    update_ratios: FloatArray
    items: Sequence[Sequence[Row]]


class StepColumns:
    """Collects rows of steps as columns; rows without a step number are skipped."""

    def __init__(self) -> None:
        self.n_torn = 0
        self._numbers: dict[str, list[FloatArray]] = {name: [] for name in NUMBER_FIELDS}
        self._outcomes: list[npt.NDArray[np.str_]] = []
        self._si_sdr: list[FloatArray] = []
        self._sample = _EvenSample()

    def add(self, rows: Sequence[Row], n_torn: int = 0) -> None:
        """Add rows, and the number of lines among them that could not be read."""
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        for name, parts in self._numbers.items():
            parts.append(number_column(rows, name))
        self._outcomes.append(np.array([str(row.get("outcome", "")) for row in rows], dtype=np.str_))
        si_sdr = [row.get("si_sdr") for row in rows]
        self._si_sdr.append(padded_array([value if isinstance(value, list) else [] for value in si_sdr]))
        for row in rows:
            if row.get("blocks") or row.get("items"):
                self._sample.add(row)
        self.n_torn += n_torn

    def finish(self) -> tuple[dict[str, FloatArray], npt.NDArray[np.str_], FloatArray, SampledSteps]:
        """Return number columns by name, outcomes, SI-SDR ``(step, source)``, and the sampled steps; call it once."""
        # Each list of parts is dropped as soon as it is joined: both at once would double the memory.
        numbers = {name: np.concatenate([np.empty(0), *self._numbers.pop(name)]) for name in NUMBER_FIELDS}
        outcomes = np.concatenate([np.empty(0, dtype="<U1"), *self._outcomes])
        return numbers, outcomes, _stack_padded(self._si_sdr), _sampled_steps(self._sample.rows())


class _EvenSample:
    """Keeps an evenly spaced sample of a stream of rows of unknown length, and all of the last rows."""

    LIMIT = 2000
    N_LAST = 100

    def __init__(self) -> None:
        self.sample: list[tuple[int, Row]] = []
        self.last: deque[tuple[int, Row]] = deque(maxlen=self.N_LAST)
        self.n = 0
        self.stride = 1

    def add(self, row: Row) -> None:
        if self.n % self.stride == 0:
            self.sample.append((self.n, row))
        # At the limit, drop every second row and take every second row from now on: the spacing stays even.
        if len(self.sample) > self.LIMIT:
            self.sample = self.sample[::2]
            self.stride *= 2
        self.last.append((self.n, row))
        self.n += 1

    def rows(self) -> list[Row]:
        by_index = dict([*self.sample, *self.last])
        return [row for _, row in sorted(by_index.items())]


def _sampled_steps(rows: Sequence[Row]) -> SampledSteps:
    blocks = tuple(next((row["blocks"] for row in rows if row.get("blocks")), {}))
    return SampledSteps(
        step=number_column(rows, "step"),
        blocks=blocks,
        grad_norms=_block_columns(rows, blocks, "grad_norm"),
        update_ratios=_block_columns(rows, blocks, "update_ratio"),
        items=[row.get("items") or [] for row in rows],
    )


def _block_columns(rows: Sequence[Row], blocks: Sequence[str], name: str) -> FloatArray:
    table = np.full((len(rows), len(blocks)), np.nan)
    for index, row in enumerate(rows):
        block_rows = row.get("blocks") or {}
        table[index] = [_number(block_rows.get(block) or {}, name) for block in blocks]
    return table


def number_column(rows: Sequence[Row], name: str) -> FloatArray:
    """Return one number per row, ``(row,)``: NaN where it is missing, infinite where ``NAME_text`` says so."""
    # Fast path: numpy turns None into NaN. It refuses text and nested lists.
    try:
        values = np.array([row.get(name) for row in rows], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.empty(0)
    if values.shape != (len(rows),):
        return np.array([_number(row, name) for row in rows], dtype=np.float64)
    text = f"{name}_text"
    for index in np.flatnonzero(np.isnan(values)).tolist():
        if text in rows[index]:
            values[index] = _to_float(rows[index][text])
    return values


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return _to_float(row.get(f"{name}_text") if value is None else value)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def padded_array(rows: Sequence[Sequence[Any]]) -> FloatArray:
    """Return lists of numbers as one array, ``(row, longest)``, with NaN where a number is missing."""
    lengths = set(map(len, rows))
    # Fast path: lists of one length, all of them numbers or None.
    if len(lengths) == 1:
        try:
            return np.array(rows, dtype=np.float64)
        except (TypeError, ValueError):
            pass
    table = np.full((len(rows), max(lengths, default=0)), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = list(map(_to_float, row))
    return table


def _stack_padded(tables: Sequence[FloatArray]) -> FloatArray:
    """Stack tables of different widths, padded on the right with NaN."""
    n_columns = max((table.shape[1] for table in tables), default=0)
    stacked = np.full((sum(map(len, tables)), n_columns), np.nan)
    first = 0
    for table in tables:
        stacked[first : first + len(table), : table.shape[1]] = table
        first += len(table)
    return stacked
