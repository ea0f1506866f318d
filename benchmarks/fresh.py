"""Measure what happens only once in a process: the first step, and the peak of memory of a step.

A child process of against_peers.py: ``python benchmarks/fresh.py '{"model": "sepformer", ...}'`` prints a line of JSON.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Work, build, missing, our_step, peer_step
from race import synchronize

CHILD_SECONDS = 3600


def in_a_fresh_process(task: Mapping[str, Any], *, cache: Path | None = None) -> dict[str, Any]:
    """Run `measure_first_steps` in its own process.

    Args:
        task: As for `measure_first_steps`.
        cache: Cache folder of the compiler; None for an empty one, deleted afterwards.

    Raises:
        RuntimeError: If the process failed; the message ends with its last output.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or folder)}
        command = [sys.executable, __file__, json.dumps(dict(task))]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=CHILD_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{task}: {done.stderr.strip()[-2000:] or f'status {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_first_steps(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seconds of the first two steps, and the bytes of a third beyond weights and optimizer state.

    Args:
        task: ``work`` (the fields of `Work`), ``who`` (``"ours"`` or a peer), ``precision``, ``compile`` (``""``,
            ``"regions"`` or ``"whole"``), ``threads``, ``device``; optionally ``options``, more options of our model.
    """
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    work = Work(*task["work"])
    device = torch.device(task["device"])
    ours = task["who"] == "ours"
    model = build(work, device, ours=ours, compiled=task["compile"] == "regions", **task.get("options", {}))
    if task["compile"] == "whole":
        model.compile()
    batch = work.batch(device)
    if ours:
        step = our_step(model, task["precision"], batch)
    else:
        step = peer_step(model, PEERS[work.model].loss, task["precision"], batch)

    # The first step compiles; the second is one without compiling.
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)

    # The peers' loops end a step with zero_grad, ours begins with it: without this call theirs would start lower.
    model.zero_grad(set_to_none=True)
    before = begin_peak(device)
    step()
    synchronize(device)
    return {"first": seconds[0], "second": seconds[1], "extra_bytes": peak(device) - before}


def begin_peak(device: torch.device) -> int:
    """Reset the peak of memory, and return the bytes that are allocated now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but are still mapped would hide the next peak
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Return the peak of memory since `begin_peak`, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """Return a size from /proc/self/status, which states it in KiB, in bytes."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith(key))


if __name__ == "__main__":
    missing(())  # adds unpacked sources of the peers to the path
    print(json.dumps(measure_first_steps(json.loads(sys.argv[1]))))
