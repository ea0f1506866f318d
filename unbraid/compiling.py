"""How a model is compiled: the regions that it names, else the whole."""

import platform
import sys

from torch import nn


def compile_model(model: nn.Module) -> None:
    """Compile what pays, in place: ``compile_regions`` of the model, or all of it.

    Nothing is compiled yet when this returns: the first step is.
    """
    _take_the_processors_word()
    getattr(model, "compile_regions", model.compile)()


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
