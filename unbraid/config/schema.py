"""Check the keys and values of a recipe's table against the signature of the code that receives them."""

import inspect
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unbraid.errors import RecipeError, nearest

Table = dict[str, Any]

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "a path in quotes",
}


def parse_override(text: str, *, example: str = "optim.lr=3e-4") -> tuple[str, Any]:
    """Split the ``KEY=VALUE`` of a ``--set`` into key and value; the value is TOML, or else plain text.

    Args:
        text: The argument of ``--set``.
        example: A valid argument, for the message.

    Raises:
        RecipeError: If there is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r} must look like {example}.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        # Text needs no quotes on a command line: --set clip.name=autoclip.
        return key.strip(), value.strip()


def toml_value(value: object) -> str:
    """Return a value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Path)):
        return json.dumps(str(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return str(value)


def allowed_keys(signature: Callable[..., Any], *, supplied: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters of a signature that a recipe may set.

    Args:
        signature: A dataclass, class or function.
        supplied: Parameters that the code passes itself.
    """
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(signature).parameters
    return {name: p for name, p in parameters.items() if p.kind in kinds and name not in supplied}


def type_hints(signature: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a signature's parameters; empty if its annotations cannot be resolved."""
    is_plain_class = inspect.isclass(signature) and not hasattr(signature, "__dataclass_fields__")
    try:
        return get_type_hints(signature.__init__ if is_plain_class else signature)
    except (NameError, TypeError):  # annotations of the user's own code may name what is only imported for typing
        return {}


def check_table(where: str, signature: Callable[..., Any], table: Table, *, supplied: Sequence[str] = ()) -> Table:
    """Check every key and value of a table against a signature, and return the values converted to its types.

    Args:
        where: Name of the table, for messages.
        signature: A dataclass, class or function; its keyword arguments are the allowed keys.
        table: Keys and values from the recipe.
        supplied: Parameters that the code passes itself, so that a recipe must not.

    Raises:
        RecipeError: If a key is unknown or missing, or a value has the wrong type.
    """
    allowed = allowed_keys(signature, supplied=supplied)
    takes_any_key = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(signature).parameters.values()
    )
    for key in table:
        if key not in allowed and not takes_any_key:
            listed = ", ".join(allowed) or "none but name"
            raise RecipeError(f"[{where}] has no key {key!r}; its keys are {listed}.{nearest(key, allowed)}")
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in table:
            raise RecipeError(f"[{where}] needs the key {key!r}.")
    hints = type_hints(signature)
    return {key: convert(value, hints.get(key, Any), f"{where}.{key}") for key, value in table.items()}


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a TOML value to the type that a hint asks for: integers to floats, text to paths, lists to tuples.

    Args:
        value: As TOML gave it.
        hint: A type hint; types that are not known here pass unchecked.
        where: The key, for messages.

    Raises:
        RecipeError: If the value has another type.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        choices = get_args(hint)
        if isinstance(value, bool) and {"on", "off"} <= set(choices):  # what people type
            value = "on" if value else "off"
        if value in choices:
            return value
        listed = ", ".join(repr(choice) for choice in choices)
        raise RecipeError(f"{where} = {value!r} is not one of {listed}.{nearest(str(value), map(str, choices))}")
    if origin in (Union, UnionType):
        return _convert_union(value, get_args(hint), where)
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        return _convert_sequence(value, hint, where)
    # bool is a subclass of int in Python; in a recipe, true is not a number.
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RecipeError(f"{where} = {value} must be a finite number.")
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not inspect.isclass(hint) or (isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)):
        return value
    raise RecipeError(f"{where} = {value!r} must be {_TYPE_NAMES.get(hint, hint.__name__)}.")


def _convert_union(value: Any, hints: Sequence[Any], where: str) -> Any:
    if value is None and NoneType in hints:
        return None
    errors = []
    for hint in hints:
        if hint is NoneType:
            continue
        try:
            return convert(value, hint, where)
        except RecipeError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(value: Any, hint: Any, where: str) -> Any:
    origin = get_origin(hint) or hint
    item_hints = get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{where} = {value!r} must be a list in brackets.")
    if origin is tuple and item_hints and item_hints[-1] is not Ellipsis:
        if len(value) != len(item_hints):
            raise RecipeError(f"{where} = {list(value)!r} must be a list of {len(item_hints)}.")
        return tuple(convert(item, item_hint, where) for item, item_hint in zip(value, item_hints, strict=True))
    items = [convert(item, item_hints[0] if item_hints else Any, where) for item in value]
    return items if origin is list else tuple(items)
