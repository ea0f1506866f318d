"""What is measured is what a training would do, and what is advised follows from it."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from bench_rows import TINY, recipe, row, without
from rich.console import Console

from unbraid import bench
from unbraid.bench import fits, in_a_fresh_process, measure, run_bench, variants
from unbraid.bench_advice import Variant, advise
from unbraid.errors import UserError

CPU = torch.device("cpu")
FAULTY = """
import os, signal
import torch
from torch import nn

class Faulty(nn.Module):
    def __init__(self, fault="", n_sources=2):
        super().__init__()
        self.fault, self.gains = fault, nn.Parameter(torch.ones(n_sources, 1, 1))

    def forward(self, mixture):
        if self.fault == "accelerator" and len(mixture) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.fault == "allocator":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        if self.fault == "other":
            raise RuntimeError("This cannot be done.\\nA long story.")
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "nan":
            return mixture[:, None] * self.gains * torch.nan
        return mixture[:, None] * self.gains
"""


@pytest.fixture
def faulty(tmp_path):
    """A factory of recipes whose model has a fault."""
    (tmp_path / "faulty.py").write_text(FAULTY)

    def make(fault, **options):
        return recipe(tmp_path, model={"name": "faulty:Faulty", "fault": fault}, **options)

    return make


@pytest.fixture
def in_turn(monkeypatch):
    """Measure in this process, which starts at once; tells what was asked for."""
    asked = []

    def measured(what, variant, seconds):
        asked.append(variant)
        return replace(measure(what, replace(variant, compiled=False), seconds=seconds), variant=variant)

    monkeypatch.setattr(bench, "in_a_fresh_process", measured)
    monkeypatch.setattr(bench, "best_precision", lambda _device: "bf16")
    monkeypatch.setattr(bench, "choose_device", lambda: CPU)
    return asked


def test_a_variant_is_trained_on_noise_and_no_data_are_needed():
    found = measure(recipe(), Variant("fp32", False, 3), seconds=0.05)

    assert found.examples_per_second == pytest.approx(3 / found.step_seconds)
    assert 0 < found.step_seconds < found.first_step_seconds
    assert found.peak_memory_bytes > 2**20
    assert found.note == ""


def test_a_model_of_several_channels_is_refused_as_training_refuses_it():
    stereo = recipe(model={"name": "bs_roformer", "d_model": 8, "n_blocks": 1, "n_heads": 1, "d_head": 8})

    with pytest.raises(UserError, match=r"set model\.n_channels = 1"):
        measure(stereo, Variant("fp32", False, 2), seconds=0.0)


def test_steps_are_measured_for_the_seconds_asked_for_and_at_least_one_is(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench, "perf_counter", lambda: 10.0 * next(ticks))

    found = measure(recipe(), Variant("fp32", False, 2), seconds=0.0)

    assert (found.first_step_seconds, found.step_seconds) == (10.0, 10.0)
    assert next(ticks) == 3  # building, first step, second step


def test_micro_batches_are_made_as_the_recipe_has_them(monkeypatch):
    seen = []

    def launched(state, parts):
        seen.extend(len(part.mixture) for part in parts)
        return launch(state, parts)

    launch = bench.launch
    monkeypatch.setattr(bench, "launch", launched)

    measure(recipe(accumulate=2, max_steps=9), Variant("fp32", False, 4), seconds=0.0)

    assert seen == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("fault", "batch_size", "note"),
    [
        ("accelerator", 4, "in 4 pieces, as memory does not do for the whole"),
        ("allocator", 2, "out of memory"),
        ("other", 2, "RuntimeError: This cannot be done."),
        ("nan", 2, "nonfinite loss"),
    ],
)
def test_the_row_of_a_variant_that_cannot_be_measured_says_why(faulty, fault, batch_size, note):
    found = measure(faulty(fault), Variant("fp32", False, batch_size), seconds=0.0)

    assert found.note == note
    assert (found.examples_per_second is None) == (not note.startswith("in "))


def test_every_precision_is_measured_compiled_and_not_at_three_batch_sizes(in_turn):
    found = run_bench(recipe(), seconds=0.0)

    assert len(found.rows) == 12
    assert in_turn == variants(recipe(), CPU)
    assert {v.batch_size for v in in_turn[:4]} == {2}  # what the recipe asks for is known first
    assert {v.precision for v in in_turn} == {"fp32", "bf16"}
    assert found.advice.take["data.batch_size"] == 2
    assert json.loads(json.dumps(asdict(found)))["rows"][0]["variant"]["precision"] == "fp32"


@pytest.mark.parametrize(("name", "compiled"), [("sepreformer", {False}), ("my_file:Mine", {False, True})])
def test_a_model_of_ours_that_is_not_made_for_compiling_is_not_compiled(name, compiled):
    assert {variant.compiled for variant in variants(recipe(model={"name": name}), CPU)} == compiled


def test_an_interrupt_ends_it_with_what_is_known_by_then(in_turn):
    def progress(_done, _text):
        if len(in_turn) == 2:
            raise KeyboardInterrupt

    found = run_bench(recipe(), seconds=0.0, progress=progress)

    assert found.stopped
    assert len(found.rows) == 2
    assert found.advice.take
    assert found.advice.words.startswith("Interrupted")


def test_a_larger_batch_is_left_out_where_a_smaller_one_failed_or_memory_will_not_do(monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda: 3 * 2**30)
    rows = [row("fp32", memory=2**30), row("bf16", memory=2 * 2**30), without("fp32", True)]

    assert fits(Variant("fp32", False, 4), rows, CPU)
    assert not fits(Variant("bf16", False, 4), rows, CPU)
    assert fits(Variant("bf16", False, 4), rows, torch.device("cuda"))  # it is told there, and nothing dies of it
    assert not fits(Variant("fp32", True, 4), rows, CPU)
    assert not fits(Variant("fp32", True, 8), rows, CPU)


def test_the_table_shows_every_row_and_the_one_to_take(capsys):
    rows = (row(step=0.25), without("bf16", note="out of memory"))
    found = bench.Bench("conv_tasnet", "3 s at 8000 Hz", "a CPU", rows, advise(rows, recipe()), stopped=False)

    Console(width=80).print(found.table())

    printed = capsys.readouterr().out
    assert "compiled  batch" in printed  # whole words, also in a narrow terminal
    assert "8" in printed
    assert "250" in printed
    assert "1.00 GiB" in printed
    assert "bf16, batch 2: out of memory" in printed
    assert "take" in printed


@pytest.mark.slow
def test_a_process_that_the_system_ends_costs_its_own_row_and_a_wrong_recipe_is_told(faulty):
    assert in_a_fresh_process(faulty("killed"), Variant("fp32", False, 2), 0.0).note == "out of memory"
    with pytest.raises(UserError, match="no key 'fault_'"):
        in_a_fresh_process(recipe(model=TINY | {"fault_": 1}), Variant("fp32", False, 2), 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
def test_compiling_takes_its_time_at_the_first_step():
    eager, compiled = (in_a_fresh_process(recipe(), Variant("fp32", one, 2), 0.0) for one in (False, True))

    assert compiled.note == ""
    assert compiled.first_step_seconds > 2 * eager.first_step_seconds
