"""The examples of a step through model, loss and backward: once, in smaller pieces, or again without the bad ones."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.errors import UserError
from unbraid.records import ItemId
from unbraid.seeding import seeded_torch
from unbraid.train.block_stats import is_sampled_step, output_stats, source_stats
from unbraid.train.buffer_snapshot import BufferSnapshot
from unbraid.train.diagnose import bad_by_gradient, bad_by_loss
from unbraid.train.forward import compute_losses
from unbraid.train.host_transfer import sum_together
from unbraid.train.state import TrainState


@dataclass
class Ran:
    """What one micro-batch came to; tensors of one value an example, ``(batch,)``, unless told."""

    batch: Batch
    losses: Tensor
    weights: Tensor
    bad: Tensor  # loss not finite, or over the limit
    real: Tensor  # no stand-in
    order: Tensor | None = None  # (batch, source)
    si_sdr: Tensor | None = None  # (batch, source)
    active: Tensor | None = None  # (batch, source)
    details: Tensor | None = None  # (batch, output + 2), in sampled steps
    truth: Tensor | None = None  # (batch, source + 1), in sampled steps


@dataclass
class Attempt:
    """All micro-batches of this rank once through model, loss and backward, and what the ranks make of them together.

    Attributes:
        ran: Micro-batches; empty where memory ran out.
        told: Sums over all ranks, by name.
        gradients: As backward left them.
        norm: L2 norm of the averaged, unscaled gradient, 0-d.
        divisor: What the gradients at hand must be divided by to become that, 0-d.
        busy: Time that this rank was busy before it had to wait for others.
        set_aside: Examples of this rank that were left out when the step was repeated.
        n_set_aside: How many that were on all ranks.
    """

    ran: list[Ran]
    told: dict[str, Tensor]
    gradients: list[Tensor]
    norm: Tensor
    divisor: Tensor
    busy: "Stopwatch"
    set_aside: tuple[ItemId, ...] = ()
    n_set_aside: int = 0

    def count(self, name: str) -> Tensor:
        """One of `COUNTS`, 0-d, summed over all ranks."""
        return self.told["counts"][COUNTS.index(name)]


class Stopwatch:
    """Seconds from its making until it is stopped, on the device's own clock.

    Args:
        device: Whose time; an accelerator's is known only once it has come so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in "ab"] if device.type == "cuda" else []
        self.began, self.ended = perf_counter(), 0.0
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        """Stop it; only the last time counts."""
        self.ended = perf_counter()
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """What it shows; to be asked when the step is finished."""
        if self.events and self.ended:
            return self.events[0].elapsed_time(self.events[1]) / 1000
        return max(0.0, self.ended - self.began)


def cut(state: TrainState, parts: Sequence[Batch]) -> list[Batch]:
    """Batches in as many pieces as memory asked for so far."""
    return list(parts) if state.n_pieces == 1 else [piece for part in parts for piece in part.split(state.n_pieces)]


def divisible(state: TrainState, parts: Sequence[Batch]) -> bool:
    """Whether batches can be cut into smaller pieces than they are now."""
    return max(len(part.mixture) for part in parts) > state.n_pieces


def run_once(
    state: TrainState, pieces: Sequence[Batch], step: int, notes: Sequence[float], *, divisible: bool
) -> Attempt:
    """Every piece of this rank through model, loss and backward; then the ranks sum what they have to agree on.

    Args:
        state: Its gradients are made anew.
        pieces: Micro-batches.
        step: Seeds what the model draws.
        notes: Summed over the ranks as well.
        divisible: Whether smaller pieces can be had if memory runs out; told to the others.
    """
    state.optimizer.zero_grad(set_to_none=True)
    if state.exchange is not None:
        state.exchange.under_way = False
    busy, ran = Stopwatch(state.device), list[Ran]()
    starved = False
    with seeded_torch(state.seed, "step", step, dist.rank()):
        for piece in pieces:
            last = piece is pieces[-1]
            try:
                ran.append(_forward_backward(state, piece, busy, last=last, sampled=is_sampled_step(step)))
            except torch.OutOfMemoryError:
                starved = True
            if starved:  # not in the handler, where the error still holds what is to be freed
                ran.clear()
                _go_without(state, pieces[0])
                break
    told = sum_together(_tally(state, pieces, ran, notes, flags=(starved, divisible)))
    owned = [p for group in state.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in owned if p.grad is not None]
    norm, divisor = _true_norm(
        gradients, told["counts"][COUNTS.index("weight")], state.precision.scale_on(state.device)
    )
    return Attempt(ran, told, gradients, norm, divisor, busy)


