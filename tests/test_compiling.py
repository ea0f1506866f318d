import sys

import pytest
from torch import nn
from torch._inductor import config, cpu_vec_isa

from unbraid.compiling import compile_model


class Regions(nn.Module):
    """Says what was compiled instead of compiling."""

    def __init__(self):
        super().__init__()
        self.compiled = []

    def compile(self):
        self.compiled.append("whole")


class Named(Regions):
    def compile_regions(self):
        self.compiled.append("regions")


@pytest.mark.parametrize(("kind", "expected"), [(Regions, "whole"), (Named, "regions")])
def test_the_regions_that_a_model_names_are_compiled_else_the_whole(kind, expected):
    model = kind()
    compile_model(model)

    assert model.compiled == [expected]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere vectors are found out otherwise")
@pytest.mark.parametrize(
    ("machine", "before", "after"),
    [("x86_64", None, True), ("x86_64", False, False), ("x86_64", True, True), ("aarch64", None, None)],
)
def test_the_processor_is_taken_at_its_word_unless_somebody_said_otherwise(monkeypatch, machine, before, after):
    monkeypatch.setattr("platform.machine", lambda: machine)
    with config.patch({"cpp.vec_isa_ok": before}):
        compile_model(Regions())

        assert config.cpp.vec_isa_ok is after


@pytest.mark.slow
def test_what_the_processor_says_is_what_trying_out_finds():
    found = []
    for word in (None, True):
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        with config.patch({"cpp.vec_isa_ok": word}):
            found.append(str(cpu_vec_isa.pick_vec_isa()))
    cpu_vec_isa.valid_vec_isa_list.cache_clear()

    assert found[0] == found[1]
