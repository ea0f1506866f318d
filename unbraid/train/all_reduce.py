"""One all-reduce for all the small tensors that the ranks must agree on in a step."""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from unbraid import dist


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all tensors as one vector."""
    device = next(iter(tensors.values())).device
    # float64 holds counts and losses exactly; MPS has no float64
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors.values()])


def slices_of(tensors: Mapping[str, Tensor]) -> dict[str, slice]:
    """Return where each tensor lies in the flat vector."""
    edges = [0, *accumulate(tensor.numel() for tensor in tensors.values())]
    return {name: slice(start, stop) for name, (start, stop) in zip(tensors, pairwise(edges), strict=True)}


def sum_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all ranks in one collective. Every rank must pass the same names and shapes."""
    total = dist.sum_over_ranks(flatten(tensors))
    return {name: total[where].view(tensors[name].shape) for name, where in slices_of(tensors).items()}