def _forward_backward(state: TrainState, batch: Batch, busy: Stopwatch, *, last: bool, sampled: bool) -> Ran:
    """Judge each example, and add the gradient of the weighted sum of their losses to what is there."""
    model = state.model
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        estimate, losses, assigned = compute_losses(model, state.loss, state.precision, batch)
        judged, given = losses.detach(), batch.weight.to(losses.dtype)
        weights = given
        for loss_filter in state.filters:
            weights = weights * loss_filter(judged).clamp_min(0)
        bad = ~(judged.isfinite() & (judged.abs() <= state.loss_upper_limit)) & (given > 0)
        weights = torch.where(bad, given, weights)
        total = (weights * losses).sum() * state.precision.scale_on(losses.device)
        if last:
            busy.stop()  # from here on it may wait for others
        if state.exchange is not None and last:
            state.exchange.begin()
        total.backward()
    ran = Ran(batch, judged, weights, bad, given > 0)
    if assigned is not None:
        ran.order, ran.si_sdr, ran.active = assigned.order, assigned.si_sdr, assigned.active
    if sampled and estimate.dim() == 4:
        ran.details = output_stats(estimate, batch.mixture)
        ran.truth = source_stats(batch.mixture, batch.sources)
    return ran


def _go_without(state: TrainState, piece: Batch) -> None:
    """After memory ran out: take part in the others' exchange of gradients with nothing, and drop what there is."""
    exchange = state.exchange
    if exchange is not None and exchange.under_way:
        exchange.complete()
    state.optimizer.zero_grad(set_to_none=True)
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    if exchange is None or exchange.under_way:
        return
    with state.precision.autocast(state.device):
        if exchange.take_part(piece.mixture):
            return
    raise UserError(
        f"Process {dist.rank()} has not the memory for a part of an example: lower data.excerpt_seconds, or take a "
        "smaller model."
    )


COUNTS = (
    "weight",
    "weighted_loss",
    "loss",
    "real",
    "trained",
    "filtered",
    "nonfinite",
    "over",
    "out_of_memory",
    "divisible",
)
"""What is summed over the ranks in every step, in this order: sums over examples, then flags."""

_N_SUMS = COUNTS.index("out_of_memory")


def _tally(
    state: TrainState, pieces: Sequence[Batch], ran: Sequence[Ran], notes: Sequence[float], *, flags: Sequence[bool]
) -> dict[str, Tensor]:
    """What the ranks have to sum in order to agree on a step, and the notes beside it."""
    head = dist.on_device([*[0.0] * _N_SUMS, *map(float, flags), *notes], state.device)
    told = {"counts": head[: len(COUNTS)], "notes": head[len(COUNTS) :]}
    n_sources = pieces[0].sources.shape[1] if hasattr(state.loss, "with_order") else 0
    si_sdr = head.new_zeros(2, n_sources)
    for one in ran:
        weights, losses = one.weights.to(head.dtype), one.losses.to(head.dtype)
        counted, finite = one.weights > 0, one.losses.isfinite()
        used = counted & ~one.bad
        flagged = torch.stack([one.real, used, one.real & ~counted, one.bad & ~finite, one.bad & finite])
        known = torch.stack([weights, torch.where(counted, weights * losses, 0), torch.where(one.real, losses, 0)])
        head[:_N_SUMS] += torch.cat([known, flagged.to(head.dtype)]).sum(1)
        if one.si_sdr is not None and one.active is not None:
            heard = one.active & used[:, None]
            si_sdr += torch.stack([torch.where(heard, one.si_sdr, 0).to(head.dtype), heard.to(head.dtype)]).sum(1)
    told["si_sdr"] = si_sdr
    if state.remembering_filters:
        told["losses"] = _losses_of_all(state, ran, head)
    return told


