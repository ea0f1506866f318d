"""The example and the layer to blame for a bad step."""

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
    """Where in a step the first value that must not be appeared.

    Attributes:
        kind: ``weights``, ``mixture``, ``sources``, ``forward``, ``loss``, ``over_limit``, ``backward``, ``memory``;
            ``unclear`` where the model refuses an example alone; ``none`` where nothing is wrong.
        precision: In which it was looked for.
        place: Of the example in its batch; None where no single one is to blame.
        item: Where that example came from; None where nobody said.
        layer: The module, or for ``weights`` the tensor; empty where there is none.
        position: Of the first bad value in the tensor.
        value: That value.
    """

    kind: str
    precision: str
    place: int | None = None
    item: ItemId | None = None
    layer: str = ""
    position: tuple[int, ...] = ()
    value: float = 0.0

    def sentence(self) -> str:
        """The verdict in words."""
        if self.kind == "none":
            return f"In {self.precision} nothing is wrong."
        where = f"at {list(self.position)}" if self.position else ""
        words = {
            "memory": "memory runs out with a single example",
            "unclear": f"it cannot be told: the model refuses an example alone ({self.layer})",
            "weights": f"the weight {self.layer} is {self.value} {where}",
            "mixture": f"the mixture is {self.value} {where}",
            "sources": f"a source is {self.value} {where}",
            "forward": f"the output of {self.layer} is the first that is {self.value}, {where}",
            "loss": f"the model's output is finite, but its loss is {self.value}",
            "over_limit": f"its loss is {self.value:g}, over the limit",
            "backward": f"the loss is finite, but the gradient turns {self.value} in the backward of {self.layer}",
        }[self.kind].rstrip(", ")
        files = " + ".join(self.item.files) if self.item else ""
        which = f"example {self.place}{f' ({files})' if files else ''}: "
        if self.place is None:
            which = "" if self.kind in ("weights", "memory", "unclear") else "the examples together: "
        return f"In {self.precision}, {which}{words}."


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
    """Find the first example with which a step goes wrong, and where in the model that begins.

    The losses of all examples are looked at before the gradient of any; where none is to blame alone, all together.
    Not compiled, the weights as they are; it leaves no trace in the model.

    Args:
        model: Not wrapped for several processes.
        loss: Per-example loss.
        precision: Number format, and the loss scale.
        batch: The examples of one rank.
        seed: With step and rank, of what the model draws.
        step: Number of the step.
        rank: Number of the process.
        loss_upper_limit: As the step has it.
    """
    for name, tensor in model.named_parameters():
        if (bad := _first_bad(tensor)) is not None:
            return Diagnosis("weights", precision.name, None, None, name, *bad)
    alone = [batch.select([place]) for place in range(len(batch.mixture))]
    unclear = Diagnosis("none", precision.name)
    looks = [(*one, backward) for backward in (False, True) for one in enumerate(alone)]
    for place, some, backward in [*looks, (None, batch, True)]:
        try:
            with _undisturbed(model, seed, step, rank):
                found = _trace(model, loss, precision, some, loss_upper_limit, backward=backward)
        except _CANNOT_BE_TOLD as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            unclear = Diagnosis("memory" if memory else "unclear", precision.name, layer=str(error).split("\n")[0])
            continue
        if found is not None:
            kind, layer, position, value = found
            item = some.items[0] if some.items and place is not None else None
            return Diagnosis(kind, precision.name, place, item, layer, position, value)
    return unclear


def bad_by_gradient(
    model: nn.Module, loss: ExampleLoss, precision: Precision, batch: Batch, *, seed: int, step: int, rank: int
) -> list[int]:
    """Places of the examples whose own gradient is not finite: one forward and backward each.

    None, where the model refuses an example alone, or has not the memory for it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    bad = []
    for place in range(len(batch.mixture)):
        try:
            with _undisturbed(model, seed, step, rank):
                value = compute_losses(model, loss, precision, batch.select([place]))[1].sum()
                scaled = value * precision.scale_on(value.device)
                gradients = torch.autograd.grad(scaled, parameters, allow_unused=True)
        except _CANNOT_BE_TOLD:
            return []
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if not bool(norm.isfinite()):
            bad.append(place)
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
    """Places of the examples whose loss is not finite, or over the limit, if each is alone: one forward each.

    None, as in `bad_by_gradient`.
    """
    bad = []
    for place in range(len(batch.mixture)):
        try:
            with _undisturbed(model, seed, step, rank), torch.no_grad():
                value = compute_losses(model, loss, precision, batch.select([place]))[1]
        except _CANNOT_BE_TOLD:
            return []
        if not bool(value.isfinite().all() & (value.abs() <= limit).all()):
            bad.append(place)
    return bad


_CANNOT_BE_TOLD = (RuntimeError, ValueError)
"""What a model raises that cannot take an example alone, such as BatchNorm over a single value; memory among it."""


@contextmanager
def _undisturbed(model: nn.Module, seed: int, step: int, rank: int) -> Iterator[None]:
    """The step's own random draws, nothing compiled, and buffers as they were afterwards."""
    kept = BufferSnapshot(buffer_locations(model))
    try:
        with seeded_torch(seed, "step", step, rank), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            yield
    finally:
        kept.restore()


Found = tuple[str, str, tuple[int, ...], float]
"""Kind, layer, position and value of a `Diagnosis`."""


def _trace(
    model: nn.Module,
    loss: ExampleLoss,
    precision: Precision,
    batch: Batch,
    loss_upper_limit: float,
    *,
    backward: bool,
) -> Found | None:
    for kind, tensor in (("mixture", batch.mixture), ("sources", batch.sources)):
        if (bad := _first_bad(tensor)) is not None:
            return kind, "", *bad
    forward: list[Found] = []
    gone: dict[int, tuple[tuple[int, ...], float]] = {}
    order: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
        place = len(order)
        order.append(names[module])
        for tensor in iter_tensors(output):
            if not forward and (bad := _first_bad(tensor)) is not None:
                forward.append(("forward", names[module], *bad))
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: hear(place, gradient))

    def hear(place: int, gradient: Tensor) -> None:
        if (bad := _first_bad(gradient)) is not None:
            gone[place] = bad

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(watch) for module in leaves]
    try:
        estimate, losses, _ = compute_losses(model, loss, precision, batch)
        value = losses.sum()
        loss_here = float(value.detach())
        if not forward and (bad := _first_bad(estimate)) is not None:
            forward.append(("forward", f"what follows {order[-1]}" if order else names[model], *bad))
        if forward:
            return forward[0]
        if not math.isfinite(loss_here):
            return "loss", "", (), loss_here
        if abs(loss_here) > loss_upper_limit:
            return "over_limit", "", (), loss_here
        if not backward:
            return None
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        scaled = value * precision.scale_on(value.device)
        gradients = torch.autograd.grad(scaled, list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    if gone:
        last = max(gone)  # the gradient comes from behind: what was run after this module made it so
        after = order[last + 1] if last + 1 < len(order) else "the loss"
        return "backward", f"{after}, or between it and {order[last]}", *gone[last]
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and (bad := _first_bad(gradient)) is not None:
            return "backward", name, *bad
    return None


def _first_bad(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Position and value of the first entry that is not finite."""
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    flat = tensor.detach().reshape(-1)
    first = int((~flat.isfinite()).to(torch.uint8).argmax())
    position = [int(place) for place in torch.unravel_index(torch.tensor(first), tensor.shape)]
    return tuple(position), float(flat[first])
