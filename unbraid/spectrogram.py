"""The spectrogram of a signal, for pictures; numpy only."""

import numpy as np
import numpy.typing as npt


def spectrogram_db(signal: npt.NDArray[np.float32], n_fft: int = 256, hop_length: int = 64) -> npt.NDArray[np.float64]:
    """Power of Hann-windowed frames in dB, ``(freq, frame)``."""
    padded = np.pad(signal.astype(np.float64), (0, max(0, n_fft - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length] * np.hanning(n_fft)
    return 10 * np.log10(np.abs(np.fft.rfft(frames, axis=-1).T) ** 2 + 1e-12)
