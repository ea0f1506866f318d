"""Means over few seeds, with intervals by Student's t: with two seeds 12.7 standard errors to either side."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean and what is known of it.

    Attributes:
        mean: NaN of no values.
        spread: Standard deviation over the values; NaN of fewer than two.
        half: Half the width of the confidence interval of the mean, 95 % unless told; NaN of fewer than two.
        n: How many values.
    """

    mean: float
    spread: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half

    def text(self, decimals: int = 2) -> str:
        """``1.23 ± 0.45`` with half the 95 % interval; the mean alone of one value, a dash of none."""
        if not self.n:
            return "-"
        return f"{self.mean:.{decimals}f}" + (f" ± {self.half:.{decimals}f}" if self.n > 1 else "")


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean, spread and confidence interval of independent values, taken for normally distributed.

    Args:
        values: One for each seed.
        level: How sure. Where one of k comparisons is picked because it came out best, ``1 - 0.05 / k`` is as sure of
            all of them together as 95 % is of one that was planned (Bonferroni).
    """
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan, math.nan, n)
    spread = statistics.stdev(values)
    return Interval(
        statistics.fmean(values), spread, float(student.ppf((1 + level) / 2, n - 1)) * spread / math.sqrt(n), n
    )
