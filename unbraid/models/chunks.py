"""A long sequence cut into chunks that overlap by half, and joined again: what dual-path networks run on."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def cut(features: Tensor, chunk_size: int) -> Tensor:
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


def join(chunks: Tensor, n_frames: int) -> Tensor:
    """Add up overlapping chunks, ``(batch, chunk, frame, channel)``, and leave out what `cut` had padded.

    What was only cut comes back doubled, as every frame lies in two chunks.
    """
    hop = chunks.shape[2] // 2
    early, late = chunks[:, 1:, :hop], chunks[:, :-1, hop:]
    return rearrange(early + late, "b s h c -> b (s h) c")[:, :n_frames]
