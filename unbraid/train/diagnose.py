"""Find the example and the layer that made a step go wrong."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.data.batch import Batch
from unbraid.model_output import iter_tensors
from unbraid.records import ItemId
from unbraid.robust.precision import Precision
from unbraid.seeding import seeded_torch
from unbraid.train.buffer_snapshot import BufferSnapshot, buffer_locations
from unbraid.train.forward import ExampleLoss, compute_losses


@dataclass(frozen=True)
class Diagnosis:
    """Where in a step the first bad value appeared.

    Attributes:
        kind: ``weights``, ``mixture``, ``sources``, ``forward``, ``loss``, ``over_limit``, ``backward``, ``memory``;
            ``unclear`` if the model refuses an example alone; ``none`` if nothing is wrong.
        precision: The number format in which the step was repeated.
        index: Index of the example in its batch; None if no single example is the cause.
        item: Where that example came from; None if unknown.
        layer: The module, or for ``weights`` the tensor; empty if there is none.
        position: Index of the first bad value in its tensor.
        value: That value.
    """

    kind: str
    precision: str
    index: int | None = None
    item: ItemId | None = None
    layer: str = ""
    position: tuple[int, ...] = ()
    value: float = 0.0

    def sentence(self) -> str:
        """Return the diagnosis as a sentence."""
        if self.kind == "none":
            return f"In {self.precision} nothing is wrong."
        where = f"at {list(self.position)}" if self.position else ""
        cause = {
            "memory": "memory runs out with a single example",
            "unclear": f"the cause is unclear, because the model refuses an example alone ({self.layer})",
            "weights": f"the weight {self.layer} is {self.value} {where}",
            "mixture": f"the mixture is {self.value} {where}",
            "sources": f"a source is {self.value} {where}",
            "forward": f"the output of {self.layer} is the first that is {self.value}, {where}",
            "loss": f"the model's output is finite, but its loss is {self.value}",
            "over_limit": f"its loss is {self.value:g}, over the limit",
            "backward": f"the loss is finite, but the gradient turns {self.value} in the backward of {self.layer}",
        }[self.kind].rstrip(", ")
        files = " + ".join(self.item.files) if self.item else ""
        if self.index is not None:
            subject = f"example {self.index}{f' ({files})' if files else ''}: "
        else:
            subject = "" if self.kind in ("weights", "memory", "unclear") else "the examples together: "
        return f"In {self.precision}, {subject}{cause}."


BadValue = tuple[str, str, tuple[int, ...], float]
"""Kind, layer, position and value of a `Diagnosis`."""

_MODEL_REFUSES = (RuntimeError, ValueError)
"""Raised by a model that cannot run on a single example, such as one with BatchNorm, or when memory runs out."""


def diagnose(
    model: nn.Module,
    loss: ExampleLoss,
    precision: Precision,
    batch: Batch,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    loss_upper_limit: float = math.inf,
) -> Diagnosis:
    """Find the first example that makes a step go wrong, and where in the model that begins.

    The losses of all examples are checked before the gradient of any. If no single example is the cause, all of them
    are run together. Nothing is compiled, and model and weights are unchanged afterwards.

    Args:
        model: Not wrapped for several processes.
        loss: One loss per example.
        precision: Number format, and the loss scale.
        batch: The examples of one rank.
        seed: With step and rank, seeds the model's own random draws.
        step: Number of the step.
        rank: Number of the process.
        loss_upper_limit: As in the step.
    """
    for name, tensor in model.named_parameters():
        bad_value = _first_nonfinite(tensor)
        if bad_value is not None:
            return Diagnosis("weights", precision.name, None, None, name, *bad_value)

    # Forward passes are cheap and find most causes, so all of them come before the first backward.
    single_examples = [(index, batch.select([index])) for index in range(len(batch.mixture))]
    attempts: list[tuple[int | None, Batch, bool]] = []
    for backward in (False, True):
        attempts += [(index, example, backward) for index, example in single_examples]
    attempts.append((None, batch, True))

    fallback = Diagnosis("none", precision.name)
    for index, examples, backward in attempts:
        try:
            with _repeated_step(model, seed, step, rank):
                bad = _trace(model, loss, precision, examples, loss_upper_limit, backward=backward)
        except _MODEL_REFUSES as error:
            kind = "memory" if isinstance(error, torch.OutOfMemoryError) else "unclear"
            fallback = Diagnosis(kind, precision.name, layer=str(error).split("\n")[0])
            continue
        if bad is not None:
            kind, layer, position, value = bad
            item = examples.items[0] if examples.items and index is not None else None
            return Diagnosis(kind, precision.name, index, item, layer, position, value)
    return fallback


def bad_by_gradient(
    model: nn.Module, loss: ExampleLoss, precision: Precision, batch: Batch, *, seed: int, step: int, rank: int
) -> list[int]:
    """Return the indices of the examples whose own gradient is not finite, by one forward and backward each.

    The list is empty if the model refuses an example alone, or memory does not suffice for it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    bad = []
    for index in range(len(batch.mixture)):
        try:
            with _repeated_step(model, seed, step, rank):
                value = compute_losses(model, loss, precision, batch.select([index]))[1].sum()
                scaled = value * precision.scale_on(value.device)
                gradients = torch.autograd.grad(scaled, parameters, allow_unused=True)
        except _MODEL_REFUSES:
            return []
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if not bool(norm.isfinite()):
            bad.append(index)
    return bad


