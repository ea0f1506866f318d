"""Healthy runs on real speech, in which the doctor must find nothing, not even a note.

They were made by ``scripts/record_healthy_runs.py``, 2,000 steps each, each with another model, loss, optimizer,
schedule or clipper.
"""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from unbraid.health.rules import run_rules
from unbraid.health.series import series_from_rows
from unbraid.schema_version import upgrade_row

RUNS = sorted((Path(__file__).parent / "healthy").glob("*.jsonl.gz"))


def read(path):
    rows = defaultdict(list)
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        kind, row = json.loads(line)
        rows[kind].append(upgrade_row(row))  # these runs were recorded under schema version 2
    (recipe,), (environment,), (data,) = (rows[kind] for kind in ("recipe", "environment", "data"))
    return series_from_rows(rows["step"], rows["validation"], rows["event"], recipe, environment, data)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_a_healthy_run_on_real_speech_has_no_findings(path):
    series = read(path)

    assert series.covers_start
    assert series.last_step == 2000
    assert len(series.sampled.items[0]) == 4
    assert len(series.validation["step"]) == 10
    assert np.isfinite(series.steps["n_filtered"]).all()
    assert np.isfinite(series.steps["clipped_grad_norm"]).mean() > 0.99
    assert run_rules(series) == []


def test_the_recorded_runs_are_varied_and_small():
    recipes = [read(path).recipe for path in RUNS]

    assert len({recipe["model"]["name"] for recipe in recipes}) >= 6
    assert len({recipe["loss"]["name"] for recipe in recipes}) >= 6
    assert {recipe["clip"]["name"] for recipe in recipes} == {"autoclip", "fixed", "none", "zclip"}
    assert sum(path.stat().st_size for path in RUNS) < 2_000_000


def test_the_recorded_runs_contain_no_absolute_paths():
    for path in RUNS:
        text = gzip.decompress(path.read_bytes()).decode()
        assert '"/' not in text  # no path from the root of any file system
        assert ":\\\\" not in text
