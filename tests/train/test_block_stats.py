"""What a step records is what happened."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from toys import TwoFilters, make_batch, make_state, squared_error

from unbraid.data.batch import Batch
from unbraid.metrics import si_sdr
from unbraid.models import MODELS
from unbraid.records import append_record, read_steps
from unbraid.robust.clip import FixedClip, NoClip
from unbraid.train.block_stats import MAX_BLOCKS, SAMPLE_EVERY_STEPS, is_sampled_step, parameters_by_block
from unbraid.train.example_stats import output_stats, source_stats
from unbraid.train.step import train_step


def sampled_step(state, batch):
    state.step = SAMPLE_EVERY_STEPS - 1
    return train_step(state, batch)


def test_the_first_and_most_steps_are_not_sampled_and_every_fiftieth_is():
    assert [step for step in range(1, 151) if is_sampled_step(step)] == [50, 100, 150]
    record = train_step(make_state(), make_batch())

    assert (record.blocks, record.items) == ({}, ())


def test_blocks_are_named_up_to_their_first_number():
    model = nn.ModuleDict(
        {
            "encoder": nn.Conv1d(1, 1, 1),
            "stack": nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")}),
        }
    )

    blocks = parameters_by_block(model)

    assert list(blocks) == ["encoder", "stack.blocks.0", "stack.blocks.1"]
    assert sum(map(len, blocks.values())) == len(list(model.parameters()))


class Deep(nn.Module):
    """Stacks within stacks, layers of a recurrent one, a sequence of unlike layers, and a frozen one."""

    def __init__(self, n_outer=2, n_inner=3):
        super().__init__()
        self.encoder = nn.ModuleDict({"filters": nn.Conv1d(1, 4, 3)})
        self.dual = nn.ModuleList(
            nn.ModuleDict({"intra": nn.ModuleList(nn.Linear(2, 2) for _ in range(n_inner)), "norm": nn.LayerNorm(2)})
            for _ in range(n_outer)
        )
        self.head = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.PReLU()))
        self.rnn = nn.LSTM(2, 2, num_layers=2, bidirectional=True)


def test_nested_stacks_and_layers_of_an_lstm_are_separate_blocks():
    model = Deep()

    blocks = parameters_by_block(model)

    assert list(blocks) == [
        "encoder",
        *[f"dual.{outer}{inner}" for outer in (0, 1) for inner in (".intra.0", ".intra.1", ".intra.2", "")],
        "head.0",
        "rnn.l0",
        "rnn.l0_reverse",
        "rnn.l1",
        "rnn.l1_reverse",
    ]
    assert {id(p) for block in blocks.values() for p in block} == set(map(id, model.parameters()))
    assert [len(blocks[name]) for name in ("dual.0.intra.1", "dual.0", "head.0", "rnn.l1")] == [2, 2, 3, 4]


def test_a_model_with_too_many_blocks_is_recorded_in_coarser_ones():
    blocks = parameters_by_block(Deep(n_outer=3, n_inner=30))

    assert list(blocks) == ["encoder", "dual.0", "dual.1", "dual.2", "head.0", "rnn"]


@pytest.mark.parametrize("name", MODELS)
def test_no_built_in_model_has_more_blocks_than_a_record_should_hold(name):
    with torch.device("meta"):
        model = MODELS[name](**({"n_sources": 2} if name != "bs_roformer" else {}))

    assert 1 < len(parameters_by_block(model)) <= MAX_BLOCKS


@pytest.mark.parametrize("clipper", [NoClip(), FixedClip(max_norm=1e-3)])
def test_the_norms_of_the_blocks_make_up_the_norm_before_clipping(clipper):
    record = sampled_step(make_state(loss=squared_error, clipper=clipper), make_batch(3))

    assert sum(block.grad_norm**2 for block in record.blocks.values()) == pytest.approx(record.grad_norm**2)


def test_the_update_ratio_is_learning_rate_times_clipped_norm_over_the_weights():
    state = make_state(loss=squared_error, optimizer="sgd", lr=0.25, clipper=FixedClip(max_norm=1e-2))
    weights = torch.cat([p.detach().flatten() for p in state.model.parameters()]).norm().item()

    record = sampled_step(state, make_batch())

    assert record.clipped_grad_norm == pytest.approx(1e-2)
    assert record.blocks["filters"].update_ratio == pytest.approx(0.25 * 1e-2 / weights, rel=1e-3)


def test_a_skipped_sampled_step_records_no_update():
    batch = make_batch()
    batch.mixture[0, 0, 0] = torch.nan

    record = sampled_step(make_state(), batch)

    assert [block.update_ratio for block in record.blocks.values()] == [0.0]
    assert len(record.items) == 2


def test_a_sampled_step_records_the_estimates_of_each_example(tmp_path):
    state = make_state()
    batch = make_batch(3)
    with torch.no_grad():
        estimate = state.model(batch.mixture)
        wanted = state.loss.with_order(estimate, batch.sources)

    record = sampled_step(state, [batch.select([0]), batch.select([1, 2])])

    assert [one.item for one in record.items] == list(batch.items)
    assert [one.loss for one in record.items] == pytest.approx(wanted.losses.tolist(), abs=1e-4)
    assert [list(one.order) for one in record.items] == wanted.order.tolist()
    assert {one.weight for one in record.items} == {1.0}
    for one, outputs in zip(record.items, estimate[:, :, 0], strict=True):
        assert one.estimate_levels_db == pytest.approx((10 * outputs.square().mean(-1).log10()).tolist(), abs=1e-3)
    for one, sources in zip(record.items, batch.sources[:, :, 0], strict=True):
        assert one.source_levels_db == pytest.approx((10 * sources.square().mean(-1).log10()).tolist(), abs=1e-3)
        assert one.source_residual_db < -100
    append_record(tmp_path / "steps.jsonl", record)
    assert read_steps(tmp_path / "steps.jsonl") == [record]


def test_similarity_and_residual_have_their_known_values():
    time = torch.arange(800) / 8000
    low, high = torch.sin(200 * torch.pi * time), torch.sin(1000 * torch.pi * time)
    mixture = (low + high)[None, None]

    def details(first, second):
        *levels, similarity, residual = output_stats(torch.stack([first, second])[None, :, None], mixture)[0].tolist()
        return levels, similarity, residual

    levels, similarity, residual = details(low, high)
    assert levels == pytest.approx([-3.01, -3.01], abs=0.01)
    assert similarity == pytest.approx(0, abs=1e-3)
    assert residual < -100
    _, similarity, residual = details(low, -2 * low)
    assert similarity == pytest.approx(1)
    _, similarity, residual = details(low, torch.zeros(800))
    assert similarity == 0
    assert residual == pytest.approx(-3.01, abs=0.01)


def test_the_part_of_a_mixture_that_is_not_its_sources_is_recorded():
    sources = torch.randn(3, 2, 1, 4000, generator=torch.Generator().manual_seed(0))
    sources[1, 1] = 0
    mixture = sources.sum(1)
    mixture[2] *= 0.9

    levels, beside = source_stats(mixture, sources).split([2, 1], 1)

    assert levels[1, 1] == -200
    assert levels[0].tolist() == pytest.approx([0, 0], abs=0.2)
    assert (beside[:2] < -100).all()
    assert beside[2].item() == pytest.approx(20 * math.log10(0.1 / 0.9), abs=1e-2)
    assert source_stats(mixture.expand(-1, 2, -1), sources)[:, 2].isnan().all()


def test_si_sdr_of_each_source_is_the_mean_over_the_examples_trained_on():
    state, batch = make_state(), make_batch(4)
    batch.weight[3] = 0.0
    batch.sources[2, 1] = 0.0  # silent: no SI-SDR
    with torch.no_grad():
        estimate = state.model(batch.mixture)
        order = state.loss.with_order(estimate, batch.sources).order
    ratios = si_sdr(estimate.gather(1, order[:, :, None, None].expand_as(estimate)), batch.sources)[:, :, 0]

    record = train_step(state, [batch.select([0, 1]), batch.select([2, 3])])

    assert record.si_sdr == pytest.approx([ratios[:3, 0].mean().item(), ratios[:2, 1].mean().item()], abs=1e-3)


def test_a_loss_without_an_order_is_recorded_without_one():
    record = sampled_step(make_state(loss=squared_error), make_batch())

    assert record.si_sdr == ()
    assert [one.order for one in record.items] == [(), ()]


@pytest.mark.parametrize(("max_norm", "clipped"), [(1e-4, True), (1e4, False)])
def test_a_step_is_clipped_if_its_norm_exceeds_the_maximum(max_norm, clipped):
    record = train_step(make_state(loss=squared_error, clipper=FixedClip(max_norm=max_norm)), make_batch())

    assert (record.clipped, record.max_norm) == (clipped, max_norm)
    assert record.clipped_grad_norm == pytest.approx(min(record.grad_norm, max_norm))


def test_memory_is_recorded():
    record = train_step(make_state(), make_batch())

    assert min(record.peak_memory_bytes, record.host_memory_bytes) > 10**7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells a process's own peak, or none")
def test_the_recorded_memory_is_not_that_of_the_parent_process():
    tell = "from unbraid.train.memory import host_memory; print(host_memory())"
    hold = f"import subprocess, sys; held = b'.' * 1_500_000_000; subprocess.run([sys.executable, '-c', {tell!r}])"
    output = subprocess.run([sys.executable, "-c", hold], capture_output=True, text=True, check=True).stdout

    assert 10**7 < int(output) < 10**9


def test_a_frozen_block_has_no_norm():
    state = make_state()
    state.model.frozen = nn.Linear(2, 2).requires_grad_(False)

    assert sampled_step(state, make_batch()).blocks["frozen"].grad_norm == 0
    assert isinstance(state.model, TwoFilters)


def test_a_mixture_of_more_channels_than_the_outputs_is_recorded_without_a_residual():
    class FirstChannel(TwoFilters):
        def forward(self, mixture):
            return super().forward(mixture[:, :1])

    state, batch = make_state(), make_batch()
    model = FirstChannel()
    state = type(state)(model, squared_error, torch.optim.SGD(model.parameters(), lr=0.1))

    record = sampled_step(state, Batch.from_tensors(batch.mixture.expand(-1, 4, -1), batch.sources, items=batch.items))

    assert all(one.residual_db != one.residual_db for one in record.items)
    assert all(len(one.estimate_levels_db) == 2 for one in record.items)


def test_a_silent_example_does_not_count_in_the_si_sdr():
    with_silence, without = make_batch(3), make_batch(3).select([0, 1])
    with_silence.sources[2], with_silence.mixture[2] = 0.0, 0.0

    assert train_step(make_state(), with_silence).si_sdr == pytest.approx(train_step(make_state(), without).si_sdr)
