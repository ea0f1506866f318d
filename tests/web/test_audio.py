"""What can be heard of a run is found, drawn and made small, and nothing else is served."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image
from runs import RATE, add_sounds, tone, write_run

from unbraid.audio import read_audio
from unbraid.errors import AudioError
from unbraid.web.audio import all_sounds, as_mp3, examples, picture, sound_file, worst_of_evaluation


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", n_steps=20)
    add_sounds(path)
    return path


def test_the_examples_of_each_checkpoint_are_found(run):
    found = examples(run)

    assert found["steps"] == [100, 400]
    first = found["items"][0]
    assert first["mixture"] == ["audio/000-mixture.wav"]
    assert first["reference"] == ["audio/000-reference-1.wav", "audio/000-reference-2.wav"]
    assert [at["si_sdri"] for at in first["at"]] == [3.0, 4.0]
    assert first["at"][1]["estimate"][1] == "audio/step-000400/000-estimate-2.wav"
    assert len(list(all_sounds(found["items"]))) == 2 * (1 + 2 + 4)


def test_the_worst_of_an_evaluation_come_first(run):
    rows = [(n, 5.0 - n if n != 3 else "", f"a{n}.wav + b{n}.wav") for n in range(14)]
    table = "index,si_sdri,files\n" + "".join(f"{index},{score},{files}\n" for index, score, files in rows)
    (run / "evaluation.csv").write_text(table)

    found = worst_of_evaluation(run)

    assert [item["index"] for item in found] == [13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert found[0]["files"] == ["a13.wav", "b13.wav"]
    assert found[0]["at"][0]["si_sdri"] == -8.0


@pytest.mark.parametrize(
    "name", ["../outside.wav", "/etc/hostname", "recipe.toml", "audio/../../outside.wav", "audio/link.wav", "audio", ""]
)
def test_nothing_but_the_runs_own_sound_is_served(run, name):
    outside = run.parent / "outside.wav"
    soundfile.write(outside, tone(300), RATE)
    (run / "audio" / "link.wav").symlink_to(outside)

    with pytest.raises(AudioError):
        sound_file(run, name)

    assert sound_file(run, "audio/000-mixture.wav").is_file()


def test_a_tone_is_a_bright_line_at_its_frequency(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(1000.0, 2.0), RATE)

    image = np.asarray(Image.open(io.BytesIO(picture(tmp_path / "tone.wav"))).convert("L")).astype(float)

    row = image.mean(1).argmax()
    assert abs((1 - row / image.shape[0]) * RATE / 2 - 1000) < 150
    assert image[row].mean() > 150
    assert image.mean() < 60


@pytest.mark.parametrize("n_samples", [1, 40, 8000])
def test_silence_and_very_short_sounds_have_a_picture(tmp_path, n_samples):
    soundfile.write(tmp_path / "short.wav", np.zeros(n_samples, np.float32), RATE)

    assert Image.open(io.BytesIO(picture(tmp_path / "short.wav"))).size == (360, 128)


def test_beside_its_reference_a_faint_estimate_is_dark(tmp_path):
    soundfile.write(tmp_path / "loud.wav", tone(500.0), RATE)
    soundfile.write(tmp_path / "faint.wav", 1e-3 * tone(500.0), RATE, subtype="FLOAT")

    alone, beside = (
        np.asarray(Image.open(io.BytesIO(picture(tmp_path / "faint.wav", like))).convert("L")).max()
        for like in (None, tmp_path / "loud.wav")
    )

    assert alone > 200 > beside


def test_no_click_of_a_long_sound_is_passed_over(tmp_path):
    sound = np.zeros(30 * RATE, np.float32)
    sound[RATE // 2 :: RATE] = 0.9
    soundfile.write(tmp_path / "clicks.wav", sound, RATE)

    image = np.asarray(Image.open(io.BytesIO(picture(tmp_path / "clicks.wav"))).convert("L")).astype(float)

    bright = image.mean(0) > 0.5 * image.mean(0).max()
    assert np.sum(bright[1:] & ~bright[:-1]) == 30


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000, 6000])
def test_an_mp3_holds_the_sound(tmp_path, rate):
    time = np.arange(rate) / rate
    sound = 0.5 * np.sin(2 * np.pi * 440 * time, dtype=np.float32)[None]
    (tmp_path / "sound.mp3").write_bytes(as_mp3(sound, rate))

    found, at = read_audio(tmp_path / "sound.mp3")

    peak = np.abs(np.fft.rfft(found[0])).argmax() * at / found.shape[1]
    assert abs(peak - 440) < 3
    assert 0.4 < np.abs(found).max() < 0.6


def test_a_sound_over_full_scale_is_brought_below_it(tmp_path):
    (tmp_path / "loud.mp3").write_bytes(as_mp3(30 * tone(440.0)[None], RATE))

    found, _ = read_audio(tmp_path / "loud.mp3")

    assert 0.8 < np.abs(found).max() < 1.1
