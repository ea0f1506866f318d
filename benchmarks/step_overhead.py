"""Measure the cost of train_step compared with a plain loop of the same work: python benchmarks/step_overhead.py.

Both have their own copy of the same model and optimizer, and train on the same batches in one process. Measurements
come in pairs, one of each loop, every second pair in reverse order, so that other work on the machine slows both
alike. On the CPU the clock is the CPU time of the process on one thread; on a GPU, which is synchronised before and
after, it is wall time. The result is the median over the pairs of ours / plain, with a bootstrap interval of 95 %; the
ratio of the sums gives the sampled steps, which record blocks and examples, their full weight.
"""

import argparse
import copy
import json
import os
import re
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import processor
from torch import nn

from unbraid.compilation import compile_model
from unbraid.data.batch import Batch
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.models import MODELS
from unbraid.robust.clip import FixedClip
from unbraid.robust.filter import ThresholdFilter
from unbraid.robust.precision import Precision
from unbraid.train.block_stats import SAMPLE_EVERY_STEPS
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import TrainState
from unbraid.train.step import train_step

ROOT = Path(__file__).parents[1]
SAMPLE_RATE = 8000
LR = 1e-4
MAX_NORM = 5.0
PLAIN = (
    "zero_grad(set_to_none=True); model(mixture) under autocast; PIT negative SI-SDR in float32, mean over the batch; "
    f"backward; torch.nn.utils.clip_grad_norm_({MAX_NORM:g}); fused Adam step"
)
OURS = (
    "unbraid.train.step.train_step: all that, and a generator seeded for the step, per-example losses, filtered at "
    "-30 dB, steps with non-finite losses or gradients skipped in the optimizer's own pass, and a complete record on "
    f"the host; every {SAMPLE_EVERY_STEPS}th step also records each block and each example"
)


class Setup(NamedTuple):
    """A model and the size of its batches."""

    model: str
    options: dict[str, Any]
    batch_size: int
    seconds: float


def setups() -> dict[str, Setup]:
    """Return the setups that can be measured, by name."""
    recipe = tomllib.loads((ROOT / "recipes" / "conv_tasnet_small.toml").read_text(encoding="utf-8"))
    conv_tasnet = {key: value for key, value in recipe["model"].items() if key != "name"}
    tiny = {"n_filters": 8, "bottleneck": 8, "hidden": 8, "skip": 8, "n_blocks": 1, "n_repeats": 1}
    return {
        "conv_tasnet_small": Setup("conv_tasnet", conv_tasnet, 4, 3.0),
        "sepformer_small": Setup("sepformer", {"n_blocks": 1, "n_layers": 2}, 1, 4.0),
        "tiny": Setup("conv_tasnet", tiny, 2, 0.05),
    }


def main() -> None:
    """Measure, print and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--models", nargs="+", choices=sorted(setups()), default=["conv_tasnet_small", "sepformer_small"]
    )
    arguments.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    arguments.add_argument("--compile", action="store_true", help="measure compiled models instead of uncompiled ones")
    arguments.add_argument("--pairs", type=int, default=20, help="pairs for each model and precision")
    arguments.add_argument("--steps", type=int, default=3, help="steps per measurement")
    arguments.add_argument("--warm-up", type=int, default=3, help="steps of each loop before the first measurement")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--out", type=Path, help="JSON to write; benchmarks/results/step_overhead.json")
    args = arguments.parse_args()
    if args.pairs < 1 or args.steps < 1:
        arguments.error("--pairs and --steps must be 1 or more")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    figures = environment(device) | {"compiled": args.compile, "steps_per_measurement": args.steps, "results": []}
    for name in args.models:
        for precision in args.precision:
            options = {"pairs": args.pairs, "steps": args.steps, "warm_up": args.warm_up, "compiled": args.compile}
            measured = measure(setups()[name], precision, device, **options)
            result = {"model": name, "precision": precision} | measured
            figures["results"].append(result)
            low, high = result["interval_95"]
            print(
                f"{name} {precision}: ours / plain {result['median_ratio']:.4f} [{low:.4f}, {high:.4f}], "
                f"{1000 * result['ours_seconds']:.1f} ms and {1000 * result['bare_seconds']:.1f} ms a step"
            )
    out = args.out or default_out(device, compiled=args.compile)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(out)


def default_out(device: torch.device, *, compiled: bool) -> Path:
    """Return the file of the results: one for each GPU, and others for compiled models."""
    words = ["step_overhead"]
    if device.type == "cuda":
        words.append(re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower())
    if compiled:
        words.append("compiled")
    return ROOT / "benchmarks" / "results" / f"{'_'.join(words)}.json"


def environment(device: torch.device) -> dict[str, Any]:
    """Return date, machine, clock, and what the two loops do."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/step_overhead.py", *sys.argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "wall time, the device synchronised before and after" if cuda else "CPU time of the process",
        "bare": PLAIN,
        "ours": OURS,
    }


