"""Descent on surfaces of two weights: races of optimizers, a cliff and its clippers, gradients through recurrence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unbraid.robust.clip import AutoClip, Clipper, FixedClip, NoClip, clip_
from unbraid.robust.transform import ValueClip
from unbraid.seeding import generator
from unbraid.train.optim import OPTIMIZERS
from unbraid.type_aliases import FloatArray

Loss = Callable[[Tensor], Tensor]
"""Points ``(point, 2)`` to losses ``(point,)``."""


@dataclass(frozen=True)
class Quadratic:
    """A valley: half of ``(x - lowest)' hessian (x - lowest)``.

    Attributes:
        hessian: Its curvature, ``(2, 2)``, symmetric.
        lowest: Where it is 0, ``(2,)``.
    """

    hessian: FloatArray
    lowest: FloatArray

    @classmethod
    def turned(cls, curvatures: tuple[float, float], degrees: float, lowest: tuple[float, float]) -> "Quadratic":
        """Two curvatures along axes turned by so many degrees, so that no optimizer has it easier along x or y."""
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        axes = np.array([[cosine, -sine], [sine, cosine]])
        return cls(axes @ np.diag(curvatures) @ axes.T, np.array(lowest))

    def __call__(self, points: Tensor) -> Tensor:
        """Losses ``(point,)``."""
        away = points - torch.from_numpy(self.lowest)
        return (away @ torch.from_numpy(self.hessian) * away).sum(1) / 2


@dataclass(frozen=True)
class Dents:
    """A round bowl about 0 with Gaussian dents in it, each likely to hold a descent.

    Attributes:
        centres: Of the dents, ``(dent, 2)``.
        depths: ``(dent,)``.
        width: Standard deviation of a dent.
        curvature: Of the bowl.
    """

    centres: FloatArray
    depths: FloatArray
    width: float
    curvature: float

    @classmethod
    def drawn(cls, seed: int, n_dents: int = 70, *, extent: float = 4.0) -> "Dents":
        """Dents in random places of a square, 0.3 to 0.8 deep."""
        rng = generator(seed, "dents")
        return cls(rng.uniform(-extent, extent, (n_dents, 2)), rng.uniform(0.3, 0.8, n_dents), 0.3, 0.5)

    def __call__(self, points: Tensor) -> Tensor:
        """Losses ``(point,)``."""
        squared = (points[:, None] - torch.from_numpy(self.centres)).square().sum(2)
        dents = (torch.from_numpy(self.depths) * (-squared / (2 * self.width**2)).exp()).sum(1)
        return self.curvature * points.square().sum(1) / 2 - dents


@dataclass(frozen=True)
class FedBack:
    """A cliff: one neuron fed back to itself, ``state = sigmoid(w state + b)``, whose last state should be a target.

    Where the loop begins to hold a state, a little more weight decides between two ends, and the loss is a wall.

    Attributes:
        n_times: How often the neuron sees itself.
        target: What the last state should be; the loss is the squared distance.

    Reference:
        Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, arXiv:1211.5063, figure 6.
    """

    n_times: int = 15
    target: float = 0.7

    def __call__(self, points: Tensor) -> Tensor:
        """Losses ``(point,)`` of weights and biases."""
        weight, bias = points.unbind(1)
        state = torch.full_like(weight, 0.5)
        for _ in range(self.n_times):
            state = torch.sigmoid(weight * state + bias)
        return (state - self.target).square()


def evaluate(loss: Loss, points: npt.ArrayLike) -> FloatArray:
    """Losses at points ``(..., 2)``, in one pass."""
    wide = np.asarray(points, dtype=float)
    with torch.no_grad():
        return loss(torch.from_numpy(wide.reshape(-1, 2))).numpy().reshape(wide.shape[:-1])


def grid(
    across: tuple[float, float], up: tuple[float, float], n_points: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Two axes, x and y, each ``(n_points,)``, and the points of their grid, ``(y, x, 2)``."""
    x, y = np.linspace(*across, n_points), np.linspace(*up, n_points)
    return x, y, np.stack(np.meshgrid(x, y), axis=-1)


