"""Levels and residuals of single examples, recorded in sampled steps. Everything stays on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.dsp import SILENCE
from unbraid.records import ItemId, ItemRecord


def output_stats(estimate: Tensor, mixture: Tensor) -> Tensor:
    """Compute the level of each output, the similarity of the outputs, and the residual of the mixture.

    Args:
        estimate: ``(batch, source, channel, time)``; its graph is not used.
        mixture: ``(batch, channel, time)``.

    Returns:
        ``(batch, source + 2)``: levels in dB, the largest absolute correlation of two outputs, and the residual in dB,
        as described in `ItemRecord`.
    """
    outputs = estimate.detach().float().flatten(2)
    power = outputs.square().mean(-1)
    unit_norm = outputs / (power.sqrt()[..., None] * outputs.shape[-1] ** 0.5 + SILENCE)
    # an output always equals itself: skip the diagonal
    off_diagonal = 1 - torch.eye(outputs.shape[1], device=outputs.device)
    similarity = (unit_norm @ unit_norm.mT).abs() * off_diagonal
    residual = _residual_share(mixture, outputs.sum(1))
    return torch.cat([_to_db(power), similarity.amax((1, 2))[:, None], _to_db(residual)[:, None]], 1)


def source_stats(mixture: Tensor, sources: Tensor) -> Tensor:
    """Compute the level of each source, and what the mixture contains besides the sources.

    Args:
        mixture: ``(batch, channel, time)``.
        sources: ``(batch, source, channel, time)``.

    Returns:
        ``(batch, source + 1)``: levels in dB, and the residual in dB, as described in `ItemRecord`.
    """
    flat = sources.detach().float().flatten(2)
    residual = _residual_share(mixture, flat.sum(1))
    return _to_db(torch.cat([flat.square().mean(-1), residual[:, None]], 1))


def _residual_share(mixture: Tensor, total: Tensor) -> Tensor:
    """Return the power of the mixture minus ``total`` over that of the mixture, ``(batch,)``.

    Args:
        mixture: ``(batch, channel, time)``.
        total: ``(batch, channel * time)``; with another number of channels than the mixture the result is NaN.
    """
    flat = mixture.float().flatten(1)
    if flat.shape != total.shape:
        return torch.full_like(total[:, 0], torch.nan)
    return (flat - total).square().mean(-1) / (flat.square().mean(-1) + SILENCE)


def _to_db(power: Tensor) -> Tensor:
    return 10 * (power + SILENCE).log10()


def item_record(
    item: ItemId,
    loss: float,
    weight: float,
    order: Sequence[float],
    output_row: Sequence[float],
    source_row: Sequence[float],
) -> ItemRecord:
    """Make the record of one example from its rows of `output_stats` and `source_stats`."""
    *estimate_levels, similarity, residual = output_row
    *source_levels, source_residual = source_row
    return ItemRecord(
        item=item,
        loss=loss,
        weight=weight,
        order=tuple(map(int, order)),
        estimate_levels_db=tuple(estimate_levels),
        similarity=similarity,
        residual_db=residual,
        source_levels_db=tuple(source_levels),
        source_residual_db=source_residual,
    )
