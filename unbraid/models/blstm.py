"""BLSTM mask inference and Chimera: masks on the mixture's spectrum, and an embedding of its bins."""

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
"""What lies 80 dB below the mean of a spectrum, as power: the features hardly tell anything below it from silence."""


class BLSTM(nn.Module):
    """Mask the mixture's spectrum, once per source, by bidirectional LSTMs; the phase stays the mixture's.

    The features are log magnitudes above a floor that moves with the level of the mixture, normalised over each
    example: the masks do not depend on the level, and silence gives features of zero. The defaults are those of
    mask inference for 8 kHz in the AutoClip paper, 29.8 million parameters.

    There is no region to compile: nearly all time goes to the LSTM, which torch runs as a kernel of its own.

    Args:
        n_sources: How many sources to return.
        hidden: Units of each LSTM layer in each direction.
        n_layers: LSTM layers.
        n_fft: Samples in a frame, even, under the square root of a Hann window.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        dropout: After every LSTM layer, in training (0.3 as published); N processes then draw other numbers than one.

    References:
        Kolbaek et al., "Multi-talker speech separation with utterance-level permutation invariant training", TASLP
        2017, arXiv:1703.06284. Seetharaman et al., "AutoClip", MLSP 2020, arXiv:2007.14469.
    """

    scale_equivariant = True
    """Twice the input, twice the output."""

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
            raise ValueError(f"n_fft {n_fft} must be even, and hop_length {hop_length} from 1 to half of it.")
        if mask not in MASKS:
            raise ValueError(f"{mask!r} is not one of {', '.join(MASKS)}.")
        self.n_sources, self.n_fft, self.hop_length = n_sources, n_fft, hop_length
        self.mask, self.dropout = mask, dropout
        n_freqs = n_fft // 2 + 1
        self.register_buffer("window", torch.hann_window(n_fft).sqrt(), persistent=False)
        self.norm = GlobalLayerNorm(n_freqs)
        between = dropout if n_layers > 1 else 0.0  # torch warns of a dropout that has no layers to be between
        self.lstm = nn.LSTM(n_freqs, hidden, n_layers, batch_first=True, dropout=between, bidirectional=True)
        self.masks = nn.Linear(2 * hidden, n_sources * n_freqs)

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``."""
        return self.separate(mixture)[0]

    def separate(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """The sources, and what the LSTM made of each frame, ``(batch * channel, frame, 2 * hidden)``."""
        check_mixture(mixture, self.masks.weight)
        batch, _, time = mixture.shape
        spectrum = stft(
            rearrange(mixture, "b c t -> (b c) t"), n_fft=self.n_fft, hop_length=self.hop_length, window=self.window
        ).transpose(1, 2)
        hidden = self.recur(self.norm(log_magnitude(spectrum)))
        masks = rearrange(self.masks(hidden).float(), "bc l (s f) -> bc l s f", s=self.n_sources)
        masked = rearrange(MASKS[self.mask](masks) * spectrum[:, :, None], "(b c) l s f -> b s c f l", b=batch)
        sources = istft(masked, n_fft=self.n_fft, hop_length=self.hop_length, window=self.window, time=time)
        return sources, hidden

    def recur(self, features: Tensor) -> Tensor:
        """``(batch, frame, freq)`` to ``(batch, frame, 2 * hidden)``, through all LSTM layers."""
        with blstm_autocast(features.device):
            hidden: Tensor = self.lstm(features)[0]
        return F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


class Chimera(nn.Module):
    """BLSTM mask inference with a second head: a vector of unit length for each bin of the mixture's spectrum.

    The second head is there to be trained, by deep clustering or whitened k-means beside a loss on the sources; both
    share the LSTM, and the sources come from the masks alone. The defaults are the published sizes, 32.9 million
    parameters.

    Args:
        n_sources: How many sources to return.
        hidden: Units of each LSTM layer in each direction.
        n_layers: LSTM layers.
        embedding_dim: Numbers in the vector of a bin; all are positive, as they come from a sigmoid.
        n_fft: Samples in a frame, even, under the square root of a Hann window.
        hop_length: Samples from frame to frame, at most half of `n_fft`.
        mask: `sigmoid`, `relu`, or `softmax` over the sources.
        dropout: After every LSTM layer, in training (0.3 as published); N processes then draw other numbers than one.

    References:
        Luo et al., "Deep clustering and conventional networks for music separation", ICASSP 2017, arXiv:1611.06265.
        Wang, Le Roux and Hershey, "Alternative objective functions for deep clustering", ICASSP 2018 (Chimera++).
    """

    scale_equivariant = True
    """Twice the input, twice the sources, and the same embedding."""

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
        self.n_sources, self.embedding_dim = n_sources, embedding_dim
        self.embedding = nn.Linear(2 * hidden, (n_fft // 2 + 1) * embedding_dim)

    def forward(self, mixture: Tensor) -> ModelOutput:
        """Separate ``(batch, channel, time)``; the embedding is ``(batch, channel, frame, freq, dim)``."""
        sources, hidden = self.masker.separate(mixture)
        vectors = rearrange(self.embedding(hidden), "(b c) l (f d) -> b c l f d", b=len(mixture), d=self.embedding_dim)
        embedding = F.normalize(vectors.float().sigmoid(), dim=-1)
        return ModelOutput(sources, embedding, n_fft=self.masker.n_fft, hop_length=self.masker.hop_length)


def log_magnitude(spectrum: Tensor) -> Tensor:
    """The same for a loud and a quiet recording, from 0 for silence up; in float32.

    Args:
        spectrum: Complex, ``(batch, frame, freq)``.

    Returns:
        ``(batch, frame, freq)``: the logarithm of 1 + the power in units of the floor, whose gradient is finite at 0.
    """
    power = torch.view_as_real(spectrum).square().sum(-1)
    level = power.mean((1, 2), keepdim=True) + SILENCE
    return torch.log1p(power / (FLOOR * level))


def blstm_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """As `lstm_autocast`; on the CPU float32 also where a gradient is wanted.

    Backward in bfloat16 takes 2 to 5 times as long there as in float32; forward alone takes half as long. On a GPU
    autocast decides.
    """
    if device.type == "cpu" and torch.is_grad_enabled():
        return torch.autocast(device.type, enabled=False)
    return lstm_autocast(device)
