"""Attention over frames, by whichever way is the fastest where it runs, and rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention over all frames.

    On the CPU in bfloat16, with a backward to come and fewer than 300 frames, that is `attend_unfused`; everywhere
    else torch's own. ``benchmarks/attention.py`` measures both.

    Args:
        query: ``(..., head, frame, channel)``.
        key: ``(..., head, frame, channel)``.
        value: ``(..., head, frame, channel)``.
        dropout: Share of the weights that are dropped; 0 outside of training.

    Returns:
        ``(..., head, frame, channel)``.
    """
    bfloat16_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not bfloat16_on_cpu or not torch.is_grad_enabled() or query.shape[-2] >= 300:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attend_unfused(query, key, value, dropout=dropout)


def attend_unfused(query: Tensor, key: Tensor, value: Tensor, *, dropout: float = 0.0) -> Tensor:
    """The same, written out as product, softmax and product."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.float().softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights.to(value.dtype) @ value


def rotary_angles(n_frames: int, n_channels: int, device: torch.device, *, base: float = 10_000.0) -> Tensor:
    """How far each pair of neighbouring channels turns at each frame, in radians, ``(frame, channel / 2)``.

    Reference:
        Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, arXiv:2104.09864.
    """
    rates = base ** (-torch.arange(0, n_channels, 2, device=device) / n_channels)
    return torch.arange(n_frames, device=device)[:, None] * rates


def apply_rotary(features: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring channels as pairs: what a dot product then sees of positions is their distance alone.

    Args:
        features: Queries or keys, ``(..., frame, channel)``.
        angles: As `rotary_angles` gives them, ``(frame, channel / 2)``.

    Returns:
        As ``features``, in their dtype.
    """
    even, odd = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return turned.flatten(-2).to(features.dtype)
