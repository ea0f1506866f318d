"""Autocast and gradient scaling behind one small object."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import RecipeError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """In which number format the model runs, and by what factor its loss is scaled up.

    Weights and their updates stay in float32. Only fp16 needs scaling: its gradients underflow. The scale halves when
    a gradient overflows, and doubles after ``growth_interval`` steps without. It is kept here and not in
    ``torch.amp.GradScaler``, whose ``step`` overwrites the optimizer's ``found_inf``.

    Args:
        name: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        scale: First loss scale under fp16.
        growth_interval: Steps without an overflow until the scale doubles.
    """

    MIN_SCALE = 2.0**-4
    """Where halving ends: an overflow at this scale is no matter of the scale."""

    def __init__(self, name: str = "fp32", *, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        if name not in PRECISIONS:
            raise RecipeError(f"[train] precision = {name!r} is not one of auto, {', '.join(PRECISIONS)}.")
        self.name, self.growth_interval = name, growth_interval
        self._scale = torch.tensor(scale if name == "fp16" else 1.0)
        self._n_good = torch.tensor(0)

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled: a gradient that is not finite is then an overflow first of all."""
        return self.name == "fp16"

    @property
    def scale(self) -> float:
        """The scale as a number; where it lies on an accelerator, this waits for it."""
        return float(self._scale)

    def scale_on(self, device: torch.device) -> Tensor:
        """The scale, 0-d, where the loss is. It stays there: whether it moves is decided without the host."""
        if self._scale.device != device:
            self._scale, self._n_good = self._scale.to(device), self._n_good.to(device)
        return self._scale

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that the model's forward runs in."""
        return torch.autocast(device.type, PRECISIONS[self.name], enabled=self.name != "fp32")

    def update(self, overflowed: Tensor, trained: Tensor) -> None:
        """Move the scale after a step.

        Args:
            overflowed: Whether only the gradient was not finite, 0-d, where the scale is.
            trained: Whether the step was taken; after any other the scale stays.
        """
        if not self.scales:
            return
        shrinks = overflowed & (self._scale > self.MIN_SCALE)
        n_good = torch.where(shrinks, 0, self._n_good + trained)
        grows = n_good >= self.growth_interval
        self._scale = torch.where(shrinks, self._scale / 2, torch.where(grows, self._scale * 2, self._scale))
        self._n_good = torch.where(grows, 0, n_good)

    def state_dict(self) -> dict[str, Any]:
        """Format, scale, and count of good steps."""
        return {"name": self.name, "scale": self.scale, "n_good": int(self._n_good)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where another run stood; a scale that was found for another format means nothing here."""
        if state["name"] != self.name:
            return
        self._scale, self._n_good = torch.tensor(float(state["scale"])), torch.tensor(int(state["n_good"]))


def best_precision(device: torch.device) -> str:
    """What ``precision = "auto"`` takes: bf16 where the hardware multiplies it natively, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"
