"""A long sequence cut into chunks that overlap by half, and joined again: what dual-path networks run on."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def split_into_chunks(features: Tensor, chunk_size: int) -> Tensor:
    """Cut into chunks that overlap by half; the first begins half a chunk early, and the last ends in zeros.

    Args:
        features: ``(batch, frame, channel)``.
        chunk_size: Frames in a chunk, even.

    Returns:
        ``(batch, chunk, frame, channel)``.
    """
    hop = chunk_size // 2
    padded = F.pad(features, (0, 0, hop, hop + -features.shape[1] % hop))
    halves = rearrange(padded, "b (s h) c -> b s h c", h=hop)
    return torch.cat([halves[:, :-1], halves[:, 1:]], 2)


def merge_chunks(chunks: Tensor, n_frames: int) -> Tensor:
    """Add up overlapping chunks, ``(batch, chunk, frame, channel)``, and leave out what `split_into_chunks` had padded.

    What was only split_into_chunks comes back doubled, as every frame lies in two chunks.
    """
    hop = chunks.shape[2] // 2
    early, late = chunks[:, 1:, :hop], chunks[:, :-1, hop:]
    return rearrange(early + late, "b s h c -> b (s h) c")[:, :n_frames]


def merge_and_split_sources(chunks: Tensor, n_frames: int, split: nn.Linear, n_sources: int) -> Tensor:
    """`merge_chunks`, and then a linear layer that gives each source its channels, ``(batch, frame, source, channel)``.

    To split before joining would be the published order, the same sum, and twice the work: each frame lies in two
    chunks, and so has the bias twice.
    """
    joined = merge_chunks(chunks, n_frames)
    sources = F.linear(joined, split.weight, 2 * split.bias)
    return rearrange(sources, "b l (s c) -> b l s c", s=n_sources)


def published_padding(n_frames: int, chunk_size: int, ends: Literal["pairs", "chunk"]) -> tuple[int, int]:
    """Zeros before and after the frames that give the chunks of the published weights.

    Nothing needs so many, but the weights have seen them in every norm and every layer across chunks.

    Args:
        n_frames: Without the zeros.
        chunk_size: Frames in a chunk, even.
        ends: ``"pairs"`` for an even number of chunks, as in SpeechBrain; ``"chunk"`` for chunks that begin and end up
            to a whole chunk beyond the frames, as in Asteroid.
    """
    hop = chunk_size // 2
    n_hops = n_frames // hop + 1
    if ends == "chunk":
        return hop, n_hops * hop - n_frames
    return 0, (n_hops + 1 - n_hops % 2) * hop - n_frames
