"""What only a fresh process can tell: the first step after the start, and the most memory that a step takes.

A child of against_peers.py: ``python benchmarks/fresh.py '{"model": "sepformer", ...}'`` prints one line of JSON.
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
from race import wait

CHILD_SECONDS = 3600


def in_a_fresh_process(task: Mapping[str, Any], *, cache: Path | None = None) -> dict[str, Any]:
    """Run `told` of a task in a process of its own.

    Args:
        task: See `told`.
        cache: Where the compiler keeps what it has made; an empty folder that is thrown away if none is given.

    Raises:
        RuntimeError: If it ended without a result; with the last it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or folder)}
        command = [sys.executable, __file__, json.dumps(dict(task))]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=CHILD_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{task}: {done.stderr.strip()[-2000:] or f'status {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def told(task: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the first two steps, and bytes that the third needs beyond weights and optimizer state.

    Args:
        task: ``work`` (the fields of `Work`), ``who`` (``"ours"`` or a peer), ``precision``, ``compile`` (``""``,
            ``"regions"`` or ``"whole"``), ``threads``, ``device``; perhaps ``options``, more of our network's.
    """
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    work, device, ours = Work(*task["work"]), torch.device(task["device"]), task["who"] == "ours"
    model = build(work, device, ours=ours, compiled=task["compile"] == "regions", **task.get("options", {}))
    if task["compile"] == "whole":
        model.compile()
    precision, batch = task["precision"], work.batch(device)
    step = our_step(model, precision, batch) if ours else peer_step(model, PEERS[work.model].loss, precision, batch)
    seconds, began = [], time.perf_counter()
    for _ in range(2):
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    model.zero_grad(set_to_none=True)  # the peers' loops end a step with it, ours begins one
    before = begin_peak(device)
    step()
    wait(device)
    return {"first": seconds[0], "second": seconds[1], "extra_bytes": peak(device) - before}


def begin_peak(device: torch.device) -> int:
    """Forget the peak so far; what is held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # or pages freed long ago would hide the next peak
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes held since `begin_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """A figure of this process, from Linux."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith(key))


if __name__ == "__main__":
    missing(())  # finds unpacked sources
    print(json.dumps(told(json.loads(sys.argv[1]))))
