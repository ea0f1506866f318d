import os
import subprocess
import sys

import pytest
from torch import nn
from torch._inductor import config

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
    asked = "from torch._inductor.cpu_vec_isa import pick_vec_isa as pick; print(pick(), pick().build_arch_flags())"
    found = []
    for word in ("", "1"):  # in a process each, as what was found is kept
        settings = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": word}
        found.append(
            subprocess.run([sys.executable, "-c", asked], env=settings, capture_output=True, check=True).stdout
        )

    assert found[0] == found[1]
