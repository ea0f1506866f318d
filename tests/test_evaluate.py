"""Evaluation: known scores for models whose scores are known, means over defined values, and tables."""

import math

import pyarrow.parquet
import pytest
import torch
from torch import nn

from unbraid.audio import read_audio
from unbraid.config.recipe import Recipe
from unbraid.data.dataset import DataSettings, make_dataset
from unbraid.data.folders import list_speakers
from unbraid.data.splits import assign_splits
from unbraid.evaluate import evaluate, summarise, write_table


class PassThrough(nn.Module):
    """Returns the mixture, scaled, as every source."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, mixture):
        return torch.stack([mixture, 0.5 * mixture], 1) * self.gain


class NoisyOracle(nn.Module):
    """Returns the sources in the wrong order, with noise 20 dB below each."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset
        self.count = 0
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, mixture):
        from unbraid.data.dataset import Key

        sources = torch.from_numpy(self.dataset[Key(0, self.count)].audio.sources)
        self.count += 1
        noise = torch.randn(sources.shape, generator=torch.Generator().manual_seed(self.count))
        noise = noise - noise.mean(-1, keepdim=True)
        clean = sources - sources.mean(-1, keepdim=True)
        noise -= (noise * clean).sum(-1, keepdim=True) / clean.square().sum(-1, keepdim=True) * clean
        noise *= 0.1 * clean.square().mean(-1, keepdim=True).sqrt() / noise.square().mean(-1, keepdim=True).sqrt()
        return (clean + noise).flip(0)[None]


@pytest.fixture
def dataset(speaker_folder):
    tracks = assign_splits(list_speakers(speaker_folder()), n_sources=2)
    return make_dataset(tracks, DataSettings(excerpt_seconds=1.0), "test")


def test_returning_the_mixture_improves_nothing(dataset):
    rows = [row for row, _ in evaluate(PassThrough(), dataset, Recipe(), n_items=3)]

    for row in rows:
        assert row["si_sdri"] == pytest.approx(0, abs=1e-3)
        assert row["sdri"] == pytest.approx(0, abs=0.05)


def test_a_known_distortion_gets_its_known_score_in_any_order(dataset):
    rows = [row for row, _ in evaluate(NoisyOracle(dataset), dataset, Recipe(), n_items=3)]

    for row in rows:
        assert row["si_sdr_1"] == pytest.approx(20, abs=0.02)
        assert row["si_sdr_2"] == pytest.approx(20, abs=0.02)
        assert row["si_sdr"] == pytest.approx((row["si_sdr_1"] + row["si_sdr_2"]) / 2, abs=1e-3)
        assert row["sdr"] > 19


def test_a_source_alone_in_its_mixture_has_no_improvement(speaker_folder):
    tracks = assign_splits(list_speakers(speaker_folder()), n_sources=2)
    alone = make_dataset(tracks, DataSettings(excerpt_seconds=1.0, n_sources=1), "test")
    model = PassThrough()
    model.forward = lambda mixture: 0.9 * mixture[:, None] + 0.001 * mixture[:, None].roll(1, -1) * model.gain

    rows = [row for row, _ in evaluate(model, alone, Recipe(), n_items=3)]

    assert [row["si_sdri"] for row in rows] == [None] * 3
    assert [row["sdri"] for row in rows] == [None] * 3
    assert all(20 < row["si_sdr"] < 100 for row in rows)
    assert math.isnan(summarise(rows)["si_sdri"].mean)
    assert summarise(rows)["si_sdri"].n_items == 0


def test_saved_audio_is_the_mixture_the_sources_and_the_estimates_in_their_order(dataset, tmp_path):
    list(evaluate(NoisyOracle(dataset), dataset, Recipe(), n_items=2, save_audio=1, audio_folder=tmp_path / "audio"))

    names = sorted(path.name for path in (tmp_path / "audio").iterdir())
    assert names == [
        f"000-{kind}.wav" for kind in ("estimate-1", "estimate-2", "mixture", "reference-1", "reference-2")
    ]
    audio = {path.stem: read_audio(path)[0] for path in (tmp_path / "audio").iterdir()}
    assert audio["000-mixture"] == pytest.approx(audio["000-reference-1"] + audio["000-reference-2"], abs=1e-6)
    for n in (1, 2):
        error = audio[f"000-estimate-{n}"] - audio[f"000-reference-{n}"]
        assert (error**2).mean() < 0.03 * (audio[f"000-reference-{n}"] ** 2).mean()


def test_a_mean_is_over_defined_values_and_has_a_standard_error():
    rows = [{"si_sdr": v, "si_sdri": v, "sdr": None, "sdri": 1.0} for v in (1.0, 2.0, 6.0)]

    summary = summarise(rows)

    assert (summary["si_sdr"].mean, summary["si_sdr"].n_items) == (3.0, 3)
    assert summary["si_sdr"].standard_error == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(summary["sdr"].mean)
    assert summary["sdr"].n_items == 0
    assert summary["sdri"].standard_error == 0.0


def test_parquet_and_csv_hold_the_same_rows(tmp_path):
    rows = [{"index": 0, "si_sdr": 1.5, "sdr": None}, {"index": 1, "si_sdr": -2.0, "sdr": 3.0}]

    write_table(tmp_path / "rows.parquet", rows)
    write_table(tmp_path / "rows.csv", rows)

    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["index,si_sdr,sdr", "0,1.5,", "1,-2.0,3.0"]
