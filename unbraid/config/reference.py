"""List every key that a recipe can have, with type, default and meaning, read from signatures and docstrings.

The signature of a class or function is the schema of its table, and its docstring explains the keys: "Attributes:" of
the settings dataclasses, "Args:" of the registries' entries. So the reference cannot drift away from the code.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from unbraid.config.recipe import Recipe
from unbraid.config.registry import FROM_DATA, loss_parameters_from_step
from unbraid.config.schema import allowed_keys, toml_value, type_hints
from unbraid.data import DATASETS
from unbraid.data.dataset import DataSettings
from unbraid.losses import LOSSES
from unbraid.losses.pit import SeparationLoss
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.train.loggers import LOGGERS
from unbraid.train.optim import OPTIMIZERS, SCHEDULES
from unbraid.train.settings import SaveSettings, TrainSettings, ValidateSettings

_TYPE_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


class RecipeKey(NamedTuple):
    """One key of a recipe.

    Attributes:
        table: Its table, such as ``data``, ``loss.terms`` or ``filter``.
        component: The entry of the registry that has the key, such as ``autoclip``; empty if the table always has it.
        key: Its name.
        type: Its type in words, such as ``integer`` or ``"redraw" or "keep"``.
        default: The default as TOML; empty if there is none.
        meaning: What it does, in the words of the docstring.
    """

    table: str
    component: str
    key: str
    type: str
    default: str
    meaning: str


def recipe_keys() -> list[RecipeKey]:
    """Return every key that a recipe can have, table by table in the order of a recipe file."""
    defaults = Recipe()
    return [
        *_settings("data", DataSettings, choices={"name": DATASETS}),
        _name("model", MODELS, defaults.model.name, "The network, or my_file:MyModel for your own."),
        RecipeKey("model", "", "init", "path", "", "Checkpoint or run directory that gives the initial weights."),
        *_options("model", MODELS),
        _name("loss", [*LOSSES, "sum"], defaults.loss.name, "The loss, my_file:my_loss, or sum for [[loss.terms]]."),
        *[_key("loss", "", name, SeparationLoss) for name in allowed_keys(SeparationLoss, supplied=["loss"])],
        *_options("loss", LOSSES),
        RecipeKey("loss", "sum", "terms", "list of tables", "", "The losses of the sum, each a [[loss.terms]]."),
        _name("loss.terms", LOSSES, "", "One loss of the sum. Its own keys stand next to the name."),
        RecipeKey("loss.terms", "", "weight", "number", "1.0", "Factor of the loss in the sum, above 0."),
        _name("optim", OPTIMIZERS, defaults.optim.name, "The optimizer."),
        *_options("optim", OPTIMIZERS),
        _name("schedule", SCHEDULES, defaults.schedule.name, "The schedule of the learning rate."),
        *_options("schedule", SCHEDULES),
        _name("clip", CLIPPERS, defaults.clip.name, "The clipper of the gradient norm."),
        *_options("clip", CLIPPERS),
        _name("filter", FILTERS, "", "A filter of examples by their loss. There can be several; they apply in order."),
        *_options("filter", FILTERS),
        _name("transform", TRANSFORMS, "", "A gradient transform. There can be several; they apply in order."),
        *_options("transform", TRANSFORMS),
        *_settings("train", TrainSettings, choices={"also_log": LOGGERS}),
        *_settings("validate", ValidateSettings),
        *_settings("save", SaveSettings),
    ]


def _name(table: str, names: Iterable[str], default: str, meaning: str) -> RecipeKey:
    choices = " or ".join(toml_value(name) for name in sorted(names))
    return RecipeKey(table, "", "name", choices, toml_value(default) if default else "", meaning)


def _settings(
    table: str, settings: Callable[..., Any], *, choices: Mapping[str, Iterable[str]] | None = None
) -> list[RecipeKey]:
    """Return the keys of a settings dataclass; ``choices`` are the registries that keys of plain text choose from."""
    keys = []
    for name in allowed_keys(settings):
        key = _key(table, "", name, settings)
        if choices and name in choices:
            listed = ", ".join(toml_value(choice) for choice in sorted(choices[name]))
            key = key._replace(type=f"{key.type}: {listed}, or your own")
        keys.append(key)
    return keys


def _options(table: str, registry: Mapping[str, Callable[..., Any]]) -> list[RecipeKey]:
    """Return the keys of every entry of a registry."""
    keys = []
    for component, signature in registry.items():
        # Arguments that the code passes itself are no keys.
        supplied = ["parameters"] if table == "optim" else []
        if table == "loss":
            supplied = loss_parameters_from_step(signature)
        for name in allowed_keys(signature, supplied=supplied):
            key = _key(table, component, name, signature)
            if table == "model" and name in FROM_DATA:
                key = key._replace(default=f"data.{name}")
            keys.append(key)
    return keys


def _key(table: str, component: str, name: str, signature: Callable[..., Any]) -> RecipeKey:
    """Return the key of one parameter of a signature."""
    parameter = allowed_keys(signature)[name]
    default = "" if parameter.default in (inspect.Parameter.empty, None) else toml_value(parameter.default)
    kind = type_in_words(type_hints(signature).get(name, Any))
    return RecipeKey(table, component, name, kind, default, argument_meanings(signature).get(name, ""))


def type_in_words(hint: Any) -> str:
    """Return a type hint as a reader of TOML would say it."""
    origin = get_origin(hint)
    arguments = [argument for argument in get_args(hint) if argument not in (NoneType, Ellipsis)]
    if origin is Literal:
        return " or ".join(toml_value(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(argument) for argument in arguments)
    if origin in (tuple, list, Sequence):
        items = " and ".join(dict.fromkeys(type_in_words(argument) for argument in arguments))
        is_fixed = origin is tuple and Ellipsis not in get_args(hint)
        return f"list of {len(arguments)}: {items}" if is_fixed else f"list: {items}"
    return _TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def argument_meanings(signature: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring's "Args:" or "Attributes:" section says of each argument, each on one line."""
    meanings: dict[str, str] = {}
    in_section = False
    name = ""
    for line in (inspect.getdoc(signature) or "").splitlines():
        if line and not line.startswith(" "):
            # A line without indentation ends the section, or begins one.
            in_section = line in ("Args:", "Attributes:")
        elif in_section and (entry := re.fullmatch(r" {4}(\w+): (.+)", line)):
            name = entry[1]
            meanings[name] = entry[2]
        elif in_section and name and line.strip():
            meanings[name] += f" {line.strip()}"
    return meanings
