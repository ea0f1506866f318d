"""train_step: forward, filter, backward, agree across ranks, clip, update, record."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.draws import seeded_torch
from unbraid.errors import UserError
from unbraid.records import ItemId, StepRecord
from unbraid.robust.guard import update
from unbraid.train.state import ExampleLoss, TrainState

_WEIGHT, _WEIGHTED_LOSS, _LOSS, _REAL, _TRAINED, _EASY, _NONFINITE, _OVER = range(8)
"""Places in the tally: the small tensor that the ranks sum to agree on a step."""


class Verdicts(NamedTuple):
    """What one micro-batch came to, each ``(batch,)``: losses, their weights, and flags."""

    losses: Tensor
    weights: Tensor
    bad: Tensor  # loss not finite, or over the limit
    real: Tensor  # no stand-in


def train_step(state: TrainState, batch: Batch | Sequence[Batch]) -> StepRecord:
    """Train on one batch, or on the micro-batches of one step, unless something is wrong with it.

    With per-example losses l_i and weights w_i over all ranks and micro-batches, the gradient is
    ``sum(w_i * grad l_i) / sum(w_i)``. Every rank must call it, and runs every backward. A step that cannot be trusted
    is left out on every rank alike: weights, optimizer and clipper stay as they were, bit for bit; the record says why.

    Args:
        state: Changed in place.
        batch: Examples of this rank.

    Returns:
        What happened; the same on every rank but for `epoch`, times and `StepRecord.bad_items`.
    """
    started = perf_counter()
    parts = [batch] if isinstance(batch, Batch) else list(batch)
    state.step += 1
    state.optimizer.zero_grad(set_to_none=True)
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    with seeded_torch(state.seed, "step", state.step, dist.rank()):
        ran = [_forward_backward(state, part, last=part is parts[-1]) for part in parts]
    tally = dist.sum_over_ranks(torch.stack([_tally(part) for part in ran]).sum(0))
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm, divisor = _true_norm(gradients, tally, state.precision.scale)
    fine = (tally[_NONFINITE] + tally[_OVER] == 0) & (tally[_WEIGHT] > 0) & norm.isfinite()
    limit = state.clipper(norm, fine)
    update(state.optimizer, gradients, divisor * (norm / limit).clamp_min(1), fine)
    for buffer, before in buffers:  # statistics that layers such as BatchNorm keep
        buffer.copy_(torch.where(fine, buffer, before))
    state.optimizer.zero_grad(set_to_none=True)
    epoch = parts[0].items[0].epoch if parts[0].items else 0
    record = _record(state, tally, norm, limit, epoch=epoch, seconds=perf_counter() - started)
    if record.outcome not in ("trained", "all_easy"):
        record = replace(record, bad_items=tuple(_bad_items(parts, ran, all_of_them=record.outcome not in _BY_LOSS)))
    state.faults.add(record.outcome)
    if record.outcome in ("trained", "loss_scale"):
        state.precision.update(overflowed=record.outcome == "loss_scale")
    return record


def _forward_backward(state: TrainState, batch: Batch, *, last: bool) -> Verdicts:
    """Judge each example, and add the gradient of the weighted sum of their losses to what is there."""
    model = state.model
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        with state.precision.autocast(batch.mixture.device):
            estimate = model(batch.mixture)
        losses = example_losses(state.loss, estimate, batch.sources)
        judged, given = losses.detach(), batch.weight.to(losses.dtype)
        weights = given
        for loss_filter in state.filters:
            weights = weights * loss_filter(judged).clamp_min(0)
        bad = ~(judged.isfinite() & (judged.abs() <= state.loss_upper_limit)) & (given > 0)
        weights = torch.where(bad, given, weights)
        ((weights * losses).sum() * state.precision.scale).backward()
    return Verdicts(judged, weights, bad, given > 0)


def example_losses(loss: ExampleLoss, estimate: Tensor, sources: Tensor) -> Tensor:
    """One loss for each example, ``(batch,)``, in float32 (float64 stays).

    Raises:
        UserError: If the loss does not keep the examples apart.
    """
    wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in (estimate, sources)]
    losses = loss(*wide)
    if losses.dim() == 0 or len(losses) != len(sources):
        raise UserError(
            f"The loss returned {tuple(losses.shape)} for a batch of {len(sources)}; it must keep the examples apart, "
            "so that a bad one can be told from the others."
        )
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _tally(of: Verdicts) -> Tensor:
    counted, finite = of.weights > 0, of.losses.isfinite()
    rows: list[Tensor] = [
        of.weights,
        torch.where(counted, of.weights * of.losses, 0),
        torch.where(of.real, of.losses, 0),
    ]
    rows += [of.real, counted & ~of.bad, of.real & ~counted, of.bad & ~finite, of.bad & finite]
    return torch.stack([row.sum().to(torch.float32) for row in rows])


def _true_norm(gradients: list[Tensor], tally: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """L2 norm of the averaged, unscaled gradient, and what the gradients at hand must be divided by to become it.

    Several processes leave the mean over ranks of each rank's weighted sum.
    """
    divisor = tally[_WEIGHT].clamp_min(torch.finfo(tally.dtype).tiny) * (scale / dist.world_size())
    total = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(divisor)
    return torch.where(tally[_WEIGHT] > 0, total / divisor, 0.0 * total), divisor


_BY_LOSS = ("nonfinite_loss", "over_limit")


def _record(state: TrainState, tally: Tensor, norm: Tensor, limit: Tensor, *, epoch: int, seconds: float) -> StepRecord:
    """Bring all scalars to the host together, and say what became of the step."""
    *counts, norm_here, limit_here = torch.cat([tally, torch.stack([norm, limit]).to(tally.dtype)]).tolist()
    weight, n_real = counts[_WEIGHT], counts[_REAL]
    if counts[_NONFINITE]:
        outcome = "nonfinite_loss"
    elif counts[_OVER]:
        outcome = "over_limit"
    elif weight == 0:
        outcome = "all_easy"
    elif not math.isfinite(norm_here):
        outcome = "loss_scale" if state.precision.can_shrink else "nonfinite_gradient"
    else:
        outcome = "trained"
    return StepRecord(
        step=state.step,
        epoch=epoch,
        outcome=outcome,
        loss=counts[_WEIGHTED_LOSS] / weight if weight else counts[_LOSS] / max(n_real, 1),
        grad_norm=norm_here,
        limit=limit_here,
        lr=float(state.optimizer.param_groups[0]["lr"]),
        loss_scale=state.precision.scale,
        n_trained=round(counts[_TRAINED]) if outcome == "trained" else 0,
        n_easy=round(counts[_EASY]),
        n_bad=round(counts[_NONFINITE] + counts[_OVER]),
        seconds=seconds,
        examples_per_second=n_real / seconds,
    )


def _bad_items(parts: Sequence[Batch], ran: Sequence[Verdicts], *, all_of_them: bool) -> Iterator[ItemId]:
    for part, verdicts in zip(parts, ran, strict=True):
        guilty = verdicts.real if all_of_them else verdicts.bad
        yield from (item for item, flag in zip(part.items, guilty.tolist(), strict=False) if flag)
