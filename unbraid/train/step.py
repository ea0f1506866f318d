"""One training step: forward, filter, backward, agree over the ranks, clip, update or skip, record."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.records import FAULT_OUTCOMES, ItemId, ItemRecord, Outcome, StepRecord
from unbraid.robust.clip import as_max_norm
from unbraid.robust.guard import apply_update, supports_found_inf
from unbraid.train.block_stats import BlockStats, block_records, is_sampled_step, parameters_by_block
from unbraid.train.buffer_snapshot import BufferSnapshot
from unbraid.train.example_stats import item_record
from unbraid.train.forward_backward import BackwardResult, MicroBatchResult, Totals, forward_backward
from unbraid.train.host_transfer import HostTransfer
from unbraid.train.memory import host_memory, peak_memory
from unbraid.train.rescue import find_bad_examples, loss_scale_can_shrink, rescue
from unbraid.train.state import TrainState


@dataclass
class LaunchedStep:
    """A step whose work is queued on the device, and whose numbers are on their way to the host.

    Attributes:
        step: Its number, from 1.
        batches: Micro-batches of this rank, as they were passed in.
        backward: Results of forward and backward.
        transfer: The numbers.
        lr: Learning rate of the first parameter group.
        started: When it was launched, by `perf_counter`.
    """

    step: int
    batches: list[Batch]
    backward: BackwardResult
    transfer: HostTransfer
    lr: float
    started: float


def train_step(state: TrainState, batch: Batch | Sequence[Batch]) -> StepRecord:
    """Train on one batch, or on the micro-batches of one step, unless something is wrong with it.

    With per-example losses l_i and weights w_i over all ranks and micro-batches, the gradient is
    ``sum(w_i * grad l_i) / sum(w_i)``. Every rank must call it, and every rank runs every backward. A step that cannot
    be trusted is skipped on every rank: weights, optimizer and clipper stay as they were, bit for bit, and the record
    gives the reason.

    It waits for the device once, at its end. `launch` and `finish` are its two halves: a loop that launches the next
    step before it finishes this one never leaves an accelerator without work.

    Args:
        state: Changed in place.
        batch: Examples of this rank.

    Returns:
        The record of the step. It is the same on every rank, except for `epoch`, times, memory, `items`,
        `n_micro_batches` and `bad_items`; where memory ran out on one rank, norms may differ as well.
    """
    batches = [batch] if isinstance(batch, Batch) else list(batch)
    while True:
        finished = finish(state, launch(state, batches))
        if finished is not None:  # else memory ran out, and the batches are cut into smaller pieces now
            record, _ = finished
            return record


def launch(state: TrainState, batches: Sequence[Batch], *, notes: Sequence[float] = ()) -> LaunchedStep:
    """Do everything in a step that needs no answer from the device.

    Args:
        state: Changed in place.
        batches: Micro-batches of this rank.
        notes: Numbers to sum over the ranks along with the step's own. Every rank must pass the same number of them.

    Raises:
        ValueError: If there are no batches. A rank without examples passes one of weight 0.
    """
    started = perf_counter()
    if not batches:
        raise ValueError("A step needs a batch on every process. Without examples, pass a batch of weight 0.")
    step = state.step + 1

    # 1. Forward and backward. A model that raises leaves buffers and step count as they were.
    buffers = BufferSnapshot(state.buffer_locations)
    pieces = list(batches)
    if state.n_pieces > 1:  # memory ran out before
        pieces = [piece for batch in batches for piece in batch.split(state.n_pieces)]
    # A piece of one example cannot be split.
    can_split_further = max(len(batch.mixture) for batch in batches) > state.n_pieces
    try:
        backward = forward_backward(state, pieces, step, notes, can_split_further=can_split_further)
        if state.on_bad_example == "rescue":
            backward = rescue(state, backward, step, notes, can_split_further=can_split_further, buffers=buffers)
    except Exception:
        buffers.restore()
        raise
    state.step = step

    # 2. Update the weights or skip the step, and send the numbers off.
    transfer = _update_or_skip(state, backward, step, buffers)

    # Release the list: otherwise a launched step would keep its gradients alive while the next one allocates its own.
    backward.gradients.clear()
    lr = float(state.optimizer.param_groups[0]["lr"])
    return LaunchedStep(step, list(batches), backward, transfer, lr, started)


def _update_or_skip(state: TrainState, backward: BackwardResult, step: int, buffers: BufferSnapshot) -> HostTransfer:
    """Clip and update, or leave everything as it was. All decisions are 0-d tensors on the device."""
    totals = backward.totals
    grad_norm = backward.grad_norm
    gradients = backward.gradients
    divisor = backward.divisor

    # 1. Decide, from sums that all ranks agree on, whether this step may change the weights. It may not if an earlier
    #    step that ran out of memory is still to be repeated: the order of the steps must not change.
    out_of_memory = totals.n_ranks_out_of_memory > 0
    must_repeat = out_of_memory & (totals.n_ranks_cannot_split == 0)
    if state.repeat_pending is not None:
        must_repeat = must_repeat | state.repeat_pending
    state.repeat_pending = must_repeat
    batch_is_usable = ~must_repeat & ~out_of_memory & (totals.n_nonfinite + totals.n_over_limit == 0)
    has_weight = totals.weight > 0

    # 2. What the host wants to know. In sampled steps also each block and each example.
    loss_scale = state.precision.scale_on(grad_norm.device)
    numbers = {"loss_scale": loss_scale, **backward.sums, "grad_norm": grad_norm}
    numbers |= _numbers_of_examples(backward.micro_batches)
    block_stats = BlockStats(state.unwrapped_model, divisor) if is_sampled_step(step) else None

    # 3. Transforms such as AGC compare gradients with weights, so they need true gradients: average and unscale first.
    transformed_norm = grad_norm
    if state.transforms and gradients:
        torch._foreach_div_(gradients, divisor)
        _apply_transforms(state)
        transformed_norm = nn.utils.get_total_norm(gradients)
        divisor = torch.ones_like(divisor)

    # 4. Clip. A clipper learns only from steps that are taken: one NaN in AutoClip's history would poison it for good.
    gradient_is_finite = grad_norm.isfinite() & transformed_norm.isfinite()
    take_step = batch_is_usable & has_weight & gradient_is_finite
    max_norm = as_max_norm(state.clipper(transformed_norm, take_step), transformed_norm)
    take_step = take_step & (max_norm == max_norm)  # False for NaN: the clipper itself is at fault
    divisor = divisor * (transformed_norm / max_norm).clamp_min(1)
    numbers |= {"transformed_norm": transformed_norm, "max_norm": max_norm}

    # 5. Update. Averaging, unscaling and clipping are one division in a fused optimizer's own pass. Any other optimizer
    #    needs the host's decision: then the transfer is awaited here, and serves the record too unless it is sampled.
    transfer: HostTransfer | None = None
    if supports_found_inf(state.optimizer):
        apply_update(state.optimizer, gradients, divisor, take_step)
    else:
        transfer = HostTransfer(numbers | {"take_step": take_step})
        host_decision = torch.tensor(bool(transfer.values()["take_step"][0]))
        apply_update(state.optimizer, gradients, divisor, host_decision)

    # 6. All else that remembers. Only an overflow of usable examples shrinks the loss scale.
    buffers.restore(unless=take_step)
    if state.ema is not None:
        state.ema.update(state.unwrapped_model, take_step)
    overflowed = batch_is_usable & has_weight & ~gradient_is_finite
    state.precision.update(overflowed, take_step)
    all_filtered = batch_is_usable & ~has_weight
    for loss_filter in state.stateful_filters:
        losses = backward.sums["losses"]
        loss_filter.observe(losses, losses.isfinite() & (take_step | all_filtered))

    # p.grad stays allocated until the next step: on a CPU, freeing its pages here would cost page faults in each step.
    if block_stats is None and transfer is not None:
        return transfer
    if block_stats is not None:
        numbers |= block_stats.after_update()
    return HostTransfer(numbers)


def _apply_transforms(state: TrainState) -> None:
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                for transform in state.transforms:
                    transform(parameter.detach(), parameter.grad)


def _numbers_of_examples(micro_batches: Sequence[MicroBatchResult]) -> dict[str, Tensor]:
    """Return what a sampled step records of each example of this rank; nothing in any other step."""
    numbers: dict[str, Tensor] = {}
    for index, result in enumerate(micro_batches):
        if result.output_stats is None or result.source_stats is None:
            continue
        no_order = result.losses.new_zeros(len(result.losses), 0)
        numbers[f"item_losses_{index}"] = result.losses
        numbers[f"item_weights_{index}"] = result.weights
        numbers[f"item_orders_{index}"] = no_order if result.order is None else result.order
        numbers[f"item_output_stats_{index}"] = result.output_stats
        numbers[f"item_source_stats_{index}"] = result.source_stats
    return numbers


def finish(state: TrainState, launched: LaunchedStep) -> tuple[StepRecord, list[float]] | None:
    """Wait for a step's numbers, and make its record. Steps must be finished in the order of their launches.

    Returns:
        The record, and the notes it was launched with, summed over the ranks. None if memory ran out on some rank and
        smaller pieces may help: no weights have changed since, batches are cut into more pieces from now on, and the
        caller launches this step again and then those that it had launched after it.
    """
    values = launched.transfer.values()
    totals = dict(zip(Totals._fields, values["totals"], strict=True))
    # All ranks read the same sums here, so all of them repeat the step, even if only one ran out of memory.
    if totals["n_ranks_out_of_memory"] and not totals["n_ranks_cannot_split"]:
        state.n_pieces *= 2
        state.step = launched.step - 1
        state.repeat_pending = None
        return None
    record = _make_record(state, launched, values, totals)
    state.faults.add(record.outcome)
    return record, values["notes"]


def _outcome(
    state: TrainState, totals: dict[str, float], grad_norms: Sequence[float], max_norm: float, loss_scale: float
) -> Outcome:
    if totals["n_ranks_out_of_memory"]:
        return "out_of_memory"
    if totals["n_nonfinite"]:
        return "nonfinite_loss"
    if totals["n_over_limit"]:
        return "over_limit"
    if totals["weight"] == 0:
        return "all_filtered"
    if not all(map(math.isfinite, grad_norms)):
        return "fp16_overflow" if loss_scale_can_shrink(state, loss_scale) else "nonfinite_gradient"
    if math.isnan(max_norm):
        return "nonfinite_gradient"
    return "trained"


def _make_record(
    state: TrainState, launched: LaunchedStep, values: dict[str, list[float]], totals: dict[str, float]
) -> StepRecord:
    backward = launched.backward
    loss_scale = values["loss_scale"][0]
    grad_norm = values["grad_norm"][0]
    transformed_norm = values["transformed_norm"][0]
    max_norm = values["max_norm"][0]
    n_examples = totals["n_examples"]
    outcome = _outcome(state, totals, (grad_norm, transformed_norm), max_norm, loss_scale)
    trained = outcome == "trained"

    # A skipped step is recorded with its true loss, the mean over all its examples, even if that is NaN.
    loss = totals["weighted_loss"] / totals["weight"] if trained else totals["loss"] / max(n_examples, 1)
    score_sums, score_counts = _as_rows(values["si_sdr"], 2)
    si_sdr = tuple(total / n if n else None for total, n in zip(score_sums, score_counts, strict=True))
    bad_items = backward.rescued_from
    if outcome in FAULT_OUTCOMES:
        bad_items = (*bad_items, *_bad_items(state, launched, outcome))
    blocks = {}
    if "block_norms" in values:
        names = parameters_by_block(state.unwrapped_model)
        blocks = block_records(names, values["block_norms"], values["update_ratios"])
    first_items = launched.batches[0].items
    seconds = perf_counter() - launched.started
    return StepRecord(
        step=launched.step,
        epoch=first_items[0].epoch if first_items else 0,
        outcome=outcome,
        loss=loss if n_examples else None,
        grad_norm=grad_norm,
        max_norm=max_norm,
        clipped=trained and transformed_norm > max_norm,
        clipped_grad_norm=min(transformed_norm, max_norm) if trained else None,
        si_sdr=si_sdr,
        lr=launched.lr,
        loss_scale=loss_scale,
        n_trained=round(totals["n_trained"]) if trained else 0,
        n_filtered=round(totals["n_filtered"]),
        n_bad=backward.n_rescued_from + round(totals["n_nonfinite"] + totals["n_over_limit"]),
        bad_items=bad_items,
        n_micro_batches=len(backward.micro_batches),
        blocks=blocks,
        items=tuple(_item_records(backward.micro_batches, values)),
        seconds=seconds,
        examples_per_second=n_examples / seconds,
        peak_memory_bytes=peak_memory(state.device),
        host_memory_bytes=host_memory(),
    )


def _item_records(micro_batches: Sequence[MicroBatchResult], values: dict[str, list[float]]) -> Iterator[ItemRecord]:
    for index, result in enumerate(micro_batches):
        if result.output_stats is None or not result.batch.items:
            continue
        losses = values[f"item_losses_{index}"]
        weights = values[f"item_weights_{index}"]
        orders = _as_rows(values[f"item_orders_{index}"], len(losses))
        outputs = _as_rows(values[f"item_output_stats_{index}"], len(losses))
        sources = _as_rows(values[f"item_source_stats_{index}"], len(losses))
        yield from map(item_record, result.batch.items, losses, weights, orders, outputs, sources)


def _as_rows(values: list[float], n_rows: int) -> list[list[float]]:
    """Return a flattened table as its rows."""
    width = len(values) // n_rows
    return [values[row * width : (row + 1) * width] for row in range(n_rows)]


def _bad_items(state: TrainState, launched: LaunchedStep, outcome: Outcome) -> list[ItemId]:
    """Return the examples of this rank behind a fault; all of them if no rank can tell which they are."""
    results = launched.backward.micro_batches
    all_items = [item for batch in launched.batches for item in batch.items]
    if outcome == "out_of_memory":
        return [] if results else all_items  # this rank had enough memory: another one did not
    by_loss = outcome in ("nonfinite_loss", "over_limit")
    bad = [find_bad_examples(state, result, launched.step, by_loss=by_loss) for result in results]
    # A collective: every rank comes here, because the outcome is the same on all of them.
    if not by_loss and not dist.any_rank(any(bad), state.device):
        return all_items
    return [
        result.batch.items[index]
        for result, indices in zip(results, bad, strict=True)
        if result.batch.items
        for index in indices
    ]
