"""Rows of ``steps.jsonl`` as columns, taken up block by block, so that the rows of a long run are never all held."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unbraid.type_aliases import FloatArray, Row

NUMBERS = (
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
class Sampled:
    """The steps that were looked at closely; of a long run some of them, and all of the last.

    Attributes:
        step: ``(sample,)``.
        blocks: Names of the model's blocks, in its order.
        norms: Of each block's gradient, ``(sample, block)``.
        ratios: Of each block's update to its weights, ``(sample, block)``.
        items: The examples of each sampled step, as `unbraid.records.ItemRecord` has them.
    """

    step: FloatArray
    blocks: tuple[str, ...]
    norms: FloatArray
    ratios: FloatArray
    items: Sequence[Sequence[Row]]


class Columns:
    """Steps taken up block by block; rows without a number of their step are left out."""

    def __init__(self) -> None:
        self.n_torn = 0
        self._numbers: dict[str, list[FloatArray]] = {name: [] for name in NUMBERS}
        self._outcomes: list[npt.NDArray[np.str_]] = []
        self._si_sdr: list[FloatArray] = []
        self._sampled = _Evenly()

    def add(self, rows: Sequence[Row], n_torn: int = 0) -> None:
        """Take up rows, and how many lines among them could not be read."""
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        for name, parts in self._numbers.items():
            parts.append(numbers(rows, name))
        self._outcomes.append(np.array([str(row.get("outcome", "")) for row in rows], dtype=np.str_))
        self._si_sdr.append(rows_of([_list(row.get("si_sdr")) for row in rows]))
        for row in rows:
            if row.get("blocks") or row.get("items"):
                self._sampled.add(row)
        self.n_torn += n_torn

    def take(self) -> tuple[dict[str, FloatArray], npt.NDArray[np.str_], FloatArray, Sampled]:
        """Numbers of all steps by name, outcomes, SI-SDR of each source, and the sampled steps; the rest is let go."""
        of_step = {name: np.concatenate([np.empty(0), *self._numbers.pop(name)]) for name in NUMBERS}
        outcome = np.concatenate([np.empty(0, dtype="<U1"), *self._outcomes])
        return of_step, outcome, _beneath(self._si_sdr), _sampled(self._sampled.rows())


class _Evenly:
    """Rows of a long run, evenly thinned to so many; the last of them all."""

    LIMIT, N_LAST = 2000, 100

    def __init__(self) -> None:
        self.kept: list[tuple[int, Row]] = []
        self.last: deque[tuple[int, Row]] = deque(maxlen=self.N_LAST)
        self.n = 0
        self.stride = 1

    def add(self, row: Row) -> None:
        if self.n % self.stride == 0:
            self.kept.append((self.n, row))
        if len(self.kept) > self.LIMIT:
            self.kept, self.stride = self.kept[::2], 2 * self.stride
        self.last.append((self.n, row))
        self.n += 1

    def rows(self) -> list[Row]:
        return [row for _, row in sorted(dict([*self.kept, *self.last]).items())]


def _sampled(rows: Sequence[Row]) -> Sampled:
    blocks = tuple(next((row["blocks"] for row in rows if row.get("blocks")), {}))
    return Sampled(
        step=numbers(rows, "step"),
        blocks=blocks,
        norms=_of_blocks(rows, blocks, "grad_norm"),
        ratios=_of_blocks(rows, blocks, "update_ratio"),
        items=[row.get("items") or [] for row in rows],
    )


def numbers(rows: Sequence[Row], name: str) -> FloatArray:
    """One number of each row; NaN where there is none, infinite where its text says so."""
    try:
        values = np.array([row.get(name) for row in rows], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.empty(0)
    if values.shape != (len(rows),):
        return np.array([_number(row, name) for row in rows], dtype=np.float64)
    text = f"{name}_text"
    for place in np.flatnonzero(np.isnan(values)).tolist():
        if text in rows[place]:
            values[place] = _float(rows[place][text])
    return values


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return _float(row.get(f"{name}_text") if value is None else value)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _list(value: Any) -> list[Any]:
    """What is a list as it is; nothing of anything else."""
    return value if isinstance(value, list) else []


def rows_of(values: Sequence[Sequence[Any]], width: int | None = None) -> FloatArray:
    """Lists of numbers as an array as wide as asked for, or as the longest; NaN where one is missing."""
    lengths = set(map(len, values))
    width = max(lengths, default=0) if width is None else width
    if lengths == {width}:
        try:
            return np.array(values, dtype=np.float64)
        except (TypeError, ValueError):
            pass
    table = np.full((len(values), width), np.nan)
    for place, row in enumerate(values):
        table[place, : len(row)] = list(map(_float, row))
    return table


def _beneath(tables: Sequence[FloatArray]) -> FloatArray:
    """Tables one under the other, as wide as the widest; NaN where one is not."""
    whole = np.full((sum(map(len, tables)), max((table.shape[1] for table in tables), default=0)), np.nan)
    first = 0
    for table in tables:
        whole[first : first + len(table), : table.shape[1]] = table
        first += len(table)
    return whole


def _of_blocks(rows: Sequence[Row], blocks: Sequence[str], name: str) -> FloatArray:
    of_rows: Iterable[Row] = [row.get("blocks") or {} for row in rows]
    return rows_of([[_number(found.get(block) or {}, name) for block in blocks] for found in of_rows], len(blocks))
