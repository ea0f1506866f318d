"""Sources from clusters of an embedding: right where the vectors tell the sources apart."""

import pytest
import torch
from torch import nn

from unbraid.dsp import stft
from unbraid.lab.clustering import ClusteredSeparation, cluster_masks, kmeans_centres, nearest_centre
from unbraid.losses.pit import evaluation_loss, match_to_targets
from unbraid.metrics import si_sdr
from unbraid.model_output import ModelOutput

N_FFT, HOP = 256, 64


def tones(n_samples=4000):
    """Two sources that share no bin of the spectrum, ``(1, 2, 1, time)``."""
    time = torch.arange(n_samples) / 8000
    return torch.stack([torch.sin(6.2832 * 500 * time), 0.5 * torch.sin(6.2832 * 2500 * time)])[None, :, None]


class Record(nn.Module):
    """A model that knows the answer: the loudest source of each bin, as a vector of unit length."""

    def __init__(self, sources, turn):
        super().__init__()
        self.unused, self.sources, self.turn = nn.Parameter(torch.zeros(1)), sources, turn

    def forward(self, mixture):
        window = torch.hann_window(N_FFT).sqrt()
        spectrum = stft(self.sources, n_fft=N_FFT, hop_length=HOP, window=window).abs().transpose(-1, -2)
        vectors = nn.functional.one_hot(spectrum.argmax(1), 2).float() @ self.turn
        return ModelOutput(torch.zeros_like(self.sources), vectors, n_fft=N_FFT, hop_length=HOP)


@pytest.mark.parametrize("seed", range(5))
def test_clouds_that_lie_apart_are_told_apart_whatever_the_seed(seed):
    drawn = torch.Generator().manual_seed(7)
    truth = torch.arange(300) % 3
    means = torch.eye(3, 5)
    vectors = means[truth] + 0.05 * torch.randn(300, 5, generator=drawn)

    found = kmeans_centres(vectors, 3, seed=seed)
    own = nearest_centre(vectors, found)

    assert len(set(own.tolist())) == 3
    for n in range(3):
        assert len(set(own[truth == n].tolist())) == 1
        torch.testing.assert_close(found[own[n]], vectors[truth == n].double().mean(0))


def test_the_same_vectors_and_seed_give_the_same_centres():
    vectors = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))

    assert torch.equal(kmeans_centres(vectors, 2, seed=3), kmeans_centres(vectors, 2, seed=3))


def test_vectors_that_are_all_the_same_give_masks_all_the_same():
    masks = cluster_masks(torch.ones(6, 5, 3), torch.ones(6, 5), 2)

    torch.testing.assert_close(masks.sum(0), torch.ones(6, 5))
    assert masks[0].unique().numel() == 1


def test_quiet_bins_do_not_move_the_centres():
    magnitude = torch.ones(1, 12)
    magnitude[0, 4:] = 1e-4  # 80 dB below the loudest
    embedding = torch.zeros(1, 12, 2)
    embedding[0, :2, 0], embedding[0, 2:4, 1] = 1.0, 1.0
    embedding[0, 4:] = torch.tensor([9.0, -9.0])

    masks = cluster_masks(embedding, magnitude, 2)

    assert torch.equal(masks[:, 0, 0], masks[:, 0, 1])
    assert torch.equal(masks[:, 0, 2], masks[:, 0, 3])
    assert not torch.equal(masks[:, 0, 0], masks[:, 0, 2])


def test_an_embedding_that_tells_the_sources_apart_separates_them():
    sources = tones()
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    separated = ClusteredSeparation(Record(sources, turn), n_sources=2)(sources.sum(1))
    ordered = match_to_targets(separated, sources, evaluation_loss("permutation"), assign="permutation")

    assert separated.shape == sources.shape
    assert si_sdr(ordered, sources).min() > 20
    torch.testing.assert_close(separated.sum(1), sources.sum(1), atol=1e-5, rtol=0)  # masks sum to 1


def test_one_embedding_for_all_bins_separates_nothing():
    sources = tones()
    separated = ClusteredSeparation(Record(sources, torch.ones(2, 2) / 2**0.5), n_sources=2)(sources.sum(1))

    assert sorted(separated.square().mean((0, 2, 3)).tolist())[0] == 0  # all of the mixture in one


def test_silence_is_separated_into_silence():
    sources = torch.zeros(1, 2, 1, 1000)
    separated = ClusteredSeparation(Record(sources, torch.eye(2)), n_sources=2)(sources.sum(1))

    assert torch.equal(separated, sources)


def test_a_model_without_an_embedding_is_refused():
    model = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match="no embedding"):
        ClusteredSeparation(model, n_sources=2)(torch.zeros(1, 1, 100))
