"""How sharp and how noisy the loss of a subject is: the Hessian's ends, the noise scale, and what they mean."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.lab.experiment import Experiment, mean_loss
from unbraid.lab.gradient_noise import NoiseScale, noise_scale
from unbraid.lab.hessian import WAYS, Extremes, Loss, best_way, extremes, gradient, hessian_product
from unbraid.records import json_row
from unbraid.robust.precision import Precision
from unbraid.seeding import generator
from unbraid.signals import StopRequest

MAX_BATCHES = 64
_ROOM_BYTES = 1_000_000_000
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Sharpness:
    """What was found at a subject's weights.

    Attributes:
        extremes: Of the Hessian of the mean loss.
        noise: The gradient noise scale; None where a signal came first.
        way: How products with the Hessian were taken, one of `WAYS`.
        n_items: Over how many mixtures.
        lr: The recipe's ``optim.lr``, which a warm-up leads up to; None where it names none.
        optimizer: Its name.
        signal: What stopped it; 0 for nothing.
    """

    extremes: Extremes
    noise: NoiseScale | None
    way: str
    n_items: int
    lr: float | None
    optimizer: str
    signal: int = 0

    def as_json(self) -> dict[str, Any]:
        """All numbers; those that are not finite are null, with a text beside, as in a run's records."""
        ends = {k: v for k, v in asdict(self.extremes).items() if k != "vector"}
        ends |= {"converged": self.extremes.converged, "lowest_converged": self.extremes.lowest_converged}
        told: dict[str, Any] = {"hessian": ends, "noise_scale": self.noise and asdict(self.noise), "way": self.way}
        told |= {"items": self.n_items, "lr": self.lr, "optimizer": self.optimizer}
        return json_row(told)


