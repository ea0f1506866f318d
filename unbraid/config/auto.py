"""Resolve "auto": the precision that the hardware multiplies natively, and compiling if the budget repays it."""

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from unbraid.compilation import missing_build_tools
from unbraid.config.recipe import Recipe
from unbraid.robust.precision import best_precision

ASSUMED_STEP_SECONDS = {"cpu": 0.5, "cuda": 0.1}
"""Assumed duration of a step, to convert a budget of steps into time."""


class CompileCost(NamedTuple):
    """Cost and gain of compiling a model's regions: its ``compile_seconds``, and its ``compile_gain`` in a precision.

    Attributes:
        seconds: Seconds that the first step takes longer.
        gain: Factor by which all other steps are faster.
    """

    seconds: float
    gain: float

    @property
    def break_even_seconds(self) -> float:
        """Seconds of training after which as many steps are done with compiling as without; infinity if never."""
        # Solve (t - seconds) * gain = t for t.
        return self.seconds * self.gain / (self.gain - 1) if self.gain > 1 else float("inf")


ASSUMED_ON_GPU = CompileCost(60.0, 1.2)
"""Assumed for every model on a GPU, because the numbers of the models were measured on a CPU."""


def resolve_auto(
    recipe: Recipe, model: nn.Module, device: torch.device, *, before: dict[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """Choose precision, compiling and threads before the first step; a resumed run keeps its choices.

    Args:
        recipe: The recipe; "auto" leaves a choice to this function.
        model: The model, which may have ``compile_regions``.
        device: The device it runs on.
        before: The choices from the start of the run; None for a new run.

    Returns:
        The choices, and a sentence on what "auto" chose and why; empty if nothing new was chosen.
    """
    train = recipe.train
    # A resumed run keeps its choices, except where the recipe now names a value.
    if before is not None:
        choices = dict(before)
        if train.precision != "auto":
            choices["precision"] = train.precision
        if train.compile != "auto":
            choices["compile"] = train.compile == "on"
        return choices, ""

    reasons = []
    precision: str = train.precision
    compiled = train.compile == "on"
    if train.precision == "auto":
        precision = best_precision(device)
        reason = {
            "bf16": "this hardware multiplies it natively",
            "fp32": "this hardware does not multiply bf16 natively",
        }[precision]
        reasons.append(f"precision is {precision}, because {reason}")
    if train.compile == "auto":
        compiled, reason = compiling_pays(recipe, model, device, precision)
        reasons.append(f"compile is {'on' if compiled else 'off'}, because {reason}")
    choices = {"precision": precision, "compile": compiled, "threads": torch.get_num_threads()}
    return choices, f"Chosen by auto: {'; '.join(reasons)}." if reasons else ""


def compiling_pays(recipe: Recipe, model: nn.Module, device: torch.device, precision: str) -> tuple[bool, str]:
    """Return whether a run completes more steps with compiling than without, and the reason in words."""
    # Reasons that need no estimate.
    name = recipe.model.name
    if not hasattr(model, "compile_regions"):
        return False, f"{name} has no compile_regions"
    if sys.platform != "linux":
        return False, "it compiles only on Linux"
    if missing := missing_build_tools(device):
        return False, f"{missing}, but compiling needs it"

    # Cost and gain of this model.
    on_cpu = device.type == "cpu"
    gains = getattr(model, "compile_gain", {})
    cost = CompileCost(getattr(model, "compile_seconds", 60.0), gains.get(precision, 1.2)) if on_cpu else ASSUMED_ON_GPU
    if cost.gain <= 1.05:
        return False, f"it makes {name} no faster in {precision}"

    # The shorter budget in seconds; 0 means no limit.
    minutes = recipe.train.max_minutes
    n_steps = recipe.train.max_steps
    steps_seconds = n_steps * ASSUMED_STEP_SECONDS.get(device.type, 0.1)
    budget_seconds = min(seconds for seconds in (60 * minutes, steps_seconds) if seconds)

    reason = f"it takes about {cost.seconds:.0f} s and makes steps of {name} about {cost.gain:.1f} times as fast"
    reason += "" if on_cpu else " (assumed, not measured on a GPU)"
    reason += f", which pays off after {cost.break_even_seconds / 60:.1f} minutes"
    if budget_seconds < 60 * minutes or not minutes:
        reason += f", and {n_steps} steps are assumed to take {steps_seconds / 60:.1f} minutes"
    return budget_seconds >= cost.break_even_seconds, reason
