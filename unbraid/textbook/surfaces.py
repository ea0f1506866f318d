"""Descent on surfaces of two weights: optimizer races, a cliff and its clippers, gradients through recurrence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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

Surface = Callable[[Tensor], Tensor]
"""Points ``(point, 2)`` to losses ``(point,)``."""


@dataclass(frozen=True)
class Quadratic:
    """A valley: half of ``(x - minimum)' hessian (x - minimum)``.

    Attributes:
        hessian: ``(2, 2)``, symmetric.
        minimum: Point where the loss is 0, ``(2,)``.
    """

    hessian: FloatArray
    minimum: FloatArray

    @classmethod
    def rotated(cls, curvatures: tuple[float, float], degrees: float, minimum: tuple[float, float]) -> "Quadratic":
        """Return a valley with these curvatures along rotated axes.

        Rotation makes it fair: optimizers that scale each coordinate gain nothing from a valley along x or y.
        """
        cosine = np.cos(np.radians(degrees))
        sine = np.sin(np.radians(degrees))
        axes = np.array([[cosine, -sine], [sine, cosine]])
        return cls(axes @ np.diag(curvatures) @ axes.T, np.array(minimum))

    def __call__(self, points: Tensor) -> Tensor:
        """Return losses, ``(point,)``."""
        offset = points - torch.from_numpy(self.minimum)
        return (offset @ torch.from_numpy(self.hessian) * offset).sum(1) / 2


@dataclass(frozen=True)
class DentedBowl:
    """A round bowl around 0 with Gaussian dents, each of which may trap a descent.

    Attributes:
        centres: Centres of the dents, ``(dent, 2)``.
        depths: ``(dent,)``.
        width: Standard deviation of each dent.
        curvature: Curvature of the bowl.
    """

    centres: FloatArray
    depths: FloatArray
    width: float
    curvature: float

    @classmethod
    def random(cls, seed: int, n_dents: int = 70, *, extent: float = 4.0) -> "DentedBowl":
        """Return a bowl with dents at random places of a square, 0.3 to 0.8 deep."""
        rng = generator(seed, "dents")
        centres = rng.uniform(-extent, extent, (n_dents, 2))
        depths = rng.uniform(0.3, 0.8, n_dents)
        return cls(centres, depths, width=0.3, curvature=0.5)

    def __call__(self, points: Tensor) -> Tensor:
        """Return losses, ``(point,)``."""
        squared_distance = (points[:, None] - torch.from_numpy(self.centres)).square().sum(2)
        dents = (torch.from_numpy(self.depths) * (-squared_distance / (2 * self.width**2)).exp()).sum(1)
        return self.curvature * points.square().sum(1) / 2 - dents


@dataclass(frozen=True)
class RecurrentNeuron:
    """A cliff: one neuron with feedback, ``state = sigmoid(w state + b)``, whose last state should equal a target.

    Around the weight at which the loop begins to hold a state, a tiny change of the weight decides between two final
    states, and the loss is a wall.

    Attributes:
        n_times: Number of time steps.
        target: Target of the last state; the loss is the squared distance.

    Reference:
        Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, arXiv:1211.5063, figure 6.
    """

    n_times: int = 15
    target: float = 0.7

    def __call__(self, points: Tensor) -> Tensor:
        """Return the losses of weights and biases, ``(point,)``."""
        weight, bias = points.unbind(1)
        state = torch.full_like(weight, 0.5)
        for _ in range(self.n_times):
            state = torch.sigmoid(weight * state + bias)
        return (state - self.target).square()


def losses_at(surface: Surface, points: npt.ArrayLike) -> FloatArray:
    """Return the losses at points, ``(..., 2)`` to ``(...,)``, in one pass."""
    array = np.asarray(points, dtype=float)
    with torch.no_grad():
        return surface(torch.from_numpy(array.reshape(-1, 2))).numpy().reshape(array.shape[:-1])


def grid_points(
    x_range: tuple[float, float], y_range: tuple[float, float], n_points: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the axes x and y, ``(n_points,)`` each, and the points of their grid, ``(y, x, 2)``."""
    x = np.linspace(*x_range, n_points)
    y = np.linspace(*y_range, n_points)
    return x, y, np.stack(np.meshgrid(x, y), axis=-1)


