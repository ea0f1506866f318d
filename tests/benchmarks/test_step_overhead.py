"""The measurement of the step runs, and both loops do the same work; a test cannot check speeds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_overhead.py"


def measured(tmp_path, *options):
    out = tmp_path / "figures" / "overhead.json"
    command = [sys.executable, str(SCRIPT), "--models", "tiny", "--device", "cpu", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_both_loops_train_a_tiny_model_to_the_same_weights(tmp_path):
    figures, printed = measured(tmp_path, "--pairs", "1", "--steps", "4")

    assert [(result["model"], result["precision"]) for result in figures["results"]] == [
        ("tiny", "fp32"),
        ("tiny", "bf16"),
    ]
    for result in figures["results"]:
        assert result["interval_95"] == [result["median_ratio"]] * 2  # of a single pair
        assert result["ours_seconds"] > 0
        assert result["bare_seconds"] > 0
        assert f"{result['median_ratio']:.4f}" in printed
    assert figures["results"][0]["largest_difference_of_weights"] < 1e-6
    assert {"date", "command", "machine", "device", "torch", "bare", "ours", "clock"} <= figures.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
def test_compiled_models_are_measured_too(tmp_path):
    figures, _ = measured(tmp_path, "--pairs", "1", "--precision", "fp32", "--compile")

    assert figures["compiled"]
    assert figures["results"][0]["largest_difference_of_weights"] < 1e-6
