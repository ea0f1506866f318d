"""What follows from `unbraid bench`: which precision, whether to compile, and a word on larger batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.config.recipe import Recipe
from unbraid.robust.precision import PRECISIONS

AS_FAST = 0.97
"""Who does this share of the fastest's examples a second is as fast: it is no more than a busy machine takes."""

WORTH_TELLING = 1.1
"""So many times the examples a second make a larger batch worth a word."""


@dataclass(frozen=True)
class Variant:
    """One way to train by a recipe."""

    precision: str
    compiled: bool
    batch_size: int

    @property
    def words(self) -> str:
        """In a line of progress."""
        return f"{self.precision}{' compiled' * self.compiled}, batch {self.batch_size}"


@dataclass(frozen=True)
class BenchRow:
    """What a variant does on this machine.

    Attributes:
        variant: Which.
        examples_per_second: None where there are no figures, as for all that follow.
        step_seconds: Median, of wall time.
        peak_memory_bytes: On the accelerator; of the whole process where there is none, but not of g++ beside it.
        first_step_seconds: From building the model to the end of the first step.
        note: Why there are no figures, or what to know of them; empty where there is nothing to say.
    """

    variant: Variant
    examples_per_second: float | None = None
    step_seconds: float | None = None
    peak_memory_bytes: int | None = None
    first_step_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Advice:
    """Which variant to take, in the words of a recipe.

    Attributes:
        take: Values by recipe key, such as ``train.precision``; empty where nothing could be measured.
        words: The same as a sentence, with its reasons.
    """

    take: dict[str, Any]
    words: str


def advise(rows: Sequence[BenchRow], recipe: Recipe) -> Advice:
    """Which precision to take, and whether to compile, at the recipe's batch size; a larger one is only told of.

    Args:
        rows: What was measured.
        recipe: Its budget says whether the seconds that compiling takes come back.
    """
    own = [row for row in rows if row.variant.batch_size == recipe.data.batch_size]
    usable = [row for row in own if row.examples_per_second]
    if not usable:
        return Advice({}, _why_nothing(own))
    best, words = _pick(usable), []
    eager = [row for row in usable if not row.variant.compiled]
    if best.variant.compiled and eager:
        after, planned = _won_back_after(best, _pick(eager)), _planned_steps(recipe, best)
        gain = _ratio(best, _pick(eager))
        if after > planned:
            words = [
                f"Compiled it does {gain:.2f} times as much, which the start of {planned:.0f} steps does not repay."
            ]
            best = _pick(eager)
        else:
            words = [
                f"Compiling does {gain:.2f} times as much; what it takes at the start comes back in {after:.0f} steps."
            ]
    listed = ", ".join(f"{key} = {_toml(value)}" for key, value in keys_of(best.variant).items())
    first = f"Take {listed}: {rate_of(best)} examples a second"
    reference = [row for row in eager if row.variant.precision == "fp32" and row is not best]
    first += f", {_ratio(best, reference[0]):.2f} times fp32 not compiled." if reference else "."
    return Advice(keys_of(best.variant), " ".join([first, *words, *_of_larger(rows, best)]))


def _pick(rows: Sequence[BenchRow]) -> BenchRow:
    """The fastest; of those that are as fast, the one that asks for the least."""
    fastest = max(row.examples_per_second or 0 for row in rows)
    as_fast = [row for row in rows if (row.examples_per_second or 0) >= AS_FAST * fastest]
    return min(as_fast, key=lambda row: (row.variant.compiled, list(PRECISIONS).index(row.variant.precision)))


def _ratio(row: BenchRow, other: BenchRow) -> float:
    return (row.examples_per_second or math.nan) / (other.examples_per_second or math.nan)


def _won_back_after(compiled: BenchRow, eager: BenchRow) -> float:
    """Steps until what compiling saves is what it took."""
    taken = (compiled.first_step_seconds or 0) - (eager.first_step_seconds or 0)
    saved = (eager.step_seconds or 0) - (compiled.step_seconds or 0)
    return max(0.0, taken / saved) if saved > 0 else math.inf


def _planned_steps(recipe: Recipe, row: BenchRow) -> float:
    by_minutes = 60 * recipe.train.max_minutes / (row.step_seconds or math.nan)
    return min(recipe.train.max_steps or math.inf, by_minutes or math.inf)


def _of_larger(rows: Sequence[BenchRow], best: BenchRow) -> list[str]:
    """A sentence where a larger batch does clearly more."""
    size = {"data.batch_size": best.variant.batch_size}
    alike = [row for row in rows if row.examples_per_second and keys_of(row.variant) | size == keys_of(best.variant)]
    most = max(alike, key=lambda row: row.examples_per_second or 0)
    if _ratio(most, best) < WORTH_TELLING:
        return []
    return [
        f"data.batch_size = {most.variant.batch_size} does {_ratio(most, best):.2f} times as many examples a second, "
        "but is another training: the learning rate has to be found anew."
    ]


def _why_nothing(rows: Sequence[BenchRow]) -> str:
    if not rows:
        return "Nothing was measured yet."
    notes = ", ".join(dict.fromkeys(row.note for row in rows))
    advice = " Lower data.batch_size or data.excerpt_seconds, or raise train.accumulate." * ("memory" in notes)
    return f"No variant did a step: {notes}.{advice}"


def keys_of(variant: Variant) -> dict[str, Any]:
    """A variant as a recipe says it."""
    return {
        "train.precision": variant.precision,
        "train.compile": "on" if variant.compiled else "off",
        "data.batch_size": variant.batch_size,
    }


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def rate_of(row: BenchRow) -> str:
    """Examples a second, in as many digits as are worth reading."""
    return short(row.examples_per_second or 0)


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
