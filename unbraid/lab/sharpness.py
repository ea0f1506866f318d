"""Sharpness and gradient noise of an experiment's loss: Hessian eigenvalues, noise scale, and what they mean."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.io import to_json_row
from unbraid.lab.experiment import Experiment, mean_loss
from unbraid.lab.gradient_noise import NoiseScale, noise_scale
from unbraid.lab.hessian import (
    GRADIENT_DIFFERENCES,
    ExtremeEigenvalues,
    Loss,
    choose_method,
    extreme_eigenvalues,
    gradient,
    hessian_product,
)
from unbraid.robust.precision import Precision
from unbraid.seeding import generator
from unbraid.signals import StopRequest

MAX_BATCHES = 64
_BASIS_BYTES = 1_000_000_000
"""Memory for the Lanczos basis and its products, in float32."""
_ROUNDING = 1e-5
"""Relative to the largest eigenvalue, a smaller one may be rounding."""


@dataclass(frozen=True)
class Sharpness:
    """Measurements at an experiment's weights.

    Attributes:
        eigenvalues: Extreme eigenvalues of the Hessian of the mean loss.
        noise: The gradient noise scale; None if a signal came first.
        method: How products with the Hessian were computed, one of `unbraid.lab.hessian.METHODS`.
        n_items: Number of mixtures in the mean.
        lr: The recipe's ``optim.lr``, after any warm-up; None if the recipe has none.
        optimizer: The recipe's optimizer.
        signal: Signal that stopped it; 0 if none did.
    """

    eigenvalues: ExtremeEigenvalues
    noise: NoiseScale | None
    method: str
    n_items: int
    lr: float | None
    optimizer: str
    signal: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all numbers as in a run's records: nonfinite ones are null, with a text in a second field."""
        hessian = {name: value for name, value in asdict(self.eigenvalues).items() if name != "vector"}
        hessian["converged"] = self.eigenvalues.converged
        hessian["lowest_converged"] = self.eigenvalues.lowest_converged
        return to_json_row(
            {
                "hessian": hessian,
                "noise_scale": self.noise and asdict(self.noise),
                "method": self.method,
                "items": self.n_items,
                "lr": self.lr,
                "optimizer": self.optimizer,
            }
        )