@dataclass(frozen=True)
class Descent:
    """Paths of several descents.

    Attributes:
        points: ``(step + 1, start, 2)``, with the starting points first.
        losses: ``(step + 1, start)``.
        grad_norms: Gradient norms before clipping, ``(step, start)``.
    """

    points: FloatArray
    losses: FloatArray
    grad_norms: FloatArray

    @property
    def final_loss(self) -> FloatArray:
        """Mean loss over the last tenth of the steps, ``(start,)``; infinite if one of them is not finite.

        An optimizer that oscillates would otherwise be ranked by where it happens to be at the end.
        """
        n_last = max(1, len(self.losses) // 10)
        last = np.where(np.isfinite(self.losses[-n_last:]), self.losses[-n_last:], np.inf)
        return last.mean(axis=0)


def descend(
    surface: Surface,
    starts: npt.ArrayLike,
    make_optimizer: Callable[..., Optimizer],
    lrs: npt.ArrayLike,
    n_steps: int,
    *,
    clip: Callable[[nn.Parameter], object] | None = None,
    one_weight_per_start: bool = True,
) -> Descent:
    """Descend from several starts side by side in float64, each with its own learning rate.

    The steps of every optimizer here are proportional to its learning rate. So one optimizer takes a step for all
    starts with a learning rate of 1, and each start moves its own fraction of it.

    Args:
        surface: The loss.
        starts: ``(start, 2)``.
        make_optimizer: Takes weights and ``lr``.
        lrs: One learning rate for all starts, or ``(start,)``.
        n_steps: Number of steps.
        clip: Changes the gradient of one start in place before each step. It is called for each start in turn, so
            with a clipper that has a memory, pass a single start.
        one_weight_per_start: Makes each start a parameter ``(1, 2)``. False makes all of them one parameter
            ``(start, 2)``: several times as fast, and the same for an elementwise optimizer without clipping.
    """
    points = torch.from_numpy(np.array(starts, dtype=float))
    lr_column = torch.from_numpy(np.broadcast_to(np.asarray(lrs, dtype=float), len(points)).copy())[:, None]
    n_per_weight = 1 if one_weight_per_start else len(points)
    weights = [nn.Parameter(values.clone()) for values in points.split(n_per_weight)]
    optimizer = make_optimizer(weights, lr=1.0)
    all_points = [points.numpy().copy()]
    all_losses = []
    all_norms = []
    for _ in range(n_steps):
        # One backward for all starts; the gradients are then handed to their parameters.
        variables = points.clone().requires_grad_()
        losses = surface(variables)
        (gradient,) = torch.autograd.grad(losses.sum(), variables)
        all_norms.append(gradient.norm(dim=1).numpy())
        for weight, weight_gradient in zip(weights, gradient.split(n_per_weight), strict=True):
            weight.grad = weight_gradient.clone()
            if clip is not None:
                clip(weight)
        optimizer.step()

        # Scale each start's step by its learning rate, and put the parameters where the starts now are.
        points = points + lr_column * (torch.cat(list[Tensor](weights)).detach() - points)
        torch._foreach_copy_([weight.detach() for weight in weights], list(points.split(n_per_weight)))
        all_points.append(points.numpy().copy())
        all_losses.append(losses.detach().numpy())
    all_losses.append(losses_at(surface, all_points[-1]))
    return Descent(np.stack(all_points), np.stack(all_losses), np.stack(all_norms))


RACE_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": OPTIMIZERS["sgd"],
    "momentum": partial(OPTIMIZERS["sgd"], momentum=0.9),
    "RMSprop": OPTIMIZERS["rmsprop"],
    "Adam": OPTIMIZERS["adam"],
    "AdamW": OPTIMIZERS["adamw"],
    "Muon": partial(OPTIMIZERS["muon"], min_side=1),
}
"""Optimizers by name, with a recipe's defaults; only Muon is told to treat a row of two weights as a matrix."""