def sharpness_of(
    subject: Experiment,
    *,
    n_items: int = 32,
    n_products: int = 200,
    tolerance: float = 1e-3,
    split: Literal["train", "valid"] = "train",
    seed: int = 0,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> Sharpness:
    """The ends of the Hessian's spectrum and the gradient noise scale, in float32 and eval mode, on a copy.

    Args:
        subject: Whose model, loss and mixtures.
        n_items: How many mixtures, 3 or more.
        n_products: With the Hessian, at most.
        tolerance: Residual to end at.
        split: Of which talkers.
        seed: Of the vector to start from.
        stop: Ends it after the product or gradient at hand, with what there is.
        progress: Is told products or gradients so far, and the eigenvalue.

    Raises:
        UserError: If there are too few mixtures, or gradient or Hessian are not finite.
    """
    if n_items < 3:
        raise UserError(f"{n_items} mixtures are too few to tell gradients from noise; give 3 or more.")
    model = subject.model()
    some = subject.fixed(n_items, split=split)
    losses = [_loss_of(subject, batch) for batch in some]
    weights = [len(batch.mixture) / n_items for batch in some]
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    drawn = generator(seed, "sharpness").standard_normal(n_weights)
    first = next(model.parameters())
    stop = stop or StopRequest()
    way = best_way(model, losses[0])

    def heard(found: Extremes) -> bool:
        progress(found.n_products, f"eigenvalue {found.highest:.4g}, residual {found.residual:.1e}")
        return not stop.signal

    ends = extremes(
        hessian_product(model, losses, weights, way=way),
        torch.from_numpy(drawn).to(first),
        n_products=n_products,
        tolerance=tolerance,
        n_kept=min(24, max(8, _ROOM_BYTES // (8 * n_weights))),
        heard=heard,
    )
    noise = _noise(subject, n_items, split, partial(gradient, model, weights=[1.0], way=way), stop, progress)
    lr = subject.recipe.optim.options.get("lr")
    return Sharpness(
        ends, noise, way, n_items, lr if lr is None else float(lr), subject.recipe.optim.name, int(stop.signal)
    )


class _Stopped(Exception):
    """A signal came while gradients were taken."""


def _noise(
    subject: Experiment,
    n_items: int,
    split: Literal["train", "valid"],
    gradient_of: Callable[..., Tensor],
    stop: StopRequest,
    progress: Callable[[float, str], None],
) -> NoiseScale | None:
    """The noise scale from batches as small as makes at most `MAX_BATCHES` of them; None where a signal comes first."""
    size = -(-n_items // MAX_BATCHES)
    batches = subject.fixed(n_items - n_items % size, split=split, batch_size=size)
    n_asked = 0

    def of_one(place: int) -> Tensor:
        nonlocal n_asked
        if stop.signal:
            raise _Stopped
        n_asked += 1
        progress(0, f"gradient {n_asked} of {2 * len(batches)}")
        return gradient_of(losses=[_loss_of(subject, batches[place])])

    try:
        return noise_scale(of_one, len(batches), size)
    except _Stopped:
        return None


def _loss_of(subject: Experiment, batch: Batch) -> Loss:
    loss, precision = subject.loss(), Precision("fp32")
    return lambda model: mean_loss(model, loss, precision, [batch])


def tell(found: Sharpness) -> Iterator[str]:
    """What was found, and what it means, sentence by sentence."""
    ends = found.extremes
    if found.signal:
        yield "Stopped: this is what there was, and it cannot be gone on with; the same command begins anew."
    settled = "converged" if ends.converged else "NOT converged, so more --iterations are needed"
    yield (
        f"Largest eigenvalue of the Hessian: {ends.highest:.4g}, residual |Hv - lambda v|/|lambda| = "
        f"{ends.residual:.1e} after {ends.n_products} products ({found.way}): {settled}."
    )
    if found.way == WAYS[2]:
        yield "Parts of the model have no second derivative, so gradients were subtracted, which is less exact."
    if ends.converged and ends.highest > 0:
        yield _about_lr(found)
    doubt = "" if ends.lowest_converged else f" (not converged, residual {ends.lowest_residual:.1e})"
    yield f"Smallest eigenvalue: {ends.lowest:.4g}{doubt}{_about_lowest(ends)}."
    if found.noise is not None:
        yield _about_noise(found.noise)


def _about_lowest(ends: Extremes) -> str:
    rounding = max(ends.tolerance, _ROUNDING) * max(abs(ends.highest), abs(ends.lowest))
    if ends.lowest < -rounding:
        return ": the loss bends downwards along some direction, so this is no minimum"
    return ", 0 to within rounding and tolerance" if ends.lowest <= rounding and ends.lowest_converged else ""


def _about_lr(found: Sharpness) -> str:
    limit = 2 / found.extremes.highest
    told = (
        "On the quadratic that touches the loss here, plain gradient descent swings ever wider along that direction at "
        f"learning rates above 2/lambda = {limit:.3g}; the loss itself bends otherwise farther off."
    )
    if found.lr is None:
        return told
    if found.optimizer == "sgd":
        side = "above" if found.lr > limit else "below"
        return (
            f"{told} The recipe's sgd has lr = {found.lr:g}, {side} that; momentum moves the limit, and a "
            "schedule the rate."
        )
    return f"{told} The recipe's {found.optimizer}, at {found.lr:g}, scales each weight's step and has another limit."


def _about_noise(noise: NoiseScale) -> str:
    made = f"{noise.n_batches} gradients of {noise.batch_size} example{'s' if noise.batch_size > 1 else ''}"
    if not noise.told_apart:
        return (
            f"Gradient noise scale: it cannot be told. From {made} the true gradient's squared length comes to "
            f"{noise.signal:.3g} +- {noise.signal_error:.2g}, which may be 0; more --items are needed."
        )
    return (
        f"Gradient noise scale tr(Sigma)/|G|^2: {noise.scale:.3g} +- {noise.scale_error:.2g} examples (one standard "
        f"error; from {made}): with far fewer than that in a step, twice as many make nearly twice the way; with far "
        "more, hardly more."
    )
