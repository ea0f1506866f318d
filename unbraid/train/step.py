"""train_step: forward, filter, backward, agree across ranks, clip, update, record."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.records import ItemId, ItemRecord, StepRecord
from unbraid.robust.guard import acts_on_device, update
from unbraid.train.attempt import (
    COUNTS,
    Attempt,
    Buffers,
    Ran,
    can_shrink,
    cut_further,
    guilty_places,
    rescued,
    restore,
    run_once,
)
from unbraid.train.parcel import Parcel
from unbraid.train.state import TrainState
from unbraid.train.watch import block_norms, block_records, blocks_of, is_sampled, item_record, peak_memory


@dataclass
class Launched:
    """A step whose work is done or under way, and whose scalars are on their way to the host."""

    step: int
    parts: list[Batch]
    notes: Sequence[float]
    attempt: Attempt
    parcel: Parcel
    lr: float
    started: float


def train_step(state: TrainState, batch: Batch | Sequence[Batch]) -> StepRecord:
    """Train on one batch, or on the micro-batches of one step, unless something is wrong with it.

    With per-example losses l_i and weights w_i over all ranks and micro-batches, the gradient is
    ``sum(w_i * grad l_i) / sum(w_i)``. Every rank must call it, and runs every backward. A step that cannot be trusted
    is left out on every rank alike: weights, optimizer and clipper stay as they were, bit for bit; the record says why.

    It waits for the device once, at its end. `launch` and `finish` are its two halves: with the next step launched
    before this one is finished, an accelerator never waits for the host.

    Args:
        state: Changed in place.
        batch: Examples of this rank.

    Returns:
        What happened; the same on every rank but for `epoch`, times, memory, `items`, `n_micro_batches` and
        `bad_items`.
    """
    return finish(state, launch(state, [batch] if isinstance(batch, Batch) else list(batch)))[0]


def launch(
    state: TrainState, parts: Sequence[Batch], *, notes: Sequence[float] = (), step: int | None = None
) -> Launched:
    """Do all of a step that needs no answer from the device.

    Args:
        state: Changed in place.
        parts: Micro-batches of this rank.
        notes: Numbers to be summed over the ranks beside the step's own; as many on each.
        step: Its number, where it is done again; else the next.
    """
    started = perf_counter()
    if step is None:
        state.step += 1
    step, parts = step or state.step, list(parts)
    if not parts:
        raise ValueError("A step needs a batch on every process: where nothing is left, a stand-in of weight 0.")
    buffers = [(buffer, buffer.clone()) for buffer in state.buffers]
    attempt = run_once(state, parts, step, notes)
    while not attempt.ran and dist.world_size() == 1 and cut_further(state, parts):
        restore(buffers)
        attempt = run_once(state, parts, step, notes)
    if state.on_bad_example == "rescue":
        attempt = rescued(state, attempt, step, notes, buffers)
    parcel = _apply(state, attempt, step, buffers)
    attempt.gradients.clear()  # so that their memory is free while this step is still to be finished
    lr = float(state.optimizer.param_groups[0]["lr"])
    return Launched(step, parts, notes, attempt, parcel, lr, started)


def finish(state: TrainState, launched: Launched) -> tuple[StepRecord, list[float]]:
    """Wait for a step's scalars, and say what became of it.

    Where memory ran out on one of several ranks, all of them do the step again in smaller pieces.

    Returns:
        Its record, and the notes that it was launched with, summed over the ranks.
    """
    values = launched.parcel.open()
    told = dict(zip(COUNTS, values["counts"], strict=True))
    if told["out_of_memory"] and told["divisible"] and dist.world_size() > 1:
        state.n_pieces *= 2
        return finish(state, launch(state, launched.parts, notes=launched.notes, step=launched.step))
    record = _record(state, launched, values, told)
    if not record.trained and record.outcome not in ("all_easy", "loss_scale"):
        record = replace(record, bad_items=tuple(_bad_items(state, launched, record.outcome)))
    state.faults.add(record.outcome)
    return record, values["notes"]


def _apply(state: TrainState, attempt: Attempt, step: int, buffers: Buffers) -> Parcel:
    """Clip and update, or leave everything as it was; all of it is decided where the tensors are."""
    told, norm, gradients, divisor = attempt.told, attempt.norm, attempt.gradients, attempt.divisor
    weighs = attempt.count("weight") > 0
    sound = attempt.count("nonfinite") + attempt.count("over") + attempt.count("out_of_memory") == 0
    fine = sound & weighs & norm.isfinite()
    watched = blocks_of(state.bare_model) if is_sampled(step) else {}
    parcel = {"scale": state.precision.scale_on(norm.device).clone()} | told | {"norm": norm}
    if watched:
        parcel["block_norms"] = block_norms([[p.grad for p in some] for some in watched.values()]) / divisor
        before = [[p.detach().clone() for p in some] for some in watched.values()]
    if state.transforms and gradients:
        torch._foreach_div_(gradients, divisor)
        _transform(state)
        norm, divisor = nn.utils.get_total_norm(gradients), torch.ones_like(divisor)
    limit = state.clipper(norm, fine)
    parcel |= {"norm_transformed": norm, "limit": limit} | _closely(attempt.ran)
    divisor = divisor * (norm / limit).clamp_min(1)
    sent = None
    if acts_on_device(state.optimizer):
        update(state.optimizer, gradients, divisor, fine)
    else:  # the host decides: it needs the scalars before the update
        sent = Parcel(parcel | {"fine": fine})
        update(state.optimizer, gradients, divisor, torch.tensor(bool(sent.open()["fine"][0])))
    for buffer, kept in buffers:  # statistics that layers such as BatchNorm keep
        buffer.copy_(torch.where(fine, buffer, kept))
    if state.average is not None:
        state.average.update(state.bare_model, fine)
    overflowed = sound & weighs & ~norm.isfinite()
    state.precision.update(overflowed, fine)
    for loss_filter in state.remembering_filters:
        loss_filter.observe(told["losses"], told["losses"].isfinite() & (fine | (sound & ~weighs)))
    if watched:
        after = [[p.detach() for p in some] for some in watched.values()]
        moved = [torch._foreach_sub(new, old) for new, old in zip(after, before, strict=True)]
        parcel["update_ratios"] = block_norms(moved) / block_norms(before).clamp_min(1e-12)
    state.optimizer.zero_grad(set_to_none=True)
    return Parcel(parcel) if sent is None or watched else sent


def _transform(state: TrainState) -> None:
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                for transform in state.transforms:
                    transform(parameter.detach(), parameter.grad)


def _closely(ran: Sequence[Ran]) -> dict[str, Tensor]:
    """What a sampled step tells of each of this rank's examples."""
    found: dict[str, Tensor] = {}
    for place, one in enumerate(ran):
        if one.details is not None:
            order = one.losses.new_zeros(len(one.losses), 0) if one.order is None else one.order
            found |= {f"item_losses_{place}": one.losses, f"item_weights_{place}": one.weights}
            found |= {f"item_orders_{place}": order, f"item_details_{place}": one.details}
    return found


