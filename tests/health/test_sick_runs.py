"""Runs that are sick for real: trained as users train, each with one thing wrong, and called by its name."""

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from unbraid.config.recipe import load_recipe
from unbraid.data import dataset, loader
from unbraid.health.rules import run_rules
from unbraid.health.series import read_series
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train import validate

MODELS = """
import torch
from torch import nn
from unbraid.models.conv_tasnet import ConvTasNet

SIZES = {"n_filters": 32, "bottleneck": 16, "hidden": 32, "skip": 16, "n_blocks": 3, "n_repeats": 1}


class DeadOutput(nn.Module):
    def __init__(self, *, n_sources: int) -> None:
        super().__init__()
        self.inner = ConvTasNet(n_sources=n_sources, **SIZES)

    def forward(self, mixture):
        sources = self.inner(mixture)
        return sources * torch.tensor([1.0, 0.0])[:, None, None]


class AlikeOutputs(DeadOutput):
    def forward(self, mixture):
        return self.inner(mixture)[:, :1].expand(-1, 2, -1, -1) * torch.tensor([1.0, 0.5])[:, None, None]
"""

CONV_TASNET = """
name = "conv_tasnet"
n_filters = 32
bottleneck = 16
hidden = 32
skip = 16
n_blocks = 3
n_repeats = 1
"""

RECIPE = """
[data]
path = "{path}"
excerpt_seconds = 0.4
batch_size = 4
workers = 0
[model]
{model}
[optim]
name = "adam"
lr = 2e-3
[clip]
name = "autoclip"
[train]
max_steps = 350
precision = "fp32"
compile = "off"
[validate]
every_steps = 100
n_items = 16
[save]
every_steps = 350
"""


@pytest.fixture
def doctored(tmp_path, speaker_folder):
    """A factory of runs: trains with changes to the recipe, and returns the codes of what the doctor finds."""
    folder = speaker_folder(n_speakers=12, n_files=3)

    def make(*changes, model=CONV_TASNET):
        (tmp_path / "my_models.py").write_text(MODELS)
        (tmp_path / "recipe.toml").write_text(RECIPE.format(path=folder.as_posix(), model=model))
        recipe = load_recipe(tmp_path / "recipe.toml", list(changes))
        run = RunDirectory(tmp_path / "run")
        for _ in train(recipe, run):
            pass
        return {finding.code: finding for finding in run_rules(read_series(run.path))}

    make.folder = folder
    return make


def manifest(folder, splits):
    """A table of the folder's files, each in the splits that are named for its speaker."""
    rows = [
        f"{path.relative_to(folder).as_posix()},{path.parent.name},{split}"
        for path in sorted(folder.rglob("*.wav"))
        for split in splits(int(path.parent.name[-2:]), path)
    ]
    (folder / "table.csv").write_text("\n".join(["path,speaker,split", *rows]) + "\n")
    return f"data.path={folder / 'table.csv'}"


@pytest.fixture
def batches_become(monkeypatch):
    """A factory that puts a change between the data and training as well as validation."""

    def change(mend):
        collate = loader.collate

        def collated(*given):
            loaded = collate(*given)
            return loaded._replace(batch=mend(loaded.batch))

        monkeypatch.setattr(loader, "collate", collated)
        monkeypatch.setattr(validate, "collate", collated)

    return change


def worst(found):
    """What is told first."""
    return next(iter(found), None)


@pytest.mark.slow
def test_a_run_with_nothing_wrong_is_healthy(doctored):
    assert doctored("train.max_steps=600") == {}


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_high(doctored):
    assert worst(doctored("optim.lr=0.2")) == "LR_TOO_HIGH"


@pytest.mark.slow
def test_a_learning_rate_a_thousand_times_too_low(doctored):
    assert worst(doctored("optim.lr=2e-6")) == "LR_TOO_LOW"


@pytest.mark.slow
def test_files_with_a_nan(doctored):
    paths = sorted(doctored.folder.rglob("00.wav"))[:3]
    for path in paths:
        audio, rate = soundfile.read(path, dtype="float32")
        audio[100] = np.nan
        soundfile.write(path, audio, rate, subtype="FLOAT")

    found = doctored("train.max_steps=100")

    assert any(str(path) in found["BAD_FILES"].problem for path in paths)


@pytest.mark.slow
def test_an_output_layer_that_is_dead(doctored):
    assert list(doctored(model='name = "my_models:DeadOutput"')) == ["DEAD_OUTPUT"]


@pytest.mark.slow
def test_outputs_that_are_the_same(doctored):
    assert worst(doctored(model='name = "my_models:AlikeOutputs"')) == "IDENTICAL_OUTPUTS"


@pytest.mark.slow
def test_a_loader_that_sleeps(doctored, monkeypatch):
    read = dataset.read_excerpt

    def slowly(*given, **named):
        time.sleep(0.04)
        return read(*given, **named)

    monkeypatch.setattr(dataset, "read_excerpt", slowly)

    assert worst(doctored("data.batch_size=1")) == "LOADER_BOUND"


@pytest.mark.slow
def test_targets_of_another_mixture(doctored, batches_become):
    batches_become(lambda batch: replace(batch, sources=batch.sources.roll(1, 0)))

    assert worst(doctored()) == "TARGETS_UNRELATED"


@pytest.mark.slow
def test_sources_that_do_not_add_up_to_the_mixture(doctored, batches_become):
    batches_become(lambda batch: replace(batch, mixture=0.8 * batch.mixture))

    assert worst(doctored()) == "SOURCES_DO_NOT_SUM"


@pytest.mark.slow
def test_one_silent_source_in_each_example(doctored, batches_become):
    def silenced(batch):
        batch.sources[:, 1] = 0
        return batch

    batches_become(silenced)

    assert worst(doctored()) == "SILENT_SOURCES"


@pytest.mark.slow
def test_files_that_are_trained_on_and_validated_on(doctored):
    table = manifest(doctored.folder, lambda speaker, _: ("train", "valid") if speaker < 4 else ("train",))

    found = doctored(table)

    assert worst(found) == "VALIDATION_IN_TRAINING"
    assert found["VALIDATION_IN_TRAINING"].problem.startswith("12 of 12 validation recordings")
    assert "speaker-00" in found["VALIDATION_IN_TRAINING"].evidence


@pytest.mark.slow
def test_recordings_that_are_validated_on_under_another_name(doctored):
    folder = doctored.folder
    for speaker in range(4):
        for path in (folder / f"speaker-{speaker:02d}").glob("*.wav"):
            copy = folder / f"other-{speaker:02d}" / f"take-{path.name}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    table = manifest(folder, lambda _, path: ("valid",) if path.parent.name.startswith("other") else ("train",))

    found = doctored(table)

    assert worst(found) == "VALIDATION_IN_TRAINING"
    assert "12 are copies under other names" in found["VALIDATION_IN_TRAINING"].evidence


@pytest.mark.slow
def test_data_that_are_not_shuffled(doctored, speaker_folder, monkeypatch):
    """Pair by pair as they lie in their folders: many mixtures of the same two talkers follow each other."""
    speaker_folder(n_speakers=14, n_files=24, root=doctored.folder)
    table = manifest(doctored.folder, lambda speaker, _: ("valid",) if speaker in (0, 13) else ("train",))

    def in_order(self, _rng, key, _attempt):
        place = key.index % len(self.tracks)
        return [self.tracks[place], self.tracks[-1 - place]]

    monkeypatch.setattr(dataset.MixtureDataset, "_draw_talkers", in_order)

    assert worst(doctored(table, "train.max_steps=800")) == "NOT_SHUFFLED"
