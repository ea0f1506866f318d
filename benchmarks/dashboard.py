"""Measure the dashboard on a long run: python benchmarks/dashboard.py.

A synthetic run of a million steps is served by `unbraid dashboard` in its own process. Measured are the time until
all steps are read, the memory used then, the time to answer the page's requests (for the whole run and for windows down
to single steps), and the delay from writing a step until the page is notified of it.
"""

import argparse
import http.client
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from machine import processor

from unbraid.io import to_json_row
from unbraid.records import BlockRecord, StepRecord
from unbraid.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
BLOCKS = [f"separator.blocks.{n}" for n in range(16)]


def main() -> None:
    """Measure, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the synthetic run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="repetitions of each request (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dashboard.json")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        run.path.mkdir()
        write_steps(run.steps, args.steps)
        results = {"steps": args.steps, "records_mib": round(run.steps.stat().st_size / 2**20)}
        with run_dashboard(run.path) as dashboard:
            results |= measure(dashboard, run, args.steps, args.rounds)
    results |= {"date": datetime.now(UTC).date().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores"}
    print(json.dumps(results, indent=1))
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_steps(path: Path, n_steps: int) -> None:
    """Write the steps of a run whose loss falls like a power of the step; every 50th has blocks."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1.5, n_steps)
    grad_norm = 6 * np.exp(rng.normal(0, 0.4, n_steps))
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, n_steps + 1):
            file.write(step_line(step, float(noise[step - 1]), float(grad_norm[step - 1])))


def step_line(step: int, noise: float, grad_norm: float) -> str:
    """Return a step's line in steps.jsonl, as a real run writes it."""
    loss = 1 - 4 * math.log10(1 + step / 1000) + noise
    is_sampled = step % 50 == 0
    record = StepRecord(
        step=step,
        epoch=0,
        outcome="trained",
        loss=loss,
        grad_norm=grad_norm,
        max_norm=5.0,
        clipped=grad_norm > 5,
        clipped_grad_norm=min(grad_norm, 5.0),
        lr=1e-3,
        loss_scale=1.0,
        n_trained=4,
        n_filtered=0,
        n_bad=0,
        si_sdr=(-loss, -loss - 1),
        blocks={name: BlockRecord(grad_norm / 4, 1.5e-3) for name in BLOCKS} if is_sampled else {},
        seconds=0.1,
        data_seconds=0.002,
        examples_per_second=39.2,
        elapsed_seconds=0.102 * step,
        peak_memory_bytes=2**31,
    )
    return json.dumps(to_json_row(record)) + "\n"


class Dashboard:
    """A running dashboard and a connection to it, as a page has one.

    Args:
        process: The dashboard's process.
        port: Port that it listens on.
        token: Token in its link.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, token: str) -> None:
        self.process = process
        self.port = port
        self.cookie = f"unbraid-{port}={token}"
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def get_json(self, path: str) -> Any:
        """Return the answer to a request."""
        self.connection.request("GET", path, headers={"Cookie": self.cookie})
        return json.loads(self.connection.getresponse().read())

    def request_ms(self, path: str) -> float:
        """Return the milliseconds from sending a request to having parsed its answer."""
        start = time.perf_counter()
        self.get_json(path)
        return 1000 * (time.perf_counter() - start)

    @property
    def memory_mib(self) -> int:
        """Resident memory of the process; Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return round(int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024)


@contextmanager
def run_dashboard(path: Path) -> Iterator[Dashboard]:
    """Run `unbraid dashboard` while the context is open."""
    command = [sys.executable, "-m", "unbraid", "dashboard", str(path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = re.search(r":(\d+)/\?token=(\S+)", process.stdout.readline())
        assert link
        yield Dashboard(process, int(link[1]), link[2])
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure(dashboard: Dashboard, run: RunDirectory, n_steps: int, rounds: int) -> dict[str, Any]:
    """Return reading time, memory, the time of each kind of request and the delay of a notification."""
    # Reading starts with the first request for the run's curves.
    name = dashboard.get_json("/api/runs")[0]["id"]
    memory_before_mib = dashboard.memory_mib
    start = time.perf_counter()
    while dashboard.get_json(f"/api/series/{name}?n=700")["unread_bytes"]:
        time.sleep(0.5)
    results: dict[str, Any] = {
        "reading_seconds": round(time.perf_counter() - start, 1),
        "memory_before_mib": memory_before_mib,
        "memory_after_mib": dashboard.memory_mib,
    }

    # The whole run and windows of several sizes, at random positions.
    rng = np.random.default_rng(0)
    firsts = rng.integers(1, n_steps - 20_000, rounds)
    requests = {
        "whole_run_ms": [f"/api/series/{name}?n=700"] * rounds,
        "tenth_of_it_ms": [f"/api/series/{name}?n=700&first={k}&last={k + n_steps // 10}" for k in firsts],
        "twenty_thousand_steps_ms": [f"/api/series/{name}?n=700&first={k}&last={k + 20_000}" for k in firsts],
        "thousand_steps_ms": [f"/api/series/{name}?n=700&first={k}&last={k + 1000}" for k in firsts],
        "list_ms": ["/api/runs"] * rounds,
    }
    for kind, paths in requests.items():
        results[kind] = median_and_max([dashboard.request_ms(path) for path in paths])
    results["notification_ms"] = median_and_max(notification_ms(dashboard, run, n_steps, rounds))
    return results


def notification_ms(dashboard: Dashboard, run: RunDirectory, n_steps: int, rounds: int) -> list[float]:
    """Return the milliseconds from writing a step to receiving the event that reports it, once per round."""
    stream = socket.create_connection(("127.0.0.1", dashboard.port), timeout=60)
    headers = f"Host: 127.0.0.1:{dashboard.port}\r\nCookie: {dashboard.cookie}"
    stream.sendall(f"GET /api/live HTTP/1.1\r\n{headers}\r\n\r\n".encode())
    delays = []
    received = b""
    for step in range(n_steps + 1, n_steps + 1 + rounds):
        time.sleep(0.37)
        with run.steps.open("a", encoding="utf-8") as file:
            file.write(step_line(step, 0.0, 6.0))
        start = time.perf_counter()
        while f'"last_step": {step}'.encode() not in received:
            received = received[-1000:] + stream.recv(65536)
        delays.append(1000 * (time.perf_counter() - start))
    stream.close()
    return delays


def median_and_max(values: list[float]) -> dict[str, float]:
    """Return the median and the maximum, rounded for the results file."""
    return {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}


if __name__ == "__main__":
    main()
