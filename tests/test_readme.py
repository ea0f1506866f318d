"""The README is true: its commands run, its code runs, its figures are those of benchmarks/results."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from unbraid.build import load_model
from unbraid.config.recipe import recipe_table
from unbraid.data.batch import Batch
from unbraid.models.conv_tasnet import ConvTasNet
from unbraid.train.incident import Incident, write_incident

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALLER = {
    "train": "--set train.max_steps=3 --set validate.n_items=2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "evaluate": "--n-items 3",
    "lr-range": "--steps 60 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "race": "--steps 2 --set validate.n_items=2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "trajectory": "--steps 4 --every 2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "clipping": "--seeds 1 --steps 2 --test-items 2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "landscape": "--points 3 --items 2",
    "sharpness": "--iterations 2 --items 3",
}
"""Added to the README's commands, so that a test can afford them; nothing in them is taken away."""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def workshop(tmp_path, monkeypatch, speaker_folder):
    """A folder with the files that the README speaks of."""
    speaker_folder(root=tmp_path / "my_speakers")
    for name in ("my_noise/hum.wav", "my_mixture.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, 0.1 * np.random.default_rng(0).standard_normal(16000), 8000)
    shutil.copytree(ROOT / "tests" / "foreign" / "speechbrain-sepformer", tmp_path / "their_checkpoint")
    for block in (*blocks("python"), *blocks("toml")):
        if named := re.match(r"# (\w+\.\w+)\n", block):
            (tmp_path / named[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leave_an_incident(path):
    """A bad step of the run in whose folder it shall lie: one example with a NaN sample."""
    step, rank = (int(number) for number in re.fullmatch(r"step-(\d+)-rank-(\d+)", path.name).groups())
    model, recipe = load_model(path.parent.parent)
    sources = torch.randn(2, 2, 1, 4000, generator=torch.Generator().manual_seed(0))
    sources[1, 0, 0, 100] = torch.nan
    about = {"step": step, "rank": rank, "seed": 0, "outcome": "nonfinite_loss", "precision": "fp32", "loss_scale": 1.0}
    about |= {"loss_upper_limit": 1e6, "verdict": "to be found out."}
    batch = Batch.from_tensors(sources.sum(1), sources)
    assert write_incident(path.parent, Incident(about, recipe_table(recipe), model.state_dict(), batch)) == path


def run_as_written(line, folder):
    words = shlex.split(line)
    kind = next((kind for kind in SMALLER if kind in words), None)
    resumed = ["--set", "train.max_steps=5"] if "--resume" in words else []
    words += shlex.split(SMALLER.get(kind, "")) + resumed
    tools = Path(sys.executable).parent
    if kind is None and "replay" in words:
        leave_an_incident(folder / words[2])
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if "dashboard" in words:  # shows its page until somebody ends it
        return ended_after_its_link([*words, "--port", "0"], folder, environment)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def ended_after_its_link(words, folder, environment):
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, env=environment, **piped) as process:
        link = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        told, complained = process.communicate(timeout=60)
    assert "http://127.0.0.1:" in link
    return subprocess.CompletedProcess(words, process.returncode, link + told, complained)


@pytest.mark.slow
def test_every_command_but_make_runs_in_the_order_it_is_written(workshop):
    ours = [line for line in commands() if not line.startswith("make ")]
    assert len(ours) >= 6

    for line in ours:
        ended = run_as_written(line, workshop)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"

    assert (workshop / "separated" / "my_mixture.source-2.wav").exists()
    assert (workshop / "runs" / "two" / "checkpoints" / "best").exists()


def test_the_make_targets_it_names_are_there():
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert targets == ["demo", "test"]
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


def test_the_loop_of_ones_own_trains(capsys):
    code = next(block for block in blocks("python") if "train_step" in block)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    sources = torch.randn(2, 2, 1, 800, generator=torch.Generator().manual_seed(0))

    names["train"]([(sources.sum(1), sources)] * 2)

    assert re.findall(r"^(\d) (\w+)", capsys.readouterr().out, flags=re.MULTILINE) == [
        ("1", "trained"),
        ("2", "trained"),
    ]


def test_the_guard_in_ones_own_loop_leaves_a_bad_batch_out(capsys):
    code = next(block for block in blocks("python") if "guarded_step" in block)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    rng = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 1, 400, generator=rng), torch.randn(2, 2, 1, 400, generator=rng)) for _ in range(3)]
    batches[1][0][0, 0, 3] = torch.nan
    model = ConvTasNet(n_filters=16, bottleneck=8, hidden=16, skip=8, n_blocks=2, n_repeats=1)

    names["train_plainly"](model, batches)

    assert re.findall(r"taken (\w+)", capsys.readouterr().out) == ["True", "False", "True"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_figures_are_those_that_were_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    quoted = re.search(r"SI-SDRi (\S+) ± (\S+) dB", README)

    real = json.loads((ROOT / "benchmarks" / "results" / "real_talkers_15_minutes.json").read_text())
    assert [float(quoted[1]), float(quoted[2])] == measured["test"]["si_sdri"]
    assert "came to SI-SDRi {} ± {} dB".format(*real["test"]["si_sdri"]) in README
    assert measured["date"] in README
    assert measured["machine"].split(",")[0] in README
    assert f"{measured['command_seconds'] / 60:.1f} minutes" in README


def test_the_cost_of_a_step_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "step_overhead.json").read_text())
    ratios = [result["median_ratio"] for result in measured["results"]]
    edges = [edge for result in measured["results"] for edge in result["interval_95"]]

    assert f"{min(ratios):.3f} to {max(ratios):.3f} times the CPU time" in README
    assert f"intervals from {min(edges):.3f} to {max(edges):.3f}" in README.replace("\n", " ")
    assert {result["pairs"] for result in measured["results"]} == {30}
    assert measured["date"] in README


