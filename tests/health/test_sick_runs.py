"""Real training runs, each with one deliberate problem that the doctor must find."""

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


class IdenticalOutputs(DeadOutput):
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
def findings_of(tmp_path, speaker_folder):
    """Return a function that trains with changes to the recipe and returns the findings of the doctor by code."""
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
    """Write a table of the folder's files, with the splits that a function gives for speaker and path."""
    rows = [
        f"{path.relative_to(folder).as_posix()},{path.parent.name},{split}"
        for path in sorted(folder.rglob("*.wav"))
        for split in splits(int(path.parent.name[-2:]), path)
    ]
    (folder / "table.csv").write_text("\n".join(["path,speaker,split", *rows]) + "\n")
    return f"data.path={folder / 'table.csv'}"


@pytest.fixture
def transform_batches(monkeypatch):
    """Return a function that makes training and validation transform each batch first."""

    def change(transform):
        collate = loader.collate

        def collated(*given):
            loaded = collate(*given)
            return loaded._replace(batch=transform(loaded.batch))

        monkeypatch.setattr(loader, "collate", collated)
        monkeypatch.setattr(validate, "collate", collated)

    return change


def worst(found):
    """Return the code of the first finding, or None."""
    return next(iter(found), None)


@pytest.mark.slow
def test_a_healthy_run_has_no_findings(findings_of):
    assert findings_of("train.max_steps=600") == {}


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_high(findings_of):
    assert worst(findings_of("optim.lr=0.2")) == "LR_TOO_HIGH"


@pytest.mark.slow
def test_a_learning_rate_a_thousand_times_too_low(findings_of):
    assert worst(findings_of("optim.lr=2e-6")) == "LR_TOO_LOW"


@pytest.mark.slow
def test_files_with_a_nan(findings_of):
    paths = sorted(findings_of.folder.rglob("00.wav"))[:3]
    for path in paths:
        audio, rate = soundfile.read(path, dtype="float32")
        audio[100] = np.nan
        soundfile.write(path, audio, rate, subtype="FLOAT")

    found = findings_of("train.max_steps=100")

    assert any(str(path) in found["BAD_FILES"].problem for path in paths)


@pytest.mark.slow
def test_a_dead_output(findings_of):
    assert list(findings_of(model='name = "my_models:DeadOutput"')) == ["DEAD_OUTPUT"]


@pytest.mark.slow
def test_identical_outputs(findings_of):
    assert worst(findings_of(model='name = "my_models:IdenticalOutputs"')) == "IDENTICAL_OUTPUTS"


@pytest.mark.slow
def test_a_loader_that_sleeps(findings_of, monkeypatch):
    read = dataset.read_excerpt

    def slowly(*given, **named):
        time.sleep(0.04)
        return read(*given, **named)

    monkeypatch.setattr(dataset, "read_excerpt", slowly)

    assert worst(findings_of("data.batch_size=1")) == "LOADER_BOUND"


@pytest.mark.slow
def test_targets_of_another_mixture(findings_of, transform_batches):
    transform_batches(lambda batch: replace(batch, sources=batch.sources.roll(1, 0)))

    assert worst(findings_of()) == "TARGETS_UNRELATED"


@pytest.mark.slow
def test_sources_that_do_not_add_up_to_the_mixture(findings_of, transform_batches):
    transform_batches(lambda batch: replace(batch, mixture=0.8 * batch.mixture))

    assert worst(findings_of()) == "SOURCES_DO_NOT_SUM"


@pytest.mark.slow
def test_one_silent_source_in_each_example(findings_of, transform_batches):
    def silenced(batch):
        batch.sources[:, 1] = 0
        return batch

    transform_batches(silenced)

    assert worst(findings_of()) == "SILENT_SOURCES"


@pytest.mark.slow
def test_files_in_training_and_validation(findings_of):
    table = manifest(findings_of.folder, lambda speaker, _: ("train", "valid") if speaker < 4 else ("train",))

    found = findings_of(table)

    assert worst(found) == "VALIDATION_IN_TRAINING"
    assert found["VALIDATION_IN_TRAINING"].problem.startswith("12 of 12 validation recordings")
    assert "speaker-00" in found["VALIDATION_IN_TRAINING"].evidence


@pytest.mark.slow
def test_validation_recordings_copied_under_other_names(findings_of):
    folder = findings_of.folder
    for speaker in range(4):
        for path in (folder / f"speaker-{speaker:02d}").glob("*.wav"):
            copy = folder / f"other-{speaker:02d}" / f"take-{path.name}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    table = manifest(folder, lambda _, path: ("valid",) if path.parent.name.startswith("other") else ("train",))

    found = findings_of(table)

    assert worst(found) == "VALIDATION_IN_TRAINING"
    assert "12 are copies under other names" in found["VALIDATION_IN_TRAINING"].evidence


@pytest.mark.slow
def test_data_that_is_not_shuffled(findings_of, speaker_folder, monkeypatch):
    """Pair by pair as they lie in their folders: many mixtures of the same two talkers follow each other."""
    speaker_folder(n_speakers=14, n_files=24, root=findings_of.folder)
    table = manifest(findings_of.folder, lambda speaker, _: ("valid",) if speaker in (0, 13) else ("train",))

    def in_order(self, _rng, key, _attempt):
        index = key.index % len(self.tracks)
        return [self.tracks[index], self.tracks[-1 - index]]

    monkeypatch.setattr(dataset.MixtureDataset, "_draw_talkers", in_order)

    assert worst(findings_of(table, "train.max_steps=800")) == "NOT_SHUFFLED"
