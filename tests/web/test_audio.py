"""A run's audio is found, drawn and encoded, and no other file is served."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image
from runs import RATE, add_audio, tone, write_run

from unbraid.audio import read_audio
from unbraid.errors import AudioError
from unbraid.web.audio import (
    audio_names,
    audio_path,
    encode_mp3,
    evaluation_examples,
    spectrogram_image,
    validation_examples,
)


def brightness(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("L")).astype(float)


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", n_steps=20)
    add_audio(path)
    return path


def test_the_examples_of_each_checkpoint_are_found(run):
    examples = validation_examples(run)

    first = examples[0]
    assert first["mixture"] == ["audio/000-mixture.wav"]
    assert first["references"] == ["audio/000-reference-1.wav", "audio/000-reference-2.wav"]
    assert [estimate["step"] for estimate in first["estimates"]] == [100, 400]
    assert [estimate["si_sdri"] for estimate in first["estimates"]] == [3.0, 4.0]
    assert first["estimates"][1]["audio"][1] == "audio/step-000400/000-estimate-2.wav"
    assert len(list(audio_names(examples))) == 2 * (1 + 2 + 4)


def test_the_worst_evaluation_examples_come_first(run):
    rows = [(n, 5.0 - n if n != 3 else "", f"a{n}.wav + b{n}.wav") for n in range(14)]
    table = "index,si_sdri,files\n" + "".join(f"{index},{score},{files}\n" for index, score, files in rows)
    (run / "evaluation.csv").write_text(table)

    examples = evaluation_examples(run)

    assert [item["index"] for item in examples] == [13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert examples[0]["files"] == ["a13.wav", "b13.wav"]
    assert examples[0]["estimates"][0]["si_sdri"] == -8.0


@pytest.mark.parametrize(
    "name", ["../outside.wav", "/etc/hostname", "recipe.toml", "audio/../../outside.wav", "audio/link.wav", "audio", ""]
)
def test_only_audio_of_the_run_is_served(run, name):
    outside = run.parent / "outside.wav"
    soundfile.write(outside, tone(300), RATE)
    (run / "audio" / "link.wav").symlink_to(outside)

    with pytest.raises(AudioError):
        audio_path(run, name)

    assert audio_path(run, "audio/000-mixture.wav").is_file()


def test_a_tone_is_a_bright_line_at_its_frequency(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(1000.0, 2.0), RATE)

    image = brightness(spectrogram_image(tmp_path / "tone.wav"))

    row = image.mean(1).argmax()
    assert abs((1 - row / image.shape[0]) * RATE / 2 - 1000) < 150
    assert image[row].mean() > 150
    assert image.mean() < 60


@pytest.mark.parametrize("n_samples", [1, 40, 8000])
def test_silence_and_very_short_recordings_have_a_spectrogram(tmp_path, n_samples):
    soundfile.write(tmp_path / "short.wav", np.zeros(n_samples, np.float32), RATE)

    assert Image.open(io.BytesIO(spectrogram_image(tmp_path / "short.wav"))).size == (360, 128)


def test_a_quiet_estimate_is_dark_on_the_scale_of_a_loud_reference(tmp_path):
    soundfile.write(tmp_path / "loud.wav", tone(500.0), RATE)
    soundfile.write(tmp_path / "quiet.wav", 1e-3 * tone(500.0), RATE, subtype="FLOAT")

    on_its_own = brightness(spectrogram_image(tmp_path / "quiet.wav"))
    on_the_scale_of_the_loud_one = brightness(spectrogram_image(tmp_path / "quiet.wav", tmp_path / "loud.wav"))

    assert on_its_own.max() > 200
    assert on_the_scale_of_the_loud_one.max() < 200


def test_every_click_of_a_long_recording_is_visible(tmp_path):
    sound = np.zeros(30 * RATE, np.float32)
    sound[RATE // 2 :: RATE] = 0.9
    soundfile.write(tmp_path / "clicks.wav", sound, RATE)

    image = brightness(spectrogram_image(tmp_path / "clicks.wav"))

    bright = image.mean(0) > 0.5 * image.mean(0).max()
    assert np.sum(bright[1:] & ~bright[:-1]) == 30


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000, 6000])
def test_an_mp3_keeps_pitch_and_level(tmp_path, rate):
    time = np.arange(rate) / rate
    sound = 0.5 * np.sin(2 * np.pi * 440 * time, dtype=np.float32)[None]
    (tmp_path / "sound.mp3").write_bytes(encode_mp3(sound, rate))

    decoded, mp3_rate = read_audio(tmp_path / "sound.mp3")

    peak_hz = np.abs(np.fft.rfft(decoded[0])).argmax() * mp3_rate / decoded.shape[1]
    assert abs(peak_hz - 440) < 3
    assert 0.4 < np.abs(decoded).max() < 0.6


def test_audio_over_full_scale_is_scaled_down(tmp_path):
    (tmp_path / "loud.mp3").write_bytes(encode_mp3(30 * tone(440.0)[None], RATE))

    decoded, _ = read_audio(tmp_path / "loud.mp3")

    assert 0.8 < np.abs(decoded).max() < 1.1