def _losses_of_all(state: TrainState, ran: Sequence[Ran], like: Tensor) -> Tensor:
    """This rank's losses in its own places among all ranks', ``(example,)``; infinite where there is nothing to learn.

    Each place belongs to one rank, and the others add nothing to it: so the sum over ranks puts them together.
    """
    some = [torch.where(one.real & ~one.bad, one.losses, torch.inf).to(like.dtype) for one in ran]
    mine = torch.cat([like.new_zeros(0), *some])
    n_ranks = dist.world_size()
    if n_ranks == 1:
        return mine
    if len(mine) > state.examples_per_rank:
        raise UserError(
            f"A filter that remembers losses must know on several processes how many examples one has in a step: set "
            f"TrainState.examples_per_rank to {len(mine)} or more, the same on all."
        )
    slots = like.new_zeros(n_ranks, state.examples_per_rank)
    slots[dist.rank()] = torch.inf
    slots[dist.rank(), : len(mine)] = mine
    return slots.flatten()


def _true_norm(gradients: list[Tensor], weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """L2 norm of the averaged, unscaled gradient, and what the gradients at hand must be divided by to become it.

    Several processes leave the mean over ranks of each rank's weighted sum.
    """
    divisor = weight.clamp_min(torch.finfo(weight.dtype).tiny) * (scale / dist.world_size())
    total = nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(divisor)
    return torch.where(weight > 0, total / divisor, 0.0 * total), divisor


def rescued(
    state: TrainState, attempt: Attempt, step: int, notes: Sequence[float], *, divisible: bool, kept: BufferSnapshot
) -> Attempt:
    """The step again on its clean examples, if some are bad; every rank decides the same.

    Of an fp16 overflow nothing is rescued: a smaller scale is its cure.
    """
    values = torch.cat([attempt.told["counts"], attempt.norm.reshape(1).to(attempt.divisor)]).tolist()
    told, norm = dict(zip(COUNTS, values[:-1], strict=True)), values[-1]
    n_sick, starved, weight = told["nonfinite"] + told["over"], told["out_of_memory"], told["weight"]
    if starved or (not n_sick and (math.isfinite(norm) or not weight)):
        return attempt
    if not n_sick and can_shrink(state, state.precision.scale):
        return attempt
    guilty = [guilty_places(state, one, step, by_loss=n_sick > 0) for one in attempt.ran]
    clean = [
        [place for place, real in enumerate(one.real.tolist()) if real and place not in bad]
        for one, bad in zip(attempt.ran, guilty, strict=True)
    ]
    sums = dist.on_device([sum(map(len, guilty)), sum(map(len, clean))], state.device)
    n_guilty, n_clean = dist.sum_over_ranks(sums).tolist()
    if not n_guilty or not n_clean:
        return attempt
    kept.restore()
    attempt.gradients.clear()
    items = tuple(
        one.batch.items[place] for one, bad in zip(attempt.ran, guilty, strict=True) if one.batch.items for place in bad
    )
    pieces = [one.batch.select(places) for one, places in zip(attempt.ran, clean, strict=True) if places]
    again = run_once(state, pieces or [_stand_in(attempt.ran[0].batch)], step, notes, divisible=divisible)
    return replace(again, set_aside=items, n_set_aside=round(n_guilty))


def guilty_places(state: TrainState, one: Ran, step: int, *, by_loss: bool) -> list[int]:
    """Places of the examples behind a fault: by their loss, or if all losses are fine by their own gradient.

    Where all of several losses are bad, a layer may have carried one example's fault to the others, as BatchNorm does:
    then each is looked at alone.
    """
    bad = [place for place, bad in enumerate(one.bad.tolist()) if bad]
    if by_loss and not len(bad) == len(one.losses) > 1:
        return bad
    look = partial(bad_by_loss, limit=state.loss_upper_limit) if by_loss else bad_by_gradient
    found = look(
        state.unwrapped_model, state.loss, state.precision, one.batch, seed=state.seed, step=step, rank=dist.rank()
    )
    return found or bad


def _stand_in(batch: Batch) -> Batch:
    """One example of harmless noise that counts nothing, so that its rank can run the backward of the others."""
    rng = torch.Generator().manual_seed(0)
    sources = 0.1 * torch.randn(batch.sources[:1].shape, generator=rng).to(batch.sources)
    return Batch.from_tensors(sources.sum(1), sources, weight=batch.weight.new_zeros(1))


def can_shrink(state: TrainState, scale: float) -> bool:
    """Whether a gradient that is not finite may be an overflow that a smaller scale cures."""
    return state.precision.uses_loss_scale and scale > state.precision.MIN_SCALE
