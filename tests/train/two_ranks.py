"""Run by torchrun on two processes; leaves what each rank saw as JSON, for test_ddp.py to check."""

import itertools
import json
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.data.loader import LoadedBatch
from unbraid.errors import TrainingStopped
from unbraid.records import Event, ItemId
from unbraid.robust.clip import AutoClip, NoClip
from unbraid.robust.filter import OutlierFilter, PercentileFilter, ThresholdFilter
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.loop import ValidationScores, fit
from unbraid.train.settings import Job, SaveSettings, TrainSettings, ValidateSettings
from unbraid.train.state import TrainState
from unbraid.train.step import finish, launch, train_step


def squared_error(estimate, target):
    return (estimate - target).square().mean(-1)


class Net(nn.Sequential):
    """Three layers; one rank can be made short of memory, slow, or different."""

    def __init__(self):
        super().__init__(nn.Conv1d(1, 4, 5, padding=2), nn.Tanh(), nn.Conv1d(4, 2, 5, padding=2))
        self.memory, self.seconds, self.n_calls, self.breaks_at = 10**9, 0.0, 0, None
        self.memory_backward = 10**9

    def forward(self, mixture):
        self.n_calls += 1
        time.sleep(self.seconds)
        if mixture.numel() > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        if self.n_calls == self.breaks_at:
            with torch.no_grad():
                self[2].weight[0, 0, 0] += 1e-3
        hidden = self[1](self[0](mixture))
        return self[2](Short.apply(hidden, mixture.numel() > self.memory_backward))


class Short(torch.autograd.Function):
    """Runs out of memory in the backward."""

    @staticmethod
    def forward(context, x, is_short):
        context.is_short = is_short
        return x * 1

    @staticmethod
    def backward(context, gradient):
        if context.is_short:
            raise torch.OutOfMemoryError("out of memory")
        return gradient, None


def make_state(*, dtype=torch.float64, wrapped=True, clipper=None, filters=(), **parts):
    torch.manual_seed(0)
    model = Net().to(dtype)
    net = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = lambda estimate, target: squared_error(estimate, target.flatten(1, 2)).mean(1)  # noqa: E731
    return TrainState(net, loss, optimizer, clipper or NoClip(), filters=filters, examples_per_rank=8, **parts)


