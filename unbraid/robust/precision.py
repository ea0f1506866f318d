"""Mixed precision: autocast, and the loss scale that fp16 needs."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import RecipeError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The number format of the model's forward pass, and the scale of its loss.

    Weights and their updates stay in float32. Only fp16 needs a loss scale, because its gradients underflow. The scale
    halves when a gradient overflows, and doubles after ``growth_interval`` steps without an overflow.
    ``torch.amp.GradScaler`` is not used: its ``step`` overwrites the optimizer's ``found_inf``.

    Args:
        name: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        scale: First loss scale under fp16.
        growth_interval: Steps without an overflow until the scale doubles.
    """

    MIN_SCALE = 2.0**-4
    """The scale is not halved further: a gradient that overflows at this scale has another cause."""

    def __init__(self, name: str = "fp32", *, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        if name not in PRECISIONS:
            raise RecipeError(f"[train] precision = {name!r} is unknown. Choose one of auto, {', '.join(PRECISIONS)}.")
        self.name = name
        self.growth_interval = growth_interval
        self._scale = torch.tensor(scale if name == "fp16" else 1.0)
        self._n_good = torch.tensor(0)  # steps taken since the scale last changed

    @property
    def uses_loss_scale(self) -> bool:
        """True under fp16, where a gradient that is not finite is most likely an overflow."""
        return self.name == "fp16"

    @property
    def scale(self) -> float:
        """The loss scale as a number; waits for the accelerator if it lies there."""
        return float(self._scale)

    def scale_on(self, device: torch.device) -> Tensor:
        """Return the loss scale, 0-d, on the device of the loss.

        It stays there, so that the host need not know whether it changes.
        """
        if self._scale.device != device:
            self._scale = self._scale.to(device)
            self._n_good = self._n_good.to(device)
        return self._scale

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context for the model's forward pass."""
        return torch.autocast(device.type, PRECISIONS[self.name], enabled=self.name != "fp32")

    def update(self, overflowed: Tensor, taken: Tensor) -> None:
        """Update the loss scale after a step, with no synchronisation.

        Args:
            overflowed: Whether the gradient was not finite although the loss was, 0-d, on the device of the scale.
            taken: Whether the step was taken, 0-d; a step skipped for another reason changes nothing.
        """
        if not self.uses_loss_scale:
            return
        # An overflow also restarts the count of good steps; both happen on the device of the scale.
        shrinks = overflowed & (self._scale > self.MIN_SCALE)
        n_good = torch.where(shrinks, 0, self._n_good + taken)
        grows = n_good >= self.growth_interval
        # torch.where instead of if: the host never has to read the flags.
        self._scale = torch.where(shrinks, self._scale / 2, torch.where(grows, self._scale * 2, self._scale))
        self._n_good = torch.where(grows, 0, n_good)

    def state_dict(self) -> dict[str, Any]:
        """Return the format, the scale, and the number of steps since the scale changed."""
        return {"name": self.name, "scale": self.scale, "n_good": int(self._n_good)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale of another run; ignored if that run had another format, whose scale means nothing here."""
        if state["name"] != self.name:
            return
        self._scale = torch.tensor(float(state["scale"]))
        self._n_good = torch.tensor(int(state["n_good"]))


def best_precision(device: torch.device) -> str:
    """Return what ``precision = "auto"`` chooses: bf16 if the hardware multiplies it natively, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"
    return "fp32"
