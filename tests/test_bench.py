"""`unbraid bench` measures the steps that training would take, and its advice follows from them."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from bench_rows import TINY, recipe, row, without
from rich.console import Console

from unbraid import bench
from unbraid.bench import fits, measure, measure_in_subprocess, run_bench, variants
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
def measured_variants(monkeypatch):
    """Measure in this process, without compiling; returns the list of the variants measured so far."""
    variants_so_far = []

    def measure_here(bench_recipe, variant, seconds):
        variants_so_far.append(variant)
        return replace(measure(bench_recipe, replace(variant, compiled=False), seconds=seconds), variant=variant)

    monkeypatch.setattr(bench, "measure_in_subprocess", measure_here)
    monkeypatch.setattr(bench, "best_precision", lambda _device: "bf16")
    monkeypatch.setattr(bench, "choose_device", lambda: CPU)
    return variants_so_far


def test_a_variant_is_measured_on_noise_without_data():
    result = measure(recipe(), Variant("fp32", False, 3), seconds=0.05)

    assert result.examples_per_second == pytest.approx(3 / result.step_seconds)
    assert 0 < result.step_seconds < result.first_step_seconds
    assert result.peak_memory_bytes > 2**20
    assert result.note == ""


def test_a_model_of_several_channels_is_refused_as_in_training():
    stereo = recipe(model={"name": "bs_roformer", "d_model": 8, "n_blocks": 1, "n_heads": 1, "d_head": 8})

    with pytest.raises(UserError, match=r"set model\.n_channels = 1"):
        measure(stereo, Variant("fp32", False, 2), seconds=0.0)


def test_steps_are_measured_for_the_given_seconds_and_at_least_one(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench, "perf_counter", lambda: 10.0 * next(ticks))

    result = measure(recipe(), Variant("fp32", False, 2), seconds=0.0)

    assert (result.first_step_seconds, result.step_seconds) == (10.0, 10.0)
    assert next(ticks) == 3  # building, first step, second step


def test_the_batch_is_split_into_the_recipes_micro_batches(monkeypatch):
    sizes = []

    def launch_and_record(state, micro_batches):
        sizes.extend(len(micro_batch.mixture) for micro_batch in micro_batches)
        return launch(state, micro_batches)

    launch = bench.launch
    monkeypatch.setattr(bench, "launch", launch_and_record)

    measure(recipe(accumulate=2, max_steps=9), Variant("fp32", False, 4), seconds=0.0)

    assert sizes == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("fault", "batch_size", "note"),
    [
        ("accelerator", 4, "in 4 pieces, because memory is too small for the whole batch"),
        ("allocator", 2, "out of memory"),
        ("other", 2, "RuntimeError: This cannot be done."),
        ("nan", 2, "nonfinite loss"),
    ],
)
def test_the_row_of_a_variant_that_cannot_be_measured_says_why(faulty, fault, batch_size, note):
    result = measure(faulty(fault), Variant("fp32", False, batch_size), seconds=0.0)

    assert result.note == note
    assert (result.examples_per_second is None) == (not note.startswith("in "))


def test_every_precision_is_measured_compiled_and_not_at_three_batch_sizes(measured_variants):
    result = run_bench(recipe(), seconds=0.0)

    assert len(result.rows) == 12
    assert measured_variants == variants(recipe(), CPU)
    assert {v.batch_size for v in measured_variants[:4]} == {2}  # the recipe's own batch size is measured first
    assert {v.precision for v in measured_variants} == {"fp32", "bf16"}
    assert result.advice.take["data.batch_size"] == 2
    assert json.loads(json.dumps(asdict(result)))["rows"][0]["variant"]["precision"] == "fp32"


@pytest.mark.parametrize(("name", "compiled"), [("sepreformer", {False}), ("my_file:Mine", {False, True})])
def test_a_built_in_model_without_compile_regions_is_not_compiled(name, compiled):
    assert {variant.compiled for variant in variants(recipe(model={"name": name}), CPU)} == compiled


def test_an_interrupt_returns_the_rows_measured_so_far(measured_variants):
    def progress(_done, _text):
        if len(measured_variants) == 2:
            raise KeyboardInterrupt

    result = run_bench(recipe(), seconds=0.0, progress=progress)

    assert result.stopped
    assert len(result.rows) == 2
    assert result.advice.take
    assert result.advice.words.startswith("Interrupted")


def test_a_larger_batch_is_skipped_if_a_smaller_one_failed_or_memory_is_too_small(monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda: 3 * 2**30)
    rows = [row("fp32", memory=2**30), row("bf16", memory=2 * 2**30), without("fp32", True)]

    assert fits(Variant("fp32", False, 4), rows, CPU)
    assert not fits(Variant("bf16", False, 4), rows, CPU)
    assert fits(Variant("bf16", False, 4), rows, torch.device("cuda"))  # a GPU reports it, and no process is killed
    assert not fits(Variant("fp32", True, 4), rows, CPU)
    assert not fits(Variant("fp32", True, 8), rows, CPU)


def test_the_table_shows_every_row_and_marks_the_advised_one(capsys):
    rows = (row(step=0.25), without("bf16", note="out of memory"))
    result = bench.Bench("conv_tasnet", "3 s at 8000 Hz", "a CPU", rows, advise(rows, recipe()), stopped=False)

    Console(width=80).print(result.table())

    printed = capsys.readouterr().out
    assert "compiled  batch" in printed  # whole words, also in a narrow terminal
    assert "8" in printed
    assert "250" in printed
    assert "1.00 GiB" in printed
    assert "bf16, batch 2: out of memory" in printed
    assert "use" in printed


@pytest.mark.slow
def test_a_killed_process_costs_one_row_and_a_wrong_recipe_raises(faulty):
    assert measure_in_subprocess(faulty("killed"), Variant("fp32", False, 2), 0.0).note == "out of memory"
    with pytest.raises(UserError, match="no key 'fault_'"):
        measure_in_subprocess(recipe(model=TINY | {"fault_": 1}), Variant("fp32", False, 2), 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
def test_compiling_makes_the_first_step_slower():
    eager, compiled = (measure_in_subprocess(recipe(), Variant("fp32", compiled, 2), 0.0) for compiled in (False, True))

    assert compiled.note == ""
    assert compiled.first_step_seconds > 2 * eager.first_step_seconds
