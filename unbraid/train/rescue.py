"""Repeat a step without its bad examples, and find out which those are."""

import math
from collections.abc import Sequence

import torch

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.records import ItemId
from unbraid.train.buffer_snapshot import BufferSnapshot
from unbraid.train.diagnose import bad_by_gradient, bad_by_loss
from unbraid.train.forward_backward import BackwardResult, MicroBatchResult, Totals, forward_backward
from unbraid.train.state import TrainState


def rescue(
    state: TrainState,
    backward: BackwardResult,
    step: int,
    notes: Sequence[float],
    *,
    can_split_further: bool,
    buffers: BufferSnapshot,
) -> BackwardResult:
    """Repeat the step on its clean examples if some are bad; every rank decides the same.

    This waits for the device, once a step. An fp16 overflow is not rescued: a smaller loss scale is its cure.

    Returns:
        The repeated step, or the given one if there is nothing to repeat or nothing clean to repeat it on.
    """
    # 1. Is there anything to rescue? All numbers are sums over the ranks, so all ranks answer alike.
    vector = torch.cat([backward.sums["totals"], backward.grad_norm.reshape(1).to(backward.divisor)]).tolist()
    totals = dict(zip(Totals._fields, vector[:-1], strict=True))
    grad_norm_is_finite = math.isfinite(vector[-1])
    n_bad_losses = totals["n_nonfinite"] + totals["n_over_limit"]
    gradient_is_usable = grad_norm_is_finite or totals["weight"] == 0
    if totals["n_ranks_out_of_memory"] or (n_bad_losses == 0 and gradient_is_usable):
        return backward
    if n_bad_losses == 0 and loss_scale_can_shrink(state, state.precision.scale):
        return backward

    # 2. Which examples are bad, and which are clean?
    bad = [find_bad_examples(state, result, step, by_loss=n_bad_losses > 0) for result in backward.micro_batches]
    clean = []
    for result, bad_indices in zip(backward.micro_batches, bad, strict=True):
        is_real = result.is_real.tolist()
        clean.append([index for index, real in enumerate(is_real) if real and index not in bad_indices])
    counts = dist.on_device([sum(map(len, bad)), sum(map(len, clean))], state.device)
    n_bad, n_clean = dist.sum_over_ranks(counts).tolist()
    if n_bad == 0 or n_clean == 0:
        return backward

    # 3. Repeat it. A rank with nothing clean runs a stand-in of weight 0: the others wait for its gradients.
    buffers.restore()
    backward.gradients.clear()
    bad_items: list[ItemId] = []
    clean_batches: list[Batch] = []
    for result, bad_indices, clean_indices in zip(backward.micro_batches, bad, clean, strict=True):
        if result.batch.items:
            bad_items += [result.batch.items[index] for index in bad_indices]
        if clean_indices:
            clean_batches.append(result.batch.select(clean_indices))
    batches = clean_batches or [_stand_in(backward.micro_batches[0].batch)]
    repeated = forward_backward(state, batches, step, notes, can_split_further=can_split_further)
    repeated.rescued_from = tuple(bad_items)
    repeated.n_rescued_from = round(n_bad)
    return repeated


def find_bad_examples(state: TrainState, result: MicroBatchResult, step: int, *, by_loss: bool) -> list[int]:
    """Return the indices of the examples behind a fault, by their loss or by their own gradient.

    If all of several losses are bad, a layer such as BatchNorm may have carried the fault of one example to the others:
    then each example is run alone.
    """
    bad = [index for index, is_bad in enumerate(result.is_bad.tolist()) if is_bad]
    all_are_bad = len(bad) == len(result.losses) > 1
    if by_loss and not all_are_bad:
        return bad
    model = state.unwrapped_model
    if by_loss:
        found = bad_by_loss(
            model,
            state.loss,
            state.precision,
            result.batch,
            limit=state.loss_upper_limit,
            seed=state.seed,
            step=step,
            rank=dist.rank(),
        )
    else:
        found = bad_by_gradient(
            model, state.loss, state.precision, result.batch, seed=state.seed, step=step, rank=dist.rank()
        )
    return found or bad


def loss_scale_can_shrink(state: TrainState, loss_scale: float) -> bool:
    """Return whether a nonfinite gradient may be an fp16 overflow, which a smaller loss scale cures."""
    return state.precision.uses_loss_scale and loss_scale > state.precision.MIN_SCALE


def _stand_in(batch: Batch) -> Batch:
    """Return one example of harmless noise with weight 0, so that a rank can take part in the others' backward."""
    rng = torch.Generator().manual_seed(0)
    sources = 0.1 * torch.randn(batch.sources[:1].shape, generator=rng).to(batch.sources)
    return Batch.from_tensors(sources.sum(1), sources, weight=batch.weight.new_zeros(1))
