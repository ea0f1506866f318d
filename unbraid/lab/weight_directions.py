"""Directions in weight space: random filter-normalised ones, linear combinations, principal axes of a training path."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.models.bs_roformer import BandLinear, BandSplit
from unbraid.seeding import generator
from unbraid.type_aliases import FloatArray

Weights = Mapping[str, Tensor]
"""A state dict, or the difference of two; a tensor missing from a difference is 0 there."""


def linear_combination(anchors: Sequence[Weights], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return the sum of anchors, each times its coefficient.

    The sum is computed in float64 (complex128) and rounded once. Anchors with coefficient 0 are skipped, so that
    coefficients ``(0, 1)`` return the second anchor bit for bit. Integer and boolean tensors are the first anchor's.

    Args:
        anchors: State dicts or differences. The first one decides the names and dtypes.
        coefficients: ``(anchor,)``.
    """
    return {name: _combine_tensor(name, anchors, coefficients) for name in anchors[0]}


def _combine_tensor(name: str, anchors: Sequence[Weights], coefficients: Sequence[float]) -> Tensor:
    first = anchors[0][name]
    if not _is_continuous(first):
        return first
    dtype = _double_dtype(first)
    total = torch.zeros(first.shape, dtype=dtype)
    for anchor, coefficient in zip(anchors, coefficients, strict=True):
        # Skipping zeros is not only faster: 0 * inf would be NaN.
        if coefficient != 0 and name in anchor:
            total.add_(anchor[name].to(dtype), alpha=float(coefficient))
    return total.to(first.dtype)


def _double_dtype(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(frozen=True)
class FilterLayout:
    """The way a parameter divides into filters.

    Attributes:
        axes: Axes within a filter.
        group_sizes: Sizes of the groups that the first axis divides into; empty for a single group.
    """

    axes: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()

    def norms(self, weight: Tensor) -> Tensor:
        """Return the norm of the filter that each element belongs to, in float64 and in the weight's shape."""
        weight = weight.to(_double_dtype(weight))
        groups = weight.split(list(self.group_sizes)) if self.group_sizes else (weight,)
        norms = [torch.linalg.vector_norm(group, dim=self.axes, keepdim=True).expand(group.shape) for group in groups]
        return torch.cat(norms)


def filter_layouts(model: nn.Module) -> dict[str, FilterLayout]:
    """Return the layouts of weights that hold one linear layer per band: each output of a band is a filter."""
    layouts = {}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, BandLinear):
            layouts[name] = FilterLayout((3,))
        elif isinstance(module, BandSplit):
            widths = tuple(width for n_bands, width in module.width_groups for _ in range(n_bands))
            layouts[name] = FilterLayout((0,), widths)
    return layouts


def filter_normalised_direction(
    weights: Weights, seed: int, index: int = 0, *, filters: Mapping[str, FilterLayout] | None = None
) -> dict[str, Tensor]:
    """Return a random direction in which each filter has the norm of the same filter in the weights.

    If one layer of a ReLU network is scaled up and the next one scaled down by the same factor, the network computes
    the same function; with filter normalisation the loss along the direction stays the same too. This holds for one
    factor per layer. A factor per filter scales the next layer's columns differently, and so changes the shapes of its
    filters, not only their norms.

    A filter is a slice along the first axis: an output of a convolution or linear layer, or a gate of an LSTM. In a
    transposed convolution it is a basis signal. In depthwise filters named ``taps``, ``(tap, channel)``, it is the
    column of a channel. Biases, norms and other tensors with fewer than two axes are not moved.

    Args:
        weights: Parameters by name.
        seed: Seed of the draw.
        index: Number of the direction; each index gives another one for the same seed.
        filters: Layouts of the parameters that divide differently, as `filter_layouts` returns them.

    Reference:
        Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv:1712.09913.
    """
    direction = {}
    for position, (name, weight) in enumerate(weights.items()):
        if not has_filters(name, weight):
            continue
        noise = _normal_like(weight, generator(seed, "direction", index, position))
        layout = (filters or {}).get(name) or _default_layout(name, weight)
        # A filter of zeros gets norm 0, so it does not move.
        noise *= layout.norms(weight) / layout.norms(noise)
        direction[name] = noise.to(weight.dtype)
    return direction