def measure(
    setup: Setup, precision: str, device: torch.device, *, pairs: int, steps: int, warm_up: int, compiled: bool
) -> dict[str, Any]:
    """Return medians over the pairs, and the ratio of every pair."""
    torch.manual_seed(0)
    first = MODELS[setup.model](**setup.options).to(device)

    # Equal weights and batches: at the end the weights are compared, which shows that both loops did the same work.
    models = [first, copy.deepcopy(first)]
    if compiled:
        for model in models:
            compile_model(model, device)
    batches = [noise(setup, device, seed) for seed in range(4)]
    loops = [our_loop(models[0], precision), plain_loop(models[1], precision)]
    for loop in loops:
        for i in range(warm_up):
            loop(batches[i % len(batches)])

    clocks = np.zeros((2, 2, pairs))  # (CPU or wall time, ours or plain, pair)
    for pair in range(pairs):
        chosen = [batches[(pair * steps + i) % len(batches)] for i in range(steps)]
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for which in order:
            clocks[:, which, pair] = timed(loops[which], chosen, device)

    ours, plain = clocks[1 if device.type == "cuda" else 0] / steps
    ours_wall, plain_wall = clocks[1] / steps
    ratios = ours / plain
    return {
        "batch_size": setup.batch_size,
        "seconds": setup.seconds,
        "parameters": sum(weight.numel() for weight in first.parameters()),
        "pairs": pairs,
        "median_ratio": round(float(np.median(ratios)), 5),
        "interval_95": bootstrap(ratios),
        "ratio_of_sums": round(float(ours.sum() / plain.sum()), 5),
        "median_ratio_of_wall_times": round(float(np.median(ours_wall / plain_wall)), 5),
        "ours_seconds": round(statistics.median(ours), 6),
        "bare_seconds": round(statistics.median(plain), 6),
        "ours_wall_seconds": round(statistics.median(ours_wall), 6),
        "bare_wall_seconds": round(statistics.median(plain_wall), 6),
        "ratios": [round(float(ratio), 4) for ratio in ratios],
        "largest_difference_of_weights": largest_difference(*models),
    }


def noise(setup: Setup, device: torch.device, seed: int) -> Batch:
    """Return a batch of two sources of noise: the values make no difference to the time."""
    rng = torch.Generator().manual_seed(seed)
    sources = 0.1 * torch.randn(setup.batch_size, 2, 1, round(setup.seconds * SAMPLE_RATE), generator=rng)
    return Batch.from_tensors(sources.sum(1), sources).to(device)


Loop = Callable[[Batch], object]


def our_loop(model: nn.Module, precision: str) -> Loop:
    """Return our training step, with the settings of our recipes."""
    state = TrainState(
        model,
        loss=SeparationLoss(neg_si_sdr),
        optimizer=OPTIMIZERS["adam"](model.parameters(), lr=LR),
        clipper=FixedClip(max_norm=MAX_NORM),
        filters=[ThresholdFilter(threshold_db=-30.0)],
        precision=Precision(precision),
    )
    return lambda batch: train_step(state, batch)


def plain_loop(model: nn.Module, precision: str) -> Loop:
    """Return the same work as a plain loop, with no checks and no records."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    loss = SeparationLoss(neg_si_sdr)
    autocast = Precision(precision).autocast

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(batch.mixture.device):
            estimate = model(batch.mixture)
        loss(estimate.float(), batch.sources).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return step


def timed(loop: Loop, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    """Return the CPU and the wall seconds of some steps, until the device has done all of their work."""
    synchronize(device)
    wall = time.perf_counter()
    cpu = time.process_time()
    for batch in batches:
        loop(batch)
    synchronize(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bootstrap(ratios: np.ndarray, *, n_draws: int = 10_000) -> list[float]:
    """Return the 95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (n_draws, len(ratios))), axis=1)
    return [round(float(edge), 5) for edge in np.percentile(medians, [2.5, 97.5])]


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two models' weights; 0 if both had the same training."""
    return max(float((a - b).abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


if __name__ == "__main__":
    main()
