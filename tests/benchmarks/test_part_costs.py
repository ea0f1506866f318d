"""The benchmark of clippers and filters covers all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from unbraid.robust import CLIPPERS, FILTERS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "part_costs.py"


def test_every_clipper_and_filter_but_none_is_measured(tmp_path):
    out = tmp_path / "costs.json"
    command = [sys.executable, str(SCRIPT), "--lengths", "50", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr

    (costs,) = json.loads(out.read_text())["results"]

    assert costs.pop("steps_before") == 50
    assert all(cost > 0 for cost in costs.values())
    for name in {*CLIPPERS, *FILTERS} - {"none"}:
        assert any(name in measured for measured in costs), name
