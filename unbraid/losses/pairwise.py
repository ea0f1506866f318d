"""The terms of a loss: what each comes to for signals held against each other, and for every pair of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.errors import UserError
from unbraid.losses import SignalLoss, by_products, is_scale_invariant, loss_inputs
from unbraid.metrics import is_active, mean_square, pair_products

Extras = Mapping[str, Any]
"""What a loss may ask for by name: ``mixture`` (batch, channel, time), ``embedding``, ``n_fft``, ``hop_length``."""


class Term(NamedTuple):
    """One of the losses that are summed, and how much it counts."""

    loss: SignalLoss
    weight: float = 1.0


def wide(signal: Tensor) -> Tensor:
    """In float32 or wider, as losses are computed."""
    return signal.to(torch.promote_types(signal.dtype, torch.float32))


def as_terms(loss: SignalLoss | Sequence[Term]) -> Sequence[Term]:
    """A loss as a sum of one, a sum as it is."""
    return (Term(loss),) if callable(loss) else loss


def compares(loss: SignalLoss) -> bool:
    """Whether it depends on which estimate is held against which target."""
    return "estimate" in loss_inputs(loss)


def pair_losses(loss: SignalLoss, estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """What every estimate held against every target adds to the loss, ``(batch, estimate, target)``."""
    by = by_products(loss)
    if by is not None:
        products = pair_products(estimate.transpose(1, 2), target.transpose(1, 2))
        pairs = by(products._replace(mixture_power=mixture_power(extras)))
    else:
        rows = [
            [value_of(loss, estimate[:, i : i + 1], target[:, j : j + 1], extras) for j in range(target.shape[1])]
            for i in range(estimate.shape[1])
        ]
        pairs = torch.stack([torch.stack([_by_channel(pair) for pair in row], -1) for row in rows], -2)
    if not is_scale_invariant(loss):
        return pairs.mean(1) / target.shape[1]
    counts = is_active(target).transpose(1, 2)[:, :, None]
    return torch.where(counts, pairs, 0.0).sum(1) / counts.sum((1, 3)).unsqueeze(-1)


def mixture_power(extras: Extras) -> Tensor | None:
    """``(batch, channel, 1, 1)``."""
    mixture = extras.get("mixture")
    return None if mixture is None else mean_square(wide(mixture))[..., None, None]


def _by_channel(values: Tensor) -> Tensor:
    """``(batch, 1, channel)`` or ``(batch,)`` to ``(batch, channel)``."""
    return values[:, 0] if values.dim() == 3 else values[:, None]


def value_of(loss: SignalLoss, estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """The loss with what it asks for by name: ``(batch, source, channel)`` or ``(batch,)``.

    Raises:
        UserError: If there is not what it asks for, or it returned neither.
    """
    asked = loss_inputs(loss)
    known = {"estimate": estimate, "target": target, **extras}
    given = {name: known[name] for name in asked if known.get(name) is not None}
    missing = [name for name, needed in asked.items() if needed and name not in given]
    if missing:
        why = "the model does not return" if "embedding" in missing else "is not there"
        raise UserError(
            f"The loss asks for {', '.join(missing)}, which {why}; take another loss, or a model that returns an "
            "embedding, such as chimera."
        )
    signals = [given.pop(name) for name in ("estimate", "target")] if "estimate" in asked else []
    values = loss(*signals, **given)
    if values.shape not in (target.shape[:-1], target.shape[:1]):
        raise UserError(
            f"The loss returned {tuple(values.shape)} for signals {tuple(target.shape)}; it must return one value a "
            f"signal, {tuple(target.shape[:-1])}, or one an example, {tuple(target.shape[:1])}."
        )
    return values