def bad_by_loss(
    model: nn.Module,
    loss: ExampleLoss,
    precision: Precision,
    batch: Batch,
    *,
    limit: float,
    seed: int,
    step: int,
    rank: int,
) -> list[int]:
    """Return the indices of the examples whose loss, computed alone, is not finite or over the limit.

    The list is empty if the model refuses an example alone, or memory does not suffice for it.
    """
    bad = []
    for index in range(len(batch.mixture)):
        try:
            with _repeated_step(model, seed, step, rank), torch.no_grad():
                value = compute_losses(model, loss, precision, batch.select([index]))[1]
        except _MODEL_REFUSES:
            return []
        if not bool(value.isfinite().all() & (value.abs() <= limit).all()):
            bad.append(index)
    return bad


@contextmanager
def _repeated_step(model: nn.Module, seed: int, step: int, rank: int) -> Iterator[None]:
    """Repeat the step's own random draws, without compiled code, and restore the buffers afterwards."""
    buffers = BufferSnapshot(buffer_locations(model))
    try:
        with seeded_torch(seed, "step", step, rank), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            yield
    finally:
        buffers.restore()


def _trace(
    model: nn.Module,
    loss: ExampleLoss,
    precision: Precision,
    batch: Batch,
    loss_upper_limit: float,
    *,
    backward: bool,
) -> BadValue | None:
    """Run the batch with hooks on every innermost module, and return the first bad value."""
    for kind, tensor in (("mixture", batch.mixture), ("sources", batch.sources)):
        bad_value = _first_nonfinite(tensor)
        if bad_value is not None:
            return kind, "", *bad_value

    # 1. Hooks note the first bad output, and the bad gradient of each output by the order of execution.
    bad_outputs: list[BadValue] = []
    bad_gradients: dict[int, tuple[tuple[int, ...], float]] = {}
    executed: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def check_output(module: nn.Module, _inputs: Any, output: Any) -> None:
        index = len(executed)
        executed.append(names[module])
        for tensor in iter_tensors(output):
            bad_value = _first_nonfinite(tensor)
            if not bad_outputs and bad_value is not None:
                bad_outputs.append(("forward", names[module], *bad_value))
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, index=index: check_gradient(index, gradient))

    def check_gradient(index: int, gradient: Tensor) -> None:
        bad_value = _first_nonfinite(gradient)
        if bad_value is not None:
            bad_gradients[index] = bad_value

    innermost = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(check_output) for module in innermost]
    try:
        # 2. Forward and loss.
        estimate, losses, _ = compute_losses(model, loss, precision, batch)
        total = losses.sum()
        loss_value = float(total.detach())
        bad_value = _first_nonfinite(estimate)
        if not bad_outputs and bad_value is not None:  # computed outside of any module
            layer = f"what follows {executed[-1]}" if executed else names[model]
            bad_outputs.append(("forward", layer, *bad_value))
        if bad_outputs:
            return bad_outputs[0]
        if not math.isfinite(loss_value):
            return "loss", "", (), loss_value
        if abs(loss_value) > loss_upper_limit:
            return "over_limit", "", (), loss_value
        if not backward:
            return None

        # 3. Backward.
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        scaled = total * precision.scale_on(total.device)
        gradients = torch.autograd.grad(scaled, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if bad_gradients:
        # Backward runs from the end: the module executed after the last bad output made its gradient bad.
        last = max(bad_gradients)
        after = executed[last + 1] if last + 1 < len(executed) else "the loss"
        return "backward", f"{after}, or between it and {executed[last]}", *bad_gradients[last]
    for name, gradient in zip(parameters, gradients, strict=True):
        bad_value = None if gradient is None else _first_nonfinite(gradient)
        if bad_value is not None:
            return "backward", name, *bad_value
    return None


def _first_nonfinite(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Return index and value of the first entry that is not finite, or None."""
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    flat = tensor.detach().reshape(-1)
    first = int((~flat.isfinite()).to(torch.uint8).argmax())  # argmax does not take booleans
    position = [int(index) for index in torch.unravel_index(torch.tensor(first), tensor.shape)]
    return tuple(position), float(flat[first])
