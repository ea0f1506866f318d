"""Separate by k-means clusters of an embedding: for models whose loss trains nothing but the embedding."""

import warnings

import numpy as np
import torch
from einops import rearrange
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor, nn

from unbraid.dsp import SILENCE, istft, stft
from unbraid.inference import infer
from unbraid.model_output import ModelOutput
from unbraid.seeding import generator

N_STARTS = 4
N_ITERATIONS = 30
RANGE_DB = 40.0
"""Bins further below the loudest one do not move the cluster centres."""


def kmeans_centres(vectors: Tensor, n_clusters: int, *, seed: int = 0) -> Tensor:
    """Return the k-means centres of vectors: the tightest of several runs, each from a k-means++ start.

    Deterministic for the same vectors and seed.

    Args:
        vectors: ``(vector, dim)``. With fewer distinct vectors than clusters, some centres coincide.
        n_clusters: Number of clusters.
        seed: Seed of the starts.

    Returns:
        ``(cluster, dim)``, in float64.

    Reference:
        Arthur and Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007.
    """
    data = vectors.detach().cpu().double().numpy()
    rng = generator(seed, "k-means")
    candidates = []
    for _ in range(N_STARTS):
        # SciPy warns of empty clusters and divides 0 by 0 if all vectors are equal, as in silence: no problem here.
        # check_finite is off, because one bad embedding must not end the evaluation of all mixtures.
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)
            # seed, not rng: SciPy before 1.15 does not know rng.
            centres, _ = kmeans2(data, n_clusters, iter=N_ITERATIONS, minit="++", check_finite=False, seed=rng)
        _, distances = vq(data, centres, check_finite=False)
        candidates.append((float(np.square(distances).sum()), centres))
    _, tightest = min(candidates, key=lambda candidate: candidate[0])
    return torch.from_numpy(tightest)


def nearest_centre(vectors: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest centre of each vector, ``(..., dim)`` to ``(...,)``."""
    return torch.cdist(vectors.to(centres), centres).argmin(-1)


def cluster_masks(embedding: Tensor, magnitude: Tensor, n_sources: int, *, seed: int = 0) -> Tensor:
    """Return binary masks that give each bin to the source of its vector's cluster.

    Args:
        embedding: A vector for each bin, ``(frame, freq, dim)``.
        magnitude: Magnitude of the mixture, ``(frame, freq)``. Only loud bins decide the cluster centres.
        n_sources: Number of clusters.
        seed: Seed of the clustering.

    Returns:
        Ones and zeros that sum to 1 over the sources, ``(source, frame, freq)``.
    """
    is_loud = magnitude >= magnitude.max().clamp_min(SILENCE) * 10 ** (-RANGE_DB / 20)
    vectors = embedding.flatten(0, 1)
    # A silent mixture has no loud bin.
    centres = kmeans_centres(embedding[is_loud] if is_loud.any() else vectors, n_sources, seed=seed)
    owner = nearest_centre(vectors, centres.to(vectors.device)).view_as(magnitude)
    return torch.stack([owner == source for source in range(n_sources)]).to(magnitude.dtype)


class ClusteredSeparation(nn.Module):
    """Deep clustering at inference: clusters of a model's embedding become masks on the mixture's spectrum.

    The model's own sources are ignored. There is no gradient through the clustering.

    Args:
        model: Model that returns a `ModelOutput` with an embedding.
        n_sources: Number of sources.
        seed: Seed of the clustering, the same for every mixture.

    Reference:
        Hershey et al., "Deep clustering", ICASSP 2016, arXiv:1508.04306.
    """

    def __init__(self, model: nn.Module, *, n_sources: int, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.n_sources = n_sources
        self.seed = seed

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate ``(batch, channel, time)`` into ``(batch, source, channel, time)``.

        Raises:
            ValueError: If the model returns no embedding.
        """
        output = infer(self.model, mixture)
        if not isinstance(output, ModelOutput) or output.embedding is None:
            raise ValueError("The model returns no embedding to cluster.")
        window = torch.hann_window(output.n_fft, device=mixture.device).sqrt()
        spectrum = stft(
            rearrange(mixture.float(), "b c t -> (b c) t"),
            n_fft=output.n_fft,
            hop_length=output.hop_length,
            window=window,
        ).transpose(1, 2)  # (b c) f l -> (b c) l f, the order of the embedding
        embeddings = rearrange(output.embedding, "b c l f d -> (b c) l f d")
        # Each channel of each mixture is clustered on its own.
        masks = [
            cluster_masks(embedding, bins.abs(), self.n_sources, seed=self.seed)
            for embedding, bins in zip(embeddings, spectrum, strict=True)
        ]
        masked = rearrange(torch.stack(masks) * spectrum[:, None], "(b c) s l f -> b s c f l", b=len(mixture))
        return istft(masked, n_fft=output.n_fft, hop_length=output.hop_length, window=window, time=mixture.shape[-1])
