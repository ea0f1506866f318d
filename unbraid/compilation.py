"""How a model is compiled: what that needs, and the regions that the model names, else the whole."""

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
    """Compile what pays, in place: ``compile_regions`` of the model, or all of it.

    Nothing is compiled yet when this returns: the first step is.

    Raises:
        UserError: If something is absent that compiling needs.
    """
    if absent := missing_build_tools(device):
        raise UserError(f'{absent}, which compiling needs: install it, or set train.compile = "off".')
    _take_the_processors_word()
    getattr(model, "compile_regions", model.compile)()


def missing_build_tools(device: torch.device) -> str:
    """What torch's compiler would look for on Linux and not find, in words; empty if all is there.

    It makes C++ for a CPU, and for a GPU a launcher in C.
    """
    if sys.platform != "linux":
        return ""
    asked, usual = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[asked]] if asked in os.environ else usual
    if not any(shutil.which(name) for name in names):
        return f"{' or '.join(names)} is not here"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header Python.h (python3-dev) is not here"
    return ""


def _take_the_processors_word() -> None:
    """Whether a processor has AVX2 and AVX-512 is read from it, not tried out.

    Else torch's compiler builds a library for each and loads it in another Python, some seconds each, before anything
    of ours. A C++ compiler that can read torch's headers knows both; what comes on top, as bf16 and AMX, is tried out
    still. ``TORCHINDUCTOR_VEC_ISA_OK`` goes before.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    from torch._inductor import config  # takes a second, in runs that compile alone

    if getattr(config.cpp, "vec_isa_ok", True) is None:
        config.cpp.vec_isa_ok = True
