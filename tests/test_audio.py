import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unbraid.audio import first_bad_sample, probe_audio, read_audio, write_audio
from unbraid.errors import AudioError

RAMP = np.linspace(-0.5, 0.5, 800, dtype=np.float32)[None]


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    return write_audio(tmp_path_factory.mktemp("audio") / "ramp.wav", RAMP, 8000)


def noise(n_samples=12_000, n_channels=1):
    return 0.1 * np.random.default_rng(0).standard_normal((n_channels, n_samples), dtype=np.float32)


def write_pcm_wav(path, *, data_length=None, before_data=b""):
    """A 16-bit mono WAV by hand, whose header may say anything about the length of its data."""
    data = (RAMP[0] * 32767).astype("<i2").tobytes()
    length = len(data) if data_length is None else data_length
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    body = b"WAVE" + form + before_data + b"data" + struct.pack("<I", length) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", min(len(body), 0xFFFFFFFF)) + body)
    return path


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-1e6, 1e6, width=32)
    ),
    st.sampled_from([8000, 16000, 44100]),
)
def test_wav_reads_back_bit_for_bit_at_any_level(audio, sample_rate):
    with tempfile.TemporaryDirectory() as folder:
        path = write_audio(Path(folder) / "a.wav", audio, sample_rate)
        back, rate = read_audio(path)

    assert rate == sample_rate
    assert back.dtype == np.float32
    assert np.array_equal(back, audio)


def test_flac_reads_back_to_24_bits(tmp_path):
    back, _ = read_audio(write_audio(tmp_path / "a.flac", RAMP, 8000))

    assert np.abs(back - RAMP).max() <= 2.0**-23


def test_audio_without_a_channel_axis_is_written_as_mono(tmp_path):
    back, _ = read_audio(write_audio(tmp_path / "a.wav", RAMP[0], 8000))

    assert np.array_equal(back, RAMP)


def test_the_header_is_reported_as_written(tmp_path):
    info = probe_audio(write_audio(tmp_path / "a.wav", noise(12_000, 3), 8000))

    assert (info.n_samples, info.sample_rate, info.n_channels, info.seconds) == (12_000, 8000, 3, 1.5)


@given(start=st.integers(0, 900), length=st.integers(0, 900))
def test_an_excerpt_equals_that_slice_of_the_file(ramp, start, length):
    excerpt, _ = read_audio(ramp, start / 8000, length / 8000)

    assert np.array_equal(excerpt, RAMP[:, start : start + length])


def test_without_a_duration_the_rest_is_read(ramp):
    assert np.array_equal(read_audio(ramp, 0.05)[0], RAMP[:, 400:])


