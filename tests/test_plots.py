"""The picture of a run."""

import numpy as np
import pytest

from unbraid.cli import main
from unbraid.plots import draw_run, running_mean, spectrogram_db
from unbraid.records import RunDirectory


def test_the_running_mean_begins_with_what_there_is():
    assert running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2) == pytest.approx([2.0, 3.0, 5.0, 7.0])


def test_a_tone_stands_at_its_frequency():
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000).astype(np.float32)

    assert set(spectrogram_db(tone, n_fft=256).argmax(0)) == {1000 * 256 // 8000}


def test_a_run_and_its_sound_become_a_png(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(recipe_file()), "--run", str(run)])
    main(["evaluate", str(run), "--n-items", "1", "--save-audio", "1"])

    picture = draw_run(RunDirectory(run), run / "evaluation-audio", 0, tmp_path / "deep" / "run.png")

    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
