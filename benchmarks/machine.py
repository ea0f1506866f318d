"""The name of the processor that a measurement was taken on."""

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name; on systems without /proc/cpuinfo what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
