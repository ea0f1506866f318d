"""Means over a few seeds with confidence intervals by Student's t: with two seeds, 12.7 standard errors either way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: NaN without values.
        std: Sample standard deviation; NaN with fewer than two values.
        margin: Half the width of the confidence interval of the mean; NaN with fewer than two values.
        n: Number of values.
    """

    mean: float
    std: float
    margin: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.margin

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.margin

    def text(self, decimals: int = 2) -> str:
        """Return ``1.23 ± 0.45``, mean and margin; the mean alone for one value, a dash without values."""
        if not self.n:
            return "-"
        return f"{self.mean:.{decimals}f}" + (f" ± {self.margin:.{decimals}f}" if self.n > 1 else "")


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the mean, standard deviation and confidence interval of independent, normally distributed values.

    Args:
        values: One for each seed.
        level: Confidence level. If the best of k comparisons was picked, ``1 - 0.05 / k`` gives all of them together
            the confidence that 0.95 gives a single planned one (Bonferroni).
    """
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan, math.nan, n)
    # Not stats.t.interval: it returns NaN if all values are equal.
    margin = stats.t.ppf((1 + level) / 2, df=n - 1) * stats.sem(values)
    return Interval(float(np.mean(values)), float(np.std(values, ddof=1)), float(margin), n)