ELEMENTWISE = frozenset(RACE_OPTIMIZERS) - {"Muon"}
"""Optimizers that treat each element of a weight by itself."""

LR_GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Learning rates that a race tries for each optimizer."""


class TunedDescent(NamedTuple):
    """An optimizer's descent at its best learning rate."""

    lr: float
    descent: Descent


def race(
    surface: Surface,
    starts: npt.ArrayLike,
    n_steps: int,
    *,
    optimizers: Mapping[str, Callable[..., Optimizer]] = RACE_OPTIMIZERS,
    lrs: Sequence[float] = LR_GRID,
) -> dict[str, TunedDescent]:
    """Race optimizers from the same starts, each at its best learning rate of a grid.

    The best learning rate has the lowest median final loss over the starts.

    Args:
        surface: The loss.
        starts: ``(start, 2)``.
        n_steps: Number of steps for each learning rate.
        optimizers: By name; each takes weights and ``lr``.
        lrs: The grid.
    """
    start_points = np.asarray(starts, dtype=float)
    n_starts = len(start_points)
    best = {}
    for name, make_optimizer in optimizers.items():
        # All learning rates in one descent: every start once for each of them.
        all_runs = descend(
            surface,
            np.tile(start_points, (len(lrs), 1)),
            make_optimizer,
            np.repeat(lrs, n_starts),
            n_steps,
            one_weight_per_start=name not in ELEMENTWISE,
        )
        candidates = []
        for index, lr in enumerate(lrs):
            runs = slice(index * n_starts, (index + 1) * n_starts)
            descent = Descent(all_runs.points[:, runs], all_runs.losses[:, runs], all_runs.grad_norms[:, runs])
            candidates.append(TunedDescent(lr, descent))
        best[name] = min(candidates, key=lambda tuned: float(np.median(tuned.descent.final_loss)))
    return best


def make_clippers(max_norm: float, max_value: float, percentile: float) -> dict[str, Clipper | ValueClip]:
    """Return new clippers of the library, by the names that figures use."""
    return {
        "no clipping": NoClip(),
        "by value": ValueClip(max_value=max_value),
        "fixed norm": FixedClip(max_norm=max_norm),
        "AutoClip": AutoClip(percentile=percentile),
    }


def clip_gradient(clipper: Clipper | ValueClip, weight: nn.Parameter) -> None:
    """Clip a gradient in place, by its norm or by value."""
    if not isinstance(clipper, ValueClip):
        clip_(weight, clipper)
    elif weight.grad is not None:
        clipper(weight, weight.grad)


def autoclip_max_norms(norms: npt.ArrayLike, percentile: float) -> FloatArray:
    """Return the limit that `AutoClip` sets at each step of a series of gradient norms, ``(step,)``."""
    clipper = AutoClip(percentile=percentile)
    series = torch.as_tensor(np.asarray(norms, dtype=float))
    return np.array([float(clipper(norm, norm.isfinite())) for norm in series])


def training_norms(seed: int, n_steps: int = 600, *, batch_size: int = 8) -> FloatArray:
    """Return the gradient norms of a small training run, ``(step,)``: 16 tanh units fit a sine from noisy points.

    One label in 25 is an outlier, so most norms are small and a few are very large.
    """
    rng = generator(seed, "training norms")
    # Shape and initial standard deviation of: input weights, hidden biases, output weights, output bias.
    layers = (((1, 16), 2.0), ((16,), 1.0), ((16, 1), 0.25), ((1,), 0.1))
    weights = [nn.Parameter(torch.from_numpy(rng.normal(0, scale, shape))) for shape, scale in layers]
    optimizer = torch.optim.SGD(weights, lr=0.02)
    norms = []
    for _ in range(n_steps):
        x = torch.from_numpy(rng.uniform(-1, 1, (batch_size, 1)))
        outlier = torch.from_numpy((rng.random((batch_size, 1)) < 0.04) * rng.normal(0, 5, (batch_size, 1)))
        noise = torch.from_numpy(rng.normal(0, 0.1, (batch_size, 1)))
        target = torch.sin(3 * x) + outlier + noise
        estimate = torch.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
        optimizer.zero_grad()
        (estimate - target).square().mean().backward()
        # Without a limit one outlier could send the weights off for good.
        norms.append(float(clip_(weights, FixedClip(max_norm=5.0))))
        optimizer.step()
    return np.array(norms)