@dataclass(frozen=True)
class Descent:
    """Where several descents went.

    Attributes:
        points: ``(step + 1, start, 2)``, the start first.
        losses: ``(step + 1, start)``.
        norms: Of the gradient before clipping, ``(step, start)``.
    """

    points: FloatArray
    losses: FloatArray
    norms: FloatArray

    def of(self, which: slice) -> "Descent":
        """Those of some starts."""
        return Descent(self.points[:, which], self.losses[:, which], self.norms[:, which])

    @property
    def outcome(self) -> FloatArray:
        """Mean loss over the last tenth of the steps, ``(start,)``: who swings about is judged by all of the swing."""
        n_last = max(1, len(self.losses) // 10)
        last = np.where(np.isfinite(self.losses[-n_last:]), self.losses[-n_last:], np.inf)
        return last.mean(axis=0)


def descend(
    loss: Loss,
    starts: npt.ArrayLike,
    make: Callable[..., Optimizer],
    lrs: npt.ArrayLike,
    n_steps: int,
    *,
    clip: Callable[[nn.Parameter], object] | None = None,
    apart: bool = True,
) -> Descent:
    """Descend from several starts side by side, in float64, each with a learning rate of its own.

    Every optimizer raced here moves in proportion to its learning rate, and treats each start by itself. So one
    optimizer takes its step for all of them with a learning rate of 1, and each start goes its own share of it.

    Args:
        loss: The surface.
        starts: ``(start, 2)``.
        make: An optimizer, from weights and ``lr``.
        lrs: One for all, or ``(start,)``.
        n_steps: How many steps.
        clip: Changes the gradient of a start in place before each step; called for each in turn, so give a clipper
            that remembers a single one.
        apart: Whether each start is a weight of its own, ``(1, 2)``. All as one, ``(start, 2)``, is several times as
            fast, and right where an optimizer treats each number by itself and nothing is clipped.
    """
    place = torch.from_numpy(np.array(starts, dtype=float))
    share = torch.from_numpy(np.broadcast_to(np.asarray(lrs, dtype=float), len(place)).copy())[:, None]
    size = 1 if apart else len(place)
    weights = [nn.Parameter(part.clone()) for part in place.split(size)]
    optimizer = make(weights, lr=1.0)
    points, losses, norms = [place.numpy().copy()], [], []
    for _ in range(n_steps):
        at = place.clone().requires_grad_()
        value = loss(at)
        (gradient,) = torch.autograd.grad(value.sum(), at)
        norms.append(gradient.norm(dim=1).numpy())
        for weight, own in zip(weights, gradient.split(size), strict=True):
            weight.grad = own.clone()
            if clip is not None:
                clip(weight)
        optimizer.step()
        place = place + share * (torch.cat(list[Tensor](weights)).detach() - place)
        torch._foreach_copy_([weight.detach() for weight in weights], list(place.split(size)))
        points.append(place.numpy().copy())
        losses.append(value.detach().numpy())
    losses.append(evaluate(loss, points[-1]))
    return Descent(np.stack(points), np.stack(losses), np.stack(norms))


RACERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": OPTIMIZERS["sgd"],
    "momentum": partial(OPTIMIZERS["sgd"], momentum=0.9),
    "RMSprop": OPTIMIZERS["rmsprop"],
    "Adam": OPTIMIZERS["adam"],
    "AdamW": OPTIMIZERS["adamw"],
    "Muon": partial(OPTIMIZERS["muon"], min_side=1),
}
"""Each takes weights and ``lr``; all else is as recipes have it, but that to Muon a row of two is a matrix too."""

BY_NUMBER = frozenset(RACERS) - {"Muon"}
"""Those that treat each number of a weight by itself."""

GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""The learning rates that a race tries for each optimizer."""


@dataclass(frozen=True)
class Racer:
    """An optimizer at its own best learning rate.

    Attributes:
        lr: That of the grid with the lowest median outcome over all starts.
        descent: How it went with it.
    """

    lr: float
    descent: Descent


def race(
    loss: Loss,
    starts: npt.ArrayLike,
    n_steps: int,
    *,
    racers: Mapping[str, Callable[..., Optimizer]] = RACERS,
    lrs: Sequence[float] = GRID,
) -> dict[str, Racer]:
    """Race optimizers from the same starts, each at the best learning rate of a grid for it.

    Args:
        loss: The surface.
        starts: ``(start, 2)``.
        n_steps: How many steps for each learning rate.
        racers: Each takes weights and ``lr``.
        lrs: The grid.
    """
    wide = np.asarray(starts, dtype=float)
    best = {}
    for name, make in racers.items():
        everywhere, rates = np.tile(wide, (len(lrs), 1)), np.repeat(lrs, len(wide))
        all_tried = descend(loss, everywhere, make, rates, n_steps, apart=name not in BY_NUMBER)
        tried = [Racer(lr, all_tried.of(slice(n * len(wide), (n + 1) * len(wide)))) for n, lr in enumerate(lrs)]
        best[name] = min(tried, key=lambda racer: float(np.median(racer.descent.outcome)))
    return best


def clippings(max_norm: float, max_value: float, percentile: float) -> dict[str, Clipper | ValueClip]:
    """The product's own clippers, fresh, by what a figure calls them."""
    return {
        "no clipping": NoClip(),
        "by value": ValueClip(max_value=max_value),
        "fixed norm": FixedClip(max_norm=max_norm),
        "AutoClip": AutoClip(percentile=percentile),
    }


def clip_by(clipper: Clipper | ValueClip, weight: nn.Parameter) -> None:
    """Clip a gradient in place by a limit on its norm, or by value."""
    if not isinstance(clipper, ValueClip):
        clip_(weight, clipper)
    elif weight.grad is not None:
        clipper(weight, weight.grad)


