"""Real talkers and real noise, where the recordings that the project is developed with are at hand."""

from pathlib import Path

import numpy as np
import pytest

from unbraid.cli.main import main
from unbraid.config.shipped_recipes import recipes_folder
from unbraid.data.dataset import DataSettings, Key, make_dataset
from unbraid.data.folders import list_noises, list_speakers
from unbraid.dsp import power_db
from unbraid.records import read_rows
from unbraid.run_directory import RunDirectory

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SPEECH, NOISE = DATA / "speech.csv", DATA / "noise.csv"

pytestmark = pytest.mark.skipif(not SPEECH.exists(), reason="the real recordings are not beside this checkout")


def test_the_manifest_holds_three_hundred_talkers_each_in_one_split():
    tracks = list_speakers(SPEECH)
    splits = {}
    for track in tracks:
        splits.setdefault(track.group, set()).add(track.split)

    assert len(splits) == 314
    assert {len(found) for found in splits.values()} == {1}
    assert [sum(found == {split} for found in splits.values()) for split in ("train", "valid", "test")] == [254, 28, 32]


@pytest.mark.parametrize("purpose", ["train", "valid", "test"])
def test_mixtures_of_real_talkers_over_real_noise_are_the_sum_of_their_parts_at_the_levels_asked(purpose):
    settings = DataSettings(resample=True, noise=NOISE, noise_snr_db=(3.0, 9.0))
    dataset = make_dataset(list_speakers(SPEECH), settings, purpose, noises=list_noises(NOISE))

    for index in range(12):
        example = dataset[Key(0, index)]
        mixture, sources, noise = example.audio
        talkers = sources.sum(axis=0)
        assert example.faults == ()
        assert np.allclose(mixture, talkers + noise, atol=1e-6)
        assert -5.01 <= power_db(sources[1]) - power_db(sources[0]) <= 0.01
        assert 2.99 <= power_db(talkers) - power_db(noise) <= 9.01


def test_the_recipe_with_noise_trains_evaluates_and_separates_on_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smaller = ["train.max_steps=4", "validate.n_items=4", "train.compile=off", "data.workers=0", "model.hidden=32"]
    overrides = [f"data.path={SPEECH}", f"data.noise={NOISE}", *smaller]
    words = [word for override in overrides for word in ("--set", override)]

    assert main(["train", str(recipes_folder() / "conv_tasnet_small_noise.toml"), "--run", "run", *words]) == 0
    assert main(["evaluate", "run", "--n-items", "3", "--save-audio", "1"]) == 0
    assert main(["separate", "run/evaluation-audio/000-mixture.wav", "-m", "run", "-o", "out"]) == 0

    assert [row["outcome"] for row in read_rows(RunDirectory(tmp_path / "run").steps)[0]] == ["trained"] * 4
    assert "3 mixtures of" in capsys.readouterr().out
    assert (tmp_path / "out" / "000-mixture.source-2.wav").exists()