def _normal_like(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw standard normal numbers of a tensor's shape, in float64 or complex128."""
    real = torch.from_numpy(rng.standard_normal(tensor.shape))
    if not tensor.is_complex():
        return real
    return torch.complex(real, torch.from_numpy(rng.standard_normal(tensor.shape)))


def has_filters(name: str, weight: Tensor) -> bool:
    """Return whether a parameter consists of filters, unlike a bias or the parameters of a norm or activation."""
    return _is_continuous(weight) and weight.dim() >= 2 and "bias" not in name.rsplit(".", 1)[-1]


def _default_layout(name: str, weight: Tensor) -> FilterLayout:
    return FilterLayout((0,) if name.rsplit(".", 1)[-1] == "taps" else tuple(range(1, weight.dim())))


@dataclass(frozen=True)
class PathPlane:
    """The plane through the last point of a path of weights, along the path's two principal axes.

    It is not the least-squares plane of the points in general: that one goes through their mean.

    Attributes:
        axes: Two orthonormal directions.
        coordinates: Projection of each point on the plane, in units of the weights, ``(point, 2)``; the last is 0, 0.
        variance_ratios: Share of the path's variance along each principal axis, in descending order,
            ``(point - 1,)``.
        distances: Distance of each point from its projection, ``(point,)``.
    """

    axes: tuple[dict[str, Tensor], dict[str, Tensor]]
    coordinates: FloatArray
    variance_ratios: FloatArray
    distances: FloatArray


def principal_plane(points: Sequence[Weights], names: Sequence[str]) -> PathPlane:
    """Return the plane along the two principal axes of a path.

    The axes come from the Gram matrix of the points, ``(point, point)``. The covariance matrix of the weights would be
    far too large.

    Args:
        points: State dicts of one model, three or more.
        names: Names of its parameters; other tensors are ignored.

    Raises:
        ValueError: If there are fewer than three points, or they do not span a plane.

    Reference:
        Li et al., arXiv:1712.09913, section 7.2.
    """
    if len(points) < 3:
        raise ValueError(f"A plane needs three points, not {len(points)}.")
    # Gram matrix of the differences to the last point, summed over the parameters.
    n = len(points)
    gram = np.zeros((n, n))
    for name in names:
        differences = _differences(points, name)
        if differences.is_complex():
            differences = torch.view_as_real(differences)
        differences = differences.reshape(n, -1)
        gram += (differences @ differences.T).numpy()

    # Principal component analysis by the centred Gram matrix; eigh returns eigenvalues in ascending order.
    centring = np.eye(n) - 1 / n
    variances, vectors = np.linalg.eigh(centring @ gram @ centring)
    variances = variances[::-1]
    vectors = vectors[:, ::-1]
    if not variances[1] > 1e-12 * variances[0]:
        raise ValueError("The points lie on a line or coincide; they span no plane.")
    mixing = centring @ vectors[:, :2] / np.sqrt(variances[:2])
    # An eigenvector's sign is arbitrary: let the path run from left to right, and upwards.
    mixing = mixing * np.where(gram[0] @ mixing > 0, -1.0, 1.0)

    # Projections, axes as weights, and distances by Pythagoras; rounding can make a square slightly negative.
    coordinates = gram @ mixing
    axes = (_mix_differences(points, names, mixing[:, 0]), _mix_differences(points, names, mixing[:, 1]))
    distances = np.sqrt(np.maximum(np.diag(gram) - (coordinates**2).sum(1), 0))
    nonnegative = np.maximum(variances[: n - 1], 0)
    return PathPlane(axes, coordinates, nonnegative / nonnegative.sum(), distances)


def _mix_differences(points: Sequence[Weights], names: Sequence[str], mixing: FloatArray) -> dict[str, Tensor]:
    """Return a linear combination of the differences to the last point, in float64 against cancellation."""
    direction = {}
    for name in names:
        differences = _differences(points, name)
        direction[name] = torch.tensordot(torch.from_numpy(mixing).to(differences.dtype), differences, dims=1)
    return direction


def _differences(points: Sequence[Weights], name: str) -> Tensor:
    stacked = torch.stack([point[name].to(_double_dtype(point[name])) for point in points])
    return stacked - stacked[-1]


def random_walk_variance_ratios(n_points: int) -> FloatArray:
    """Return `PathPlane.variance_ratios` of a random walk in many dimensions, ``(point - 1,)``.

    A long random walk has 61 % and 15 % of its variance along its first two axes, although it heads nowhere.

    Reference:
        Antognini and Sohl-Dickstein, "PCA of high dimensional random walks with comparison to neural network
        training", NeurIPS 2018, arXiv:1806.08805.
    """
    variances = 1 / np.sin(np.pi * np.arange(1, n_points) / (2 * n_points)) ** 2
    return variances / variances.sum()


def weights_digest(state_dicts: Sequence[Weights]) -> str:
    """Return a SHA-256 hash over the names, dtypes, shapes and every bit of the tensors."""
    digest = hashlib.sha256()
    for state_dict in state_dicts:
        for name, tensor in sorted(state_dict.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
