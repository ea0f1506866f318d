"""What the live page costs on a long run: python benchmarks/dashboard.py.

A made-up run of a million steps, as a run writes them, is served by `unbraid dashboard` in a process of its own: how
long it reads until all is there, what memory it takes then, how fast it answers what the page asks for (whole run, and
a window where each step is shown), and how long after a step was written the page is told of it.
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

from unbraid.records import BlockRecord, RunDirectory, StepRecord, to_json_row

ROOT = Path(__file__).parents[1]
BLOCKS = [f"separator.blocks.{n}" for n in range(16)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="of each question (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dashboard.json")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        run.path.mkdir()
        write_steps(run.steps, args.steps)
        found = {"steps": args.steps, "records_mib": round(run.steps.stat().st_size / 2**20)}
        with served(run.path) as page:
            found |= measure(page, run, args.steps, args.rounds)
    found |= {"date": datetime.now(UTC).date().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores"}
    print(json.dumps(found, indent=1))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_steps(path: Path, n_steps: int) -> None:
    """The steps of a run whose loss falls as a power of the step, every 50th with its blocks."""
    rng = np.random.default_rng(0)
    noise, norms = rng.normal(0, 1.5, n_steps), 6 * np.exp(rng.normal(0, 0.4, n_steps))
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, n_steps + 1):
            file.write(line(step, float(noise[step - 1]), float(norms[step - 1])))


def line(step: int, noise: float, norm: float) -> str:
    """A step as a run writes it."""
    loss = 1 - 4 * math.log10(1 + step / 1000) + noise
    counts = {"n_trained": 4, "n_filtered": 0, "n_bad": 0}
    times = {"seconds": 0.1, "data_seconds": 0.002, "examples_per_second": 39.2, "elapsed_seconds": 0.102 * step}
    blocks = {name: BlockRecord(norm / 4, 1.5e-3) for name in BLOCKS} if step % 50 == 0 else {}
    record = StepRecord(
        step, 0, "trained", loss, norm, 5.0, 1e-3, 1.0, **counts, **times, clipped=norm > 5, blocks=blocks,
        clipped_grad_norm=min(norm, 5.0), si_sdr=(-loss, -loss - 1), peak_memory_bytes=2**31,
    )  # fmt: skip
    return json.dumps(to_json_row(record)) + "\n"


class Page:
    """What the page asks a dashboard for.

    Args:
        process: The dashboard.
        port: Where it answers.
        token: Of its link.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, token: str) -> None:
        self.process, self.port, self.cookie = process, port, f"unbraid-{port}={token}"
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str) -> Any:
        """The answer."""
        self.connection.request("GET", path, headers={"Cookie": self.cookie})
        return json.loads(self.connection.getresponse().read())

    def milliseconds(self, path: str) -> float:
        """How long an answer takes, as a page sees it."""
        began = time.perf_counter()
        self.ask(path)
        return 1000 * (time.perf_counter() - began)

    @property
    def memory_mib(self) -> int:
        """What the dashboard holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return round(int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024)


@contextmanager
def served(path: Path) -> Iterator[Page]:
    """A dashboard in a process of its own."""
    command = [sys.executable, "-m", "unbraid", "dashboard", str(path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = re.search(r":(\d+)/\?token=(\S+)", process.stdout.readline())
        assert link
        yield Page(process, int(link[1]), link[2])
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure(page: Page, run: RunDirectory, n_steps: int, rounds: int) -> dict[str, Any]:
    """What is asked for above."""
    name, before = page.ask("/api/runs")[0]["id"], page.memory_mib
    began = time.perf_counter()
    while page.ask(f"/api/series/{name}?n=700")["unread_bytes"]:
        time.sleep(0.5)
    found: dict[str, Any] = {"reading_seconds": round(time.perf_counter() - began, 1)}
    found |= {"memory_before_mib": before, "memory_after_mib": page.memory_mib}
    rng = np.random.default_rng(0)
    firsts = rng.integers(1, n_steps - 20_000, rounds)
    questions = {
        "whole_run_ms": [f"/api/series/{name}?n=700"] * rounds,
        "tenth_of_it_ms": [f"/api/series/{name}?n=700&first={k}&last={k + n_steps // 10}" for k in firsts],
        "twenty_thousand_steps_ms": [f"/api/series/{name}?n=700&first={k}&last={k + 20_000}" for k in firsts],
        "thousand_steps_ms": [f"/api/series/{name}?n=700&first={k}&last={k + 1000}" for k in firsts],
        "list_ms": ["/api/runs"] * rounds,
    }
    for kind, paths in questions.items():
        found[kind] = spread([page.milliseconds(path) for path in paths])
    found["told_of_a_step_after_ms"] = spread(told_after(page, run, n_steps, rounds))
    return found


def told_after(page: Page, run: RunDirectory, n_steps: int, rounds: int) -> list[float]:
    """Milliseconds from a step's line in the file to the event that the page hears."""
    live = socket.create_connection(("127.0.0.1", page.port), timeout=60)
    live.sendall(f"GET /api/live HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nCookie: {page.cookie}\r\n\r\n".encode())
    found, heard = [], b""
    for step in range(n_steps + 1, n_steps + 1 + rounds):
        time.sleep(0.37)
        with run.steps.open("a", encoding="utf-8") as file:
            file.write(line(step, 0.0, 6.0))
        began = time.perf_counter()
        while f'"last_step": {step}'.encode() not in heard:
            heard = heard[-1000:] + live.recv(65536)
        found.append(1000 * (time.perf_counter() - began))
    live.close()
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and largest."""
    return {"median": round(statistics.median(values), 1), "largest": round(max(values), 1)}


if __name__ == "__main__":
    main()
