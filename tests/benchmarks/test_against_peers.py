"""The race is run and written as it says, also without the peers; how fast anything is, no test can know."""

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
"""What needs no package that ours does not need too."""


@pytest.fixture
def part(monkeypatch):
    """A file of the benchmark, as a module."""
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


def test_compiled_code_is_held_against_the_peer_in_the_same_precision(part):
    race = part("race")
    ours = race.Contestant("ours", "bf16 compiled")
    peers = {race.Contestant("they", "fp32"): [1.0], race.Contestant("they", "bf16"): [3.0]}

    assert race.ratios(ours, {ours: [1.0], **peers})["like"]["against"] == "they bf16"


def test_every_second_round_is_run_the_other_way_round(part):
    race, calls = part("race"), []
    one, other = race.Contestant("ours", "fp32"), race.Contestant("they", "fp32")
    contestants = {one: lambda: calls.append("o"), other: lambda: calls.append("t")}

    measured = race.race(contestants, rounds=3, device=torch.device("cpu"), calls=2, warm_up=1)

    assert "".join(calls) == "ot" + "oott" + "ttoo" + "oott"
    assert {len(values) for values in measured.values()} == {3}


def test_what_needs_no_peer_is_measured_and_takes_its_place_among_what_was_known(part, tmp_path, capsys):
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


@pytest.mark.skipif(importlib.util.find_spec("speechbrain") is not None, reason="SpeechBrain is here")
def test_a_peer_that_is_not_there_is_named_in_one_sentence(part, tmp_path, capsys):
    out = tmp_path / "none.json"

    assert part("against_peers").main(["--only", "sepformer_step", "--out", str(out)]) == 2

    said = capsys.readouterr().err
    assert said.startswith("speechbrain cannot be imported here")
    assert len(said.splitlines()) == 1
    assert not out.exists()


def test_tiny_sizes_and_other_machines_are_kept_apart_from_the_figures(part, capsys, monkeypatch):
    against = part("against_peers")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100 80GB")
    on_cpu, on_card = (against.Setting(torch.device(name), 1, quick=False) for name in ("cpu", "cuda"))

    assert against.main(ALONE) == 2
    assert "name another --out" in capsys.readouterr().err
    assert against.usual_file(on_cpu).name == "against_peers.json"
    assert against.usual_file(on_card).name == "against_peers_nvidia_a100_80gb.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert against.usual_file(on_cpu).name == "against_peers_4_threads.json"


def test_a_batch_that_fills_a_card_can_be_asked_for(part):
    against = part("against_peers")
    work = against.Work("sepformer", {}, 1, 4.0)

    assert against.Setting(torch.device("cpu"), 1, quick=False, batch_size=16).sized(work).batch_size == 16
    assert against.Setting(torch.device("cpu"), 1, quick=False).sized(work) == work


def test_a_model_that_ours_has_not_is_told_and_not_measured(part, capsys):
    against = part("against_peers")
    piece = against.Piece(lambda _setting: pytest.fail("measured"), model="of_tomorrow")
    setting = against.Setting(torch.device("cpu"), 1, quick=True)

    assert against.measure("step", piece, setting) == {"not_there": "of_tomorrow"}
    assert "of_tomorrow" in capsys.readouterr().out


def test_no_rounds_are_refused(part):
    with pytest.raises(argparse.ArgumentTypeError, match="0 must be 1 or more"):
        part("against_peers").at_least_one("0")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_fresh_process_tells_the_first_step_and_the_memory_of_another(part):
    against, fresh = part("against_peers"), part("fresh")
    one, work = against.Contestant("ours", ""), against.Work("conv_tasnet", against.QUICK["conv_tasnet"], 1, 0.25)
    setting = against.Setting(torch.device("cpu"), 1, quick=True)

    small, large = (
        fresh.in_a_fresh_process(against.fresh_task(one, work._replace(seconds=seconds), setting))
        for seconds in (0.25, 16.0)
    )

    assert small["first"] > 0
    assert large["extra_bytes"] > 2**22 > small["extra_bytes"]


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.skipif("UNBRAID_PEERS" not in os.environ, reason="UNBRAID_PEERS names no Python with the peers' packages")
def test_the_networks_of_both_sides_have_the_same_sizes(tmp_path):
    out, script = tmp_path / "figures.json", FOLDER / "against_peers.py"
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
