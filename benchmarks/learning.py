"""Compare what is learned in a quarter of an hour: python benchmarks/learning.py TABLE.csv, with Asteroid installed.

A small Conv-TasNet on mixtures of two speakers, 3 s at 8 kHz, four per step, gradients clipped to a norm of 5. All arms
get the same mixtures in the same order from the same loader, and their last weights are evaluated on the same mixtures
of the test split. Each run has a fresh process with an empty compiler cache. The two arms that are limited by time run
side by side in turns, one stopped while the other runs: if the machine is slower for a while, it is so for both.

asteroid    its network with its filterbank (hops of 8 samples), its loss, and a plain loop: Adam at 1e-3, float32
ours        `unbraid train conv_tasnet_small` with the changes in `OURS`. What differs: hops of 32 samples, and filters
            initialised as sines; bfloat16 where the hardware multiplies it natively, and a compiled network; well
            separated examples filtered; a learning rate that warms up to twice Asteroid's and falls to 0 at the end
ours-steps  the same for as many steps as Asteroid's loop took: shows how much of the lead is not speed

Runs that are in the results already are not repeated, so that an interrupted benchmark can be resumed.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import torch
from machine import processor
from peers import PeerAdapter, asteroid_loss, missing
from torch import nn

from unbraid.build import build_corpus, choose_device, list_tracks, load_model
from unbraid.config.recipe import Recipe, load_recipe, recipe_table
from unbraid.config.shipped_recipes import find_recipe
from unbraid.console import show_training
from unbraid.data.dataset import make_dataset
from unbraid.data.loader import StepSampler, batches
from unbraid.evaluate import evaluate
from unbraid.records import read_steps
from unbraid.run import train
from unbraid.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
BY_TIME = ("asteroid", "ours")
ARMS = (*BY_TIME, "ours-steps")
TURN_SECONDS = 15.0
OURS = {"optim.lr": 2e-3, "schedule.name": "cosine", "schedule.warmup_steps": 100, "validate.every_steps": 0}
BLOCKS = ("n_filters", "hidden", "n_blocks", "n_repeats")
"""Sizes that both networks take from the recipe."""
Task = tuple[str, int, int | None]
"""Arm, seed, and the number of steps, or None if the run ends by time."""


def main(words: Sequence[str] | None = None) -> int:
    """Train the runs that are missing, evaluate them, print and write the results."""
    args = arguments().parse_args(words)
    if missing(("asteroid",)):
        print(
            "asteroid cannot be imported here: run this with the Python of an environment that has it.", file=sys.stderr
        )
        return 2
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up its child processes
    if args.child:
        arm, seed, n_steps = json.loads(args.child)
        print(json.dumps(run(arm, recipe_of(args.table, seed, args.minutes), n_steps, n_items=args.items)))
        return 0
    given = conditions(args)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"given": given, "runs": {}}
    if known["given"] != given:
        print(
            f"{args.out} has results under other conditions, {known['given']}; choose another --out.", file=sys.stderr
        )
        return 2
    for seed in range(args.seeds):
        for arms in (BY_TIME, ("ours-steps",)):
            names = [f"{arm} {seed}" for arm in arms]
            if not all(name in known["runs"] for name in names):
                n_steps = None if arms == BY_TIME else known["runs"][f"asteroid {seed}"]["steps"]
                made = in_turns(args, [(arm, seed, n_steps) for arm in arms])
                known["runs"] |= {name: environment() | run for name, run in zip(names, made, strict=True)}
                known["ahead_of_asteroid_db"] = leads(known["runs"])
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            for name in names:
                print(name, {key: value for key, value in known["runs"][name].items() if key != "items_db"}, flush=True)
    print(known["ahead_of_asteroid_db"])
    return 0


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions that must be equal for runs to be compared."""
    options = {"table": args.table.name, "minutes": args.minutes, "items": args.items, "threads": args.threads}
    recipe = recipe_table(recipe_of(args.table, 0, args.minutes))
    del recipe["data"]["path"], recipe["data"]["seed"]
    return options | {"turn_seconds": TURN_SECONDS, "recipe": recipe}