def make_batch(n, seed, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    sources = torch.randn(n, 2, 1, 50, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.rand(n, generator=rng, dtype=torch.float64).to(dtype) + 0.1
    return Batch.from_tensors(sources.sum(1), sources, weight=weight)


def select(batch, indices):
    return Batch.from_tensors(batch.mixture[indices], batch.sources[indices], weight=batch.weight[indices])


def distance(state, other):
    pairs = zip(state.unwrapped_model.parameters(), other.unwrapped_model.parameters(), strict=True)
    return max((mine - theirs).detach().abs().max().item() for mine, theirs in pairs)


@contextmanager
def alone():
    """Let one process do what two would."""
    world, summed, rank = dist.world_size, dist.sum_over_ranks, dist.rank
    dist.world_size, dist.sum_over_ranks, dist.rank = (lambda: 1), (lambda values: values), (lambda: 0)
    try:
        yield
    finally:
        dist.world_size, dist.sum_over_ranks, dist.rank = world, summed, rank


def same_as_one_process(shares, *, dtype=torch.float64, filters=list, weightless=(), nan_examples=None, **parts):
    """Return how far two ranks (and micro-batches) are from one process on the joined batch, over five steps.

    The one process does not get the examples that are NaN on the ranks.
    """
    state, single = (make_state(dtype=dtype, wrapped=wrapped, filters=filters(), **parts) for wrapped in (True, False))
    indices = [index for rank in shares for share in rank for index in share]
    for seed in range(5):
        batch = make_batch(max(indices) + 1, seed, dtype)
        batch.weight[list(weightless)] = 0.0
        clean = select(batch, sorted(set(indices) - set(nan_examples or ())))
        for index in nan_examples or ():
            batch.mixture[index, 0, 3] = torch.nan
        record = train_step(state, [select(batch, share) for share in shares[dist.rank()]])
        with alone():
            expected = train_step(single, clean)
        assert record.outcome == expected.outcome, (record, expected)
        assert record.n_trained == expected.n_trained
    return {"distance": distance(state, single), "norms": [record.grad_norm, expected.grad_norm], "n": record.n_trained}


def random_shares(seed):
    """Return examples distributed to two ranks in one to four micro-batches each, none of them empty."""
    rng = np.random.default_rng(seed)
    n_parts = [int(rng.integers(1, 5)) for _ in range(2)]
    n_examples = int(rng.integers(sum(n_parts), sum(n_parts) + 4))
    edges = np.sort(rng.choice(np.arange(1, n_examples), sum(n_parts) - 1, replace=False))
    parts = [indices.tolist() for indices in np.split(np.arange(n_examples), edges)]
    weightless = rng.choice(n_examples, rng.integers(0, n_examples), replace=False).tolist()
    return [parts[: n_parts[0]], parts[n_parts[0] :]], weightless


FILTERS = [
    list,
    lambda: [ThresholdFilter(threshold_db=0.9)],
    lambda: [PercentileFilter(percentile=30.0, window=16, warmup=4)],
    lambda: [OutlierFilter(n_mads=1.0, at_least_db=0.0, window=16, warmup=4), ThresholdFilter(threshold_db=0.5)],
]


def any_distribution(dtype):
    """Return the distance for each of many random ways to distribute, weigh and filter examples."""
    distances = []
    for seed in range(12):
        shares, weightless = random_shares(seed)
        seen = same_as_one_process(shares, dtype=dtype, filters=FILTERS[seed % 4], weightless=weightless)
        distances.append(seen["distance"])
    return distances


def memory_runs_out_on_one_rank(*, where="memory"):
    """Give rank 1 memory for one example of 50 samples: both cut their batches, and the step is the same."""
    here, plenty = make_state(), make_state()
    if dist.rank() == 1:
        setattr(here.unwrapped_model, where, 50)
    batch = select(make_batch(8, 0), list(range(4 * dist.rank(), 4 * dist.rank() + 4)))
    record, _ = train_step(here, batch), train_step(plenty, batch)
    again = train_step(here, batch)
    return {
        "outcomes": [record.outcome, again.outcome],
        "pieces": [record.n_micro_batches, again.n_micro_batches, here.n_pieces],
        "distance": distance(here, after_one_more(plenty, batch)),
    }


def after_one_more(state, batch):
    train_step(state, batch)
    return state


def memory_runs_out_while_the_next_step_is_launched():
    """Stay one step ahead, with another learning rate in each step: all steps are as with enough memory."""
    ahead, plenty = make_state(), make_state()
    if dist.rank() == 1:
        ahead.unwrapped_model.memory = 100
    batches = [select(make_batch(8, seed), list(range(4 * dist.rank(), 4 * dist.rank() + 4))) for seed in range(5)]
    for step, batch in enumerate(batches):
        plenty.optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        train_step(plenty, batch)

    records, to_launch, in_flight = [], deque(enumerate(batches)), deque()
    n_launched_ahead = 0
    while to_launch or in_flight:
        if to_launch:
            step, batch = to_launch.popleft()
            ahead.optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
            in_flight.append((step, batch, launch(ahead, [batch])))
            if len(in_flight) == 1 and to_launch:
                continue
        n_launched_ahead += len(in_flight) - 1
        finished = finish(ahead, in_flight[0][2])
        if finished is None:
            to_launch.extendleft(reversed([(step, batch) for step, batch, _ in in_flight]))
            in_flight.clear()
            continue
        in_flight.popleft()
        records.append(finished[0])
    return {
        "steps": [[record.step, record.outcome, record.lr] for record in records],
        "pieces": ahead.n_pieces,
        "launched_ahead": n_launched_ahead,
        "distance": distance(ahead, plenty),
    }


def a_bad_gradient_on_one_rank():
    """Mark one example of rank 1: only that one is named, and only there."""
    state = make_state()
    state.loss = lambda estimate, target: rooted(estimate, target.flatten(1, 2))
    batch = make_batch(3, dist.rank())
    items = [ItemId("train", dist.rank(), index) for index in range(3)]
    if dist.rank() == 1:
        batch.sources[1, 0, 0, 0] = 7.0
    record = train_step(state, Batch.from_tensors(batch.mixture, batch.sources, items=items))
    return {"outcome": record.outcome, "items": [[item.epoch, item.index] for item in record.bad_items]}


def rooted(estimate, target):
    """Return a finite loss whose gradient is 0 * inf where the target is marked."""
    kept = (target[:, :1, :1] != 7.0).to(estimate.dtype)
    return squared_error(estimate, target).mean(1) + (estimate * kept).abs().sum((1, 2)).sqrt()


def no_memory_at_all_on_one_rank():
    state = make_state(clipper=AutoClip())
    train_step(state, make_batch(2, dist.rank()))
    before = [p.detach().clone() for p in state.unwrapped_model.parameters()]
    state.unwrapped_model.memory = 20 if dist.rank() == 1 else 10**9
    outcome = train_step(state, make_batch(1, 5)).outcome
    return {"outcome": outcome, "unmoved": all(map(torch.equal, before, state.unwrapped_model.parameters()))}


def fit_on_two(folder, name, *, change=None, stop=None, **train):
    """Run the loop over made-up batches; return its events and how it ended."""
    run = RunDirectory(Path(folder) / name)
    state = make_state(dtype=torch.float32)
    if change is not None:
        change(state)

    def load(n_steps_done):
        for step in itertools.count(n_steps_done):
            batch = make_batch(2, 10 * step + dist.rank(), torch.float32)
            items = [ItemId("train", dist.rank(), 2 * step + index, (f"{index}.wav",)) for index in range(2)]
            yield LoadedBatch(Batch.from_tensors(batch.mixture, batch.sources, weight=batch.weight, items=items), ())

    settings = TrainSettings(**{"max_steps": 400, "compare_every_steps": 0} | train)
    job = Job(run, settings, ValidateSettings(every_steps=0), SaveSettings(every_steps=0), {}, {})
    if dist.is_main():
        run.checkpoints.mkdir(parents=True)
    dist.any_rank(False)
    yielded, ended = [], ""
    try:
        yielded.extend(fit(state, load, lambda _: ValidationScores(1.0, 0.0, 0.0, 1), job, stop))
    except TrainingStopped as error:
        ended = str(error)
    events = [[event.code, event.rank, dict(event.evidence)] for event in yielded if isinstance(event, Event)]
    return {"events": events, "ended": ended, "steps": state.step}


def a_bad_example_on_one_rank(folder):
    """Give rank 1 a bad example: both ranks report it."""

    def change(state):
        state.loss = lambda estimate, target: (
            squared_error(estimate, target.flatten(1, 2)).mean(1)
            * torch.where(
                (dist.rank() == 1) & (target[:, 0, 0, 0] == target[0, 0, 0, 0]) & (state.step == 3), torch.nan, 1.0
            )
        )

    return fit_on_two(folder, "bad", change=change, max_steps=6)


def weights_that_drift(folder):
    def change(state):
        state.unwrapped_model.breaks_at = 30 if dist.rank() == 1 else None

    return fit_on_two(folder, "drift", change=change, compare_every_steps=20)


def a_slow_rank(folder):
    def change(state):
        state.unwrapped_model.seconds = 0.03 if dist.rank() == 1 else 0.0

    return fit_on_two(folder, "slow", change=change, max_steps=130)


def a_signal_while_the_ranks_agree(folder):
    """Rank 1 gets a signal after it has told the others that there was none, before it knows the sum."""
    stop, summed, calls = StopRequest(), dist.sum_over_ranks, []

    def struck(values):
        values = summed(values)
        calls.append(1)
        if dist.rank() == 1 and len(calls) == 7:
            stop.signal = int(signal.SIGTERM)
        return values

    dist.sum_over_ranks = struck
    try:
        return fit_on_two(folder, "signal", stop=stop) | {"agreed": stop.agreed}
    finally:
        dist.sum_over_ranks = summed


def nan_on_one_rank():
    state = make_state(clipper=AutoClip())
    train_step(state, make_batch(2, dist.rank()))
    before = [p.detach().clone() for p in state.unwrapped_model.parameters()]
    bad = make_batch(2, 7)
    if dist.rank() == 1:
        bad.mixture[0, 0, 3] = torch.nan
    record = train_step(state, bad)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, state.unwrapped_model.parameters(), strict=True))
    after = train_step(state, make_batch(2, 8 + dist.rank()))
    difference = dist.first_difference(state.unwrapped_model)
    history = state.clipper.state_dict()["norms"].tolist()
    return {
        "outcome": record.outcome,
        "unmoved": unmoved,
        "next": after.outcome,
        "difference": difference,
        "norms": history,
    }


