"""What "auto" comes to: the precision the hardware multiplies natively, and whether compiling pays in the budget."""

import os
import shutil
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from unbraid.recipe import Recipe
from unbraid.robust.precision import best_precision

SECONDS_A_STEP = 0.1
"""What a step is taken for where the budget is given in steps alone."""


class Compiling(NamedTuple):
    """What compiling a model's regions is known to do: the model's attributes ``compile_seconds`` and ``compile_gain``.

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


def choose(recipe: Recipe, model: nn.Module, device: torch.device, *, before: dict[str, Any] | None) -> dict[str, Any]:
    """Precision, compiling and threads of a run, fixed before the first step and taken again on resuming.

    Args:
        recipe: Where it says "auto", or something else.
        model: Whether it is made for compiling.
        device: Where it runs.
        before: What was chosen when the run began.
    """
    asked = recipe.train.precision
    if before is not None:
        return before | ({} if asked == "auto" else {"precision": asked})
    pays = recipe.train.compile == "on" or (recipe.train.compile == "auto" and compiling_pays(recipe, model, device)[0])
    return {
        "precision": best_precision(device) if asked == "auto" else asked,
        "compile": pays,
        "threads": torch.get_num_threads(),
    }


def told(recipe: Recipe, model: nn.Module, device: torch.device, choices: dict[str, Any]) -> str:
    """A sentence on what "auto" came to and why; empty where the recipe left nothing to it."""
    said = []
    if recipe.train.precision == "auto":
        why = {"bf16": "it is multiplied natively here", "fp32": "bf16 is not multiplied natively here"}
        said.append(f"precision is {choices['precision']}, as {why[choices['precision']]}")
    if recipe.train.compile == "auto":
        pays, why_not = compiling_pays(recipe, model, device)
        said.append(f"compile is {'on' if pays else 'off'}, as {why_not}")
    return f"Chosen by auto: {'; '.join(said)}." if said else ""


def compiling_pays(recipe: Recipe, model: nn.Module, device: torch.device) -> tuple[bool, str]:
    """Whether a run does more with compiling than without, and why."""
    if not hasattr(model, "compile_regions"):
        return False, f"{recipe.model.name} has no compile_regions"
    if device.type == "cpu" and not _has_compiler():
        return False, "there is no C++ compiler here"
    known = Compiling(getattr(model, "compile_seconds", 60.0), getattr(model, "compile_gain", 1.2))
    if known.gain <= 1.05:
        return False, f"it makes {recipe.model.name} no faster"
    budgets = [60 * recipe.train.max_minutes, SECONDS_A_STEP * recipe.train.max_steps]
    budget = min(given for given in budgets if given)
    fact = (
        f"it takes about {known.seconds:.0f} s and makes steps of {recipe.model.name} about {known.gain:.1f} times as "
        f"fast: that pays from {known.pays_from / 60:.1f} minutes on"
    )
    return budget >= known.pays_from, fact


def _has_compiler() -> bool:
    return sys.platform == "linux" and any(
        shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
    )