def test_the_speeds_are_those_that_were_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "against_peers.json").read_text())

    def times(piece, how, kind="like"):
        ratios = next(race["ratios"] for race in measured[piece]["races"] if f"ours {how}" in race["ratios"])
        return f"{ratios[f'ours {how}'][kind]['median']:.2f}"

    losses = ", ".join(times(f"pit_{n}", "fp32") for n in (2, 3, 5, 8, 16))
    assert re.findall(r"^\| .* \| ([\d., ]+) \|$", README.split("## How fast")[1], flags=re.MULTILINE) == [
        times("sepformer_step", "bf16 compiled"),
        times("sepformer_step", "fp32"),
        times("sepformer_small_step", "bf16 compiled"),
        times("sepformer_small_step", "fp32 compiled"),
        times("conv_tasnet_step", "bf16 compiled", "best"),
        times("conv_tasnet_step", "fp32 compiled"),
        times("conv_tasnet_step", "fp32"),
        times("dprnn_step", "bf16 compiled"),
        times("dprnn_step", "fp32 compiled"),
        times("conv_tasnet_30s", "bf16 compiled", "best"),
        times("conv_tasnet_30s", "fp32 compiled"),
        times("dprnn_30s", "bf16"),
        times("dprnn_30s", "fp32"),
        times("bs_roformer_30s", "bf16 compiled"),
        times("bs_roformer_30s", "fp32 compiled"),
        losses,
        f"{times('clip_and_adam', 'default')}, {times('clip_and_adam', 'default', 'best')}",
    ]
    first_step = measured["sepformer_small_first_step"]["races"][0]["measured"]
    seconds = [round(first_step[who]["median"]) for who in ("ours regions", "ours whole", "speechbrain whole")]
    told = " ".join(README.split())
    said = re.search(r"came after (\d+) s by the regions .*? after (\d+) s as .*? after (\d+) s \(once", told)
    assert [int(number) for number in said.groups()] == seconds
    memory = measured["sepformer_memory"]["races"][0]["measured"]
    names = ("ours fp32", "speechbrain fp32", "ours bf16", "speechbrain bf16")
    names += ("ours fp32 checkpoint", "ours bf16 checkpoint")
    sentence = told[told.index("Beside weights and optimizer") : told.index("The first compiled step")]
    assert re.findall(r"\d+\.\d", sentence) == [f"{memory[name]['median'] / 2**30:.1f}" for name in names]
    assert {piece["date"] for piece in measured.values()} == {"2026-11-22"}
    assert {piece["threads"] for piece in measured.values()} == {1}


def test_the_speed_of_a_sepformer_on_half_a_minute_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "against_peers_epyc.json").read_text())
    piece = measured["sepformer_small_30s"]
    ratios = {who: ratio["like"]["median"] for who, ratio in piece["races"][0]["ratios"].items()}
    text = " ".join(README.split())

    said = f"{ratios['ours fp32 compiled']:.2f} times as long as ours compiled, and {ratios['ours fp32']:.2f} times"
    assert said in text
    assert piece["date"] in text.split(said)[1][:200]


def test_links_and_pictures_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]

    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_what_the_page_costs_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "dashboard.json").read_text())
    asked = [
        spread for name, spread in measured.items() if name.endswith("_ms") and not name.startswith("notification")
    ]
    text = " ".join(README.split())

    assert measured["steps"] == 1_000_000
    assert f"within {max(spread['median'] for spread in asked):.0f} ms" in text
    assert f"at most {max(spread['max'] for spread in asked):.0f})" in text
    assert f"with {measured['memory_after_mib']} MiB held" in text
    assert f"{measured['notification_ms']['median'] / 1000:.2f} s after it was written" in text


def test_the_lead_in_a_quarter_of_an_hour_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "learning.json").read_text())
    text = " ".join(README.split())

    for arm in ("ours", "asteroid"):
        means = [measured["runs"][f"{arm} {seed}"]["si_sdri"]["mean"] for seed in (0, 1)]
        assert " and ".join(map(str, means)) in text
    for lead in measured["ahead_of_asteroid_db"].values():
        assert f"{lead['mean']} ± {lead['half_95_over_mixtures']} dB ahead" in text
