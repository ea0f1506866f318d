"""The choices of auto follow from the budget, the model and the machine, and are recorded with their reasons."""

import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from unbraid.config import auto
from unbraid.config.auto import CompileCost, compiling_pays, resolve_auto
from unbraid.config.recipe import load_recipe, recipe_from_table
from unbraid.records import Event, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory

CPU = torch.device("cpu")


class Compiles(nn.Module):
    compile_seconds, compile_gain = 40.0, {"fp32": 1.5, "bf16": 1.5}

    def compile_regions(self):
        raise AssertionError("nothing is compiled here")


class NoFaster(Compiles):
    compile_gain = MappingProxyType({"fp32": 1.0, "bf16": 1.5})


CUDA = torch.device("cuda")


def recipe(**settings):
    return recipe_from_table({"model": {"name": "dprnn"}, "train": {"max_steps": 10**9} | settings}, Path())


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    monkeypatch.setattr(auto, "missing_build_tools", lambda device: "")


def test_compiling_pays_off_when_it_gains_more_steps_than_it_costs():
    cost = CompileCost(40.0, 1.5)

    def steps(seconds, step=0.1):
        return seconds / step, (seconds - cost.seconds) * cost.gain / step

    assert cost.break_even_seconds == pytest.approx(120.0)
    plain, compiled = steps(cost.break_even_seconds)
    assert plain == pytest.approx(compiled)
    plain, compiled = steps(1.1 * cost.break_even_seconds)
    assert compiled > plain


@pytest.mark.parametrize(
    ("budget", "pays"),
    [
        ({"max_minutes": 1.9}, False),
        ({"max_minutes": 2.1}, True),
        ({"max_minutes": 600.0, "max_steps": 100}, False),
        ({"max_steps": 100}, False),
        ({"max_steps": 10_000}, True),
        ({"max_minutes": 600.0, "max_steps": 10_000}, True),
    ],
)
def test_the_budget_decides_whether_to_compile(budget, pays):
    choices, message = resolve_auto(recipe(**{"max_steps": 0} | budget), Compiles(), CPU, before=None)

    assert choices["compile"] is pays
    assert f"compile is {'on' if pays else 'off'}, because it takes about 40 s" in message


@pytest.mark.parametrize(("model", "why"), [(nn.Identity(), "has no compile_regions"), (NoFaster(), "no faster")])
def test_a_model_that_cannot_gain_is_not_compiled(model, why):
    pays, reason = compiling_pays(recipe(), model, CPU, "fp32")

    assert not pays
    assert why in reason


def test_without_build_tools_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(auto, "missing_build_tools", lambda device: "g++ is not here")

    expected = (False, "g++ is not here, but compiling needs it")
    assert compiling_pays(recipe(), Compiles(), CPU, "bf16") == expected


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_compiles_only_on_linux(monkeypatch, device):
    monkeypatch.setattr(sys, "platform", "win32")

    assert not compiling_pays(recipe(), Compiles(), device, "bf16")[0]


def test_the_reason_gives_the_assumed_time_of_a_budget_in_steps():
    _, reason = compiling_pays(recipe(max_steps=100), Compiles(), CPU, "bf16")

    assert "pays off after 2.0 minutes, and 100 steps are assumed to take 0.8 minutes" in reason
    assert "steps are assumed" not in compiling_pays(recipe(max_minutes=1.0), Compiles(), CPU, "bf16")[1]


def test_a_model_that_gains_in_one_precision_is_compiled_only_in_that():
    assert [compiling_pays(recipe(), NoFaster(), CPU, name)[0] for name in ("fp32", "bf16")] == [False, True]


def test_on_a_gpu_the_gain_is_assumed_and_the_reason_says_so():
    long_run, short_run = recipe(max_minutes=10.0), recipe(max_minutes=5.0)

    compiled, reason = compiling_pays(long_run, NoFaster(), torch.device("cuda"), "fp32")  # on a CPU it gains nothing

    assert compiled
    assert "about 1.2 times as fast (assumed, not measured on a GPU), which pays off after 6.0 minutes" in reason
    assert not compiling_pays(short_run, Compiles(), torch.device("cuda"), "bf16")[0]


def test_values_in_the_recipe_are_used_without_a_message():
    explicit = recipe(precision="fp16", compile="on", max_steps=1)

    choices, message = resolve_auto(explicit, nn.Identity(), CPU, before=None)

    assert (choices["precision"], choices["compile"], message) == ("fp16", True, "")


def test_a_resumed_run_keeps_its_choices():
    before = {"precision": "bf16", "compile": True, "threads": 1}

    assert resolve_auto(recipe(max_steps=1), nn.Identity(), CPU, before=before) == (before, "")
    assert resolve_auto(recipe(precision="fp32"), nn.Identity(), CPU, before=before) == (
        before | {"precision": "fp32"},
        "",
    )
    assert resolve_auto(recipe(compile="off"), nn.Identity(), CPU, before=before) == (before | {"compile": False}, "")


def test_a_run_records_its_choices_at_the_start_and_not_again_on_resuming(recipe_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    file = recipe_file()
    changes = ["train.precision=auto", "train.compile=auto", "train.max_steps=2"]

    begun = [event for event in train(load_recipe(file, changes), run) if isinstance(event, Event)]
    changes[-1] = "train.max_steps=4"
    resumed = [event for event in train(load_recipe(file, changes), run, resume=True) if isinstance(event, Event)]

    assert [(event.code, event.step) for event in begun] == [("AUTO_CHOSEN", 0)]
    assert "precision is " in begun[0].message
    assert "compile is off" in begun[0].message
    changes[1:] = ["train.compile=off", "train.max_steps=6"]  # as on a machine without a compiler
    assert list(train(load_recipe(file, changes), run, resume=True))
    assert [event.code for event in resumed] == ["RECIPE_CHANGED", "RUN_RESUMED"]
    codes = [row["code"] for row in read_rows(run.events)[0]]
    assert codes == ["AUTO_CHOSEN", "RECIPE_CHANGED", "RUN_RESUMED", *2 * ["RECIPE_CHANGED"], "RUN_RESUMED"]
