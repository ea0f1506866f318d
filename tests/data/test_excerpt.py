import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given
from hypothesis import strategies as st

from unbraid.audio import probe_audio, write_audio
from unbraid.data.excerpt import ExcerptError, read_excerpt
from unbraid.data.tracks import Track
from unbraid.dsp import power_db


def make_noise(n_samples=2000, *, seed=0, n_channels=1, level=0.1):
    return level * np.random.default_rng(seed).standard_normal((n_channels, n_samples), dtype=np.float32)


def track_of(path):
    return Track.from_file_info(path, probe_audio(path), group="anna")


def excerpt(track, start=0.0, n_samples=4000, sample_rate=8000, *, keep_silent=False):
    return read_excerpt(track, start, n_samples, sample_rate, keep_silent=keep_silent)


def test_an_excerpt_equals_that_part_of_the_recording(tmp_path):
    audio = make_noise(12_000)
    track = track_of(write_audio(tmp_path / "a.wav", audio, 8000))

    assert np.array_equal(excerpt(track, 0.25), audio[:, 2000:6000])


def test_a_short_recording_is_padded_at_its_end(tmp_path):
    audio = make_noise(3000)
    track = track_of(write_audio(tmp_path / "a.wav", audio, 8000))

    padded = excerpt(track)

    assert np.array_equal(padded[:, :3000], audio)
    assert not padded[:, 3000:].any()


def test_several_channels_become_their_mean(tmp_path):
    audio = make_noise(4000, n_channels=3)
    track = track_of(write_audio(tmp_path / "a.wav", audio, 8000))

    np.testing.assert_allclose(excerpt(track), audio.mean(axis=0, keepdims=True), atol=1e-7)


@pytest.mark.parametrize("rate", [16000, 44100, 11025])
def test_a_resampled_recording_has_the_right_length_and_pitch(tmp_path, rate):
    tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype(np.float32)
    track = track_of(write_audio(tmp_path / "a.wav", 0.5 * tone, rate))

    resampled = excerpt(track, 0.2)

    assert resampled.shape == (1, 4000)
    expected = 0.5 * np.sin(2 * np.pi * 500 * (0.2 + np.arange(4000) / 8000))
    np.testing.assert_allclose(resampled[0, 100:], expected[100:], atol=1e-2)  # up to its last sample


@pytest.fixture
def three_hours(tmp_path):
    """Three hours of zeros, in a sparse file, with noise in the last second."""
    path = tmp_path / "long.wav"
    n_samples = 3 * 3600 * 8000
    write_audio(path, make_noise(8000), 8000)
    audio = path.read_bytes()[-32_000:]
    header = bytearray(path.read_bytes()[:-32_000])
    header[-4:] = np.uint32(4 * n_samples).tobytes()
    header[4:8] = np.uint32(len(header) - 8 + 4 * n_samples).tobytes()
    with path.open("wb") as file:
        file.write(header)
        file.seek(len(header) + 4 * n_samples - len(audio))
        file.write(audio)
    return track_of(path)


def test_of_a_long_recording_only_the_excerpt_is_read(three_hours):
    assert three_hours.seconds == 3 * 3600
    tracemalloc.start()
    try:
        drawn = excerpt(three_hours, 3 * 3600 - 1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert np.array_equal(drawn, make_noise(8000)[:, :4000])
    assert peak_bytes < 1e6


def test_a_long_recording_listed_as_a_short_one_is_not_read_whole(three_hours):
    listed = replace(three_hours, seconds=4.0)
    tracemalloc.start()
    try:
        with pytest.raises(ExcerptError) as bad:
            excerpt(listed)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert bad.value.fault.in_excerpt_only  # it is silent there
    assert peak_bytes < 50e6


def test_a_silent_excerpt_is_no_fault_of_a_long_recording(three_hours):
    with pytest.raises(ExcerptError) as bad:
        excerpt(three_hours, 3600)

    assert bad.value.fault.code == "AUDIO_SILENT"
    assert bad.value.fault.in_excerpt_only


def bad_file(kind, path):
    audio = make_noise(12_000)
    write_audio(path, audio, 8000)
    track = track_of(path)
    if kind in ("nan", "inf"):
        audio[0, 100] = float(kind)
        soundfile.write(path, audio.T, 8000, subtype="FLOAT")
    elif kind == "nan in one channel":
        pair = np.concatenate([audio, audio])
        pair[1, 100] = np.nan
        soundfile.write(path, pair.T, 8000, subtype="FLOAT")
    elif kind == "vanished":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif kind == "cut in half":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 8000, subtype="FLOAT")
    elif kind == "another rate":
        write_audio(path, audio, 16000)
    elif kind == "silent":
        write_audio(path, 1e-6 * audio, 8000)
    elif kind == "one channel is the other turned over":
        write_audio(path, np.concatenate([audio, -audio]), 8000)
    elif kind == "offset without sound":
        write_audio(path, np.full((1, 12_000), 0.3, np.float32), 8000)
    return track


