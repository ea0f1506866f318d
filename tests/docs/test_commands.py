"""Every command in the README and in the docs runs."""

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
from documents import DOCUMENTS, ROOT, commands, named_blocks

from unbraid.build import load_model
from unbraid.config.recipe import recipe_table
from unbraid.data.batch import Batch
from unbraid.train.incident import Incident, write_incident

SMALLER = {
    "train": "--set train.max_steps=3 --set validate.n_items=2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "evaluate": "--n-items 3",
    "demo": "--set train.max_steps=3 --set validate.n_items=2 --set train.compile=off",
    "gradient-descent": "--no-animation",
    "lr-range": "--steps 60 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "race": "--steps 2 --set validate.n_items=2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "trajectory": "--steps 4 --every 2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "clipping": "--seeds 1 --steps 2 --test-items 2 --set data.excerpt_seconds=0.5 --set train.compile=off",
    "landscape": "--points 3 --items 2",
    "sharpness": "--iterations 2 --items 3",
}
"""Options added to a command, so that a test can afford it; nothing in the command is taken away."""

FIRST_RUN = "unbraid train conv_tasnet_small --set data.path=my_speakers"
"""What a reader has run before reading a page about runs."""

MAKE_TARGETS = {"README.md": ["demo", "test"], "docs/index.md": ["demo"]}
"""Commands that are not run here: `make demo` has a test of its own, and `make test` is what runs this one."""

WITH_COMMANDS = sorted(name for name, text in DOCUMENTS.items() if commands(text))


@pytest.fixture
def workshop(tmp_path, monkeypatch, speaker_folder):
    """A folder with the files that the documents speak of."""
    speaker_folder(root=tmp_path / "my_speakers")
    for name in ("my_noise/hum.wav", "my_mixture.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, 0.1 * np.random.default_rng(0).standard_normal(16000), 8000)
    recorded = ROOT / "tests" / "importers" / "recorded" / "speechbrain-sepformer"
    shutil.copytree(recorded, tmp_path / "their_checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_bad_step(path):
    """Write an incident of the run in whose folder `path` lies: one example has a NaN sample."""
    step, rank = (int(number) for number in re.fullmatch(r"step-(\d+)-rank-(\d+)", path.name).groups())
    model, recipe = load_model(path.parent.parent)
    sources = torch.randn(2, 2, 1, 4000, generator=torch.Generator().manual_seed(0))
    sources[1, 0, 0, 100] = torch.nan
    about = {"step": step, "rank": rank, "seed": 0, "outcome": "nonfinite_loss", "precision": "fp32", "loss_scale": 1.0}
    about |= {"loss_upper_limit": 1e6, "diagnosis": "to be found out."}
    batch = Batch.from_tensors(sources.sum(1), sources)
    assert write_incident(path.parent, Incident(about, recipe_table(recipe), model.state_dict(), batch)) == path


def run_command(line, folder):
    words = shlex.split(line)
    command = next((name for name in SMALLER if name in words), None)
    if command is not None:
        words += shlex.split(SMALLER[command])
    if "--resume" in words:  # some steps more than the run has already
        words += ["--set", "train.max_steps=5"]
    if "replay" in words:
        write_bad_step(folder / words[2])
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if "dashboard" in words:
        return interrupt_after_link([*words, "--port", "0"], folder, environment)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def interrupt_after_link(words, folder, environment):
    """Run a server until it has printed its link, and end it by Ctrl-C."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, env=environment, **pipes) as process:
        try:
            link = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()  # a server that does not end would block the test for ever
    assert "http://127.0.0.1:" in link
    return subprocess.CompletedProcess(words, process.returncode, link + output, errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_every_command_runs_in_the_order_it_is_written(workshop, name):
    text = DOCUMENTS[name]
    for file, block in named_blocks(text).items():
        (workshop / file).write_text(block, encoding="utf-8")
    lines = [line for line in commands(text) if not line.startswith("make ")]
    needs_run = "runs/conv_tasnet_small" in " ".join(lines) or any("--resume" in line for line in lines)
    if needs_run and FIRST_RUN not in lines:
        lines = [FIRST_RUN, *lines]

    for line in lines:
        ended = run_command(line, workshop)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"

    if any(" separate my_mixture.wav " in line for line in lines):
        assert (workshop / "separated" / "my_mixture.source-2.wav").exists()
    if any("runs/two" in line for line in lines):
        assert (workshop / "runs" / "two" / "checkpoints" / "best").exists()


def test_the_readme_shows_enough_commands():
    assert len([line for line in commands(DOCUMENTS["README.md"]) if not line.startswith("make ")]) >= 5
    assert len(WITH_COMMANDS) >= 10


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    for name, text in DOCUMENTS.items():
        targets = [line.split()[1] for line in commands(text) if line.startswith("make ")]
        assert targets == MAKE_TARGETS.get(name, [])
        assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []
