"""Forward and backward of a step's micro-batches, and the sums that the ranks agree on."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.records import ItemId
from unbraid.seeding import seeded_torch
from unbraid.train.all_reduce import sum_over_ranks
from unbraid.train.block_stats import is_sampled_step
from unbraid.train.example_stats import output_stats, source_stats
from unbraid.train.forward import compute_losses
from unbraid.train.state import TrainState
from unbraid.train.stopwatch import Stopwatch


@dataclass
class MicroBatchResult:
    """Losses, weights and statistics of one micro-batch. Tensors are ``(batch,)`` unless a comment says otherwise."""

    batch: Batch
    losses: Tensor
    weights: Tensor
    is_bad: Tensor  # the loss is not finite, or over the limit
    is_real: Tensor  # the example counts: no stand-in of weight 0
    order: Tensor | None = None  # (batch, source)
    si_sdr: Tensor | None = None  # (batch, source)
    active: Tensor | None = None  # (batch, source)
    output_stats: Tensor | None = None  # (batch, source + 2), in sampled steps
    source_stats: Tensor | None = None  # (batch, source + 1), in sampled steps


class Totals(NamedTuple):
    """Sums over the examples, then over the flags, of all ranks; 0-d each. `_local_sums` fills them in this order."""

    weight: Tensor
    weighted_loss: Tensor
    loss: Tensor
    n_examples: Tensor
    n_trained: Tensor
    n_filtered: Tensor
    n_nonfinite: Tensor
    n_over_limit: Tensor
    n_ranks_out_of_memory: Tensor
    n_ranks_cannot_split: Tensor  # out of memory, with batches that cannot be split further


N_EXAMPLE_SUMS = Totals._fields.index("n_ranks_out_of_memory")


@dataclass
class BackwardResult:
    """The gradients of one step, and what the ranks know about it together.

    Attributes:
        micro_batches: Of this rank; empty if memory ran out.
        sums: Summed over the ranks, by name: ``totals``, ``notes``, ``si_sdr``, and ``losses`` for filters that learn.
        gradients: As backward left them.
        grad_norm: L2 norm of the averaged, unscaled gradient, 0-d.
        divisor: Dividing `gradients` by it averages and unscales them, 0-d.
        busy: Time that this rank worked before it had to wait for the others.
        rescued_from: Bad examples of this rank that the step was repeated without.
        n_rescued_from: How many there were on all ranks.
    """

    micro_batches: list[MicroBatchResult]
    sums: dict[str, Tensor]
    gradients: list[Tensor]
    grad_norm: Tensor
    divisor: Tensor
    busy: Stopwatch
    rescued_from: tuple[ItemId, ...] = ()
    n_rescued_from: int = 0

    @property
    def totals(self) -> Totals:
        """The sums over examples and flags, by name."""
        return Totals(*self.sums["totals"])


def forward_backward(
    state: TrainState, batches: Sequence[Batch], step: int, notes: Sequence[float], *, can_split_further: bool
) -> BackwardResult:
    """Run every micro-batch of this rank, then sum over the ranks what they must agree on.

    Args:
        state: Its gradients are replaced.
        batches: Micro-batches.
        step: Seeds the model's own random draws, and decides whether the step is recorded in detail.
        notes: Further numbers to sum over the ranks.
        can_split_further: Whether this rank can split its batches further if memory runs out.
    """
    # 1. Every micro-batch, with the model's random draws seeded by step and rank: a resumed run draws the same.
    state.optimizer.zero_grad(set_to_none=True)
    if state.exchange is not None:
        state.exchange.reset()
    busy = Stopwatch(state.device)
    results: list[MicroBatchResult] = []
    out_of_memory = False
    with seeded_torch(state.seed, "step", step, dist.rank()):
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            try:
                results.append(_run_micro_batch(state, batch, busy, is_last=is_last, sampled=is_sampled_step(step)))
            except torch.OutOfMemoryError:
                out_of_memory = True
            # Outside of the handler: there the exception still holds the tensors that have to be freed.
            if out_of_memory:
                results.clear()
                _drop_gradients(state, batches[0])
                break

    # 2. One all-reduce for everything.
    flags = [float(out_of_memory), float(out_of_memory and not can_split_further)]
    sums = sum_over_ranks(_local_sums(state, batches, results, flags, notes))

    # 3. The true norm of the gradient of sum(w * loss) / sum(w). DDP averages over ranks, hence the world size.
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    weight = Totals(*sums["totals"]).weight
    loss_scale = state.precision.scale_on(state.device)
    divisor = weight.clamp_min(torch.finfo(weight.dtype).tiny) * (loss_scale / dist.world_size())
    raw_norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(divisor)
    # Without any weight there is nothing to average: the norm of zero gradients is 0.
    grad_norm = torch.where(weight > 0, raw_norm / divisor, 0.0 * raw_norm)
    return BackwardResult(results, sums, gradients, grad_norm, divisor, busy)


def _run_micro_batch(
    state: TrainState, batch: Batch, busy: Stopwatch, *, is_last: bool, sampled: bool
) -> MicroBatchResult:
    """Weigh each example by its loss, and add the gradient of the weighted sum of the losses."""
    model = state.model
    # DDP exchanges gradients once a step, in the backward of the last micro-batch.
    postpone_exchange = isinstance(model, DistributedDataParallel) and not is_last
    with model.no_sync() if postpone_exchange else nullcontext():  # type: ignore[operator]
        # 1. Forward, and one loss per example in float32.
        estimate, graph_losses, assigned = compute_losses(model, state.loss, state.precision, batch)

        # 2. Filters see losses without their graph, and give weights.
        losses = graph_losses.detach()
        initial_weights = batch.weight.to(losses.dtype)
        weights = initial_weights
        for loss_filter in state.filters:
            weights = weights * loss_filter(losses).clamp_min(0)

        # 3. A bad example keeps its weight: the step must be seen to be bad, not pass as one with fewer examples.
        is_real = initial_weights > 0
        loss_is_usable = losses.isfinite() & (losses.abs() <= state.loss_upper_limit)
        is_bad = ~loss_is_usable & is_real
        weights = torch.where(is_bad, initial_weights, weights)

        # 4. Backward of the sum; the division by the weight of all ranks comes later, when that is known.
        total = (weights * graph_losses).sum() * state.precision.scale_on(losses.device)
        if is_last:
            busy.stop()  # from here on this rank may wait for the others
            if state.exchange is not None:
                state.exchange.begin()
        total.backward()

    result = MicroBatchResult(batch, losses, weights, is_bad, is_real)
    if assigned is not None:
        result.order = assigned.order
        result.si_sdr = assigned.si_sdr
        result.active = assigned.active
    if sampled and estimate.dim() == 4:
        result.output_stats = output_stats(estimate, batch.mixture)
        result.source_stats = source_stats(batch.mixture, batch.sources)
    return result


def _drop_gradients(state: TrainState, batch: Batch) -> None:
    """After memory ran out, drop all gradients, but still take part in the exchange: the other ranks wait for it."""
    exchange = state.exchange
    if exchange is not None and exchange.under_way:
        exchange.complete()
    state.optimizer.zero_grad(set_to_none=True)
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    if exchange is None or exchange.under_way:
        return
    # Memory ran out before this rank's exchange began: a backward of zeros on a shorter excerpt takes its place.
    with state.precision.autocast(state.device):
        if exchange.take_part(batch.mixture):
            return
    raise UserError(
        f"Process {dist.rank()} does not have enough memory for even a part of one example. Lower "
        "data.excerpt_seconds or choose a smaller model."
    )


def _local_sums(
    state: TrainState,
    batches: Sequence[Batch],
    results: Sequence[MicroBatchResult],
    flags: Sequence[float],
    notes: Sequence[float],
) -> dict[str, Tensor]:
    """Return this rank's share of everything that is summed over the ranks."""
    numbers = dist.on_device([0.0] * N_EXAMPLE_SUMS + [*flags, *notes], state.device)  # one copy to the device
    totals = numbers[: len(Totals._fields)]
    sums = {"totals": totals, "notes": numbers[len(Totals._fields) :]}
    n_sources = batches[0].sources.shape[1] if hasattr(state.loss, "with_order") else 0
    si_sdr = totals.new_zeros(2, n_sources)  # sum and count of each source
    for result in results:
        weights = result.weights.to(totals.dtype)
        losses = result.losses.to(totals.dtype)
        has_weight = result.weights > 0
        is_trained = has_weight & ~result.is_bad
        loss_is_finite = result.losses.isfinite()
        # torch.where instead of a product: 0 * NaN is NaN, and one filtered NaN would spoil the sum.
        values = torch.stack(
            [
                weights,
                torch.where(has_weight, weights * losses, 0),
                torch.where(result.is_real, losses, 0),
            ]
        )
        counts = torch.stack(
            [
                result.is_real,
                is_trained,
                result.is_real & ~has_weight,
                result.is_bad & ~loss_is_finite,
                result.is_bad & loss_is_finite,
            ]
        )
        totals[:N_EXAMPLE_SUMS] += torch.cat([values, counts.to(totals.dtype)]).sum(1)
        if result.si_sdr is not None and result.active is not None:
            is_scored = result.active & is_trained[:, None]
            scores = torch.where(is_scored, result.si_sdr, 0).to(totals.dtype)
            si_sdr += torch.stack([scores, is_scored.to(totals.dtype)]).sum(1)
    sums["si_sdr"] = si_sdr
    if state.stateful_filters:
        sums["losses"] = _losses_in_slots(state, results, totals)
    return sums


def _losses_in_slots(state: TrainState, results: Sequence[MicroBatchResult], like: Tensor) -> Tensor:
    """Return the losses of this rank in its own slots among those of all ranks, ``(example,)``, zero elsewhere.

    Each slot belongs to one rank, so summing over the ranks gathers all losses in an order that is the same
    everywhere. Infinity marks examples that a filter must not learn from.
    """
    usable = [torch.where(r.is_real & ~r.is_bad, r.losses, torch.inf).to(like.dtype) for r in results]
    own_losses = torch.cat([like.new_zeros(0), *usable])
    n_ranks = dist.world_size()
    if n_ranks == 1:
        return own_losses
    if len(own_losses) > state.examples_per_rank:
        raise UserError(
            "A filter that learns from earlier losses needs to know the number of examples per process and step: set "
            f"TrainState.examples_per_rank to {len(own_losses)} or more, the same on every process."
        )
    slots = like.new_zeros(n_ranks, state.examples_per_rank)
    slots[dist.rank()] = torch.inf
    slots[dist.rank(), : len(own_losses)] = own_losses
    return slots.flatten()
