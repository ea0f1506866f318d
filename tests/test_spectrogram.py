import numpy as np

from unbraid.spectrogram import spectrogram_db


def test_the_spectrogram_of_a_tone_peaks_at_its_frequency():
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000).astype(np.float32)

    assert set(spectrogram_db(tone, n_fft=256).argmax(0)) == {1000 * 256 // 8000}
