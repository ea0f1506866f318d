import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor import config

from unbraid.compilation import compile_model, missing_build_tools
from unbraid.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def compiler_available(monkeypatch):
    """As if this machine had a compiler."""
    monkeypatch.setattr("unbraid.compilation.missing_build_tools", lambda _device: "")


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
def test_the_named_regions_or_the_whole_model_are_compiled(compiler_available, kind, expected):
    model = kind()
    compile_model(model, CPU)

    assert model.compiled == [expected]


@pytest.mark.parametrize(
    ("device", "settings", "installed", "missing"),
    [
        (CPU, {}, ["g++", "Python.h"], ""),
        (CPU, {}, ["clang++", "Python.h"], "g++ is not installed"),
        (CPU, {"CXX": "clang++"}, ["clang++", "Python.h"], ""),
        (CPU, {"CXX": "mine"}, ["g++", "Python.h"], "mine is not installed"),
        (CPU, {}, ["g++"], "Python's header Python.h (python3-dev) is not installed"),
        (CUDA, {}, ["clang", "Python.h"], ""),
        (CUDA, {}, ["g++", "Python.h"], "gcc or clang is not installed"),
        (CUDA, {"CC": "mine"}, ["gcc", "Python.h"], "mine is not installed"),
    ],
)
def test_missing_build_tools_are_named(monkeypatch, tmp_path, device, settings, installed, missing):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (settings | {"PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sysconfig.get_path", lambda kind: str(tmp_path))
    for name in installed:
        (tmp_path / name).touch(mode=0o755)

    assert missing_build_tools(device) == missing


def test_a_missing_compiler_raises_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(UserError, match="no-such-compiler is not installed, but compiling needs it"):
        compile_model(Regions(), CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere vectors are found out otherwise")
@pytest.mark.parametrize(
    ("machine", "before", "after"),
    [("x86_64", None, True), ("x86_64", False, False), ("x86_64", True, True), ("aarch64", None, None)],
)
def test_the_isa_probe_is_skipped_unless_configured(monkeypatch, compiler_available, machine, before, after):
    monkeypatch.setattr("platform.machine", lambda: machine)
    with config.patch({"cpp.vec_isa_ok": before}):
        compile_model(Regions(), CPU)

        assert config.cpp.vec_isa_ok is after


@pytest.mark.slow
def test_skipping_the_isa_probe_finds_the_same_isa():
    script = "from torch._inductor.cpu_vec_isa import pick_vec_isa as pick; print(pick(), pick().build_arch_flags())"
    found = []
    for word in ("", "1"):  # in a process each, as what was found is kept
        settings = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": word}
        found.append(
            subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, check=True).stdout
        )

    assert found[0] == found[1]