def random_orthogonal(rng: np.random.Generator, n_units: int) -> FloatArray:
    """Return a random orthogonal matrix; times r, all its eigenvalues have absolute value r."""
    q, r = np.linalg.qr(rng.normal(size=(n_units, n_units)))
    # QR leaves the signs to the implementation; this makes the matrix unique.
    return q * np.sign(np.diag(r))


def recurrent_gradients(
    weight: npt.ArrayLike, inputs: npt.ArrayLike, direction: npt.ArrayLike, *, linear: bool = False
) -> FloatArray:
    """Return the gradient of a final loss by each earlier state of a recurrent net, the last state first.

    The net is ``state = tanh(W state + input)``, and the loss is ``direction`` times the last state. Without the tanh
    the gradient k steps back is ``(W')^k direction``.

    Args:
        weight: W, ``(unit, unit)``.
        inputs: ``(time, unit)``.
        direction: ``(unit,)``.
        linear: Drop the tanh.

    Returns:
        ``(time + 1, unit)``; row k is the gradient k steps back.
    """
    w = torch.as_tensor(np.asarray(weight, dtype=float))
    loss_direction = torch.as_tensor(np.asarray(direction, dtype=float))
    states = [torch.zeros(len(loss_direction), dtype=torch.float64, requires_grad=True)]
    for net_input in torch.as_tensor(np.asarray(inputs, dtype=float)):
        state = w @ states[-1] + net_input
        states.append(state if linear else torch.tanh(state))
    gradients = torch.autograd.grad(loss_direction @ states[-1], states)
    return torch.stack(gradients[::-1]).numpy()


def lstm_gradients(
    rng: np.random.Generator, inputs: npt.ArrayLike, direction: npt.ArrayLike, forget_bias: float
) -> FloatArray:
    """Return the gradient of a final loss by each earlier state of an LSTM, the last state first.

    The state is output and cell side by side. They count as two independent states, so that no path counts twice.

    Args:
        rng: Draws the weights as PyTorch does, uniformly within 1 / root of the number of units.
        inputs: ``(time, unit)``.
        direction: The loss is this times the last output, ``(unit,)``.
        forget_bias: Bias of the forget gate; with 0 it keeps about half of the cell in each step.

    Returns:
        ``(time + 1, 2 unit)``; row k is the gradient k steps back.
    """
    input_series = torch.as_tensor(np.asarray(inputs, dtype=float))
    loss_direction = torch.as_tensor(np.asarray(direction, dtype=float))
    n_units = len(loss_direction)
    cell = nn.LSTMCell(n_units, n_units, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.from_numpy(rng.uniform(-1, 1, parameter.shape) / n_units**0.5))
        # The second quarter of PyTorch's LSTM biases is the forget gate's, and both biases are added.
        cell.bias_ih[n_units : 2 * n_units] = forget_bias
        cell.bias_hh[n_units : 2 * n_units] = 0

    # Forward: remember every state, (output, cell).
    states = [(torch.zeros(1, n_units, dtype=torch.float64),) * 2]
    with torch.no_grad():
        for net_input in input_series:
            states.append(cell(net_input[None], states[-1]))

    # Backward, one step at a time: each step's states are leaves, so output and cell have separate gradients.
    gradients: list[tuple[Tensor, ...]] = [(loss_direction[None], torch.zeros_like(loss_direction)[None])]
    for net_input, state in zip(input_series.flip(0), states[-2::-1], strict=True):
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in state)
        gradients.append(torch.autograd.grad(cell(net_input[None], leaves), leaves, gradients[-1]))
    return torch.stack([torch.cat(pair, dim=1)[0] for pair in gradients]).numpy()
