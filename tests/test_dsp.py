import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.dsp import check_same_shape, db_to_amplitude, fit_length, istft, overlap_add, power_db, resample, stft


def sine(frequency, sample_rate, seconds=0.5):
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.sin(2 * np.pi * frequency * time, dtype=np.float64).astype(np.float32)[None]


def middle(audio):
    quarter = audio.shape[-1] // 4
    return audio[..., quarter:-quarter]


@pytest.mark.parametrize(("from_rate", "to_rate"), [(16000, 8000), (8000, 16000), (44100, 8000), (8000, 11025)])
def test_a_tone_is_the_same_tone_at_the_other_rate(from_rate, to_rate):
    resampled = resample(sine(1000, from_rate), from_rate, to_rate)

    np.testing.assert_allclose(middle(resampled), middle(sine(1000, to_rate, 0.6)[:, : resampled.shape[1]]), atol=1e-3)


def test_a_tone_above_the_new_nyquist_frequency_is_removed():
    assert power_db(middle(resample(sine(6000, 16000), 16000, 8000))) < -80


@given(st.integers(1, 3000), st.sampled_from([8000, 16000, 44100, 48000]), st.sampled_from([8000, 16000, 22050]))
def test_the_duration_is_rounded_up_to_a_whole_sample(n_samples, from_rate, to_rate):
    resampled = resample(np.ones((2, n_samples), np.float32), from_rate, to_rate)

    assert resampled.shape[0] == 2
    assert resampled.dtype == np.float32
    assert 0 <= resampled.shape[1] / to_rate - n_samples / from_rate < 1 / to_rate


def test_the_same_rate_changes_nothing():
    audio = sine(440, 8000)

    assert np.array_equal(resample(audio, 8000, 8000), audio)


def test_channels_are_resampled_independently():
    pair = np.concatenate([sine(300, 16000), sine(700, 16000)])

    np.testing.assert_array_equal(resample(pair, 16000, 8000)[1:], resample(pair[1:], 16000, 8000))


def test_empty_audio_is_resampled_to_empty_audio():
    assert resample(np.zeros((1, 0), np.float32), 16000, 8000).shape == (1, 0)


@given(st.integers(0, 20), st.integers(0, 20))
def test_fit_length_trims_or_appends_zeros(n_samples, n_wanted):
    audio = np.arange(1, 2 * n_samples + 1, dtype=np.float32).reshape(2, n_samples)
    n_kept = min(n_samples, n_wanted)

    fitted = fit_length(audio, n_wanted)

    assert fitted.shape == (2, n_wanted)
    assert np.array_equal(fitted[:, :n_kept], audio[:, :n_kept])
    assert not fitted[:, n_kept:].any()


@pytest.mark.parametrize(
    ("audio", "expected"),
    [
        (np.tile(np.float32([1, -1]), 500), 0.0),
        (sine(1000, 8000), -3.0103),
        (np.full((1, 1000), 0.1, np.float32), -20.0),
        (np.zeros((1, 1000), np.float32), -200.0),
        (np.full((1, 1000), 1e-7, np.float32), -140.0),
        (np.full((1, 3_000_000), 1e-3, np.float32), -60.0),
    ],
    ids=["square wave", "sine", "tenth", "silence", "very quiet", "long"],
)
def test_power_of_simple_signals(audio, expected):
    assert power_db(audio) == pytest.approx(expected, abs=1e-4)


@given(st.floats(-60, 60))
def test_a_gain_in_db_moves_the_power_by_as_much(gain_db):
    audio = sine(440, 8000).astype(np.float64)

    assert power_db(audio * db_to_amplitude(gain_db)) == pytest.approx(power_db(audio) + gain_db, abs=1e-9)


def test_twenty_db_are_a_factor_of_ten():
    assert db_to_amplitude(20) == pytest.approx(10)


@pytest.mark.parametrize("shape", [(1, 8), (8,), (2, 1), (2, 9)])
def test_shapes_that_only_broadcast_raise_an_error(shape):
    with pytest.raises(ValueError, match="same shape"):
        check_same_shape(torch.zeros(2, 8), torch.zeros(shape))


SPECTRA = [(64, 16), (64, 32), (200, 50), (2048, 441), (64, 24)]


@pytest.mark.parametrize(("n_fft", "hop_length"), SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stft_equals_torch_stft(n_fft, hop_length, dtype):
    waveform, window = torch.randn(2, 3, 5000, dtype=dtype), torch.hann_window(n_fft)
    expected = torch.stft(waveform.flatten(0, 1), n_fft, hop_length, window=window.to(dtype), return_complex=True)

    spectrum = stft(waveform, n_fft=n_fft, hop_length=hop_length, window=window)

    torch.testing.assert_close(spectrum, expected.unflatten(0, (2, 3)))


@pytest.mark.parametrize(("n_fft", "hop_length"), SPECTRA)
def test_istft_of_a_modified_spectrum_equals_torch_istft(n_fft, hop_length):
    window, sizes = torch.hann_window(n_fft), {"n_fft": n_fft, "hop_length": hop_length}
    spectrum = stft(torch.randn(2, 5000), **sizes, window=window)
    spectrum = spectrum * torch.rand(spectrum.shape)
    expected = torch.istft(spectrum, **sizes, window=window, length=4900)

    torch.testing.assert_close(istft(spectrum, **sizes, window=window, time=4900), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 600))
def test_stft_and_istft_round_trip_at_every_length(time):
    waveform, window = torch.randn(2, time), torch.hann_window(128)
    sizes = {"n_fft": 128, "hop_length": 32, "window": window}

    torch.testing.assert_close(istft(stft(waveform, **sizes), **sizes, time=time), waveform, rtol=1e-4, atol=1e-5)


def test_overlap_add_of_two_frames():
    frames = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])

    assert overlap_add(frames, 2).tolist() == [[1.0, 2.0, 13.0, 20.0, 30.0, 0.0]]
