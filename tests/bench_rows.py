"""A recipe to measure, and made-up rows of measurements."""

from pathlib import Path

from unbraid.bench_advice import BenchRow, Variant
from unbraid.config.recipe import recipe_from_table

TINY = {"name": "conv_tasnet", "n_filters": 8, "bottleneck": 8, "hidden": 8, "skip": 8, "n_blocks": 1, "n_repeats": 1}


def recipe(folder=Path(), *, model=TINY, batch_size=2, **train):
    data = {"batch_size": batch_size, "excerpt_seconds": 0.1, "path": "nowhere"}
    return recipe_from_table({"data": data, "model": model, "train": train or {"max_steps": 10**9}}, Path(folder))


def row(precision="fp32", compiled=False, batch_size=2, *, step=1.0, first=1.0, memory=2**30, note=""):
    variant = Variant(precision, compiled, batch_size)
    return BenchRow(variant, batch_size / step, step, memory, first, note)


def without(precision="fp32", compiled=False, batch_size=2, *, note="out of memory"):
    return BenchRow(Variant(precision, compiled, batch_size), note=note)