FAULTS = {
    "nan": "AUDIO_NONFINITE",
    "inf": "AUDIO_NONFINITE",
    "nan in one channel": "AUDIO_NONFINITE",
    "vanished": "AUDIO_UNREADABLE",
    "emptied": "AUDIO_UNREADABLE",
    "random bytes": "AUDIO_UNREADABLE",
    "cut in half": "AUDIO_UNREADABLE",
    "no samples": "AUDIO_EMPTY",
    "another rate": "AUDIO_WRONG_RATE",
    "silent": "AUDIO_SILENT",
    "one channel is the other turned over": "AUDIO_SILENT",
    "offset without sound": "AUDIO_SILENT",
}


@pytest.mark.parametrize(("kind", "code"), FAULTS.items())
@pytest.mark.parametrize("start", [0.0, 0.9])
def test_a_bad_file_is_named_wherever_the_excerpt_lies(tmp_path, kind, code, start):
    track = bad_file(kind, tmp_path / "bad.wav")

    with pytest.raises(ExcerptError) as bad:
        excerpt(track, start)

    assert (bad.value.fault.code, bad.value.fault.path) == (code, str(track.path))
    assert not bad.value.fault.in_excerpt_only
    assert str(track.path) in bad.value.fault.message


def test_the_index_of_the_first_nonfinite_sample_is_named(tmp_path):
    with pytest.raises(ExcerptError, match="index 100"):
        excerpt(bad_file("nan", tmp_path / "bad.wav"), 0.9)


def test_another_rate_than_listed_is_refused_with_both_rates(tmp_path):
    with pytest.raises(ExcerptError, match=r"16000 Hz.*8000 Hz"):
        excerpt(bad_file("another rate", tmp_path / "bad.wav"))


def test_silence_is_accepted_with_keep_silent(tmp_path):
    track = track_of(write_audio(tmp_path / "a.wav", np.zeros((1, 12_000), np.float32), 8000))

    assert not excerpt(track, keep_silent=True).any()


@given(st.integers(0, 8000))
def test_a_silent_excerpt_of_an_audible_file_is_refused(tmp_path_factory, start):
    path = tmp_path_factory.getbasetemp() / "half.wav"
    if not path.exists():
        write_audio(path, np.concatenate([np.zeros((1, 6000), np.float32), make_noise(6000)], axis=1), 8000)
    track = track_of(path)
    assume(not 2000 <= start < 2100)  # a few samples of sound: either is right

    if start < 2000:
        with pytest.raises(ExcerptError, match="silent in the excerpt") as bad:
            excerpt(track, start / 8000)
        assert bad.value.fault.in_excerpt_only
    else:
        assert power_db(excerpt(track, start / 8000)) > -80


@pytest.mark.parametrize("n_samples", [8000, 800_000])
def test_a_length_listed_in_samples_is_named_as_the_cause(tmp_path, n_samples):
    track = track_of(write_audio(tmp_path / "a.wav", make_noise(n_samples), 8000))

    with pytest.raises(ExcerptError) as bad:
        excerpt(replace(track, seconds=float(n_samples)), start=5000.0)

    assert bad.value.fault.code == "AUDIO_TOO_SHORT"
    assert f"has {n_samples / 8000:.2f} s, but is listed with {n_samples}.00 s" in bad.value.fault.message
    assert "the column seconds must be in seconds" in bad.value.fault.message