_BY_LOSS = ("nonfinite_loss", "over_limit")


def _record(
    state: TrainState, launched: Launched, values: dict[str, list[float]], told: dict[str, float]
) -> StepRecord:
    one = told | {name: values[name][0] for name in ("scale", "norm", "norm_transformed", "limit")}
    weight, n_real, attempt = one["weight"], one["real"], launched.attempt
    if one["out_of_memory"]:
        outcome = "out_of_memory"
    elif one["nonfinite"]:
        outcome = "nonfinite_loss"
    elif one["over"]:
        outcome = "over_limit"
    elif weight == 0:
        outcome = "all_easy"
    elif not math.isfinite(one["norm"]):
        outcome = "loss_scale" if can_shrink(state, one["scale"]) else "nonfinite_gradient"
    else:
        outcome = "trained"
    trained, seconds = outcome == "trained", perf_counter() - launched.started
    loss = one["weighted_loss"] / weight if weight else one["loss"] / max(n_real, 1)
    items = [part.items for part in launched.parts]
    blocks = {}
    if "block_norms" in values:
        blocks = block_records(blocks_of(state.bare_model), values["block_norms"], values["update_ratios"])
    return StepRecord(
        step=launched.step,
        epoch=items[0][0].epoch if items[0] else 0,
        outcome=outcome,
        loss=loss if n_real else None,
        grad_norm=one["norm"],
        limit=one["limit"],
        clipped=trained and one["norm_transformed"] > one["limit"],
        norm_after=min(one["norm_transformed"], one["limit"]) if trained else None,
        si_sdr=tuple(total / n if n else None for total, n in zip(*_rows(values["si_sdr"], 2), strict=True)),
        lr=launched.lr,
        loss_scale=one["scale"],
        n_trained=round(one["trained"]) if trained else 0,
        n_easy=round(one["easy"]),
        n_bad=attempt.n_set_aside or round(one["nonfinite"] + one["over"]),
        bad_items=attempt.set_aside,
        n_micro_batches=len(attempt.ran),
        blocks=blocks,
        items=tuple(_item_records(attempt.ran, values)),
        seconds=seconds,
        examples_per_second=n_real / seconds,
        peak_memory_bytes=peak_memory(state.device),
    )


def _item_records(ran: Sequence[Ran], values: dict[str, list[float]]) -> Iterator[ItemRecord]:
    for place, one in enumerate(ran):
        if one.details is None or not one.batch.items:
            continue
        losses, weights = values[f"item_losses_{place}"], values[f"item_weights_{place}"]
        orders, details = (_rows(values[f"item_{name}_{place}"], len(losses)) for name in ("orders", "details"))
        yield from map(item_record, one.batch.items, losses, weights, orders, details)


def _rows(values: list[float], n_rows: int) -> list[list[float]]:
    width = len(values) // n_rows
    return [values[row * width : (row + 1) * width] for row in range(n_rows)]


def _bad_items(state: TrainState, launched: Launched, outcome: str) -> Iterator[ItemId]:
    """The examples of this rank behind a fault; all of them where none can be told from the others."""
    ran, everything = launched.attempt.ran, [item for part in launched.parts for item in part.items]
    if outcome == "out_of_memory":
        yield from () if ran else everything
        return
    by_loss, found = outcome in _BY_LOSS, False
    for one in ran:
        places = guilty_places(state, one, launched.step, by_loss=by_loss)
        found = found or bool(places)
        yield from (one.batch.items[place] for place in places if one.batch.items)
    if not found and not by_loss:
        yield from everything
