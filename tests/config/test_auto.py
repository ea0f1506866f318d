"""What auto comes to follows from the budget, the model and the machine, and is told."""

import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from unbraid.config import auto
from unbraid.config.auto import Compiling, choose, compiling_pays
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


def test_compiling_pays_where_the_steps_that_it_adds_outnumber_those_that_it_costs():
    known = Compiling(40.0, 1.5)

    def steps(seconds, step=0.1):
        return seconds / step, (seconds - known.seconds) * known.gain / step

    assert known.pays_from == pytest.approx(120.0)
    plain, compiled = steps(known.pays_from)
    assert plain == pytest.approx(compiled)
    plain, compiled = steps(1.1 * known.pays_from)
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
def test_the_budget_known_at_the_start_decides(budget, pays):
    asked = recipe(**{"max_steps": 0} | budget)

    chosen, said = choose(asked, Compiles(), CPU, before=None)

    assert chosen["compile"] is pays
    assert f"compile is {'on' if pays else 'off'}, as it takes about 40 s" in said


@pytest.mark.parametrize(("model", "why"), [(nn.Identity(), "has no compile_regions"), (NoFaster(), "no faster")])
def test_what_cannot_gain_is_not_compiled(model, why):
    pays, said = compiling_pays(recipe(), model, CPU, "fp32")

    assert not pays
    assert why in said


def test_without_what_the_compiler_needs_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(auto, "missing_build_tools", lambda device: "g++ is not here")

    expected = (False, "g++ is not here, which compiling needs")
    assert compiling_pays(recipe(), Compiles(), CPU, "bf16") == expected


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_elsewhere_than_on_linux_nothing_is_compiled_unasked(monkeypatch, device):
    monkeypatch.setattr(sys, "platform", "win32")

    assert not compiling_pays(recipe(), Compiles(), device, "bf16")[0]


def test_a_budget_in_steps_is_told_as_what_it_is_taken_for():
    _, said = compiling_pays(recipe(max_steps=100), Compiles(), CPU, "bf16")

    assert "pays from 2.0 minutes on, and 100 steps are taken for 0.8" in said
    assert "steps are taken" not in compiling_pays(recipe(max_minutes=1.0), Compiles(), CPU, "bf16")[1]


def test_what_gains_in_one_precision_alone_is_compiled_in_that():
    assert [compiling_pays(recipe(), NoFaster(), CPU, name)[0] for name in ("fp32", "bf16")] == [False, True]


def test_on_a_gpu_the_gain_is_supposed_and_said_to_be():
    long_run, short_run = recipe(max_minutes=10.0), recipe(max_minutes=5.0)

    compiled, said = compiling_pays(long_run, NoFaster(), torch.device("cuda"), "fp32")  # on a CPU it gains nothing

    assert compiled
    assert "about 1.2 times as fast (supposed, not measured on a GPU), which pays from 6.0 minutes on" in said
    assert not compiling_pays(short_run, Compiles(), torch.device("cuda"), "bf16")[0]


def test_what_the_recipe_says_is_done_and_not_told():
    asked = recipe(precision="fp16", compile="on", max_steps=1)
    chosen, said = choose(asked, nn.Identity(), CPU, before=None)

    assert (chosen["precision"], chosen["compile"], said) == ("fp16", True, "")


def test_a_resumed_run_keeps_what_was_chosen():
    before = {"precision": "bf16", "compile": True, "threads": 1}

    assert choose(recipe(max_steps=1), nn.Identity(), CPU, before=before) == (before, "")
    assert choose(recipe(precision="fp32"), nn.Identity(), CPU, before=before) == (before | {"precision": "fp32"}, "")
    assert choose(recipe(compile="off"), nn.Identity(), CPU, before=before) == (before | {"compile": False}, "")


def test_a_run_says_at_its_start_what_was_chosen_and_on_resuming_that_it_goes_on(recipe_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    file = recipe_file()
    changes = ["train.precision=auto", "train.compile=auto", "train.max_steps=2"]

    begun = [event for event in train(load_recipe(file, changes), run) if isinstance(event, Event)]
    changes[-1] = "train.max_steps=4"
    resumed = [event for event in train(load_recipe(file, changes), run, resume=True) if isinstance(event, Event)]

    assert [(event.code, event.step) for event in begun] == [("AUTO_CHOSEN", 0)]
    assert "precision is " in begun[0].message
    assert "compile is off" in begun[0].message
    changes[1:] = ["train.compile=off", "train.max_steps=6"]  # where there is no compiler any more
    assert list(train(load_recipe(file, changes), run, resume=True))
    assert [event.code for event in resumed] == ["RECIPE_CHANGED", "RUN_RESUMED"]
    told = [row["code"] for row in read_rows(run.events)[0]]
    assert told == ["AUTO_CHOSEN", "RECIPE_CHANGED", "RUN_RESUMED", *2 * ["RECIPE_CHANGED"], "RUN_RESUMED"]
