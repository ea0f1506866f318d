"""Measure what clippers and filters cost per step, early and late in a run: python benchmarks/part_costs.py."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from step_overhead import environment

from unbraid.robust.clip import AutoClip, FixedClip, ZClip
from unbraid.robust.filter import OutlierFilter, PercentileFilter, ThresholdFilter

ROOT = Path(__file__).resolve().parent.parent
N_CALLS = 200


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[100, 10_000, 1_000_000],
        help="numbers of steps that the parts have seen before",
    )
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "part_costs.json")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    figures = environment(torch.device("cpu")) | {"unit": "microseconds a step, median of 200", "results": []}
    for keyword in ("bare", "ours", "clock"):
        del figures[keyword]
    for n_before in args.lengths:
        costs = {name: microseconds(call) for name, call in calls(n_before).items()}
        figures["results"].append({"steps_before": n_before} | costs)
        print(n_before, costs)
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def calls(n_before: int) -> dict[str, Callable[[], object]]:
    """Return a function for each part that runs it for one step, after `n_before` steps."""
    norms = torch.rand(n_before, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1)
    whole = AutoClip()
    window = AutoClip(window=1000)
    fixed = FixedClip()
    zclip = ZClip()
    filters = {"threshold": ThresholdFilter(), "percentile": PercentileFilter(), "outlier": OutlierFilter()}
    step_taken = torch.tensor(True)
    losses = torch.linspace(-20.0, 5.0, 4)

    # Fill the histories. Parts with a window hold no more than 1,000 values; the whole history is loaded at once.
    whole.load_state_dict({"norms": norms.sort().values})
    for norm in norms[:1000]:
        window(norm, step_taken)
        zclip(norm, step_taken)
    for batch_losses in norms[:4000].float().split(4):
        for part in filters.values():
            if hasattr(part, "observe"):
                part.observe(batch_losses, torch.ones_like(batch_losses, dtype=torch.bool))

    def filtered(part: object) -> Callable[[], object]:
        def call() -> None:
            part(losses)
            if hasattr(part, "observe"):
                part.observe(losses, torch.ones_like(losses, dtype=torch.bool))

        return call

    clippers = {"clip fixed": fixed, "clip autoclip": whole, "clip autoclip, window 1000": window, "clip zclip": zclip}
    norm = torch.tensor(0.7, dtype=torch.float64)
    found = {name: (lambda clipper=clipper: clipper(norm, step_taken)) for name, clipper in clippers.items()}
    return found | {f"filter {name}, batch of 4": filtered(part) for name, part in filters.items()}


def microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    for _ in range(20):
        call()
    seconds = []
    for _ in range(N_CALLS):
        started = perf_counter()
        call()
        seconds.append(perf_counter() - started)
    return round(1e6 * statistics.median(seconds), 1)


if __name__ == "__main__":
    main()
