"""The benchmark of learning computes what it states, and resumes; a test cannot check what is learned."""

import importlib
import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
ARMS = {"asteroid": 1, "ours": 5, "ours-steps": 3}
COUNTING = """
import time
for _ in range(60):
    print(time.monotonic(), flush=True)
    time.sleep(0.01)
"""


@pytest.fixture
def learning(monkeypatch):
    """Import the benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module("learning")
    torch.set_num_threads(threads)


def test_the_lead_is_paired_by_mixture_over_the_seeds(learning):
    runs = {
        "asteroid 0": {"items_db": [0.0, 10.0, 20.0]},
        "ours 0": {"items_db": [2.0, 12.0, 25.0]},
        "asteroid 1": {"items_db": [0.0, 0.0, 0.0]},
        "ours 1": {"items_db": [2.0, 2.0, 5.0]},
        "ours-steps 0": {"items_db": [1.0, 11.0, 21.0]},
    }

    leads = learning.leads(runs)

    # 2, 2, 5: deviation 3 ** 0.5, over 3 mixtures
    assert leads["ours"] == {"mean": 3.0, "half_95_over_mixtures": 1.96, "each_seed": [3.0, 3.0]}
    assert leads["ours-steps"] == {"mean": 1.0, "half_95_over_mixtures": 0.0, "each_seed": [1.0]}


def test_runs_in_the_results_are_not_repeated(learning, monkeypatch, tmp_path, capsys):
    made = []

    def in_turns(args, tasks):
        made.extend(tasks)
        return [{"steps": 7, "minutes": 1.0, "items_db": [float(ARMS[arm])] * args.items} for arm, _, _ in tasks]

    monkeypatch.setattr(learning, "missing", lambda _packages: [])
    monkeypatch.setattr(learning, "in_turns", in_turns)
    words = [str(tmp_path / "table.csv"), "--items", "3", "--out", str(tmp_path / "out.json")]

    assert learning.main([*words, "--seeds", "1"]) == 0
    assert learning.main([*words, "--seeds", "2"]) == 0

    per_seed = [("asteroid", None), ("ours", None), ("ours-steps", 7)]
    assert made == [(arm, seed, n_steps) for seed in (0, 1) for arm, n_steps in per_seed]
    assert learning.main([*words, "--minutes", "5"]) == 2
    monkeypatch.setitem(learning.OURS, "optim.lr", 1e-3)
    assert learning.main(words) == 2
    assert len(made) == 6
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["runs"]) == [f"{arm} {seed}" for seed in (0, 1) for arm, _ in per_seed]
    assert results["ahead_of_asteroid_db"]["ours"]["mean"] == 4.0
    assert "ours-steps 1" in capsys.readouterr().out


def test_one_process_runs_at_a_time(learning, monkeypatch, tmp_path):
    monkeypatch.setattr(learning, "TURN_SECONDS", 0.2)
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    processes = []
    for path in paths:
        with path.open("w") as output:
            command = [sys.executable, "-c", COUNTING]
            processes.append(subprocess.Popen(command, stdout=output, start_new_session=True))

    learning.take_turns(processes)

    assert [process.returncode for process in processes] == [0, 0, 0]
    counted = sorted((float(line), path.name) for path in paths for line in path.read_text().split())
    assert len(counted) == 180
    changes = sum(name != next_name for (_, name), (_, next_name) in pairwise(counted))
    assert 5 < changes < 50  # if all ran at once, nearly every count would change the process


def test_a_failing_process_ends_the_turns(learning, monkeypatch):
    monkeypatch.setattr(learning, "TURN_SECONDS", 0.05)
    commands = ["import time; time.sleep(60)", "raise SystemExit(3)"]
    processes = [subprocess.Popen([sys.executable, "-c", command], start_new_session=True) for command in commands]

    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        learning.take_turns(processes)

    assert processes[0].poll() is None
    learning.kill(processes[0])
    assert processes[0].returncode == -signal.SIGKILL


def test_a_failing_process_has_no_result(learning):
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()

    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        learning.last_line(process, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings of torch
def test_ours_trains_for_a_number_of_steps_and_is_evaluated(learning, speaker_folder):
    recipe = learning.recipe_of(speaker_folder(n_speakers=40, seconds=3.5), 0, 1.0)
    scored = learning.run("ours-steps", recipe, 2, n_items=2)

    assert scored["steps"] == 2
    assert len(scored["items_db"]) == 2


def test_a_missing_asteroid_is_named(learning, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(learning, "missing", list)

    assert learning.main([str(tmp_path)]) == 2
    assert "asteroid cannot be imported here" in capsys.readouterr().err
