"""Measure how long compiling takes and how much it gains, for each model: python benchmarks/compiling.py.

A step of each model that has `compile_regions` is timed compiled and not compiled, in each precision of this machine,
in a fresh process with an empty compiler cache. Models have published widths but few layers: a region is compiled once
for all equal layers, and the gain is that of one layer. The models' `compile_seconds` and `compile_gain` are set by
these figures.
"""

import argparse
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import processor

from unbraid.bench import in_a_fresh_process
from unbraid.bench_advice import Variant
from unbraid.config.recipe import Recipe, recipe_from_table
from unbraid.robust.precision import best_precision

ROOT = Path(__file__).parents[1]
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "bs_roformer": {"n_blocks": 1, "n_channels": 1, "n_sources": 2},
    "conv_tasnet": {"n_repeats": 1},
    "dprnn": {"n_blocks": 2},
    "re_sepformer": {"n_blocks": 1, "n_layers": 2},
    "sepformer": {"n_blocks": 1, "n_layers": 2},
    "tf_locoformer": {"n_layers": 1},
}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(FEW_LAYERS), default=sorted(FEW_LAYERS))
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of steps for each variant (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compiling.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for name in args.only:
        found: dict[str, Any] = {"options": FEW_LAYERS[name]}
        for precision in dict.fromkeys(["fp32", best_precision(device)]):
            plain, compiled = (
                in_a_fresh_process(recipe_of(name), Variant(precision, on, 1), args.seconds) for on in (False, True)
            )
            gain = plain.step_seconds / compiled.step_seconds
            seconds = compiled.first_step_seconds - plain.first_step_seconds
            found[precision] = {"gain": round(gain, 2), "seconds": round(seconds, 1)}
            found[precision] |= {"plain": asdict(plain), "compiled": asdict(compiled)}
            print(f"{name:14} {precision}  {gain:.2f} times as fast, for {seconds:.0f} s at the first step", flush=True)
        # Write after each model: a long measurement may be interrupted.
        known[name] = environment(args.threads) | found
        args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def recipe_of(name: str) -> Recipe:
    """Return a recipe for a model with one example of 2 s at 8 kHz per step."""
    data = {"batch_size": 1, "excerpt_seconds": 2.0, "path": "nowhere"}
    model = {"name": name, **FEW_LAYERS[name]}
    return recipe_from_table({"data": data, "model": model, "train": {"max_steps": 10**9}}, Path())


def environment(threads: int) -> dict[str, Any]:
    """Return date, machine and device."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {threads} thread(s), torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


if __name__ == "__main__":
    main()
