"""The comparison with the peers runs and is written as stated, also without them; a test cannot check speeds."""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
ALONE = ["--only", "clip_and_adam", "pit_3", "--quick", "--repeats", "2"]
"""Benchmarks that need no package of a peer."""


@pytest.fixture
def part(monkeypatch):
    """Import a file of the benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_a_ratio_is_the_median_over_the_rounds_of_peer_over_ours(part):
    race = part("race")
    ours, like, best = race.Contestant("ours", "fp32"), race.Contestant("they", "fp32"), race.Contestant("they", "bf16")
    measured = {ours: [1.0, 2.0, 4.0], like: [4.0, 4.0, 4.0], best: [2.0, 3.0, 2.0]}

    ratios = race.ratios(ours, measured)

    assert ratios["like"] == {"against": "they fp32", "median": 2.0, "min": 1.0, "max": 4.0}
    assert ratios["best"] == {"against": "they bf16", "median": 1.5, "min": 0.5, "max": 2.0}


def test_compiled_code_is_compared_with_the_peer_in_the_same_precision(part):
    race = part("race")
    ours = race.Contestant("ours", "bf16 compiled")
    peers = {race.Contestant("they", "fp32"): [1.0], race.Contestant("they", "bf16"): [3.0]}

    assert race.ratios(ours, {ours: [1.0], **peers})["like"]["against"] == "they bf16"


def test_every_second_round_runs_in_reverse_order(part):
    race = part("race")
    calls = []
    ours = race.Contestant("ours", "fp32")
    theirs = race.Contestant("they", "fp32")
    contestants = {ours: lambda: calls.append("o"), theirs: lambda: calls.append("t")}

    measured = race.race(contestants, rounds=3, device=torch.device("cpu"), calls=2, warm_up=1)

    assert "".join(calls) == "ot" + "oott" + "ttoo" + "oott"
    assert {len(values) for values in measured.values()} == {3}


def test_results_are_added_to_those_in_the_file(part, tmp_path, capsys):
    out = tmp_path / "figures.json"
    out.write_text(json.dumps({"clip_and_adam": "old", "another": "stays"}))

    assert part("against_peers").main([*ALONE, "--out", str(out)]) == 0

    found = json.loads(out.read_text())
    assert found["another"] == "stays"
    (update,), (pit,) = found["clip_and_adam"]["races"], found["pit_3"]["races"]
    assert update["measured"].keys() == {"ours default", "torch default", "torch foreach", "torch fused"}
    assert len(update["measured"]["ours default"]["values"]) == 2
    assert pit["loss_db"]["ours fp32"] == pytest.approx(pit["loss_db"]["fast_bss_eval fp32"], abs=1e-3)
    assert f"{pit['ratios']['ours fp32']['like']['median']:.2f}x" in capsys.readouterr().out
    assert {"date", "command", "machine", "device", "torch", "threads", "clock", "peers"} <= found["pit_3"].keys()


@pytest.mark.skipif(importlib.util.find_spec("speechbrain") is not None, reason="SpeechBrain is installed")
def test_a_missing_peer_is_named_in_one_line(part, tmp_path, capsys):
    out = tmp_path / "none.json"

    assert part("against_peers").main(["--only", "sepformer_step", "--out", str(out)]) == 2

    message = capsys.readouterr().err
    assert message.startswith("speechbrain cannot be imported here")
    assert len(message.splitlines()) == 1
    assert not out.exists()


def test_tiny_sizes_and_other_machines_have_files_of_their_own(part, capsys, monkeypatch):
    against = part("against_peers")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100 80GB")
    on_cpu, on_gpu = (against.Setting(torch.device(name), 1, quick=False) for name in ("cpu", "cuda"))

    assert against.main(ALONE) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert against.default_file(on_cpu).name == "against_peers.json"
    assert against.default_file(on_gpu).name == "against_peers_nvidia_a100_80gb.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert against.default_file(on_cpu).name == "against_peers_4_threads.json"


def test_the_batch_size_can_be_chosen(part):
    against = part("against_peers")
    work = against.Work("sepformer", {}, 1, 4.0)

    assert against.Setting(torch.device("cpu"), 1, quick=False, batch_size=16).sized(work).batch_size == 16
    assert against.Setting(torch.device("cpu"), 1, quick=False).sized(work) == work


def test_a_model_that_unbraid_lacks_is_named_and_not_measured(part, capsys):
    against = part("against_peers")
    benchmark = against.Benchmark(lambda _setting: pytest.fail("measured"), model="of_tomorrow")
    setting = against.Setting(torch.device("cpu"), 1, quick=True)

    assert against.measure("step", benchmark, setting) == {"not_there": "of_tomorrow"}
    assert "of_tomorrow" in capsys.readouterr().out


def test_zero_rounds_are_refused(part):
    with pytest.raises(argparse.ArgumentTypeError, match="0 must be 1 or more"):
        part("against_peers").at_least_one("0")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_fresh_process_measures_the_first_step_and_the_peak_of_memory(part):
    against = part("against_peers")
    fresh = part("fresh")
    ours = against.Contestant("ours", "")
    work = against.Work("conv_tasnet", against.QUICK["conv_tasnet"], 1, 0.25)
    setting = against.Setting(torch.device("cpu"), 1, quick=True)

    small, large = (
        fresh.in_a_fresh_process(against.fresh_task(ours, work._replace(seconds=seconds), setting))
        for seconds in (0.25, 16.0)
    )

    assert small["first"] > 0
    assert large["extra_bytes"] > 2**22 > small["extra_bytes"]


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.skipif(
    "UNBRAID_PEERS" not in os.environ, reason="UNBRAID_PEERS does not name a Python with the peers' packages"
)
def test_the_networks_of_both_sides_have_the_same_sizes(tmp_path):
    out = tmp_path / "figures.json"
    script = FOLDER / "against_peers.py"
    names = ["sepformer_small_step", "conv_tasnet_step", "dprnn_step", "bs_roformer_30s"]

    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [os.environ["UNBRAID_PEERS"], script, "--only", *names, "--quick", "--repeats", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)

    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name in names:
        for race in found[name]["races"]:
            ours = race["parameters"].pop("ours")
            assert list(race["parameters"].values()) == [pytest.approx(ours, rel=0.02)], name
