"""BLSTM mask inference and Chimera: masks for the spectrum of the mixture, and an embedding of its bins."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import SILENCE, istft, stft
from unbraid.model_output import ModelOutput
from unbraid.models.layers import MASKS, GlobalLayerNorm, check_mixture, lstm_autocast

FLOOR = 1e-8
"""Power relative to the mean of the spectrum, -80 dB; the features hardly distinguish less from silence."""


class BLSTM(nn.Module):
    """BLSTM mask inference: one mask per source for the spectrum of the mixture, with the phase of the mixture.

    The features are log magnitudes above a floor that follows the level of the mixture, normalised over each example.
    The masks therefore do not depend on the level, and silence gives features of zero. The defaults are those of mask
    inference for 8 kHz in the AutoClip paper, 29.8 million parameters.

    There is no region to compile: the LSTM takes nearly all the time, and torch runs it as one fused kernel.

    Args:
        n_sources: Number of sources to return.
        hidden: Units of each LSTM layer in each direction.
        n_layers: LSTM layers.
        n_fft: Samples in a frame, even, under the square root of a Hann window.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        dropout: Dropout probability after every LSTM layer in training, 0.3 as published. N processes then draw other
            random numbers than one process.

    References:
        Kolbaek et al., "Multi-talker speech separation with utterance-level permutation invariant training", TASLP
        2017, arXiv:1703.06284. Seetharaman et al., "AutoClip", MLSP 2020, arXiv:2007.14469.
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources by the same factor."""

    window: Tensor

    def __init__(
        self,
        *,
        n_sources: int = 2,
        hidden: int = 600,
        n_layers: int = 4,
        n_fft: int = 256,
        hop_length: int = 64,
        mask: Literal["sigmoid", "relu", "softmax"] = "sigmoid",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if n_fft % 2 or not 1 <= hop_length <= n_fft // 2:
            raise ValueError(f"n_fft {n_fft} must be even, and hop_length {hop_length} must be from 1 to half of it.")
        if mask not in MASKS:
            raise ValueError(f"mask {mask!r} is not one of {', '.join(MASKS)}.")
        self.n_sources = n_sources
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.mask = mask
        self.dropout = dropout
        n_freqs = n_fft // 2 + 1
        self.register_buffer("window", torch.hann_window(n_fft).sqrt(), persistent=False)
        self.norm = GlobalLayerNorm(n_freqs)
        between = dropout if n_layers > 1 else 0.0  # torch warns about dropout between the layers of a single layer
        self.lstm = nn.LSTM(n_freqs, hidden, n_layers, batch_first=True, dropout=between, bidirectional=True)
        self.masks = nn.Linear(2 * hidden, n_sources * n_freqs)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return self.separate(mixture)[0]

    def separate(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sources, and the LSTM's output for each frame, ``(batch * channel, frame, 2 * hidden)``."""
        check_mixture(mixture, self.masks.weight)
        batch, _, time = mixture.shape

        # 1. Spectrum, (batch * channel, frame, freq): every channel is separated independently.
        spectrum = stft(
            rearrange(mixture, "b c t -> (b c) t"), n_fft=self.n_fft, hop_length=self.hop_length, window=self.window
        ).transpose(1, 2)

        # 2. Masks. They multiply a spectrum at the level of the recording, so they are float32 under autocast too.
        hidden = self.run_lstm(self.norm(log_magnitude(spectrum)))
        masks = rearrange(self.masks(hidden).float(), "bc l (s f) -> bc l s f", s=self.n_sources)
        masked = rearrange(MASKS[self.mask](masks) * spectrum[:, :, None], "(b c) l s f -> b s c f l", b=batch)

        # 3. Back to waveforms.
        sources = istft(masked, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window, time=time)
        return sources, hidden

    def run_lstm(self, features: Tensor) -> Tensor:
        """Run all LSTM layers: ``(batch, frame, freq)`` to ``(batch, frame, 2 * hidden)``."""
        with blstm_autocast(features.device):
            hidden: Tensor = self.lstm(features)[0]
        return F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


class Chimera(nn.Module):
    """Chimera: BLSTM mask inference with a second head that embeds each bin of the spectrum in a unit vector.

    The second head only serves training, by deep clustering or whitened k-means in addition to a loss on the sources.
    Both heads share the LSTM, and the sources come from the masks alone. The defaults are the published sizes, 32.9
    million parameters.

    Args:
        n_sources: Number of sources to return.
        hidden: Units of each LSTM layer in each direction.
        n_layers: LSTM layers.
        embedding_dim: Size of the embedding of a bin; all its elements are positive, as they come from a sigmoid.
        n_fft: Samples in a frame, even, under the square root of a Hann window.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        dropout: Dropout probability after every LSTM layer in training, 0.3 as published. N processes then draw other
            random numbers than one process.

    References:
        Luo et al., "Deep clustering and conventional networks for music separation", ICASSP 2017, arXiv:1611.06265.
        Wang, Le Roux and Hershey, "Alternative objective functions for deep clustering", ICASSP 2018 (Chimera++).
    """

    scale_equivariant = True
    """Scaling the mixture scales the sources by the same factor, and leaves the embedding unchanged."""

    def __init__(
        self,
        *,
        n_sources: int = 2,
        hidden: int = 600,
        n_layers: int = 4,
        embedding_dim: int = 20,
        n_fft: int = 256,
        hop_length: int = 64,
        mask: Literal["sigmoid", "relu", "softmax"] = "sigmoid",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.masker = BLSTM(
            n_sources=n_sources,
            hidden=hidden,
            n_layers=n_layers,
            n_fft=n_fft,
            hop_length=hop_length,
            mask=mask,
            dropout=dropout,
        )
        self.n_sources = n_sources
        self.embedding_dim = embedding_dim
        self.embedding = nn.Linear(2 * hidden, (n_fft // 2 + 1) * embedding_dim)

    def forward(self, mixture: Tensor) -> ModelOutput:
        """Separate ``(batch, channel, time)``; the embedding is ``(batch, channel, frame, freq, dim)``."""
        sources, hidden = self.masker.separate(mixture)
        vectors = rearrange(self.embedding(hidden), "(b c) l (f d) -> b c l f d", b=len(mixture), d=self.embedding_dim)
        embedding = F.normalize(vectors.float().sigmoid(), dim=-1)
        return ModelOutput(sources, embedding, n_fft=self.masker.n_fft, hop_length=self.masker.hop_length)


def log_magnitude(spectrum: Tensor) -> Tensor:
    """Return log magnitudes that do not depend on the level, 0 for silence, in float32.

    Args:
        spectrum: Complex, ``(batch, frame, freq)``.

    Returns:
        ``(batch, frame, freq)``: the logarithm of 1 + the power in units of the floor. Its gradient at 0 is finite.
    """
    power = torch.view_as_real(spectrum).square().sum(-1)
    level = power.mean((1, 2), keepdim=True) + SILENCE
    return torch.log1p(power / (FLOOR * level))


def blstm_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of `lstm_autocast`, but with float32 on the CPU whenever gradients are computed.

    On the CPU the backward pass in bfloat16 takes 2 to 5 times as long as in float32, and the forward pass alone takes
    half as long. On a GPU autocast decides.
    """
    if device.type == "cpu" and torch.is_grad_enabled():
        return torch.autocast(device.type, enabled=False)
    return lstm_autocast(device)
