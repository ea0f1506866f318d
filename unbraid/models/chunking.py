"""Segmentation of a long sequence into chunks that overlap by half, and overlap-add, for dual-path networks."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def split_into_chunks(features: Tensor, chunk_size: int) -> Tensor:
    """Split frames into chunks that overlap by half.

    The first chunk begins half a chunk before the first frame, and the last one is padded with zeros.

    Args:
        features: ``(batch, frame, channel)``.
        chunk_size: Frames in a chunk, even.

    Returns:
        ``(batch, chunk, frame, channel)``.
    """
    hop = chunk_size // 2
    padded = F.pad(features, (0, 0, hop, hop + -features.shape[1] % hop))
    # Each chunk consists of two neighbouring halves.
    halves = rearrange(padded, "b (s h) c -> b s h c", h=hop)
    return torch.cat([halves[:, :-1], halves[:, 1:]], 2)


def merge_chunks(chunks: Tensor, n_frames: int) -> Tensor:
    """Overlap-add chunks and remove the padding of `split_into_chunks`.

    Every frame lies in two chunks, so chunks that were not changed come back doubled.

    Args:
        chunks: ``(batch, chunk, frame, channel)``.
        n_frames: Frames to return.

    Returns:
        ``(batch, n_frames, channel)``.
    """
    hop = chunks.shape[2] // 2
    first_halves = chunks[:, 1:, :hop]
    second_halves = chunks[:, :-1, hop:]
    return rearrange(first_halves + second_halves, "b s h c -> b (s h) c")[:, :n_frames]


def merge_and_split_sources(chunks: Tensor, n_frames: int, split: nn.Linear, n_sources: int) -> Tensor:
    """Merge chunks, then apply a linear layer that gives each source its channels.

    Args:
        chunks: ``(batch, chunk, frame, channel)``.
        n_frames: Frames to return.
        split: From ``channel`` to ``source * channel``.
        n_sources: Number of sources.

    Returns:
        ``(batch, frame, source, channel)``.
    """
    merged = merge_chunks(chunks, n_frames)
    # The published order, splitting before merging, gives the same sum for twice the work. Each frame lies in two
    # chunks, so the bias counts twice.
    sources = F.linear(merged, split.weight, 2 * split.bias)
    return rearrange(sources, "b l (s c) -> b l s c", s=n_sources)


def published_padding(n_frames: int, chunk_size: int, ends: Literal["pairs", "chunk"]) -> tuple[int, int]:
    """Return the zeros before and after the frames with which `split_into_chunks` gives the published chunks.

    So many zeros are not necessary, but published weights were trained with them in every norm and every layer across
    chunks.

    Args:
        n_frames: Frames without the zeros.
        chunk_size: Frames in a chunk, even.
        ends: ``"pairs"`` for an even number of chunks, as in SpeechBrain; ``"chunk"`` for chunks that reach up to a
            whole chunk beyond the frames at both ends, as in Asteroid.
    """
    hop = chunk_size // 2
    n_hops = n_frames // hop + 1
    if ends == "chunk":
        return hop, n_hops * hop - n_frames
    return 0, (n_hops + 1 - n_hops % 2) * hop - n_frames
