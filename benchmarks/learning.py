"""What is learnt in a quarter of an hour: python benchmarks/learning.py TABLE.csv, with Asteroid installed.

A small Conv-TasNet on mixtures of two talkers, 3 s at 8 kHz, four a step, the norm limited at 5; the same mixtures in
the same order for all, by the same loader, scored by the last weights on one set of mixtures of the test split. Each
run has a fresh process, and the compiler finds nothing there that it made before. The two that have so many minutes run
side by side in turns, one stopped while the other goes on: a machine that is slower for a while is so for both.

asteroid    its network with its filterbank (hops of 8 samples), its loss, and a plain loop: Adam at 1e-3, float32
ours        `unbraid train conv_tasnet_small` with `OURS` laid over it. What is not the same: hops of 32 samples and
            filters that begin as sines; bfloat16 where it is multiplied natively, and a compiled network; easy examples
            left out; the learning rate warms up to twice Asteroid's and falls to 0 with the time given
ours-steps  the same for as many steps as Asteroid's loop came to: how much of the lead is not speed

A run that the result already holds is not made again, so that the whole can be stopped and gone on with.
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
from peers import AsOurs, asteroid_loss, missing
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
"""What both networks take from the recipe."""
Task = tuple[str, int, int | None]
"""Arm, seed, and the steps where it ends by them and not by time."""


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, score, print and write."""
    args = arguments().parse_args(words)
    if missing(("asteroid",)):
        print("asteroid cannot be imported here: run this with the Python of one that has it.", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no child outlives it
    if args.child:
        arm, seed, n_steps = json.loads(args.child)
        print(json.dumps(run(arm, recipe_of(args.table, seed, args.minutes), n_steps, n_items=args.items)))
        return 0
    given = conditions(args)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"given": given, "runs": {}}
    if known["given"] != given:
        print(f"{args.out} was begun under other conditions, {known['given']}; name another --out.", file=sys.stderr)
        return 2
    for seed in range(args.seeds):
        for arms in (BY_TIME, ("ours-steps",)):
            names = [f"{arm} {seed}" for arm in arms]
            if not all(name in known["runs"] for name in names):
                n_steps = None if arms == BY_TIME else known["runs"][f"asteroid {seed}"]["steps"]
                made = in_turns(args, [(arm, seed, n_steps) for arm in arms])
                known["runs"] |= {name: about() | scored for name, scored in zip(names, made, strict=True)}
                known["ahead_of_asteroid_db"] = leads(known["runs"])
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            for name in names:
                print(name, {key: value for key, value in known["runs"][name].items() if key != "items_db"}, flush=True)
    print(known["ahead_of_asteroid_db"])
    return 0


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for runs to be put together."""
    asked = {"table": args.table.name, "minutes": args.minutes, "items": args.items, "threads": args.threads}
    recipe = recipe_table(recipe_of(args.table, 0, args.minutes))
    del recipe["data"]["path"], recipe["data"]["seed"]
    return asked | {"turn_seconds": TURN_SECONDS, "recipe": recipe}


def in_turns(args: argparse.Namespace, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """`run` of each in a process where nothing was compiled before; what they show on the way goes to stderr.

    Each is told as many times its minutes as there are tasks, and stands still for the others' share of them.

    Raises:
        CalledProcessError: If one failed.
    """
    asked = {"--minutes": args.minutes * len(tasks), "--items": args.items, "--threads": args.threads}
    words = [str(args.table), *(str(word) for pair in asked.items() for word in pair)]
    with ExitStack() as left_behind:
        started = []
        for task in tasks:
            settings = os.environ | {"TORCHINDUCTOR_CACHE_DIR": left_behind.enter_context(TemporaryDirectory())}
            command = [sys.executable, "-W", "ignore", __file__, *words, "--child", json.dumps(task)]
            told = left_behind.enter_context(TemporaryFile("w+", encoding="utf-8"))
            started.append((subprocess.Popen(command, stdout=told, env=settings, start_new_session=True), told))
            left_behind.callback(end, started[-1][0])
        take_turns([process for process, _ in started])
        scored = [last_line(process, told) for process, told in started]
    return [one | {"minutes": round(one["minutes"] / len(tasks), 2)} for one in scored]


def take_turns(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let one run at a time, with its workers, each as long as the others, until all have ended.

    Raises:
        CalledProcessError: If one failed; the others are left as they are.
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


def end(process: subprocess.Popen[bytes]) -> None:
    """And what it started, if it has not come to its end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(process: subprocess.Popen[bytes], told: IO[str]) -> dict[str, Any]:
    """Of what it printed.

    Raises:
        CalledProcessError: If it failed.
    """
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    told.seek(0)
    return json.loads(told.read().splitlines()[-1])


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="manifest: path,speaker,seconds,sample_rate,split")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--items", type=int, default=300, help="mixtures scored (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser


def recipe_of(table: Path, seed: int, minutes: float) -> Recipe:
    """What ours trains by, and the others take their data from."""
    given = {"data.path": table.absolute(), "data.seed": seed, "train.max_minutes": minutes}
    changes = [f"{key}={value}" for key, value in (given | OURS).items()]
    return load_recipe(find_recipe(Path("conv_tasnet_small")), changes)


def run(arm: str, recipe: Recipe, n_steps: int | None, *, n_items: int) -> dict[str, Any]:
    """Train and score.

    Args:
        arm: One of `ARMS`.
        recipe: Data, sizes and time.
        n_steps: Where it ends by steps and not by time.
        n_items: Mixtures to score.
    """
    began = time.perf_counter()
    model, steps = by_asteroid(recipe) if arm == "asteroid" else by_us(recipe, n_steps)
    minutes = (time.perf_counter() - began) / 60
    tracks, _ = list_tracks(recipe)
    tested = make_dataset(tracks, replace(recipe.data, seed=0), "test")
    rows = [row for row, _ in evaluate(model, tested, recipe, n_items=n_items)]
    scores = [row["si_sdri"] for row in rows]
    return {"steps": steps, "minutes": round(minutes, 2), "si_sdri": interval(scores), "items_db": scores}


def by_asteroid(recipe: Recipe) -> tuple[nn.Module, int]:
    """The loop that its recipes come to, without the frameworks around it."""
    from asteroid.models import ConvTasNet

    torch.manual_seed(recipe.data.seed)
    sizes = {name: recipe.model.options[name] for name in BLOCKS}
    names = {"hidden": "hid_chan"}
    net = ConvTasNet(n_src=2, sample_rate=8000, **{names.get(name, name): size for name, size in sizes.items()})
    device = choose_device()
    model = AsOurs(net, enter="b c t -> b c t", leave="b s t -> b s 1 t").to(device)
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


def by_us(recipe: Recipe, n_steps: int | None) -> tuple[nn.Module, int]:
    """`unbraid train`."""
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
    """Mean over mixtures, and half of its 95 % interval: over mixtures, not over trainings."""
    half = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores))
    return {"mean": round(statistics.fmean(scores), 2), "half_95_over_mixtures": round(half, 2)}


def leads(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How far ours is ahead, mixture by mixture in the mean over the seeds that both sides have, and for each seed."""
    found = {}
    for arm in ARMS[1:]:
        seeds = [seed for seed in range(len(runs)) if f"{arm} {seed}" in runs]
        if seeds:
            ours, theirs = ([runs[f"{who} {seed}"]["items_db"] for seed in seeds] for who in (arm, "asteroid"))
            means = [[statistics.fmean(item) for item in zip(*side, strict=True)] for side in (ours, theirs)]
            pooled = interval([one - other for one, other in zip(*means, strict=True)])
            each = [round(statistics.fmean(a) - statistics.fmean(b), 2) for a, b in zip(ours, theirs, strict=True)]
            found[arm] = pooled | {"each_seed": each}
    return found


def about() -> dict[str, Any]:
    """Where and when."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


if __name__ == "__main__":
    sys.exit(main())
