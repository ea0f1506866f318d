"""The gradient noise scale: how many examples a step needs until its gradient is more than noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from unbraid.errors import UserError
from unbraid.type_aliases import FloatArray

Sums = FloatArray | np.float64


@dataclass(frozen=True)
class NoiseScale:
    """Variance of the gradients of single examples, compared with the squared length of their mean.

    Attributes:
        noise: Trace of the covariance of single examples' gradients.
        signal: Squared length of the true gradient; the estimate is unbiased, so it may fall below 0.
        scale: ``noise / signal``, in examples; infinite if the signal is not above 0.
        noise_error: Standard error of the noise, by the jackknife over batches, as are the other errors.
        signal_error: Standard error of the signal.
        scale_error: Standard error of the scale; NaN if the scale is infinite, with all batches or without one of them.
        n_batches: Number of gradients it was computed from.
        batch_size: Number of examples in each batch.
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
    def signal_is_significant(self) -> bool:
        """True if the signal is more than two standard errors above 0, so that noise alone does not explain it."""
        return self.signal > 2 * self.signal_error


def noise_scale(gradient: Callable[[int], Tensor], n_batches: int, batch_size: int) -> NoiseScale:
    """Compute the simple noise scale from the gradients of batches and of all batches together.

    Noise and signal are unbiased for examples drawn independently. Their ratio is biased, less so with many batches.

    Args:
        gradient: Gradient of the mean loss of one batch by its index, ``(weight,)``. It is called twice for each
            batch, so that no more than two gradients are in memory.
        n_batches: Number of batches, 3 or more.
        batch_size: Number of examples in each batch.

    Raises:
        UserError: If there are too few batches or a gradient is not finite.

    Reference:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv:1812.06162, appendix A.1. The small
        batch is one batch, the big batch is all of them.
    """
    if n_batches < 3:
        raise UserError(f"A noise scale with its error needs gradients of 3 batches or more, not {n_batches}.")

    # First pass: the sum of all gradients. Clone it, because the caller may return its own buffer.
    total = gradient(0).double().clone()
    for index in range(1, n_batches):
        total += gradient(index)

    # Second pass: each gradient's squared length and its product with the sum, all that the jackknife needs.
    products = np.zeros(n_batches)
    squares = np.zeros(n_batches)
    for index in range(n_batches):
        batch_gradient = gradient(index).double()
        products[index] = float(batch_gradient @ total)
        squares[index] = float(batch_gradient @ batch_gradient)
    total_square = float(total @ total)
    if not np.isfinite(total_square) or not np.isfinite(squares).all():
        raise UserError("The gradient of this loss is not finite at these weights, so there is no noise scale.")

    noise, signal, scale = _estimates(squares.sum(), np.float64(total_square), n_batches, batch_size)
    # |sum - g|^2 = |sum|^2 - 2 sum g + |g|^2: the estimates without each batch, at no further gradients.
    without_one = _estimates(squares.sum() - squares, total_square - 2 * products + squares, n_batches - 1, batch_size)
    noise_error, signal_error, scale_error = (_jackknife_error(np.asarray(values)) for values in without_one)
    return NoiseScale(
        float(noise), float(signal), float(scale), noise_error, signal_error, scale_error, n_batches, batch_size
    )


def _estimates(sum_of_squares: Sums, square_of_sum: Sums, n_batches: int, batch_size: int) -> tuple[Sums, Sums, Sums]:
    """Return noise, signal and scale from the sum of squared lengths and the squared length of the sum."""
    small = sum_of_squares / n_batches
    big = square_of_sum / n_batches**2
    noise = batch_size * (small - big) * n_batches / (n_batches - 1)
    signal = big - noise / (batch_size * n_batches)
    scale = np.where(signal > 0, noise / np.where(signal > 0, signal, 1.0), np.inf)
    return noise, signal, scale


def _jackknife_error(estimates: FloatArray) -> float:
    """Return the standard error of an estimate from its values without each batch in turn."""
    if not np.isfinite(estimates).all():
        return float("nan")
    return float(np.sqrt((len(estimates) - 1) * estimates.var()))