@pytest.fixture(params=["missing", "folder", "zero bytes", "random bytes", "no samples", "cut in half", "cut header"])
def unusable(request, tmp_path):
    path = tmp_path / "bad.wav"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "zero bytes":
        path.touch()
    elif request.param == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(4000))
    elif request.param == "no samples":
        soundfile.write(path, np.zeros(0), 8000)
    elif request.param.startswith("cut"):
        write_audio(path, noise(), 8000)
        os.truncate(path, path.stat().st_size // 2 if request.param == "cut in half" else 30)
    return path


def test_probing_an_unusable_file_is_an_error_that_names_it(unusable):
    with pytest.raises(AudioError) as error:
        probe_audio(unusable)

    assert str(unusable) in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_a_truncated_wav_is_an_error(tmp_path):
    path = write_audio(tmp_path / "a.wav", noise(), 8000)
    os.truncate(path, path.stat().st_size - 4)

    with pytest.raises(AudioError, match="truncated"):
        read_audio(path)


def test_an_excerpt_before_the_truncation_is_refused_too(tmp_path):
    path = write_audio(tmp_path / "a.wav", noise(), 8000)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(AudioError, match="truncated"):
        read_audio(path, 0.0, 0.1)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_of_unknown_length_from_a_pipe_is_not_truncated(tmp_path, length):
    path = write_pcm_wav(tmp_path / "a.wav", data_length=length)

    assert read_audio(path)[0].shape == (1, probe_audio(path).n_samples) == (1, 800)


def test_a_chunk_of_odd_length_is_not_a_truncation(tmp_path):
    path = write_pcm_wav(tmp_path / "a.wav", before_data=b"LIST" + struct.pack("<I", 5) + b"hello\0")

    assert probe_audio(path).n_samples == 800


def test_a_truncation_after_a_chunk_of_odd_length_is_noticed(tmp_path):
    path = write_pcm_wav(tmp_path / "a.wav", before_data=b"LIST" + struct.pack("<I", 5) + b"hello\0")
    os.truncate(path, path.stat().st_size - 400)

    with pytest.raises(AudioError, match="400 bytes more"):
        probe_audio(path)


@pytest.mark.parametrize("seed", range(5))
def test_a_flac_with_200_damaged_bytes_is_an_error_that_names_it(tmp_path, seed):
    path = write_audio(tmp_path / "a.flac", noise(), 8000)
    damaged = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(damaged) // 4, len(damaged) - 400))
    damaged[start : start + 200] = rng.bytes(200)
    path.write_bytes(damaged)

    with pytest.raises(AudioError, match=r"a\.flac"):
        read_audio(path)


def test_half_a_flac_is_an_error(tmp_path):
    path = write_audio(tmp_path / "a.flac", noise(), 8000)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(AudioError, match=r"a\.flac"):
        read_audio(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_nonfinite_sample_is_never_written(tmp_path, value, suffix):
    audio = RAMP.copy()
    audio[0, 100] = value

    with pytest.raises(AudioError, match="not finite"):
        write_audio(tmp_path / f"a{suffix}", audio, 8000)
    assert not list(tmp_path.iterdir())


def test_a_peak_over_full_scale_is_refused_where_the_format_would_clip_it(tmp_path):
    with pytest.raises(AudioError, match="full scale"):
        write_audio(tmp_path / "a.flac", 4 * RAMP, 8000)


def test_missing_folders_are_created(tmp_path):
    assert write_audio(tmp_path / "x" / "y" / "a.wav", RAMP, 8000).is_file()


@pytest.mark.parametrize("name", ["a.xyz", "a"])
def test_an_unknown_format_is_an_error_and_leaves_no_file(tmp_path, name):
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / name, RAMP, 8000)
    assert not list(tmp_path.iterdir())


def test_writing_below_a_file_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / "file" / "a.wav", RAMP, 8000)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_audio(tmp_path / "a.wav", RAMP, 8000)
    whole = soundfile.write

    def half(name, audio, *args, **options):
        whole(name, audio[: len(audio) // 2], *args, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile, "write", half)
    with pytest.raises(AudioError, match="No space left"):
        write_audio(path, 0.5 * RAMP, 8000)

    assert np.array_equal(read_audio(path)[0], RAMP)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("channel", "time"), [(0, 0), (1, 7), (0, 9)])
def test_the_first_bad_sample_is_found_in_any_channel(channel, time):
    audio = np.zeros((2, 10), np.float32)
    audio[channel, time] = np.nan
    audio[0, 9] = np.inf

    assert first_bad_sample(audio) == time


@pytest.mark.parametrize("shape", [(2, 10), (1, 0)])
def test_finite_audio_has_no_bad_sample(shape):
    assert first_bad_sample(np.zeros(shape, np.float32)) is None


def flac_with_sample_count(path, n_samples, count):
    """Write noise as FLAC, and put another sample count into its header; 0 means unknown, as from a pipe."""
    audio = 0.1 * np.random.default_rng(0).standard_normal(n_samples)
    soundfile.write(path, audio, 8000)
    content = bytearray(path.read_bytes())
    (word,) = struct.unpack(">Q", content[18:26])
    content[18:26] = struct.pack(">Q", word >> 36 << 36 | count)
    path.write_bytes(content)
    return soundfile.read(write_copy(path, audio), dtype="float32")[0]


def write_copy(path, audio):
    copy = path.with_name("whole.flac")
    soundfile.write(copy, audio, 8000)
    return copy


@pytest.mark.parametrize("n_samples", [1, 4095, 4096, 20_001])
def test_a_flac_without_a_sample_count_is_read_to_its_end(tmp_path, n_samples):
    path = tmp_path / "piped.flac"
    whole = flac_with_sample_count(path, n_samples, 0)

    assert probe_audio(path).n_samples == n_samples
    assert np.array_equal(read_audio(path)[0], whole[None])
    assert np.array_equal(read_audio(path, 0.25, 1.0)[0], whole[None, 2000:10_000])


def test_a_flac_that_claims_more_than_it_can_hold_is_refused(tmp_path):
    path = tmp_path / "huge.flac"
    flac_with_sample_count(path, 20_000, 2**36 - 1)

    for read in (probe_audio, read_audio):
        with pytest.raises(AudioError, match=r"announces 68719476735 samples, which \d+ bytes cannot hold"):
            read(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFO")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)

    for read in (probe_audio, read_audio):
        with pytest.raises(AudioError, match="not a regular file"):
            read(path)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), ValueError("no"), SystemError("NULL")])
def test_whatever_a_decoder_raises_is_an_audio_error(tmp_path, monkeypatch, error):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100), 8000)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(AudioError, match="cannot be read"):
        read_audio(path)
