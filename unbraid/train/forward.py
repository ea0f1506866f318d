"""One batch through model and loss: the losses of its examples, each for itself."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.losses.pit import OrderedLosses
from unbraid.model_output import ModelOutput, get_sources
from unbraid.robust.precision import Precision


class ExampleLoss(Protocol):
    """``(estimate, sources)`` to ``(batch, ...)``; the step takes each example's mean.

    One with a method ``with_order``, as `SeparationLoss` has, also returns the order of the outputs and their SI-SDR,
    and is given the mixture and whatever else the model returned.
    """

    def __call__(self, estimate: Tensor, target: Tensor, /) -> Tensor:
        """The losses."""
        ...


def compute_losses(
    model: nn.Module, loss: ExampleLoss, precision: Precision, batch: Batch
) -> tuple[Tensor, Tensor, OrderedLosses | None]:
    """Run a batch through the model under autocast, and through the loss outside of it.

    Returns:
        What the model returned, ``(batch, source, channel, time)``; losses as `example_losses` gives them; and what
        the loss tells beside them, where it tells anything.
    """
    with precision.autocast(batch.mixture.device):
        output = model(batch.mixture)
    losses, assigned = example_losses(loss, output, batch)
    return get_sources(output), losses, assigned


def example_losses(
    loss: ExampleLoss, output: Tensor | ModelOutput, batch: Batch
) -> tuple[Tensor, OrderedLosses | None]:
    """One loss for each example, ``(batch,)``, in float32 (float64 stays), and what else the loss tells.

    Args:
        loss: `SeparationLoss`, or another.
        output: What the model returned.
        batch: What it was given, and what it should have returned.

    Raises:
        UserError: If the loss does not keep the examples apart.
    """
    wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in (get_sources(output), batch.sources)]
    assigned = loss.with_order(*wide, **loss_extras(output, batch)) if hasattr(loss, "with_order") else None
    losses = loss(*wide) if assigned is None else assigned.losses
    if losses.dim() == 0 or len(losses) != len(batch.sources):
        raise UserError(
            f"The loss returned {tuple(losses.shape)} for a batch of {len(batch.sources)}; it must keep the examples "
            "apart, so that a bad one can be told from the others."
        )
    return (losses.flatten(1).mean(1) if losses.dim() > 1 else losses), assigned


def loss_extras(output: Tensor | ModelOutput, batch: Batch) -> dict[str, Any]:
    """What a loss may ask for by name beside estimate and target."""
    beside = output._asdict() if isinstance(output, ModelOutput) else {}
    return {"mixture": batch.mixture} | {k: v for k, v in beside.items() if k != "sources" and _is_known(v)}


def _is_known(value: Any) -> bool:
    """Whether a field of a `ModelOutput` was given: an embedding, or a size above 0."""
    return value is not None and (isinstance(value, Tensor) or value > 0)
