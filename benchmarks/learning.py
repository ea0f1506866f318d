"""What is learnt in a quarter of an hour: python benchmarks/learning.py TABLE.csv, with Asteroid installed.

A small Conv-TasNet on mixtures of two talkers, 3 s at 8 kHz, four a step, Adam at 1e-3, the norm limited at 5; the same
mixtures in the same order for all, by the same loader. Scored by the same evaluation on talkers of the test split.

asteroid    its network with its filterbank (hops of 8 samples), its loss, and a plain loop in float32
ours        `unbraid train conv_tasnet_small`, as it comes, with the learning rate falling over the time given
ours-steps  the same for as many steps as Asteroid's loop came to: how much of the lead is not speed

A run that the result already holds is not made again, so that the whole can be stopped and gone on with.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from machine import processor
from peers import AsOurs, asteroid_loss, missing
from torch import nn

from unbraid.assemble import build_corpus, list_tracks, load_model, train
from unbraid.cli import find_recipe
from unbraid.data.loader import StepKeys, batches
from unbraid.data.mixtures import mixtures
from unbraid.evaluate import evaluate
from unbraid.recipe import Recipe, load_recipe
from unbraid.records import RunDirectory
from unbraid.screen import show_training

ROOT = Path(__file__).parents[1]
ARMS = ("asteroid", "ours", "ours-steps")
BLOCKS = ("n_filters", "hidden", "n_blocks", "n_repeats")
"""What both networks take from the recipe."""


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, score, print and write."""
    args = arguments().parse_args(words)
    if missing(("asteroid",)):
        print("asteroid cannot be imported here: run this with the Python of an environment that has it.")
        return 2
    torch.set_num_threads(args.threads)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"runs": {}}
    for seed in range(args.seeds):
        for arm in ARMS:
            if (name := f"{arm} {seed}") not in known["runs"]:
                recipe = recipe_of(args.table, seed, args.minutes)
                n_steps = known["runs"][f"asteroid {seed}"]["steps"] if arm == "ours-steps" else None
                known["runs"][name] = about(args) | run(arm, recipe, n_steps, n_items=args.items)
                known["ahead_of_asteroid_db"] = leads(known["runs"])
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(name, {key: value for key, value in known["runs"][name].items() if key != "items_db"}, flush=True)
    print(known["ahead_of_asteroid_db"])
    return 0


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="manifest: path,speaker,seconds,sample_rate,split")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--items", type=int, default=300, help="mixtures scored (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    return parser


def recipe_of(table: Path, seed: int, minutes: float) -> Recipe:
    """What ours trains by, and the others take their data from."""
    changes = {
        "data.path": table.absolute(),
        "data.seed": seed,
        "train.max_minutes": minutes,
        "schedule.name": "cosine",
        "schedule.warmup_steps": 100,
        "validate.every_steps": 1000,
        "validate.n_items": 32,
    }
    return load_recipe(find_recipe(Path("conv_tasnet_small")), [f"{key}={value}" for key, value in changes.items()])


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
    rows = [row for row, _ in evaluate(model, mixtures(tracks, recipe.data, "test"), recipe, n_items=n_items)]
    scores = [row["si_sdri"] for row in rows]
    return {"steps": steps, "minutes": round(minutes, 2), "si_sdri": interval(scores), "items_db": scores}


def by_asteroid(recipe: Recipe) -> tuple[nn.Module, int]:
    """The loop that its recipes come to, without the frameworks around it."""
    from asteroid.models import ConvTasNet

    torch.manual_seed(recipe.data.seed)
    sizes = {name: recipe.model.options[name] for name in BLOCKS}
    names = {"hidden": "hid_chan"}
    net = ConvTasNet(n_src=2, sample_rate=8000, **{names.get(name, name): size for name, size in sizes.items()})
    model = AsOurs(net, enter="b c t -> b c t", leave="b s t -> b s 1 t")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    dataset = build_corpus(recipe).train
    keys = StepKeys(len(dataset), recipe.data.batch_size)
    loader = batches(dataset, keys, workers=recipe.data.workers)
    ends = time.perf_counter() + 60 * recipe.train.max_minutes
    steps = 0
    for batch, _ in takewhile(lambda _: time.perf_counter() < ends, loader):
        loss = asteroid_loss(model(batch.mixture), batch.sources)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(f"asteroid, step {steps}: {loss.item():.2f} dB", flush=True)
    return model.eval(), steps


def by_us(recipe: Recipe, n_steps: int | None) -> tuple[nn.Module, int]:
    """`unbraid train`."""
    if n_steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, max_minutes=0.0, max_steps=n_steps, compile="on"))
    with tempfile.TemporaryDirectory() as folder:
        path = RunDirectory(Path(folder) / "run")
        shown = train(recipe, path)
        show_training(shown, max_steps=recipe.train.max_steps, max_minutes=recipe.train.max_minutes)
        model, _ = load_model(path.path)
        steps = json.loads(path.steps.read_text(encoding="utf-8").splitlines()[-1])["step"]
    return model.eval(), steps


def interval(scores: Sequence[float]) -> dict[str, float]:
    """Mean over mixtures, and half of its 95 % interval."""
    half = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores))
    return {"mean": round(statistics.fmean(scores), 2), "half_95": round(half, 2)}


def leads(runs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far ours is ahead, mixture by mixture, over the seeds that both sides have."""
    found = {}
    for arm in ARMS[1:]:
        pairs = [
            [ours - theirs for ours, theirs in zip(run["items_db"], runs[f"asteroid {seed}"]["items_db"], strict=True)]
            for seed in range(len(runs))
            if (run := runs.get(f"{arm} {seed}"))
        ]
        if pairs:
            found[arm] = interval([statistics.fmean(item) for item in zip(*pairs, strict=True)]) | {"seeds": len(pairs)}
    return found


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where and when."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}",
        "minutes_given": args.minutes,
    }


if __name__ == "__main__":
    sys.exit(main())