def in_turns(args: argparse.Namespace, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Call `run` for each task in a process with an empty compiler cache, in turns; progress goes to stderr.

    Each process gets its minutes times the number of tasks, because it is stopped for the share of the others.

    Raises:
        CalledProcessError: If a process failed.
    """
    options = {"--minutes": args.minutes * len(tasks), "--items": args.items, "--threads": args.threads}
    words = [str(args.table), *(str(word) for pair in options.items() for word in pair)]
    with ExitStack() as cleanup:
        started = []
        for task in tasks:
            settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cleanup.enter_context(TemporaryDirectory())}
            command = [sys.executable, "-W", "ignore", __file__, *words, "--child", json.dumps(task)]
            output = cleanup.enter_context(TemporaryFile("w+", encoding="utf-8"))
            # Its own session, so that the process and its data workers can be stopped together.
            process = subprocess.Popen(command, stdout=output, env=settings, start_new_session=True)
            started.append((process, output))
            cleanup.callback(kill, process)
        take_turns([process for process, _ in started])
        scored = [last_line(process, output) for process, output in started]
    return [result | {"minutes": round(result["minutes"] / len(tasks), 2)} for result in scored]


def take_turns(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let one process run at a time, with its workers and for the same time each, until all have ended.

    Raises:
        CalledProcessError: If a process failed; the others are not ended.
    """
    for process in processes:
        os.killpg(process.pid, signal.SIGSTOP)
    while running := [process for process in processes if process.poll() is None]:
        for process in running:
            os.killpg(process.pid, signal.SIGCONT)
            try:
                if status := process.wait(TURN_SECONDS):
                    raise subprocess.CalledProcessError(status, process.args)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGSTOP)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its workers if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(process: subprocess.Popen[bytes], output: IO[str]) -> dict[str, Any]:
    """Return the result that a process printed as its last line.

    Raises:
        CalledProcessError: If the process failed.
    """
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    output.seek(0)
    return json.loads(output.read().splitlines()[-1])


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="manifest: path,speaker,seconds,sample_rate,split")
    parser.add_argument("--minutes", type=float, default=15.0, help="minutes of training per run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--items", type=int, default=300, help="mixtures to evaluate (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser


def recipe_of(table: Path, seed: int, minutes: float) -> Recipe:
    """Return the recipe that ours trains by, and that the other arms take their data from."""
    settings = {"data.path": table.absolute(), "data.seed": seed, "train.max_minutes": minutes}
    changes = [f"{key}={value}" for key, value in (settings | OURS).items()]
    return load_recipe(find_recipe(Path("conv_tasnet_small")), changes)


def run(arm: str, recipe: Recipe, n_steps: int | None, *, n_items: int) -> dict[str, Any]:
    """Train and evaluate one arm.

    Args:
        arm: One of `ARMS`.
        recipe: Data, sizes and time.
        n_steps: Number of steps; None ends by time.
        n_items: Mixtures to evaluate.
    """
    started = time.perf_counter()
    model, steps = train_asteroid(recipe) if arm == "asteroid" else train_ours(recipe, n_steps)
    minutes = (time.perf_counter() - started) / 60
    tracks, _ = list_tracks(recipe)
    tested = make_dataset(tracks, replace(recipe.data, seed=0), "test")
    rows = [row for row, _ in evaluate(model, tested, recipe, n_items=n_items)]
    scores = [row["si_sdri"] for row in rows]
    return {"steps": steps, "minutes": round(minutes, 2), "si_sdri": interval(scores), "items_db": scores}


def train_asteroid(recipe: Recipe) -> tuple[nn.Module, int]:
    """Train by the loop of Asteroid's recipes, without the frameworks around it; return model and steps."""
    from asteroid.models import ConvTasNet

    torch.manual_seed(recipe.data.seed)
    sizes = {name: recipe.model.options[name] for name in BLOCKS}
    names = {"hidden": "hid_chan"}
    net = ConvTasNet(n_src=2, sample_rate=8000, **{names.get(name, name): size for name, size in sizes.items()})
    device = choose_device()
    model = PeerAdapter(net, enter="b c t -> b c t", leave="b s t -> b s 1 t").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dataset = build_corpus(recipe).train
    keys = StepSampler(len(dataset), recipe.data.batch_size)
    loader = batches(dataset, keys, workers=recipe.data.workers)
    ends = time.perf_counter() + 60 * recipe.train.max_minutes
    steps = 0
    for loaded in takewhile(lambda _: time.perf_counter() < ends, loader):
        batch = loaded.batch.to(device)
        loss = asteroid_loss(model(batch.mixture), batch.sources)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(f"asteroid, step {steps}: {loss.item():.2f} dB", file=sys.stderr)
    return model.eval(), steps


def train_ours(recipe: Recipe, n_steps: int | None) -> tuple[nn.Module, int]:
    """Train as `unbraid train` does; return model and steps."""
    if n_steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, max_minutes=0.0, max_steps=n_steps, compile="on"))
    with TemporaryDirectory() as folder:
        path = RunDirectory(Path(folder) / "run")
        shown = train(recipe, path)
        show_training(shown, max_steps=recipe.train.max_steps, max_minutes=recipe.train.max_minutes)
        last = read_steps(path.steps)[-1].step
        model, _ = load_model(path.checkpoints / f"step-{last:06d}")
    return model, last


def interval(scores: Sequence[float]) -> dict[str, float]:
    """Return the mean over mixtures, and half of its 95 % interval (over mixtures, not over trainings)."""
    half = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores))
    return {"mean": round(statistics.fmean(scores), 2), "half_95_over_mixtures": round(half, 2)}


def leads(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the lead of ours per arm: paired by mixture over the mean of the seeds, and for each seed."""
    found = {}
    for arm in ARMS[1:]:
        seeds = [seed for seed in range(len(runs)) if f"{arm} {seed}" in runs]
        if seeds:
            ours, theirs = ([runs[f"{who} {seed}"]["items_db"] for seed in seeds] for who in (arm, "asteroid"))
            means = [[statistics.fmean(item) for item in zip(*side, strict=True)] for side in (ours, theirs)]
            pooled = interval([ours_db - theirs_db for ours_db, theirs_db in zip(*means, strict=True)])
            each = [round(statistics.fmean(a) - statistics.fmean(b), 2) for a, b in zip(ours, theirs, strict=True)]
            found[arm] = pooled | {"each_seed": each}
    return found


def environment() -> dict[str, Any]:
    """Return date, machine and device."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


if __name__ == "__main__":
    sys.exit(main())
