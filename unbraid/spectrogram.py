"""Power spectrogram of a signal for figures and the dashboard, with numpy only."""

import numpy as np

from unbraid.type_aliases import AudioArray, FloatArray


def spectrogram_db(signal: AudioArray, n_fft: int = 256, hop_length: int = 64) -> FloatArray:
    """Compute the power of Hann-windowed frames in dB.

    Args:
        signal: One channel, ``(time,)``.
        n_fft: Frame length in samples.
        hop_length: Samples from one frame to the next.

    Returns:
        ``(freq, frame)``, with ``n_fft // 2 + 1`` frequencies; silence is -120 dB.
    """
    # A signal shorter than one frame is padded, so that there is always a frame.
    padded = np.pad(signal.astype(np.float64), (0, max(0, n_fft - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length] * np.hanning(n_fft)
    return 10 * np.log10(np.abs(np.fft.rfft(frames, axis=-1).T) ** 2 + 1e-12)
