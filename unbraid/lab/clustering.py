"""Sources from the embedding of a mixture's bins: clusters of its vectors are masks; for losses that train it alone."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from unbraid.dsp import SILENCE, istft, stft
from unbraid.inference import infer
from unbraid.model_output import ModelOutput
from unbraid.seeding import generator

N_STARTS = 4
N_ROUNDS = 30
RANGE_DB = 40.0
"""Bins so far below the loudest have no say in where the kmeans_centres lie."""


def kmeans_centres(vectors: Tensor, n_clusters: int, *, seed: int = 0) -> Tensor:
    """Centres of clusters by Lloyd's rounds from k-means++ starts; of several starts the tightest is taken.

    The same for the same vectors and seed.

    Args:
        vectors: ``(vector, dim)``; fewer than clusters give kmeans_centres that fall together.
        n_clusters: How many.
        seed: Of the starts.

    Returns:
        ``(cluster, dim)``, in float64.

    Reference:
        Arthur and Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007.
    """
    vectors = vectors.double()
    rng, found = generator(seed, "k-means"), list[tuple[float, Tensor]]()
    for _ in range(N_STARTS):
        means = _start(vectors, n_clusters, rng)
        for _ in range(N_ROUNDS):
            before = means
            member = nn.functional.one_hot(nearest_centre(vectors, means), n_clusters).double()
            n_members = member.sum(0)[:, None]
            means = torch.where(n_members > 0, member.T @ vectors / n_members.clamp_min(1), means)
            if torch.equal(means, before):
                break
        found.append((float(torch.cdist(vectors, means).square().amin(1).sum()), means))
    return min(found, key=lambda one: one[0])[1]


def _start(vectors: Tensor, n_clusters: int, rng: np.random.Generator) -> Tensor:
    """Vectors far from each other: each drawn by the square of its distance from those before."""
    chosen = [vectors[rng.integers(len(vectors))]]
    while len(chosen) < n_clusters:
        squares = torch.cdist(vectors, torch.stack(chosen)).square().amin(1).cumsum(0)
        place = int(torch.searchsorted(squares, rng.uniform() * float(squares[-1]), right=True))
        chosen.append(vectors[min(place, len(vectors) - 1)])
    return torch.stack(chosen)


def nearest_centre(vectors: Tensor, means: Tensor) -> Tensor:
    """The number of the nearest centre of each vector, ``(..., dim)`` to ``(...,)``."""
    return torch.cdist(vectors.to(means.dtype), means).argmin(-1)


def cluster_masks(embedding: Tensor, magnitude: Tensor, n_sources: int, *, seed: int = 0) -> Tensor:
    """Each bin wholly to one source: that of its vector's cluster.

    Args:
        embedding: A vector for each bin, ``(frame, freq, dim)``.
        magnitude: Of the mixture, ``(frame, freq)``; the loud bins alone make the kmeans_centres.
        n_sources: How many clusters.
        seed: Of the clustering.

    Returns:
        Ones and zeros that sum to 1 over the sources, ``(source, frame, freq)``.
    """
    loud = magnitude >= magnitude.max().clamp_min(SILENCE) * 10 ** (-RANGE_DB / 20)
    vectors = embedding.flatten(0, 1)
    means = kmeans_centres(embedding[loud] if loud.any() else vectors, n_sources, seed=seed)
    own = nearest_centre(vectors, means).view_as(magnitude)
    return torch.stack([own == source for source in range(n_sources)]).to(magnitude.dtype)


class ClusteredSeparation(nn.Module):
    """A model whose sources are not its own: the clusters of its embedding, as masks on the mixture's spectrum.

    For evaluation; there is no gradient through it.

    Args:
        model: It returns a `ModelOutput` with an embedding.
        n_sources: How many sources.
        seed: Of the clustering, the same for every mixture.

    Reference:
        Hershey et al., "Deep clustering", ICASSP 2016, arXiv:1508.04306.
    """

    def __init__(self, model: nn.Module, *, n_sources: int, seed: int = 0) -> None:
        super().__init__()
        self.model, self.n_sources, self.seed = model, n_sources, seed

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``.

        Raises:
            ValueError: If the model returns no embedding.
        """
        output = infer(self.model, mixture)
        if not isinstance(output, ModelOutput) or output.embedding is None:
            raise ValueError("The model returns no embedding to cluster.")
        window = torch.hann_window(output.n_fft, device=mixture.device).sqrt()
        batch, time = len(mixture), mixture.shape[-1]
        spectrum = stft(
            rearrange(mixture.float(), "b c t -> (b c) t"),
            n_fft=output.n_fft,
            hop_length=output.hop_length,
            window=window,
        ).transpose(1, 2)
        vectors = rearrange(output.embedding, "b c l f d -> (b c) l f d")
        masks = [
            cluster_masks(one, bins.abs(), self.n_sources, seed=self.seed)
            for one, bins in zip(vectors, spectrum, strict=True)
        ]
        masked = rearrange(torch.stack(masks) * spectrum[:, None], "(b c) s l f -> b s c f l", b=batch)
        return istft(masked, n_fft=output.n_fft, hop_length=output.hop_length, window=window, time=time)
