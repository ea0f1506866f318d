"""Separation of whole recordings at any rate, length and level."""

import numpy as np
import pytest
import torch
from torch import nn

from unbraid.inference import at_mixture_level, separate, separate_audio


class LowAndHigh(nn.Module):
    """Separates by frequency, with a moving mean; scaled and inverted, which SI-SDR does not penalise."""

    n_sources = 2

    def __init__(self, gains=(1.0, 1.0)):
        super().__init__()
        self.gains = nn.Parameter(torch.tensor(gains))

    def forward(self, mixture):
        low = nn.functional.avg_pool1d(mixture, 9, 1, 4)
        return torch.stack([low, mixture - low], 1) * self.gains[:, None, None]


def tones(rate, seconds=1.0):
    time = np.arange(round(rate * seconds)) / rate
    low = 0.3 * np.sin(2 * np.pi * 100 * time)
    high = 0.2 * np.sin(2 * np.pi * 2000 * time)
    return low.astype(np.float32), high.astype(np.float32)


def test_levels_and_signs_that_the_loss_ignores_are_taken_from_the_mixture():
    mixture = sum(tones(8000))[None]
    model = LowAndHigh(gains=(-7.0, 0.02))

    estimates = separate_audio(model, mixture, 8000, model_rate=8000, match_level=True)

    assert np.allclose(estimates.sum(0), mixture, atol=1e-5)
    assert np.allclose(
        estimates, separate_audio(LowAndHigh(), mixture, 8000, model_rate=8000, match_level=False), atol=1e-4
    )


def test_without_match_level_the_model_sets_the_level():
    mixture = sum(tones(8000))[None]

    estimates = separate_audio(LowAndHigh(gains=(2.0, 2.0)), mixture, 8000, model_rate=8000, match_level=False)

    assert np.allclose(estimates.sum(0), 2 * mixture, atol=1e-5)


def test_silence_stays_silence():
    silence = np.zeros((1, 500), np.float32)

    assert not separate_audio(LowAndHigh(), silence, 8000, model_rate=8000, match_level=True).any()
    assert not at_mixture_level(np.zeros((2, 1, 5), np.float32), np.ones((1, 5), np.float32)).any()


@pytest.mark.parametrize("rate", [4000, 11025, 44100, 48000])
def test_audio_at_another_rate_is_returned_at_that_rate(rate):
    low, high = tones(rate)
    if rate == 4000:
        high = 0 * high  # a tone at 2 kHz needs a rate above 4 kHz

    estimates = separate_audio(LowAndHigh(), (low + high)[None], rate, model_rate=8000, match_level=False)
    total = estimates.sum(0)[0]

    inner = slice(rate // 10, -rate // 10)
    error = np.abs(total - (low + high))[inner].max()
    assert error < 0.01


@pytest.mark.parametrize("n_samples", [0, 1, 7, 8001])
def test_the_length_is_exactly_the_inputs(n_samples):
    audio = np.ones((2, n_samples), np.float32)

    assert separate_audio(LowAndHigh(), audio, 44100, model_rate=8000, match_level=True).shape == (2, 2, n_samples)


def test_channels_are_separated_independently():
    low, high = tones(8000)
    stereo = np.stack([low + high, high - low])

    both = separate_audio(LowAndHigh(), stereo, 8000, model_rate=8000, match_level=False)
    left = separate_audio(LowAndHigh(), stereo[:1], 8000, model_rate=8000, match_level=False)

    assert np.array_equal(both[:, :1], left)


def test_a_source_sixty_decibels_below_the_other_is_not_treated_as_silence():
    mixture = sum(tones(8000))[None]

    estimates = separate_audio(LowAndHigh(gains=(-7.0, 0.005)), mixture, 8000, model_rate=8000, match_level=True)

    assert np.allclose(estimates.sum(0), mixture, atol=1e-4)


def test_a_source_has_the_same_index_in_every_channel():
    class SwapsRightChannel(LowAndHigh):
        def forward(self, mixture):
            separated = super().forward(mixture)
            separated[:, :, 1] = separated[:, :, 1].flip(1)
            return separated

    low, high = tones(8000)
    stereo = np.stack([low + high, 0.5 * low + 0.5 * high])

    swapped = separate_audio(SwapsRightChannel(), stereo, 8000, model_rate=8000, match_level=False)

    assert np.allclose(swapped, separate_audio(LowAndHigh(), stereo, 8000, model_rate=8000, match_level=False))


def test_training_mode_is_restored():
    model = LowAndHigh().train()
    assert not separate(model, torch.ones(1, 1, 10)).requires_grad
    assert model.training


class LeftAndRight(torch.nn.Module):
    """Returns stems of which each right channel equals the other stem's left channel."""

    def __init__(self, n_channels):
        super().__init__()
        self.n_channels = n_channels
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, mixture):
        return torch.stack([mixture, mixture.flip(1)], 1) * self.weight


@pytest.mark.parametrize(
    ("n_channels", "fixed_order", "order_is_kept"), [(1, False, False), (1, True, True), (2, False, True)]
)
def test_stems_of_a_fixed_order_are_not_swapped_in_one_channel(n_channels, fixed_order, order_is_kept):
    stereo = (0.1 * np.random.default_rng(0).standard_normal((2, 500))).astype(np.float32)

    stems = separate_audio(
        LeftAndRight(n_channels), stereo, 8000, model_rate=8000, match_level=False, fixed_order=fixed_order
    )

    assert np.allclose(stems[0], stereo, atol=1e-6) == order_is_kept


def test_an_output_trained_to_be_silent_stays_silent():
    mixture = (0.1 * np.random.default_rng(0).standard_normal((1, 4000))).astype(np.float32)
    noise = (0.1 * np.random.default_rng(1).standard_normal((1, 4000))).astype(np.float32)
    estimates = np.stack([5 * mixture + noise, 1e-3 * mixture])

    levelled = at_mixture_level(estimates, mixture, silent_below_db=25.0)

    assert not levelled[1].any()
    assert np.square(levelled[0]).mean() > 0.9 * np.square(mixture).mean()