def autoclip_limits(norms: npt.ArrayLike, percentile: float) -> FloatArray:
    """The limit that `AutoClip` sets in each step of a series of norms, ``(step,)``."""
    clipper, known = AutoClip(percentile=percentile), torch.as_tensor(np.asarray(norms, dtype=float))
    return np.array([float(clipper(norm, norm.isfinite())) for norm in known])


def training_norms(seed: int, n_steps: int = 600, *, batch_size: int = 8) -> FloatArray:
    """Gradient norms of a small training, ``(step,)``: a net of 16 tanh units fits a sine from noisy points.

    One label in 25 is off by far, as bad examples are: most norms are small, and a few very large.
    """
    rng = generator(seed, "training norms")
    weights = [nn.Parameter(torch.from_numpy(rng.normal(0, scale, shape))) for shape, scale in _SHAPES]
    optimizer, norms = torch.optim.SGD(weights, lr=0.02), []
    for _ in range(n_steps):
        x = torch.from_numpy(rng.uniform(-1, 1, (batch_size, 1)))
        outlier = torch.from_numpy((rng.random((batch_size, 1)) < 0.04) * rng.normal(0, 5, (batch_size, 1)))
        noise = torch.from_numpy(rng.normal(0, 0.1, (batch_size, 1)))
        estimate = torch.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
        optimizer.zero_grad()
        (estimate - torch.sin(3 * x) - outlier - noise).square().mean().backward()
        norms.append(float(clip_(weights, FixedClip(max_norm=5.0))))
        optimizer.step()
    return np.array(norms)


_SHAPES = (((1, 16), 2.0), ((16,), 1.0), ((16, 1), 0.25), ((1,), 0.1))


def orthogonal(rng: np.random.Generator, n_units: int) -> FloatArray:
    """A random orthogonal matrix: times a factor it has all its eigenvalues at that radius."""
    q, r = np.linalg.qr(rng.normal(size=(n_units, n_units)))
    return q * np.sign(np.diag(r))


def recurrent_gradients(
    weight: npt.ArrayLike, inputs: npt.ArrayLike, direction: npt.ArrayLike, *, linear: bool = False
) -> FloatArray:
    """Gradient of a loss at the end by the state so many steps before, ``(time + 1, unit)``, distance 0 first.

    The net is ``state = tanh(W state + input)``, or without the tanh, and the loss ``direction`` times the last
    state. Without the tanh the gradient at distance k is ``(W')^k direction``.

    Args:
        weight: W, ``(unit, unit)``.
        inputs: ``(time, unit)``.
        direction: ``(unit,)``.
        linear: Without the tanh.
    """
    w, drive, end = (torch.as_tensor(np.asarray(given, dtype=float)) for given in (weight, inputs, direction))
    states = [torch.zeros(len(end), dtype=torch.float64, requires_grad=True)]
    for one in drive:
        state = w @ states[-1] + one
        states.append(state if linear else torch.tanh(state))
    found = torch.autograd.grad(end @ states[-1], states)
    return torch.stack(found[::-1]).numpy()


def lstm_gradients(
    rng: np.random.Generator, inputs: npt.ArrayLike, direction: npt.ArrayLike, forget_bias: float
) -> FloatArray:
    """As `recurrent_gradients` for an LSTM, by its whole state: output beside cell, ``(time + 1, 2 unit)``.

    Output and cell count as two states that could be set apart, so that nothing is counted twice.

    Args:
        rng: Draws weights as PyTorch does, evenly within one over the root of the units.
        inputs: ``(time, unit)``.
        direction: ``(unit,)``.
        forget_bias: Of the gate that keeps the cell; 0 keeps about half of it in each step.
    """
    drive, end = (torch.as_tensor(np.asarray(given, dtype=float)) for given in (inputs, direction))
    n_units = len(end)
    cell = nn.LSTMCell(n_units, n_units, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.from_numpy(rng.uniform(-1, 1, parameter.shape) / n_units**0.5))
        cell.bias_ih[n_units : 2 * n_units] = forget_bias
        cell.bias_hh[n_units : 2 * n_units] = 0
    states = [(torch.zeros(1, n_units, dtype=torch.float64),) * 2]
    gradients: list[tuple[Tensor, ...]] = [(end[None], torch.zeros_like(end)[None])]
    with torch.no_grad():
        for one in drive:
            states.append(cell(one[None], states[-1]))
    for one, state in zip(drive.flip(0), states[-2::-1], strict=True):
        leaves = tuple(part.detach().clone().requires_grad_() for part in state)
        gradients.append(torch.autograd.grad(cell(one[None], leaves), leaves, gradients[-1]))
    return torch.stack([torch.cat(pair, dim=1)[0] for pair in gradients]).numpy()
