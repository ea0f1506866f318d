"""The gradient noise scale: how many examples a step needs until its gradient is more than noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from unbraid.errors import UserError
from unbraid.lab.weight_directions import Floats

Sums = Floats | np.float64


@dataclass(frozen=True)
class NoiseScale:
    """How much the gradients of single examples differ, beside how long their mean is.

    Attributes:
        noise: Trace of the covariance of single examples' gradients.
        signal: Squared length of the true gradient; an estimate without bias, so it may fall below 0.
        scale: ``noise / signal``, in examples; infinite where the signal is not above 0.
        noise_error: Standard error, by the jackknife over batches, as the others are.
        signal_error: Of the signal.
        scale_error: Of the scale; NaN where that is infinite, with any batch left out or none.
        n_batches: How many gradients it was made from.
        batch_size: Examples in each.
    """

    noise: float
    signal: float
    scale: float
    noise_error: float
    signal_error: float
    scale_error: float
    n_batches: int
    batch_size: int

    @property
    def told_apart(self) -> bool:
        """Whether the gradient is longer than what noise alone may look like: two standard errors from 0."""
        return self.signal > 2 * self.signal_error


def noise_scale(gradient: Callable[[int], Tensor], n_batches: int, batch_size: int) -> NoiseScale:
    """The simple noise scale from the gradients of batches, and of all together.

    Both estimates are without bias for examples drawn independently; their ratio is not, least so with many batches.

    Args:
        gradient: Of the mean loss of one batch, ``(weight,)``; asked for twice each, so that few are held.
        n_batches: How many there are; 3 or more.
        batch_size: Examples in each.

    Raises:
        UserError: If there are fewer batches, or a gradient is not finite.

    Reference:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv:1812.06162, appendix A.1, with the
        batch for the small and all batches together for the big one.
    """
    if n_batches < 3:
        raise UserError(f"A noise scale with its error needs gradients of 3 batches or more, not {n_batches}.")
    total = gradient(0).double().clone()  # what was given stays
    for place in range(1, n_batches):
        total += gradient(place)
    along, squares = np.zeros(n_batches), np.zeros(n_batches)
    for place in range(n_batches):
        one = gradient(place).double()
        along[place], squares[place] = float(one @ total), float(one @ one)
    whole = float(total @ total)
    if not np.isfinite(whole) or not np.isfinite(squares).all():
        raise UserError("A gradient of this loss is not finite at these weights, so there is no noise scale.")
    found = _estimates(squares.sum(), np.float64(whole), n_batches, batch_size)
    each = _estimates(squares.sum() - squares, whole - 2 * along + squares, n_batches - 1, batch_size)
    noise, signal, scale = (float(part) for part in found)
    noise_error, signal_error, scale_error = (_jackknife(np.asarray(part)) for part in each)
    return NoiseScale(noise, signal, scale, noise_error, signal_error, scale_error, n_batches, batch_size)


def _estimates(squares: Sums, whole: Sums, n_batches: int, batch_size: int) -> tuple[Sums, Sums, Sums]:
    """Noise, signal and scale from the sum of squared lengths, and the squared length of the sum."""
    small, big = squares / n_batches, whole / n_batches**2
    noise = batch_size * (small - big) * n_batches / (n_batches - 1)
    signal = big - noise / (batch_size * n_batches)
    scale = np.where(signal > 0, noise / np.where(signal > 0, signal, 1.0), np.inf)
    return noise, signal, scale


def _jackknife(without: Floats) -> float:
    """The standard error of an estimate from what it is without each of its parts."""
    if not np.isfinite(without).all():
        return float("nan")
    return float(np.sqrt((len(without) - 1) * without.var()))
