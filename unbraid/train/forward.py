"""Run one batch through the model and the loss: one loss for each example."""

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

    A loss with a method ``with_order``, as `SeparationLoss` has, also returns the order of the outputs and their
    SI-SDR. It is given the mixture, and what the model returned besides the sources.
    """

    def __call__(self, estimate: Tensor, target: Tensor, /) -> Tensor:
        """Compute the losses."""
        ...


def compute_losses(
    model: nn.Module, loss: ExampleLoss, precision: Precision, batch: Batch
) -> tuple[Tensor, Tensor, OrderedLosses | None]:
    """Run a batch through the model under autocast, and through the loss outside of it.

    Returns:
        The estimate, ``(batch, source, channel, time)``; losses and order as in `example_losses`.
    """
    with precision.autocast(batch.mixture.device):
        output = model(batch.mixture)
    losses, ordered = example_losses(loss, output, batch)
    return get_sources(output), losses, ordered


def example_losses(
    loss: ExampleLoss, output: Tensor | ModelOutput, batch: Batch
) -> tuple[Tensor, OrderedLosses | None]:
    """Compute one loss for each example, ``(batch,)``, in float32; float64 stays float64.

    Args:
        loss: `SeparationLoss`, or another one.
        output: Of the model.
        batch: The model's input, and the sources it should have returned.

    Returns:
        The losses; and the order of the outputs with their SI-SDR, if the loss has `with_order`.

    Raises:
        UserError: If the loss does not return one value for each example.
    """
    # half precision has too few digits for a loss: SI-SDR at 60 dB would be 0.06 dB off in bfloat16
    estimate = get_sources(output)
    estimate = estimate.to(torch.promote_types(estimate.dtype, torch.float32))
    sources = batch.sources.to(torch.promote_types(batch.sources.dtype, torch.float32))

    ordered: OrderedLosses | None = None
    if hasattr(loss, "with_order"):
        ordered = loss.with_order(estimate, sources, **loss_extras(output, batch))
        losses = ordered.losses
    else:
        losses = loss(estimate, sources)
    if losses.dim() == 0 or len(losses) != len(batch.sources):
        raise UserError(
            f"The loss returned {tuple(losses.shape)} for a batch of {len(batch.sources)} examples. It must return one "
            "value for each example, so that a bad example can be told from the others."
        )
    if losses.dim() > 1:
        losses = losses.flatten(1).mean(1)
    return losses, ordered


def loss_extras(output: Tensor | ModelOutput, batch: Batch) -> dict[str, Any]:
    """Return what a loss may ask for by parameter name, besides estimate and target."""
    extras: dict[str, Any] = {"mixture": batch.mixture}
    if isinstance(output, ModelOutput):
        for name, value in output._asdict().items():
            # None and sizes of 0 mean that the model has no such output
            is_set = value is not None and (isinstance(value, Tensor) or value > 0)
            if name != "sources" and is_set:
                extras[name] = value
    return extras
