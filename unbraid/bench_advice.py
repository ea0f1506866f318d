"""Advise on precision, compiling and batch size, from the measurements of `unbraid bench`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.config.recipe import Recipe
from unbraid.config.schema import toml_value
from unbraid.robust.precision import PRECISIONS

EQUALLY_FAST = 0.97
"""Variants with at least this share of the fastest's speed count as equally fast: a busy machine varies as much."""

MIN_GAIN = 1.1
"""A larger batch is mentioned only if it processes at least this many times as many examples per second."""


@dataclass(frozen=True)
class Variant:
    """One way to train by a recipe: a precision, compiled or not, and a batch size."""

    precision: str
    compiled: bool
    batch_size: int

    @property
    def words(self) -> str:
        """The variant in words, for progress and notes."""
        return f"{self.precision}{' compiled' * self.compiled}, batch {self.batch_size}"


@dataclass(frozen=True)
class BenchRow:
    """Speed and memory of a variant on this machine. All numbers are None if it could not be measured.

    Attributes:
        variant: The variant that was measured.
        examples_per_second: Training examples per second.
        step_seconds: Median wall time of a step.
        peak_memory_bytes: Peak memory of the accelerator; without one, of the process, without a compiler it started.
        first_step_seconds: Time from building the model to the end of the first step.
        note: Why there are no numbers, or what to know about them; else empty.
    """

    variant: Variant
    examples_per_second: float | None = None
    step_seconds: float | None = None
    peak_memory_bytes: int | None = None
    first_step_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Advice:
    """The variant to use, as keys of a recipe.

    Attributes:
        take: Values by recipe key, such as ``train.precision``; empty if nothing could be measured.
        words: The advice in sentences, with its reasons.
    """

    take: dict[str, Any]
    words: str


def advise(rows: Sequence[BenchRow], recipe: Recipe) -> Advice:
    """Advise on precision and compiling at the recipe's batch size; a faster larger batch is only mentioned.

    Args:
        rows: The measurements.
        recipe: Its budget decides whether compiling repays the time that it takes.
    """
    # A larger batch trains differently, so the advice keeps the batch size.
    own = [row for row in rows if row.variant.batch_size == recipe.data.batch_size]
    usable = [row for row in own if row.examples_per_second]
    if not usable:
        return Advice({}, _why_none_usable(own))
    best = _cheapest_of_fastest(usable)
    words = []

    # Compiling pays only if the run is long enough.
    eager = [row for row in usable if not row.variant.compiled]
    if best.variant.compiled and eager:
        best_eager = _cheapest_of_fastest(eager)
        steps_to_repay = _steps_to_repay(best, best_eager)
        planned = _planned_steps(recipe, best)
        gain = _ratio(best, best_eager)
        if steps_to_repay > planned:
            words = [
                f"Compiled, it would be {gain:.2f} times as fast, but {planned:.0f} steps do not repay the time for "
                "compiling."
            ]
            best = best_eager
        else:
            words = [f"Compiling makes it {gain:.2f} times as fast and is repaid after {steps_to_repay:.0f} steps."]

    listed = ", ".join(f"{key} = {toml_value(value)}" for key, value in keys_of(best.variant).items())
    first = f"Use {listed}: {rate_of(best)} examples per second"
    reference = [row for row in eager if row.variant.precision == "fp32" and row is not best]
    first += f", {_ratio(best, reference[0]):.2f} times as fast as fp32 without compiling." if reference else "."
    return Advice(keys_of(best.variant), " ".join([first, *words, *_larger_batch_sentence(rows, best)]))


def _cheapest_of_fastest(rows: Sequence[BenchRow]) -> BenchRow:
    """Return the fastest row; of equally fast ones prefer no compiling, then the precision that comes first."""
    fastest = max(row.examples_per_second or 0 for row in rows)
    equally_fast = [row for row in rows if (row.examples_per_second or 0) >= EQUALLY_FAST * fastest]
    return min(equally_fast, key=lambda row: (row.variant.compiled, list(PRECISIONS).index(row.variant.precision)))


def _ratio(row: BenchRow, other: BenchRow) -> float:
    return (row.examples_per_second or math.nan) / (other.examples_per_second or math.nan)


def _steps_to_repay(compiled: BenchRow, eager: BenchRow) -> float:
    """Return the number of steps after which compiling has saved the time that it took; infinity if never."""
    spent = (compiled.first_step_seconds or 0) - (eager.first_step_seconds or 0)
    saved_per_step = (eager.step_seconds or 0) - (compiled.step_seconds or 0)
    return max(0.0, spent / saved_per_step) if saved_per_step > 0 else math.inf


def _planned_steps(recipe: Recipe, row: BenchRow) -> float:
    # A budget of 0 means no limit.
    by_minutes = 60 * recipe.train.max_minutes / (row.step_seconds or math.nan)
    return min(recipe.train.max_steps or math.inf, by_minutes or math.inf)


def _larger_batch_sentence(rows: Sequence[BenchRow], best: BenchRow) -> list[str]:
    """Return a sentence if a larger batch is clearly faster, else nothing."""
    # Compare only rows that differ from the best one in nothing but the batch size.
    size = {"data.batch_size": best.variant.batch_size}
    comparable = [
        row for row in rows if row.examples_per_second and keys_of(row.variant) | size == keys_of(best.variant)
    ]
    fastest = max(comparable, key=lambda row: row.examples_per_second or 0)
    if _ratio(fastest, best) < MIN_GAIN:
        return []
    return [
        f"data.batch_size = {fastest.variant.batch_size} processes {_ratio(fastest, best):.2f} times as many examples "
        "per second, but trains differently: tune the learning rate again."
    ]


def _why_none_usable(rows: Sequence[BenchRow]) -> str:
    if not rows:
        return "No variant was measured."
    notes = ", ".join(dict.fromkeys(row.note for row in rows))
    advice = " Lower data.batch_size or data.excerpt_seconds, or raise train.accumulate." * ("memory" in notes)
    return f"No variant could be measured: {notes}.{advice}"


def keys_of(variant: Variant) -> dict[str, Any]:
    """Return a variant as recipe keys and values."""
    return {
        "train.precision": variant.precision,
        "train.compile": "on" if variant.compiled else "off",
        "data.batch_size": variant.batch_size,
    }


def rate_of(row: BenchRow) -> str:
    """Return the examples per second as text."""
    return short(row.examples_per_second or 0)


def short(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the decimal point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