def different_data_for_fifty_steps():
    state = make_state(dtype=torch.float32)
    for step in range(50):
        train_step(state, make_batch(2, 100 * dist.rank() + step, torch.float32))
    agreed = dist.first_difference(state.unwrapped_model)
    if dist.rank() == 1:
        with torch.no_grad():
            state.unwrapped_model[2].weight[0, 0, 0] += 1e-3
    return {"agreed": agreed, "found": dist.first_difference(state.unwrapped_model)}


def main(out):
    with dist.process_group(torch.device("cpu")):
        easy = lambda: [ThresholdFilter(threshold_db=1.0)]  # noqa: E731
        results = {
            "even": same_as_one_process([[[0, 1, 2]], [[3, 4, 5]]]),
            "uneven": same_as_one_process([[[0]], [[1, 2, 3, 4, 5]]]),
            "micro_batches": same_as_one_process([[[0], [1, 2]], [[3, 4], [5]]]),
            "float32": same_as_one_process([[[0, 1]], [[2, 3, 4, 5]]], dtype=torch.float32),
            "filtered": same_as_one_process([[[0, 1, 2]], [[3, 4, 5]]], filters=easy),
            "nothing_left": same_as_one_process([[[0, 1]], [[2, 3, 4, 5]]], weightless=(0, 1)),
            "rescued": same_as_one_process([[[0, 1, 2]], [[3, 4, 5]]], nan_examples=[4], on_bad_example="rescue"),
            "rescued_without_a_rank": same_as_one_process(
                [[[0, 1, 2]], [[3], [4]]], nan_examples=[3, 4], on_bad_example="rescue"
            ),
            "any_distribution": any_distribution(torch.float64),
            "any_distribution_float32": any_distribution(torch.float32),
            "memory": memory_runs_out_on_one_rank(),
            "memory_backward": memory_runs_out_on_one_rank(where="memory_backward"),
            "memory_ahead": memory_runs_out_while_the_next_step_is_launched(),
            "bad_gradient": a_bad_gradient_on_one_rank(),
            "no_memory": no_memory_at_all_on_one_rank(),
            "nan": nan_on_one_rank(),
            "bad_example": a_bad_example_on_one_rank(out),
            "drift": weights_that_drift(out),
            "slow": a_slow_rank(out),
            "signal": a_signal_while_the_ranks_agree(out),
            "fifty": different_data_for_fifty_steps(),
            "any": [dist.any_rank(dist.rank() == 1), dist.any_rank(False)],
            "from_main": dist.from_main_process({"rank": dist.rank()}),
            "largest": dist.max_over_ranks([dist.rank(), -dist.rank()]),
            "gathered": [dist.gather(["b"] if dist.rank() == 1 else []), dist.gather([])],
        }
        rank = dist.rank()
    results["threads"] = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(out, f"rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
