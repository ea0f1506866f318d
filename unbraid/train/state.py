"""TrainState: everything that changes in training, and so everything that a checkpoint holds."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from unbraid.records import Outcome
from unbraid.robust.clip import Clipper, FixedClip
from unbraid.robust.filter import LossFilter, StatefulFilter
from unbraid.robust.guard import initialise_optimizer_state
from unbraid.robust.precision import Precision
from unbraid.robust.transform import GradientTransform
from unbraid.train.buffer_snapshot import BufferLocation, buffer_locations
from unbraid.train.ddp_recovery import GradientExchange
from unbraid.train.ema import EMA
from unbraid.train.forward import ExampleLoss
from unbraid.train.optim import Constant, Schedule


class FaultWindow:
    """The outcomes of the last steps, and whether there are so many faults that the run must end.

    A batch of filtered examples is no fault. An fp16 overflow counts towards faults in a row, but not towards their
    share: while the loss scale is searched for, overflows are normal.
    """

    MAX_IN_A_ROW = 20
    WINDOW = 1000
    MAX_SHARE = 0.01
    ALWAYS_ALLOWED = 10

    def __init__(self) -> None:
        self.n_in_a_row = 0
        self.recent: deque[bool] = deque(maxlen=self.WINDOW)

    def add(self, outcome: Outcome) -> None:
        """Count one step."""
        is_fault = outcome not in ("trained", "all_filtered")
        self.n_in_a_row = self.n_in_a_row + 1 if is_fault else 0
        self.recent.append(is_fault and outcome != "fp16_overflow")

    def reason_to_stop(self) -> str | None:
        """Return why the run has to end, or None."""
        if self.n_in_a_row >= self.MAX_IN_A_ROW:
            return f"{self.n_in_a_row} steps in a row were skipped"
        n_faults = sum(self.recent)
        if n_faults > max(self.ALWAYS_ALLOWED, self.MAX_SHARE * len(self.recent)):
            return f"{n_faults} of the last {len(self.recent)} steps were skipped"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        recent = "".join("1" if is_fault else "0" for is_fault in self.recent)
        return {"in_a_row": self.n_in_a_row, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the counts of another run."""
        self.n_in_a_row = int(state["in_a_row"])
        self.recent = deque((mark == "1" for mark in state["recent"]), maxlen=self.WINDOW)


