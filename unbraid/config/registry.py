"""A recipe's names turned into objects: an entry of a registry, or one's own from a file beside the recipe."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbraid.config.recipe import Component, Recipe
from unbraid.config.schema import checked
from unbraid.errors import RecipeError, nearest
from unbraid.losses import LOSS_INPUTS, LOSSES, SignalLoss, loss_inputs
from unbraid.losses.pairwise import Term
from unbraid.losses.pit import SeparationLoss

MAY_BE_ZERO = frozenset({"skip"})
"""Whole numbers of a model that mean something when they are 0; all others count something there must be."""


def find_component(
    kind: str, part: Component, registry: dict[str, Callable[..., Any]], folder: Path | None
) -> Callable[..., Any]:
    """The object that a name stands for: an entry of the registry, or ``my_file:MyClass`` beside the recipe.

    Args:
        kind: Name of the table, for messages.
        part: The name.
        registry: Built-in entries.
        folder: Where to look for one's own; None where one's own code must not run.

    Raises:
        RecipeError: If there is no such thing.
    """
    if part.name in registry:
        return registry[part.name]
    file, colon, attribute = part.name.partition(":")
    if not colon:
        raise RecipeError(
            f"[{kind}] name = {part.name!r} is not one of {', '.join(sorted(registry))}.{nearest(part.name, registry)} "
            "For your own, write 'my_file:MyClass'."
        )
    if folder is None:
        raise RecipeError(f"[{kind}] name = {part.name!r} is code that came with the checkpoint; --trust lets it run.")
    path = next((path for path in (folder / f"{file}.py", Path.cwd() / f"{file}.py") if path.is_file()), None)
    if path is None:
        raise RecipeError(f"[{kind}] name = {part.name!r}: there is no {file}.py beside the recipe ({folder}).")
    module = _load_module(path)
    if not hasattr(module, attribute):
        raise RecipeError(f"[{kind}] name = {part.name!r}: {path} has no {attribute}.{nearest(attribute, dir(module))}")
    found = getattr(module, attribute)
    if not callable(found):
        raise RecipeError(f"[{kind}] name = {part.name!r} is a {type(found).__name__}, nothing that can be called.")
    return found


def _load_module(path: Path) -> Any:
    name = f"unbraid_own_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{path} cannot be imported ({type(error).__name__}: {error}).") from error
    return module


def build_component(
    kind: str, part: Component, registry: dict[str, Callable[..., Any]], folder: Path | None, **given: Any
) -> Any:
    """Find a part and call it with the recipe's options, and with what the code supplies itself.

    Raises:
        RecipeError: If a key is unknown, or a value of the wrong type or refused by the part.
    """
    signature = find_component(kind, part, registry, folder)
    if not callable(signature):
        raise RecipeError(f"[{kind}] name = {part.name!r} is a {type(signature).__name__}, nothing that can be called.")
    options = checked(kind, signature, part.options, given=tuple(given))
    if kind == "model" and part.name in registry:
        _check_sizes(part.name, options)
    try:
        return signature(**given, **options)
    except RecipeError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise RecipeError(
            f"[{kind}] {part.name} cannot be made of these keys ({type(error).__name__}: {error})."
        ) from error


def _check_sizes(name: str, options: Mapping[str, Any]) -> None:
    """Refuse counts below 1 and shares beyond 1, which many a network would notice in its first step alone."""
    for key, value in options.items():
        least = 0 if key in MAY_BE_ZERO else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise RecipeError(f"[model] {name}: {key} = {value} must be {least} or more.")
        if key == "dropout" and not 0 <= value < 1:
            raise RecipeError(f"[model] {name}: dropout = {value} must be from 0 to below 1.")


def build_loss(recipe: Recipe, *, trust: bool = True) -> SeparationLoss:
    """The recipe's loss.

    Raises:
        RecipeError: If it is refused, or is somebody's own code and not trusted.
    """
    own = ("assign", "inactive_weight")
    options = {key: value for key, value in recipe.loss.options.items() if key in own}
    folder = recipe.folder if trust else None
    terms = [Term(_bound_loss(part, folder), weight) for part, weight in recipe.loss_terms]
    given = checked("loss", SeparationLoss, options, given=("loss",))
    try:
        return SeparationLoss(terms, **given)
    except ValueError as error:
        raise RecipeError(f"[loss] {error}") from error


def _bound_loss(part: Component, folder: Path | None) -> SignalLoss:
    """A loss with the recipe's options, tried on a moment of noise: what it refuses, it shall refuse before a run."""
    loss = find_component("loss", part, LOSSES, folder)
    asked = loss_inputs(loss)
    # n_fft and hop_length belong to the embedding; without one they are options of the loss itself.
    kept = LOSS_INPUTS if "embedding" in asked else LOSS_INPUTS[:3]
    called = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    supplied = (*kept, *([*called.parameters][:2] if "estimate" in asked else []))
    options = checked("loss", loss, part.options, given=supplied)
    bound = partial(loss, **options) if options else loss
    if options:
        moment = torch.linspace(-0.1, 0.1, 64).reshape(1, 1, 1, 64)
        known: dict[str, Any] = {"target": -moment, "mixture": moment[:, 0], "n_fft": 8, "hop_length": 4}
        known["embedding"] = torch.full((1, 1, 17, 5, 2), 0.5**0.5)
        signals = [moment, known.pop("target")] if "estimate" in asked else []
        try:
            bound(*signals, **{name: known[name] for name in asked if name in known and name in kept})
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise RecipeError(f"[loss] {part.name} cannot be made of these keys: {error}") from error
    return bound
