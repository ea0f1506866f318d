"""Autocast and gradient scaling behind one small object."""

from contextlib import AbstractContextManager
from typing import Any

import torch

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
        self.scale = scale if name == "fp16" else 1.0
        self.n_good = 0

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled: a gradient that is not finite is then an overflow first of all."""
        return self.name == "fp16"

    @property
    def can_shrink(self) -> bool:
        """Whether a gradient that is not finite may be an overflow that a smaller scale cures."""
        return self.scales and self.scale > self.MIN_SCALE

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that the model's forward runs in."""
        return torch.autocast(device.type, PRECISIONS[self.name], enabled=self.name != "fp32")

    def update(self, overflowed: bool) -> None:
        """Move the scale after a step whose losses were fine."""
        if not self.scales:
            return
        if overflowed:
            self.scale, self.n_good = max(self.MIN_SCALE, self.scale / 2), 0
            return
        self.n_good += 1
        if self.n_good >= self.growth_interval:
            self.scale, self.n_good = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """Scale and count of good steps."""
        return {"scale": self.scale, "n_good": self.n_good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where another run stood."""
        self.scale, self.n_good = float(state["scale"]), int(state["n_good"])


def best_precision(device: torch.device) -> str:
    """What ``precision = "auto"`` takes: bf16 where the hardware multiplies it natively, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"
