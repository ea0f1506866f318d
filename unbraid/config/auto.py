"""What "auto" comes to: the precision the hardware multiplies natively, and whether compiling pays in the budget."""

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from unbraid.compilation import missing_build_tools
from unbraid.config.recipe import Recipe
from unbraid.robust.precision import best_precision

SECONDS_A_STEP = {"cpu": 0.5, "cuda": 0.1}
"""What a step is taken for where the budget is given in steps alone."""


class Compiling(NamedTuple):
    """What compiling a model's regions is known to do: its ``compile_seconds``, and ``compile_gain`` by precision.

    Attributes:
        seconds: How much longer the first step takes.
        gain: How many times as fast the others are then.
    """

    seconds: float
    gain: float

    @property
    def pays_from(self) -> float:
        """Seconds of training from which on more steps are done with it than without."""
        return self.seconds * self.gain / (self.gain - 1) if self.gain > 1 else float("inf")


ON_A_GPU = Compiling(60.0, 1.2)
"""What is taken for granted there: the figures of the models were measured on a CPU."""


def choose(
    recipe: Recipe, model: nn.Module, device: torch.device, *, before: dict[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """Precision, compiling and threads of a run, fixed before the first step and taken again on resuming.

    Args:
        recipe: Where it says "auto", or something else.
        model: Whether it is made for compiling.
        device: Where it runs.
        before: What was chosen when the run began.

    Returns:
        The choices, and a sentence on what "auto" came to and why; empty where nothing new was left to it.
    """
    train = recipe.train
    if before is not None:
        asked = {} if train.precision == "auto" else {"precision": train.precision}
        return before | asked | ({} if train.compile == "auto" else {"compile": train.compile == "on"}), ""
    said = []
    precision: str = train.precision
    compiled = train.compile == "on"
    if train.precision == "auto":
        precision = best_precision(device)
        why = {"bf16": "it is multiplied natively here", "fp32": "bf16 is not multiplied natively here"}
        said.append(f"precision is {precision}, as {why[precision]}")
    if train.compile == "auto":
        compiled, reason = compiling_pays(recipe, model, device, precision)
        said.append(f"compile is {'on' if compiled else 'off'}, as {reason}")
    choices = {"precision": precision, "compile": compiled, "threads": torch.get_num_threads()}
    return choices, f"Chosen by auto: {'; '.join(said)}." if said else ""


def compiling_pays(recipe: Recipe, model: nn.Module, device: torch.device, precision: str) -> tuple[bool, str]:
    """Whether a run does more with compiling than without, and why."""
    name = recipe.model.name
    if not hasattr(model, "compile_regions"):
        return False, f"{name} has no compile_regions"
    if sys.platform != "linux":
        return False, "it is left out on other systems than Linux"
    if absent := missing_build_tools(device):
        return False, f"{absent}, which compiling needs"
    on_cpu = device.type == "cpu"
    gains = getattr(model, "compile_gain", {})
    known = Compiling(getattr(model, "compile_seconds", 60.0), gains.get(precision, 1.2)) if on_cpu else ON_A_GPU
    if known.gain <= 1.05:
        return False, f"it makes {name} no faster in {precision}"
    minutes, steps = recipe.train.max_minutes, recipe.train.max_steps
    by_steps = steps * SECONDS_A_STEP.get(device.type, 0.1)
    budget = min(given for given in (60 * minutes, by_steps) if given)
    fact = f"it takes about {known.seconds:.0f} s and makes steps of {name} about {known.gain:.1f} times as fast"
    fact += "" if on_cpu else " (supposed, not measured on a GPU)"
    fact += f", which pays from {known.pays_from / 60:.1f} minutes on"
    if budget < 60 * minutes or not minutes:
        fact += f", and {steps} steps are taken for {by_steps / 60:.1f}"
    return budget >= known.pays_from, fact
