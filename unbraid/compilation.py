"""Compile a model: the regions that it names, or all of it, after checking for a C or C++ compiler."""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from unbraid.errors import UserError


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile a model in place, by its method ``compile_regions`` or, without one, as a whole.

    Compilation itself happens during the first step.

    Raises:
        UserError: If a compiler or header is missing.
    """
    if missing := missing_build_tools(device):
        raise UserError(f'{missing}, but compiling needs it. Install it, or set train.compile = "off".')
    _skip_vector_isa_probe()
    getattr(model, "compile_regions", model.compile)()


def missing_build_tools(device: torch.device) -> str:
    """Return a description of what torch's compiler would not find on Linux; empty if nothing is missing."""
    if sys.platform != "linux":
        return ""
    # For a CPU the compiler generates C++, and for a GPU a launcher in C.
    variable, defaults = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if variable in os.environ else defaults
    if not any(shutil.which(name) for name in names):
        return f"{' or '.join(names)} is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header Python.h (python3-dev) is not installed"
    return ""


def _skip_vector_isa_probe() -> None:
    """Let torch's compiler read from the CPU's flags whether it has AVX2 and AVX-512, without compiling a test.

    Otherwise it builds a library for each and loads it in another Python process, which takes some seconds each before
    our own code is compiled. A C++ compiler that can compile torch's headers supports both. Extensions such as bf16 and
    AMX are still tested. The environment variable ``TORCHINDUCTOR_VEC_ISA_OK`` takes precedence.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    from torch._inductor import config  # takes a second, so only runs that compile import it

    if getattr(config.cpp, "vec_isa_ok", True) is None:
        config.cpp.vec_isa_ok = True
