"""Separation by clusters of an embedding: correct if the vectors distinguish the sources."""

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


class OracleEmbedding(nn.Module):
    """A model that knows the answer: its embedding is the loudest source of each bin, one-hot and rotated."""

    def __init__(self, sources, rotation):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.sources = sources
        self.rotation = rotation

    def forward(self, mixture):
        window = torch.hann_window(N_FFT).sqrt()
        spectrum = stft(self.sources, n_fft=N_FFT, hop_length=HOP, window=window).abs().transpose(-1, -2)
        vectors = nn.functional.one_hot(spectrum.argmax(1), 2).float() @ self.rotation
        return ModelOutput(torch.zeros_like(self.sources), vectors, n_fft=N_FFT, hop_length=HOP)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_distant_clouds_with_any_seed(seed):
    rng = torch.Generator().manual_seed(7)
    truth = torch.arange(300) % 3
    means = torch.eye(3, 5)
    vectors = means[truth] + 0.05 * torch.randn(300, 5, generator=rng)

    centres = kmeans_centres(vectors, 3, seed=seed)
    cluster = nearest_centre(vectors, centres)

    assert len(set(cluster.tolist())) == 3
    for n in range(3):
        assert len(set(cluster[truth == n].tolist())) == 1
        torch.testing.assert_close(centres[cluster[n]], vectors[truth == n].double().mean(0))


def test_the_same_vectors_and_seed_give_the_same_centres():
    vectors = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))

    assert torch.equal(kmeans_centres(vectors, 2, seed=3), kmeans_centres(vectors, 2, seed=3))


def test_equal_vectors_all_get_the_same_mask():
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


def test_an_embedding_that_distinguishes_the_sources_separates_them():
    sources = tones()
    rotation = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    separated = ClusteredSeparation(OracleEmbedding(sources, rotation), n_sources=2)(sources.sum(1))
    ordered = match_to_targets(separated, sources, evaluation_loss("permutation"), assign="permutation")

    assert separated.shape == sources.shape
    assert si_sdr(ordered, sources).min() > 20
    torch.testing.assert_close(separated.sum(1), sources.sum(1), atol=1e-5, rtol=0)  # masks sum to 1


def test_a_constant_embedding_separates_nothing():
    sources = tones()
    separated = ClusteredSeparation(OracleEmbedding(sources, torch.ones(2, 2) / 2**0.5), n_sources=2)(sources.sum(1))

    assert sorted(separated.square().mean((0, 2, 3)).tolist())[0] == 0  # one source gets the whole mixture


def test_silence_is_separated_into_silence():
    sources = torch.zeros(1, 2, 1, 1000)
    separated = ClusteredSeparation(OracleEmbedding(sources, torch.eye(2)), n_sources=2)(sources.sum(1))

    assert torch.equal(separated, sources)


def test_a_model_without_an_embedding_is_refused():
    model = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match="no embedding"):
        ClusteredSeparation(model, n_sources=2)(torch.zeros(1, 1, 100))
