"""Attention over frames, by the fastest implementation for the device, and rotary position embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Compute scaled dot-product attention over all frames.

    Args:
        query: ``(..., head, frame, channel)``.
        key: ``(..., head, frame, channel)``.
        value: ``(..., head, frame, channel)``.
        dropout: Share of the attention weights that are dropped; 0 outside of training.

    Returns:
        ``(..., head, frame, channel)``.
    """
    # In bfloat16 on the CPU, with a backward pass and fewer than 300 frames, torch's own attention is slower than the
    # unfused form; everywhere else it is faster. benchmarks/attention.py measures both.
    bfloat16_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not bfloat16_on_cpu or not torch.is_grad_enabled() or query.shape[-2] >= 300:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attend_unfused(query, key, value, dropout=dropout)


def attend_unfused(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Compute the same as `attend` by a product, a softmax and a product."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.float().softmax(-1)  # bfloat16 has too few bits for a softmax
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights.to(value.dtype) @ value


def rotary_angles(n_frames: int, n_channels: int, device: torch.device, *, base: float = 10_000.0) -> Tensor:
    """Return the rotation of each pair of neighbouring channels at each frame, in radians, ``(frame, channel / 2)``.

    Reference:
        Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, arXiv:2104.09864.
    """
    rates = base ** (-torch.arange(0, n_channels, 2, device=device) / n_channels)
    return torch.arange(n_frames, device=device)[:, None] * rates


def apply_rotary(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels, so that dot products depend on the distance of two frames alone.

    Args:
        features: Queries or keys, ``(..., frame, channel)``.
        angles: From `rotary_angles`, ``(frame, channel / 2)``.

    Returns:
        The shape and dtype of ``features``.
    """
    # Channels 0 and 1 are a pair, then 2 and 3, and so on.
    even, odd = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine = angles.cos()
    sine = angles.sin()
    rotated = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return rotated.flatten(-2).to(features.dtype)
