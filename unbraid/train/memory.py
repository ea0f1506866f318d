"""Peak memory of the process and of the accelerator."""

import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of this process on a CPU; 0 if the system does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory()


def host_memory() -> int:
    """Return this process's peak memory in bytes; 0 if the system does not report it.

    On Linux it is read from ``/proc``, in about 20 microseconds. `resource.getrusage` would be wrong there: its peak
    starts from that of the process that started this one.
    """
    try:
        with Path("/proc/self/status").open("rb") as file:
            status = file.read()
        start = status.index(b"VmHWM:") + len(b"VmHWM:")
        return 1024 * int(status[start : status.index(b"kB", start)])
    except (OSError, ValueError):
        pass
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB
