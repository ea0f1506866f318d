"""Fixtures that many tests share: synthetic speakers, small recipes, two threads."""

import os
import signal

# Before torch is imported, and for every process that a test starts: the tests run on all cores already, one process
# for each (pytest -n logical), and threads of torch on top of that would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

# A shell that starts the tests in the background (nohup ... &) makes them ignore Ctrl-C, and so would every process
# that they start: tests of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "tests/docs/test_commands.py",
    "tests/contracts/test_models.py",
    "tests/health/test_sick_runs.py",
    "tests/train/test_survival.py",
)
"""Files that take minutes. Started first, none of them runs alone at the end, with the other cores idle."""


def pytest_collection_modifyitems(items):
    """Put the longest files first; the order within a file, and of all other files, stays."""
    rank = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


settings.register_profile("unbraid", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("unbraid")


def talker(speaker, utterance, *, seconds=1.5, sample_rate=8000):
    """Return a synthetic voice, ``(time,)``: decaying harmonics of the speaker's pitch, and noise; never silent."""
    rng = np.random.default_rng([20240501, speaker, utterance])
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    pitch = 90 + 17 * speaker + rng.uniform(-5, 5)
    syllable = 0.2 + np.exp(-8 * ((time + rng.uniform(0, 0.25)) % 0.25))
    voice = sum(np.sin(2 * np.pi * k * pitch * time + rng.uniform(0, 6)) / k for k in range(1, 9))
    return (0.05 * syllable * (voice + 0.3 * rng.standard_normal(len(time)))).astype(np.float32)


@pytest.fixture
def speaker_folder(tmp_path):
    """Return a factory of folders ``speaker-NN/NN.wav``, 32-bit float, with the same samples every time."""

    def make(n_speakers=8, n_files=2, seconds=1.5, sample_rate=8000, root=None):
        root = tmp_path / "speech" if root is None else root
        for speaker in range(n_speakers):
            folder = root / f"speaker-{speaker:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            for utterance in range(n_files):
                audio = talker(speaker, utterance, seconds=seconds, sample_rate=sample_rate)
                soundfile.write(folder / f"{utterance:02d}.wav", audio, sample_rate, subtype="FLOAT")
        return root

    return make


RECIPE = """
[data]
path = "{path}"
excerpt_seconds = 0.5
batch_size = 4
workers = 0
[model]
name = "conv_tasnet"
n_filters = 16
bottleneck = 8
hidden = 16
skip = 8
n_blocks = 2
n_repeats = 1
[optim]
name = "adam"
lr = 1e-3
[train]
max_steps = 6
precision = "fp32"
compile = "off"
[validate]
every_steps = 3
n_items = 3
[save]
every_steps = 2
"""


@pytest.fixture
def recipe_file(tmp_path, speaker_folder):
    """Return a factory of small recipes on a small speaker folder; it appends TOML, and returns the file's path."""

    def make(extra="", path=None):
        file = tmp_path / "recipe.toml"
        file.write_text(RECIPE.format(path=(path or speaker_folder()).as_posix()) + extra)
        return file

    return make


@pytest.fixture
def two_threads():
    """Run with two threads: the fewest with which faults of the compiler between threads show."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
