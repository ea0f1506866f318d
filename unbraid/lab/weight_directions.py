"""Points in the space of weights: filter-normalised random directions, straight lines, the plane of a path."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unbraid.models.bs_roformer import BandLinear, BandSplit
from unbraid.seeding import generator

Floats = npt.NDArray[np.float64]
Weights = Mapping[str, Tensor]
"""A model's state by name, or a difference of two; a name that a difference leaves out is 0 there."""


def combined(anchors: Sequence[Weights], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The sum of anchors, each times its coefficient.

    It is taken in float64 (complex128) and rounded once, and what counts 0 is left out: coefficients ``(0, 1)`` give
    the second anchor bit for bit. Tensors of integers or truth values are the first anchor's.

    Args:
        anchors: States or differences; the first names all tensors, and each sum has the dtype it has there.
        coefficients: ``(anchor,)``.
    """
    return {name: _sum(name, anchors, coefficients) for name in anchors[0]}


def _sum(name: str, anchors: Sequence[Weights], coefficients: Sequence[float]) -> Tensor:
    first = anchors[0][name]
    if not _is_continuous(first):
        return first
    exact = _exact(first)
    total = torch.zeros(first.shape, dtype=exact)
    for anchor, coefficient in zip(anchors, coefficients, strict=True):
        if coefficient != 0 and name in anchor:
            total.add_(anchor[name].to(exact), alpha=float(coefficient))
    return total.to(first.dtype)


def _exact(like: Tensor) -> torch.dtype:
    return torch.complex128 if like.is_complex() else torch.float64


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(frozen=True)
class Filters:
    """Which numbers of a parameter are one filter.

    Attributes:
        axes: Those within a filter.
        rows: How many along the first axis belong together, part after part; all of them where nothing is said.
    """

    axes: tuple[int, ...]
    rows: tuple[int, ...] = ()

    def norms(self, weight: Tensor) -> Tensor:
        """The norm of each number's filter, in float64, of the weight's shape."""
        exact = weight.to(_exact(weight))
        parts = exact.split(list(self.rows)) if self.rows else (exact,)
        norms = [torch.linalg.vector_norm(part, dim=self.axes, keepdim=True).expand(part.shape) for part in parts]
        return torch.cat(norms)


def filters_of(model: nn.Module) -> dict[str, Filters]:
    """The filters of the layers that have a linear layer for each band: an output of one band (and source) is one."""
    found = {}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, BandLinear):
            found[name] = Filters((3,))
        elif isinstance(module, BandSplit):
            found[name] = Filters((0,), tuple(width for n_bands, width in module.runs for _ in range(n_bands)))
    return found


def filter_normalised(
    weights: Weights, seed: int, index: int = 0, *, filters: Mapping[str, Filters] | None = None
) -> dict[str, Tensor]:
    """A random direction in which each filter has the norm that this filter of the weights has.

    A network of ReLUs of which one layer is scaled up, and the next scaled down by the same factor, is the same
    network; drawn like this, the loss along the direction is the same too. That holds of one factor a layer: a factor
    for each filter scales the next layer's columns differently, and so its filters' shapes, not only their norms. A
    filter is a slice along the first axis: an output of a convolution or linear
    layer, a gate of an LSTM; of a transposed convolution, a basis signal; of depthwise filters called ``taps``,
    ``(tap, channel)``, a channel's column. Biases, norms and other tensors with fewer than two axes are left out.

    Args:
        weights: Parameters by name.
        seed: Of the draw.
        index: Which direction of this seed.
        filters: Of parameters for which that is not so, by name; `filters_of` knows them.

    Reference:
        Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv:1712.09913.
    """
    direction = {}
    for place, (name, weight) in enumerate(weights.items()):
        if has_filters(name, weight):
            noise = _normal(weight, generator(seed, "direction", index, place))
            given = (filters or {}).get(name) or _usual(name, weight)
            noise *= given.norms(weight) / given.norms(noise)
            direction[name] = noise.to(weight.dtype)
    return direction


def _normal(like: Tensor, rng: np.random.Generator) -> Tensor:
    """Numbers of a normal distribution, in float64 or complex128."""
    real = torch.from_numpy(rng.standard_normal(like.shape))
    return torch.complex(real, torch.from_numpy(rng.standard_normal(like.shape))) if like.is_complex() else real


def has_filters(name: str, weight: Tensor) -> bool:
    """Whether a parameter is made of filters: neither a bias nor a norm's or activation's own."""
    return _is_continuous(weight) and weight.dim() >= 2 and "bias" not in name.rsplit(".", 1)[-1]


def _usual(name: str, weight: Tensor) -> Filters:
    return Filters((0,) if name.rsplit(".", 1)[-1] == "taps" else tuple(range(1, weight.dim())))


@dataclass(frozen=True)
class PathPlane:
    """The plane through the last point of a path of weights, along the path's two principal axes.

    It need not be the plane that the points lie closest to: that one goes through their mean.

    Attributes:
        axes: Two directions of length 1, at right angles.
        path: Each point's shadow on the plane, in units of the weights, ``(point, 2)``; the last is 0, 0.
        shares: Of the path's variance along every principal axis, from the largest on, ``(point - 1,)``.
        distances: Of each point from its shadow, ``(point,)``.
    """

    axes: tuple[dict[str, Tensor], dict[str, Tensor]]
    path: Floats
    shares: Floats
    distances: Floats


def plane_of(points: Sequence[Weights], names: Sequence[str]) -> PathPlane:
    """The two principal axes of a path, by the products of its points: nothing as large as weights times weights.

    Args:
        points: Three or more states of one model.
        names: Of its parameters; all that counts.

    Raises:
        ValueError: If there are fewer than three points, or they do not span a plane.

    Reference:
        Li et al., arXiv:1712.09913, section 7.2.
    """
    if len(points) < 3:
        raise ValueError(f"A plane needs three points, not {len(points)}.")
    n = len(points)
    products = np.zeros((n, n))  # of the differences to the last point
    for name in names:
        moved = _moved(points, name)
        moved = (torch.view_as_real(moved) if moved.is_complex() else moved).reshape(n, -1)
        products += (moved @ moved.T).numpy()
    centring = np.eye(n) - 1 / n
    variances, vectors = np.linalg.eigh(centring @ products @ centring)
    variances, vectors = variances[::-1], vectors[:, ::-1]  # the largest first
    if not variances[1] > 1e-12 * variances[0]:
        raise ValueError("The points lie on a line, or are one point; they span no plane.")
    mixing = centring @ vectors[:, :2] / np.sqrt(variances[:2])
    mixing = mixing * np.where(products[0] @ mixing > 0, -1.0, 1.0)  # drawn from left to right, and upwards
    path = products @ mixing
    axes = [_axis(points, names, mixing[:, place]) for place in (0, 1)]
    distances = np.sqrt(np.maximum(np.diag(products) - (path**2).sum(1), 0))
    kept = np.maximum(variances[: n - 1], 0)
    return PathPlane((axes[0], axes[1]), path, kept / kept.sum(), distances)


def _axis(points: Sequence[Weights], names: Sequence[str], mixing: Floats) -> dict[str, Tensor]:
    """Differences to the last point, mixed; in float64, so that nothing cancels."""
    moved = ((name, _moved(points, name)) for name in names)  # one at a time
    return {name: torch.tensordot(torch.from_numpy(mixing).to(part.dtype), part, dims=1) for name, part in moved}


def _moved(points: Sequence[Weights], name: str) -> Tensor:
    stacked = torch.stack([point[name].to(_exact(point[name])) for point in points])
    return stacked - stacked[-1]


def random_walk_shares(n_points: int) -> Floats:
    """What `PathPlane.shares` comes to on a random walk in many dimensions, ``(point - 1,)``.

    Of a long one, 61 % and 15 %: a path without any aim looks as if it had two.

    Reference:
        Antognini and Sohl-Dickstein, "PCA of high dimensional random walks with comparison to neural network
        training", NeurIPS 2018, arXiv:1806.08805.
    """
    shares = 1 / np.sin(np.pi * np.arange(1, n_points) / (2 * n_points)) ** 2
    return shares / shares.sum()


def digest_of(parts: Sequence[Weights]) -> str:
    """A hash of tensors: their names, dtypes, shapes and every bit."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