@dataclass
class TrainState:
    """A model in training.

    Attributes:
        model: ``(batch, channel, time)`` to ``(batch, source, channel, time)``; wrapped in DDP or not.
        loss: One loss per example; computed in float32.
        optimizer: Over the model's parameters.
        clipper: Chooses the largest gradient norm.
        filters: Weights for finite losses; several are multiplied.
        transforms: Changes to single gradients, before the norm of all of them is clipped.
        ema: Moving average of the weights, validated and saved in their place; None for none.
        on_bad_example: ``skip`` and ``stop`` skip a step with a bad example; ``rescue`` repeats it on the clean ones.
        precision: Number format of the forward, and the loss scale.
        schedule: Of the learning rate.
        loss_upper_limit: A loss above this, by absolute value, is a fault just as NaN is.
        seed: For the model's own random draws.
        step: Number of steps done, skipped ones included; the position in the data follows from it.
        best_loss: Lowest finite validation loss so far.
        best_step: The step with the lowest validation loss.
        validated_step: The step of the last validation.
        elapsed_seconds: Wall time of the run, over all its resumptions.
        faults: Outcomes of the last steps.
        bad_files: Files found to be bad on any rank, with the code of what is wrong with each.
        n_pieces: How many pieces each batch is cut into, because memory ran out before.
        examples_per_rank: The most examples that a rank has in one step. Needed on several processes by filters that
            learn from earlier losses.
        repeat_pending: Whether a launched step ran out of memory and is still to be repeated, 0-d on the device, so
            that steps launched after it are not applied before it; None for no.
        exchange: Of gradients between processes; None on one process.
    """

    model: nn.Module
    loss: ExampleLoss
    optimizer: Optimizer
    clipper: Clipper = field(default_factory=FixedClip)
    filters: Sequence[LossFilter] = ()
    transforms: Sequence[GradientTransform] = ()
    ema: EMA | None = None
    on_bad_example: Literal["skip", "rescue", "stop"] = "skip"
    precision: Precision = field(default_factory=Precision)
    schedule: Schedule = field(default_factory=Constant)
    loss_upper_limit: float = 999999.0
    seed: int = 0
    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0
    elapsed_seconds: float = 0.0
    faults: FaultWindow = field(default_factory=FaultWindow)
    bad_files: dict[str, str] = field(default_factory=dict)
    n_pieces: int = 1
    examples_per_rank: int = 0
    repeat_pending: Tensor | None = field(default=None, init=False, repr=False)
    exchange: GradientExchange | None = field(default=None, init=False, repr=False)
    _buffer_locations: tuple[nn.Module, list[BufferLocation]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        # Fused SGD would leave its momentum uninitialised if the very first step were skipped.
        initialise_optimizer_state(self.optimizer)
        if isinstance(self.model, DistributedDataParallel):
            self.exchange = GradientExchange(self.model)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without its DDP wrapper."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def buffer_locations(self) -> list[BufferLocation]:
        """Where layers such as BatchNorm keep buffers; cached, because finding them walks through the model."""
        if self._buffer_locations is None or self._buffer_locations[0] is not self.model:
            self._buffer_locations = self.model, buffer_locations(self.model)
        return self._buffer_locations[1]

    @property
    def stateful_filters(self) -> list[StatefulFilter]:
        """Filters that learn from the losses of each step."""
        return [cast(StatefulFilter, part) for part in self.filters if hasattr(part, "observe")]

    def _stateful_parts(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "clipper": self.clipper,
            "precision": self.precision,
            "schedule": self.schedule,
            "faults": self.faults,
            "ema": self.ema,
        }
        parts |= {f"filter.{index}": loss_filter for index, loss_filter in enumerate(self.filters)}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as nested dicts of tensors, numbers, strings and lists.

        ``model`` holds the weights to evaluate with. If training continues from other weights, as with an EMA, those
        are in ``training_weights``.
        """
        state = {name: part.state_dict() for name, part in self._stateful_parts().items()}
        if self._has_evaluation_weights:
            state["training_weights"] = _cloned(self.unwrapped_model)
        with evaluation_weights(self):
            model = self.unwrapped_model
            state["model"] = _cloned(model) if self._has_evaluation_weights else model.state_dict()
        state["progress"] = self._progress() | {"bad_files": dict(self.bad_files)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of another run with parts of the same kinds."""
        for name, part in self._stateful_parts().items():
            part.load_state_dict(state[name])
        if self.ema is not None:
            self.unwrapped_model.load_state_dict(state["model"])
            torch._foreach_copy_(self.ema.weights, [p.detach() for p in self.unwrapped_model.parameters()])
        self.unwrapped_model.load_state_dict(state.get("training_weights", state["model"]))
        for name in self._PROGRESS:
            setattr(self, name, state["progress"][name])
        self.bad_files = dict(state["progress"]["bad_files"])
        self.repeat_pending = None

    def _progress(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._PROGRESS}

    @property
    def _has_evaluation_weights(self) -> bool:
        """Whether the weights to evaluate with differ from those in training."""
        return self.ema is not None or _is_schedule_free(self.optimizer)

    _PROGRESS = ("step", "best_loss", "best_step", "validated_step", "elapsed_seconds", "n_pieces")


def _cloned(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _is_schedule_free(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is schedule-free: it trains other weights than it evaluates with."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@contextmanager
def evaluation_weights(state: TrainState) -> Iterator[None]:
    """Give the model the weights to validate and save; afterwards those of training again, bit for bit."""
    if not state._has_evaluation_weights:
        yield
        return
    optimizer: Any = state.optimizer
    parameters = [p.detach() for p in state.unwrapped_model.parameters()]
    training_weights = [p.clone() for p in parameters]
    if _is_schedule_free(optimizer):
        optimizer.eval()
    if state.ema is not None:
        torch._foreach_copy_(parameters, state.ema.weights)
    try:
        yield
    finally:
        if _is_schedule_free(optimizer):
            optimizer.train()
        # optimizer.train() undoes eval() only up to rounding: the copy makes it exact
        torch._foreach_copy_(parameters, training_weights)


def first_nonfinite(state: TrainState) -> str | None:
    """Return the name of the first value in training that is not finite, or None; waits for the device.

    Weights, their moving average and the optimizer's state must be finite. Everything else may hold infinity, as masks
    do and a best loss before the first validation, but not NaN.
    """
    # 1. Each weight, with its moving average and what the optimizer knows of it.
    model = state.unwrapped_model
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not bool(parameter.isfinite().all()):
            return name
        if state.ema is not None and not bool(state.ema.weights[index].isfinite().all()):
            return f"the moving average of {name}"
        for value in state.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                return f"the optimizer's state of {name}"

    # 2. Buffers, and every part that remembers: one NaN in a clipper's history would make its next limit NaN.
    parts = {name: part.state_dict() for name, part in state._stateful_parts().items() if name != "optimizer"}
    return first_nan(dict(model.named_buffers())) or first_nan(parts) or first_nan({"progress": state._progress()})


def first_nan(value: Any, name: str = "") -> str | None:
    """Return the path of the first NaN in nested dicts and lists of tensors and numbers, or None."""
    if isinstance(value, Tensor):
        return name if bool(value.isnan().any()) else None
    if isinstance(value, float):
        return name if math.isnan(value) else None
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return None
    paths = (first_nan(part, f"{name}.{key}" if name else str(key)) for key, part in items)
    return next((path for path in paths if path is not None), None)


def set_learning_rate(state: TrainState, factor: float) -> None:
    """Set the learning rate of every parameter group to its initial one times the factor."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