def measure_sharpness(
    experiment: Experiment,
    *,
    n_items: int = 32,
    n_products: int = 200,
    tolerance: float = 1e-3,
    split: Literal["train", "valid"] = "train",
    seed: int = 0,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> Sharpness:
    """Measure the Hessian's extreme eigenvalues and the gradient noise scale, in float32 and eval mode, on a copy.

    Args:
        experiment: Model, loss and mixtures.
        n_items: Number of mixtures, 3 or more.
        n_products: Largest number of products with the Hessian.
        tolerance: Residual at which to stop.
        split: Split that the talkers come from.
        seed: Seed of the start vector.
        stop: After a signal, the current product or gradient is the last.
        progress: Called with the number of products so far and the current eigenvalue, or the gradient's number.

    Raises:
        UserError: If there are too few mixtures, or gradient or Hessian are not finite.
    """
    if n_items < 3:
        raise UserError(f"{n_items} mixtures are too few to tell gradients from noise; give 3 or more.")
    stop = stop or StopRequest()
    model = experiment.copy_model()
    batches = experiment.fixed_batches(n_items, split=split)
    losses = [_loss_function(experiment, batch) for batch in batches]
    # The last batch may be smaller: weight by size, so that the sum is the mean over mixtures.
    loss_weights = [len(batch.mixture) / n_items for batch in batches]
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    start = generator(seed, "sharpness").standard_normal(n_weights)
    method = choose_method(model, losses[0])

    def on_product(estimate: ExtremeEigenvalues) -> bool:
        progress(estimate.n_products, f"eigenvalue {estimate.highest:.4g}, residual {estimate.residual:.1e}")
        return not stop.signal

    eigenvalues = extreme_eigenvalues(
        hessian_product(model, losses, loss_weights, method=method),
        torch.from_numpy(start).to(next(model.parameters())),
        n_products=n_products,
        tolerance=tolerance,
        # Each basis vector and its product take 8 bytes a weight.
        basis_size=min(24, max(8, _BASIS_BYTES // (8 * n_weights))),
        on_product=on_product,
    )
    batch_gradient = partial(gradient, model, loss_weights=[1.0], method=method)
    noise = _measure_noise(experiment, n_items, split, batch_gradient, stop, progress)
    lr = experiment.recipe.optim.options.get("lr")
    return Sharpness(
        eigenvalues=eigenvalues,
        noise=noise,
        method=method,
        n_items=n_items,
        lr=None if lr is None else float(lr),
        optimizer=experiment.recipe.optim.name,
        signal=int(stop.signal),
    )


class _StoppedError(Exception):
    """A signal came while gradients were computed."""


def _measure_noise(
    experiment: Experiment,
    n_items: int,
    split: Literal["train", "valid"],
    batch_gradient: Callable[..., Tensor],
    stop: StopRequest,
    progress: Callable[[float, str], None],
) -> NoiseScale | None:
    """Return the noise scale, or None after a signal."""
    # The smallest batches of which there are at most MAX_BATCHES; all must be of one size.
    batch_size = -(-n_items // MAX_BATCHES)
    batches = experiment.fixed_batches(n_items - n_items % batch_size, split=split, batch_size=batch_size)
    n_gradients = 0

    def gradient_of_batch(index: int) -> Tensor:
        nonlocal n_gradients
        if stop.signal:
            raise _StoppedError
        n_gradients += 1
        progress(0, f"gradient {n_gradients} of {2 * len(batches)}")
        return batch_gradient(losses=[_loss_function(experiment, batches[index])])

    try:
        return noise_scale(gradient_of_batch, len(batches), batch_size)
    except _StoppedError:
        return None


def _loss_function(experiment: Experiment, batch: Batch) -> Loss:
    loss = experiment.build_loss()
    precision = Precision("fp32")
    return lambda model: mean_loss(model, loss, precision, [batch])


def describe(sharpness: Sharpness) -> Iterator[str]:
    """Yield the results and what they mean, sentence by sentence."""
    eigenvalues = sharpness.eigenvalues
    if sharpness.signal:
        yield "Stopped: these are the results so far. They cannot be resumed; the same command starts again."
    state = "converged" if eigenvalues.converged else "NOT converged, increase --iterations"
    yield (
        f"Largest eigenvalue of the Hessian: {eigenvalues.highest:.4g}, residual |Hv - lambda v|/|lambda| = "
        f"{eigenvalues.residual:.1e} after {eigenvalues.n_products} products ({sharpness.method}): {state}."
    )
    if sharpness.method == GRADIENT_DIFFERENCES:
        yield "Parts of the model have no second derivative, so gradients were subtracted, which is less exact."
    # An eigenvalue that has not converged is too low, and its limit on the learning rate too high.
    if eigenvalues.converged and eigenvalues.highest > 0:
        yield _describe_lr(sharpness)
    doubt = "" if eigenvalues.lowest_converged else f" (not converged, residual {eigenvalues.lowest_residual:.1e})"
    yield f"Smallest eigenvalue: {eigenvalues.lowest:.4g}{doubt}{_describe_lowest(eigenvalues)}."
    if sharpness.noise is not None:
        yield _describe_noise(sharpness.noise)


def _describe_lowest(eigenvalues: ExtremeEigenvalues) -> str:
    largest = max(abs(eigenvalues.highest), abs(eigenvalues.lowest))
    rounding = max(eigenvalues.tolerance, _ROUNDING) * largest
    if eigenvalues.lowest < -rounding:
        return ": the loss curves downwards along some direction, so this is no minimum"
    if eigenvalues.lowest <= rounding and eigenvalues.lowest_converged:
        return ", 0 to within rounding and tolerance"
    return ""


def _describe_lr(sharpness: Sharpness) -> str:
    limit = 2 / sharpness.eigenvalues.highest
    text = (
        "On the quadratic approximation of the loss here, plain gradient descent diverges along that direction at "
        f"learning rates above 2/lambda = {limit:.3g}; farther away the loss itself curves differently."
    )
    if sharpness.lr is None:
        return text
    if sharpness.optimizer == "sgd":
        side = "above" if sharpness.lr > limit else "below"
        return (
            f"{text} The recipe's sgd has lr = {sharpness.lr:g}, {side} that; momentum changes the limit, and a "
            "schedule the learning rate."
        )
    return (
        f"{text} The recipe's {sharpness.optimizer}, at {sharpness.lr:g}, scales each weight's step and has another "
        "limit."
    )


def _describe_noise(noise: NoiseScale) -> str:
    gradients = f"{noise.n_batches} gradients of {noise.batch_size} example{'s' if noise.batch_size > 1 else ''}"
    if not noise.signal_is_significant:
        return (
            f"Gradient noise scale: unknown. From {gradients} the true gradient's squared length is "
            f"{noise.signal:.3g} +- {noise.signal_error:.2g}, which may be 0. Increase --items."
        )
    return (
        f"Gradient noise scale tr(Sigma)/|G|^2: {noise.scale:.3g} +- {noise.scale_error:.2g} examples (one standard "
        f"error; from {gradients}). With far fewer examples in a step, doubling them nearly doubles the progress; with "
        "far more, it hardly helps."
    )
