"""Turn the names in a recipe into objects: an entry of a registry, or ``my_file:MyClass`` from the user's own file."""

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
from unbraid.config.schema import check_table
from unbraid.errors import RecipeError, nearest
from unbraid.losses import LOSS_INPUTS, LOSSES, SignalLoss, loss_inputs
from unbraid.losses.pairwise import Term
from unbraid.losses.pit import SeparationLoss

FROM_DATA = ("n_sources", "sample_rate")
"""Keys of a model that default to the values in [data]."""

MAY_BE_ZERO = frozenset({"skip"})
"""Integer keys of models that may be 0; all others are counts or sizes of at least 1."""


def find_component(
    where: str, component: Component, registry: dict[str, Callable[..., Any]], folder: Path | None
) -> Callable[..., Any]:
    """Return the class or function that a component names.

    Args:
        where: Name of the table, for messages.
        component: Its name is an entry of the registry, or ``my_file:MyClass``.
        registry: The built-in entries.
        folder: Where ``my_file.py`` is looked for, before the current folder; None forbids code that is not built in.

    Raises:
        RecipeError: If there is no such entry, file or class, or it is not trusted.
    """
    name = component.name
    if name in registry:
        return registry[name]
    file, colon, attribute = name.partition(":")
    if not colon:
        raise RecipeError(
            f"[{where}] name = {name!r} is unknown. Choose one of {', '.join(sorted(registry))}."
            f"{nearest(name, registry)} For your own, write 'my_file:MyClass'."
        )
    if folder is None:
        raise RecipeError(
            f"[{where}] name = {name!r} is code that came with the checkpoint. If you trust it, add --trust."
        )
    path = next((path for path in (folder / f"{file}.py", Path.cwd() / f"{file}.py") if path.is_file()), None)
    if path is None:
        raise RecipeError(f"[{where}] name = {name!r}: there is no {file}.py next to the recipe ({folder}).")
    module = _load_module(path)
    if not hasattr(module, attribute):
        raise RecipeError(f"[{where}] name = {name!r}: {path} has no {attribute}.{nearest(attribute, dir(module))}")
    component_type = getattr(module, attribute)
    if not callable(component_type):
        raise RecipeError(f"[{where}] name = {name!r} is a {type(component_type).__name__}, not a class or function.")
    return component_type


def _load_module(path: Path) -> Any:
    # Cached in sys.modules, so that two components from one file share its classes, and worker processes can unpickle.
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
    where: str, component: Component, registry: dict[str, Callable[..., Any]], folder: Path | None, **supplied: Any
) -> Any:
    """Find a component and call it with the recipe's options.

    Args:
        where: Name of the table, for messages.
        component: Name and options.
        registry: The built-in entries.
        folder: As in `find_component`.
        **supplied: Arguments that the code passes itself; a recipe must not set them.

    Raises:
        RecipeError: If a key is unknown, a value has the wrong type, or the component refuses it.
    """
    component_type = find_component(where, component, registry, folder)
    options = check_table(where, component_type, component.options, supplied=tuple(supplied))
    if where == "model" and component.name in registry:
        _check_sizes(component.name, options)
    try:
        return component_type(**supplied, **options)
    except RecipeError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise RecipeError(
            f"[{where}] {component.name} refuses these keys ({type(error).__name__}: {error})."
        ) from error


def _check_sizes(name: str, options: Mapping[str, Any]) -> None:
    """Raise RecipeError for sizes below 1 and shares above 1, which many networks would only notice in a step."""
    for key, value in options.items():
        least = 0 if key in MAY_BE_ZERO else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise RecipeError(f"[model] {name}: {key} = {value} must be {least} or more.")
        if key == "dropout" and not 0 <= value < 1:
            raise RecipeError(f"[model] {name}: dropout = {value} must be from 0 to below 1.")


def build_loss(recipe: Recipe, *, trust: bool = True) -> SeparationLoss:
    """Return the recipe's loss, with its assignment of outputs to targets.

    Raises:
        RecipeError: If a loss is unknown, not trusted, or refuses its keys.
    """
    folder = recipe.folder if trust else None
    terms = [Term(_build_loss_term(component, folder), weight) for component, weight in recipe.loss_terms]
    options: dict[str, Any] = {
        key: value for key, value in recipe.loss.options.items() if key in ("assign", "inactive_weight")
    }
    options = check_table("loss", SeparationLoss, options, supplied=("loss",))
    try:
        return SeparationLoss(terms, **options)
    except ValueError as error:
        raise RecipeError(f"[loss] {error}") from error


def loss_parameters_from_step(loss: SignalLoss) -> list[str]:
    """Return the parameters of a loss that the training step passes, and that are therefore no keys of a recipe."""
    inputs = loss_inputs(loss)
    # n_fft and hop_length describe the embedding's spectrum; for other losses they are ordinary options.
    names = list(LOSS_INPUTS if "embedding" in inputs else LOSS_INPUTS[:3])
    if "estimate" in inputs:  # the first two parameters, whatever they are called
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
        names += [*signature.parameters][:2]
    return names


def _build_loss_term(component: Component, folder: Path | None) -> SignalLoss:
    loss = find_component("loss", component, LOSSES, folder)
    from_step = loss_parameters_from_step(loss)
    options = check_table("loss", loss, component.options, supplied=from_step)
    if not options:
        return loss
    bound = partial(loss, **options)

    # Call it once on a short signal: a loss checks its options when it is called, which would be in the first step.
    signal = torch.linspace(-0.1, 0.1, 64).reshape(1, 1, 1, 64)
    inputs = loss_inputs(loss)
    signals = [signal, -signal] if "estimate" in inputs else []
    keywords: dict[str, Any] = {
        "mixture": signal[:, 0],
        "n_fft": 8,
        "hop_length": 4,
        "embedding": torch.full((1, 1, 17, 5, 2), 0.5**0.5),  # batch, channel, frame, frequency, unit vector of two
    }
    if not signals:
        keywords["target"] = -signal
    try:
        bound(*signals, **{name: keywords[name] for name in inputs if name in keywords and name in from_step})
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise RecipeError(f"[loss] {component.name} refuses these keys: {error}") from error
    return bound
