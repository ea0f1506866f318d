"""Loss terms, and their values for every pair of an estimate and a target."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.errors import UserError
from unbraid.losses import SignalLoss, is_scale_invariant, loss_from_moments, loss_inputs
from unbraid.metrics import is_active, mean_square, pair_moments

Extras = Mapping[str, Any]
"""Further inputs of a loss, by name: ``mixture`` (batch, channel, time), ``embedding``, ``n_fft``, ``hop_length``."""


class Term(NamedTuple):
    """One loss of a weighted sum."""

    loss: SignalLoss
    weight: float = 1.0


def at_least_float32(signal: Tensor) -> Tensor:
    """Return a signal in float32, or in float64 if it is that already; losses are not computed in less."""
    return signal.to(torch.promote_types(signal.dtype, torch.float32))


def as_terms(loss: SignalLoss | Sequence[Term]) -> Sequence[Term]:
    """Return a single loss as a sum of one term, and a sum unchanged."""
    return (Term(loss),) if callable(loss) else loss


def uses_estimate(loss: SignalLoss) -> bool:
    """Return whether a loss depends on the order of the estimates; one on an embedding alone does not."""
    return "estimate" in loss_inputs(loss)


def pairwise_losses(loss: SignalLoss, estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """Return what each pair of an estimate and a target would add to the loss of an example.

    Args:
        loss: A loss that compares signals.
        estimate: ``(batch, source, channel, time)``.
        target: ``(batch, source, channel, time)``; the number of sources may differ.
        extras: Further inputs of the loss.

    Returns:
        ``(batch, estimate, target)``; silent targets add 0 to a scale-invariant loss.
    """
    # 1. Compute the values of all pairs, (batch, channel, estimate, target).
    from_moments = loss_from_moments(loss)
    if from_moments is not None:
        moments = pair_moments(estimate.transpose(1, 2), target.transpose(1, 2))
        pairs = from_moments(moments._replace(mixture_power=mixture_power(extras)))
    else:
        rows = []
        for i in range(estimate.shape[1]):
            row = []
            for j in range(target.shape[1]):
                values = call_loss(loss, estimate[:, i : i + 1], target[:, j : j + 1], extras)
                # (batch, 1, channel), or (batch,) from a loss with one value per example, to (batch, channel)
                row.append(values[:, 0] if values.dim() == 3 else values[:, None])
            rows.append(torch.stack(row, -1))
        pairs = torch.stack(rows, -2)

    # 2. Average over channels; SI-SDR of a silent target means nothing and must not influence the order.
    if not is_scale_invariant(loss):
        return pairs.mean(1) / target.shape[1]
    counts = is_active(target).transpose(1, 2)[:, :, None]
    return torch.where(counts, pairs, 0.0).sum(1) / counts.sum((1, 3)).unsqueeze(-1)


def mixture_power(extras: Extras) -> Tensor | None:
    """Return the mean power of the mixture, ``(batch, channel, 1, 1)``; None without a mixture."""
    mixture = extras.get("mixture")
    return None if mixture is None else mean_square(at_least_float32(mixture))[..., None, None]


def call_loss(loss: SignalLoss, estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """Call a loss with the inputs that it asks for by name.

    Args:
        loss: The loss.
        estimate: ``(batch, source, channel, time)``.
        target: ``(batch, source, channel, time)``, in the order of the estimates.
        extras: Further inputs by name.

    Returns:
        ``(batch, source, channel)``, or ``(batch,)`` from a loss with one value per example.

    Raises:
        UserError: If an input is missing, or the result has neither shape.
    """
    required = loss_inputs(loss)
    available = {"estimate": estimate, "target": target, **extras}
    inputs = {name: available[name] for name in required if available.get(name) is not None}
    missing = [name for name, is_required in required.items() if is_required and name not in inputs]
    if missing:
        reason = "which the model does not return" if "embedding" in missing else "which is not available"
        raise UserError(
            f"The loss asks for {', '.join(missing)}, {reason}. Choose another loss, or a model that returns an "
            "embedding, such as chimera."
        )
    # A custom loss may call its first two parameters by any name, so they are passed by position.
    signals = [inputs.pop(name) for name in ("estimate", "target")] if "estimate" in required else []
    values = loss(*signals, **inputs)
    if values.shape not in (target.shape[:-1], target.shape[:1]):
        raise UserError(
            f"The loss returned {tuple(values.shape)} for signals {tuple(target.shape)}; it must return one value per "
            f"signal, {tuple(target.shape[:-1])}, or one per example, {tuple(target.shape[:1])}."
        )
    return values
