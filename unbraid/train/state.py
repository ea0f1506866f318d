"""TrainState: all that changes, and so all that a checkpoint holds."""

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

from unbraid.robust.clip import Clipper, FixedClip
from unbraid.robust.filter import LossFilter, StatefulFilter
from unbraid.robust.guard import initialise_optimizer_state
from unbraid.robust.precision import Precision
from unbraid.robust.transform import GradientTransform
from unbraid.train.buffer_snapshot import Place, buffer_locations
from unbraid.train.ddp_recovery import GradientExchange
from unbraid.train.ema import EMA
from unbraid.train.forward import ExampleLoss
from unbraid.train.optim import Constant, Schedule


class FaultWindow:
    """Outcomes of the last steps, and whether they are bad enough to end the run.

    A step whose examples were all easy is no fault. An overflow under fp16 belongs to finding the scale: it counts
    in a row, but not towards the share.
    """

    IN_A_ROW, WINDOW, SHARE, AT_LEAST = 20, 1000, 0.01, 10

    def __init__(self) -> None:
        self.in_a_row = 0
        self.recent: deque[bool] = deque(maxlen=self.WINDOW)

    def add(self, outcome: str) -> None:
        """Count one step."""
        fault = outcome not in ("trained", "all_filtered")
        self.in_a_row = self.in_a_row + 1 if fault else 0
        self.recent.append(fault and outcome != "fp16_overflow")

    def verdict(self) -> str | None:
        """Why the run has to stop; None where it need not."""
        if self.in_a_row >= self.IN_A_ROW:
            return f"{self.in_a_row} steps in a row had to be left out"
        n_faults, allowed = sum(self.recent), max(self.AT_LEAST, self.SHARE * len(self.recent))
        if n_faults > allowed:
            return f"{n_faults} of the last {len(self.recent)} steps had to be left out"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Counts."""
        return {"in_a_row": self.in_a_row, "recent": "".join("1" if fault else "0" for fault in self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where another run stood."""
        self.in_a_row = int(state["in_a_row"])
        self.recent = deque((mark == "1" for mark in state["recent"]), maxlen=self.WINDOW)


@dataclass
class TrainState:
    """A model in training.

    Attributes:
        model: ``(batch, channel, time)`` to ``(batch, source, channel, time)``; wrapped for several processes or not.
        loss: Per-example loss; taken in float32.
        optimizer: Over the model's parameters.
        clipper: Limit on the gradient's norm.
        filters: Weights for finite losses, multiplied.
        transforms: Changes to single gradients, before the whole norm is limited.
        ema: Moving average of the weights, validated and saved in their place; None for none.
        on_bad_example: ``skip`` and ``stop`` leave a step out that holds one; ``rescue`` repeats it on the clean ones.
        precision: Number format of the forward, and the loss scale.
        schedule: Of the learning rate.
        loss_upper_limit: A loss beyond this, by absolute value, is a fault as NaN is.
        seed: For what draws random numbers inside the model.
        step: Steps done, those left out among them; the position in the data follows from it.
        best_loss: Lowest finite validation loss so far.
        best_step: Where that was.
        validated_step: The last step after which was validated.
        elapsed_seconds: Wall time of the run, over all its resumptions.
        faults: Outcomes of the last steps.
        bad_files: Files set aside so far on any rank, and the code of what is wrong with each.
        n_pieces: What each batch is cut into because memory ran out before.
        examples_per_rank: The most examples that a rank has in a step; needed on several processes by filters that
            remember losses.
        held: Whether a step launched before has to be done again first, 0-d; None for no.
        is_behind: Whether steps are under way that have to be done again.
        exchange: Of gradients between processes.
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
    held: Tensor | None = field(default=None, init=False, repr=False)
    is_behind: bool = field(default=False, init=False, repr=False)
    exchange: GradientExchange | None = field(default=None, init=False, repr=False)
    _places: tuple[nn.Module, list[Place]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        initialise_optimizer_state(self.optimizer)
        if isinstance(self.model, DistributedDataParallel):
            self.exchange = GradientExchange(self.model)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrapper for several processes."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def buffer_locations(self) -> list[Place]:
        """Where layers such as BatchNorm keep something; looked for once, as that walks through the model."""
        if self._places is None or self._places[0] is not self.model:
            self._places = self.model, buffer_locations(self.model)
        return self._places[1]

    @property
    def remembering_filters(self) -> list[StatefulFilter]:
        """Filters that learn from the losses of each step."""
        return [cast(StatefulFilter, part) for part in self.filters if hasattr(part, "observe")]

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "clipper": self.clipper, "precision": self.precision}
        parts |= {"schedule": self.schedule, "faults": self.faults, "ema": self.ema}
        parts |= {f"filter.{place}": part for place, part in enumerate(self.filters)}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as nested dicts of tensors, numbers, text and lists.

        ``model`` is what one evaluates with; where training goes on from other weights, those stand beside it.
        """
        state = {name: part.state_dict() for name, part in self._parts().items()}
        if self._judged_apart:
            state["training_weights"] = _copied(self.unwrapped_model)
        with evaluation_weights(self):
            state["model"] = _copied(self.unwrapped_model) if self._judged_apart else self.unwrapped_model.state_dict()
        state["progress"] = {name: getattr(self, name) for name in self._PROGRESS} | {"bad_files": dict(self.bad_files)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where another run stood; the parts must be of the same kinds."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self.ema is not None:
            self.unwrapped_model.load_state_dict(state["model"])
            torch._foreach_copy_(self.ema.weights, [p.detach() for p in self.unwrapped_model.parameters()])
        self.unwrapped_model.load_state_dict(state.get("training_weights", state["model"]))
        for name in self._PROGRESS:
            setattr(self, name, state["progress"][name])
        self.bad_files = dict(state["progress"]["bad_files"])
        self.held, self.is_behind = None, False

    @property
    def _judged_apart(self) -> bool:
        """Whether other weights are judged than trained."""
        return self.ema is not None or _has_modes(self.optimizer)

    _PROGRESS = ("step", "best_loss", "best_step", "validated_step", "elapsed_seconds", "n_pieces")


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _has_modes(optimizer: Optimizer) -> bool:
    """Whether it is schedule-free: such an optimizer keeps other weights in training than it would have judged."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@contextmanager
def evaluation_weights(state: TrainState) -> Iterator[None]:
    """Within it the model has the weights that are validated and saved; afterwards those of training, bit for bit."""
    if not state._judged_apart:
        yield
        return
    optimizer: Any = state.optimizer
    parameters = [p.detach() for p in state.unwrapped_model.parameters()]
    kept = [p.clone() for p in parameters]
    if _has_modes(optimizer):
        optimizer.eval()
    if state.ema is not None:
        torch._foreach_copy_(parameters, state.ema.weights)
    try:
        yield
    finally:
        if _has_modes(optimizer):
            optimizer.train()
        torch._foreach_copy_(parameters, kept)


def first_nonfinite(state: TrainState) -> str | None:
    """Name of the first weight that is not finite, or has optimizer state that is not, or else of a buffer with NaN.

    A buffer may hold infinity, as masks do.
    """
    model = state.unwrapped_model
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return name
        for value in state.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                return f"the optimizer's state of {name}"
    return next((name for name, buffer in model.named_buffers() if bool(buffer.isnan().any())), None)


def set_learning_rate(state: TrainState, factor: float) -> None:
    """Give every parameter group its initial learning rate times the factor."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
