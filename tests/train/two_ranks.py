"""Run by torchrun on two processes; leaves what each rank saw as JSON, for test_ddp.py to judge."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.robust.clip import AutoClip, NoClip
from unbraid.robust.filter import ThresholdFilter
from unbraid.train.state import TrainState
from unbraid.train.step import train_step


def squared_error(estimate, target):
    return (estimate - target).square().mean(-1)


def make_state(*, dtype=torch.float64, wrapped=True, clipper=None, filters=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 5, padding=2), nn.Tanh(), nn.Conv1d(4, 2, 5, padding=2)).to(dtype)
    net = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = lambda estimate, target: squared_error(estimate, target.flatten(1, 2)).mean(1)  # noqa: E731
    return TrainState(net, loss, optimizer, clipper or NoClip(), filters=filters)


def make_batch(n, seed, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    sources = torch.randn(n, 2, 1, 50, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.rand(n, generator=rng, dtype=torch.float64).to(dtype) + 0.1
    return Batch.of(sources.sum(1), sources, weight=weight)


def part(batch, places):
    return Batch.of(batch.mixture[places], batch.sources[places], weight=batch.weight[places])


def distance(state, other):
    pairs = zip(state.bare_model.parameters(), other.bare_model.parameters(), strict=True)
    return max((mine - theirs).detach().abs().max().item() for mine, theirs in pairs)


def same_as_one_process(shares, *, dtype=torch.float64, filters=(), weightless=()):
    """How far two ranks (and micro-batches) come from one process on the joined batch, over five steps."""
    here, alone = (make_state(dtype=dtype, wrapped=wrapped, filters=filters) for wrapped in (True, False))
    for seed in range(5):
        batch = make_batch(6, seed, dtype)
        batch.weight[list(weightless)] = 0.0
        record = train_step(here, [part(batch, places) for places in shares[dist.rank()]])
        world, dist.world_size = dist.world_size, lambda: 1
        summed, dist.sum_over_ranks = dist.sum_over_ranks, lambda values: values
        single = train_step(alone, batch)
        dist.world_size, dist.sum_over_ranks = world, summed
        assert record.outcome == single.outcome
    return {"distance": distance(here, alone), "norms": [record.grad_norm, single.grad_norm], "n": record.n_trained}


def nan_on_one_rank():
    state = make_state(clipper=AutoClip())
    train_step(state, make_batch(2, dist.rank()))
    before = [p.detach().clone() for p in state.bare_model.parameters()]
    bad = make_batch(2, 7)
    if dist.rank() == 1:
        bad.mixture[0, 0, 3] = torch.nan
    record = train_step(state, bad)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, state.bare_model.parameters(), strict=True))
    after = train_step(state, make_batch(2, 8 + dist.rank()))
    difference = dist.first_difference(state.bare_model)
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
    agreed = dist.first_difference(state.bare_model)
    if dist.rank() == 1:
        with torch.no_grad():
            state.bare_model[2].weight[0, 0, 0] += 1e-3
    return {"agreed": agreed, "found": dist.first_difference(state.bare_model)}


def main(out):
    with dist.process_group(torch.device("cpu")):
        easy = [ThresholdFilter(threshold_db=1.0)]
        results = {
            "even": same_as_one_process([[[0, 1, 2]], [[3, 4, 5]]]),
            "uneven": same_as_one_process([[[0]], [[1, 2, 3, 4, 5]]]),
            "micro_batches": same_as_one_process([[[0], [1, 2]], [[3, 4], [5]]]),
            "float32": same_as_one_process([[[0, 1]], [[2, 3, 4, 5]]], dtype=torch.float32),
            "filtered": same_as_one_process([[[0, 1, 2]], [[3, 4, 5]]], filters=easy),
            "nothing_left": same_as_one_process([[[0, 1]], [[2, 3, 4, 5]]], weightless=(0, 1)),
            "nan": nan_on_one_rank(),
            "fifty": different_data_for_fifty_steps(),
            "any": [dist.any_rank(dist.rank() == 1), dist.any_rank(False)],
            "from_main": dist.from_main_process({"rank": dist.rank()}),
            "largest": dist.max_over_ranks([dist.rank(), -dist.rank()]),
            "gathered": [dist.gather(["b"] if dist.rank() == 1 else []), dist.gather([])],
        }
        Path(out, f"rank-{dist.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
