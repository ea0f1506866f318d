"""train_step: forward, filter, backward, agree across ranks, clip, update, record."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.records import ItemId, ItemRecord, Outcome, StepRecord
from unbraid.robust.clip import as_max_norm
from unbraid.robust.guard import apply_update, supports_found_inf
from unbraid.train.block_stats import (
    BlockStats,
    block_records,
    host_memory,
    is_sampled_step,
    item_record,
    parameters_by_block,
    peak_memory,
)
from unbraid.train.buffer_snapshot import BufferSnapshot
from unbraid.train.forward_backward import (
    COUNTS,
    Attempt,
    Ran,
    can_shrink,
    cut,
    divisible,
    guilty_places,
    rescued,
    run_once,
)
from unbraid.train.host_transfer import HostTransfer
from unbraid.train.state import TrainState


@dataclass
class LaunchedStep:
    """A step whose work is done or under way, and whose scalars are on their way to the host.

    Attributes:
        step: Its number.
        parts: Micro-batches of this rank.
        notes: Of this rank, to be summed.
        attempt: What came of the examples.
        parcel: The scalars.
        rates: Learning rate of each parameter group.
        n_pieces: What each micro-batch was cut into.
        started: When, by `perf_counter`.
    """

    step: int
    parts: list[Batch]
    notes: Sequence[float]
    attempt: Attempt
    parcel: HostTransfer
    rates: list[float]
    n_pieces: int
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
) -> LaunchedStep:
    """Do all of a step that needs no answer from the device.

    Args:
        state: Changed in place.
        parts: Micro-batches of this rank.
        notes: Numbers to be summed over the ranks beside the step's own; as many on each.
        step: Its number, where it is done again; else the next.
    """
    started, parts, is_new = perf_counter(), list(parts), step is None
    if not parts:
        raise ValueError("A step needs a batch on every process: where nothing is left, a stand-in of weight 0.")
    step = state.step + 1 if step is None else step
    kept = BufferSnapshot(state.buffer_locations)
    try:
        attempt = _attempt(state, parts, step, notes, kept)
        while not attempt.ran and dist.world_size() == 1 and divisible(state, parts):
            state.n_pieces *= 2
            kept.restore()
            attempt = _attempt(state, parts, step, notes, kept)
    except Exception:  # a model that raises leaves the state as it was
        kept.restore()
        raise
    state.step += is_new
    parcel = _apply(state, attempt, step, kept)
    attempt.gradients.clear()  # whoever finishes this step must not hold on to them while the next one is under way
    rates = [float(group["lr"]) for group in state.optimizer.param_groups]
    return LaunchedStep(step, parts, notes, attempt, parcel, rates, state.n_pieces, started)


def _attempt(
    state: TrainState, parts: Sequence[Batch], step: int, notes: Sequence[float], kept: BufferSnapshot
) -> Attempt:
    smaller = divisible(state, parts)
    attempt = run_once(state, cut(state, parts), step, notes, divisible=smaller)
    if state.on_bad_example == "rescue":
        return rescued(state, attempt, step, notes, divisible=smaller, kept=kept)
    return attempt


def finish(state: TrainState, launched: LaunchedStep) -> tuple[StepRecord, list[float]]:
    """Wait for a step's scalars, and say what became of it.

    Where memory ran out on one of several ranks, all of them do the step again in smaller pieces, and after it those
    that were launched meanwhile: they have held back, so that all is done in the order and with the learning rates of a
    run that had the memory. Steps must be finished in the order in which they were launched, and while
    ``state.is_behind`` it is better to finish than to launch.

    Returns:
        Its record, and the notes that it was launched with, summed over the ranks.
    """
    values = launched.parcel.open()
    told = dict(zip(COUNTS, values["counts"], strict=True))
    starved = bool(told["out_of_memory"] and told["divisible"] and dist.world_size() > 1)
    if starved or values["held"][0]:
        if starved and state.n_pieces == launched.n_pieces:
            state.n_pieces *= 2
        return finish(state, _again(state, launched))
    record = _record(state, launched, values, told)
    if not record.trained and record.outcome not in ("all_filtered", "fp16_overflow"):
        record = replace(record, bad_items=(*record.bad_items, *_bad_items(state, launched, record.outcome)))
    state.faults.add(record.outcome)
    return record, values["notes"]


def _again(state: TrainState, launched: LaunchedStep) -> LaunchedStep:
    """Launch a step once more, as it was; those launched after it stay behind it."""
    state.held, state.is_behind = None, state.step > launched.step
    groups = state.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, launched.rates, strict=True):
        group["lr"] = rate
    again = launch(state, launched.parts, notes=launched.notes, step=launched.step)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    if state.is_behind:
        state.held = torch.ones((), dtype=torch.bool, device=state.device)
    return again


def _apply(state: TrainState, attempt: Attempt, step: int, kept: BufferSnapshot) -> HostTransfer:
    """Clip and update, or leave everything as it was; all of it is decided where the tensors are."""
    told, norm, gradients, divisor = attempt.told, attempt.norm, attempt.gradients, attempt.divisor
    starved = attempt.count("out_of_memory") > 0
    held = torch.zeros_like(starved) if state.held is None else state.held
    weighs = attempt.count("weight") > 0
    sound = ~held & ~starved & (attempt.count("nonfinite") + attempt.count("over") == 0)
    scale = state.precision.scale_on(norm.device)
    parcel = {"scale": scale.clone(), "held": held} | told | {"norm": norm} | _closely(attempt.ran)
    watched = BlockStats(state.unwrapped_model, divisor) if is_sampled_step(step) else None
    if state.transforms and gradients:
        torch._foreach_div_(gradients, divisor)
        _transform(state)
        norm, divisor = nn.utils.get_total_norm(gradients), torch.ones_like(divisor)
    finite = attempt.norm.isfinite() & norm.isfinite()
    fine = sound & weighs & finite
    limit = as_max_norm(state.clipper(norm, fine), norm)
    parcel |= {"norm_transformed": norm, "max_norm": limit}
    divisor, sent = divisor * (norm / limit).clamp_min(1), None
    if supports_found_inf(state.optimizer):
        apply_update(state.optimizer, gradients, divisor, fine)
    else:  # the host decides: it needs the scalars before the update
        sent = HostTransfer(parcel | {"fine": fine})
        apply_update(state.optimizer, gradients, divisor, torch.tensor(bool(sent.open()["fine"][0])))
    kept.restore(unless=fine)
    if state.ema is not None:
        state.ema.update(state.unwrapped_model, fine)
    state.precision.update(sound & weighs & ~finite, fine)
    for loss_filter in state.remembering_filters:
        loss_filter.observe(told["losses"], told["losses"].isfinite() & (fine | (sound & ~weighs)))
    if dist.world_size() > 1:  # steps after one that will be done again must not be done before it
        state.held = held | (starved & (attempt.count("divisible") > 0))
    if watched is not None:
        parcel |= watched.after_update()
    # the gradients stay until the next step: freed here, their pages would be given back and faulted in anew each time
    return HostTransfer(parcel) if sent is None or watched is not None else sent


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
        if one.details is not None and one.truth is not None:
            order = one.losses.new_zeros(len(one.losses), 0) if one.order is None else one.order
            found |= {f"item_losses_{place}": one.losses, f"item_weights_{place}": one.weights}
            found |= {f"item_orders_{place}": order, f"item_details_{place}": one.details}
            found[f"item_truths_{place}"] = one.truth
    return found


def _record(
    state: TrainState, launched: LaunchedStep, values: dict[str, list[float]], told: dict[str, float]
) -> StepRecord:
    one = told | {name: values[name][0] for name in ("scale", "norm", "norm_transformed", "max_norm")}
    weight, n_real, attempt = one["weight"], one["real"], launched.attempt
    outcome: Outcome
    if one["out_of_memory"]:
        outcome = "out_of_memory"
    elif one["nonfinite"]:
        outcome = "nonfinite_loss"
    elif one["over"]:
        outcome = "over_limit"
    elif weight == 0:
        outcome = "all_filtered"
    elif not math.isfinite(one["norm"]) or not math.isfinite(one["norm_transformed"]):
        outcome = "fp16_overflow" if can_shrink(state, one["scale"]) else "nonfinite_gradient"
    else:
        outcome = "trained"
    trained, seconds = outcome == "trained", perf_counter() - launched.started
    loss = one["weighted_loss"] / weight if trained else one["loss"] / max(n_real, 1)
    items = [part.items for part in launched.parts]
    blocks = {}
    if "block_norms" in values:
        blocks = block_records(
            parameters_by_block(state.unwrapped_model), values["block_norms"], values["update_ratios"]
        )
    return StepRecord(
        step=launched.step,
        epoch=items[0][0].epoch if items[0] else 0,
        outcome=outcome,
        loss=loss if n_real else None,
        grad_norm=one["norm"],
        max_norm=one["max_norm"],
        clipped=trained and one["norm_transformed"] > one["max_norm"],
        clipped_grad_norm=min(one["norm_transformed"], one["max_norm"]) if trained else None,
        si_sdr=tuple(total / n if n else None for total, n in zip(*_rows(values["si_sdr"], 2), strict=True)),
        lr=launched.rates[0],
        loss_scale=one["scale"],
        n_trained=round(one["trained"]) if trained else 0,
        n_filtered=round(one["filtered"]),
        n_bad=attempt.n_set_aside or round(one["nonfinite"] + one["over"]),
        bad_items=attempt.set_aside,
        n_micro_batches=len(attempt.ran),
        blocks=blocks,
        items=tuple(_item_records(attempt.ran, values)),
        seconds=seconds,
        examples_per_second=n_real / seconds,
        peak_memory_bytes=peak_memory(state.device),
        host_memory_bytes=host_memory(),
    )


def _item_records(ran: Sequence[Ran], values: dict[str, list[float]]) -> Iterator[ItemRecord]:
    for place, one in enumerate(ran):
        if one.details is None or not one.batch.items:
            continue
        losses, weights = values[f"item_losses_{place}"], values[f"item_weights_{place}"]
        tables = [_rows(values[f"item_{name}_{place}"], len(losses)) for name in ("orders", "details", "truths")]
        yield from map(item_record, one.batch.items, losses, weights, *tables)


def _rows(values: list[float], n_rows: int) -> list[list[float]]:
    width = len(values) // n_rows
    return [values[row * width : (row + 1) * width] for row in range(n_rows)]


def _bad_items(state: TrainState, launched: LaunchedStep, outcome: str) -> list[ItemId]:
    """The examples of this rank behind a fault; all of them where no rank can tell any from the others."""
    ran, everything = launched.attempt.ran, [item for part in launched.parts for item in part.items]
    if outcome == "out_of_memory":
        return [] if ran else everything
    by_loss = outcome in ("nonfinite_loss", "over_limit")
    places = [guilty_places(state, one, launched.step, by_loss=by_loss) for one in ran]
    if not by_loss and not dist.any_rank(any(places), state.device):
        return everything
    return [one.batch.items[place] for one, some in zip(ran, places, strict=True) if one.batch.items for place in some]
