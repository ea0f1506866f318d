"""Values of a recipe's tables held against signatures: what keys there are, and what types they have."""

import inspect
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unbraid.errors import RecipeError, nearest

Table = dict[str, Any]


def assignment(text: str, *, like: str = "optim.lr=3e-4") -> tuple[str, Any]:
    """The key and the value of a ``--set``; the value is TOML, or else plain text.

    Args:
        text: What was given.
        like: An example, for the message.

    Raises:
        RecipeError: If it is none.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r} must look like {like}.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def checked(where: str, signature: Callable[..., Any], table: Table, *, given: Sequence[str] = ()) -> Table:
    """The table's values, brought to the types that a signature asks for, after checking every key and type against it.

    Args:
        where: Name of the table, for messages.
        signature: A dataclass, class or function whose keyword arguments are the allowed keys.
        table: The values.
        given: Arguments that the code supplies itself, so that a recipe must not.

    Raises:
        RecipeError: If a key is unknown or missing, or a value is of the wrong type.
    """
    parameters = inspect.signature(signature).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    allowed = [
        name
        for name, p in parameters.items()
        if name not in given and p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    for key in table:
        if key not in allowed and not takes_any:
            listed = ", ".join(allowed) or "none but name"
            raise RecipeError(f"[{where}] has no key {key!r}; its keys are {listed}.{nearest(key, allowed)}")
    for key in allowed:
        if parameters[key].default is inspect.Parameter.empty and key not in table:
            raise RecipeError(f"[{where}] needs the key {key!r}.")
    hints = _hints(signature)
    return {key: as_type(value, hints.get(key, Any), f"{where}.{key}") for key, value in table.items()}


def _hints(signature: Callable[..., Any]) -> dict[str, Any]:
    is_plain_class = inspect.isclass(signature) and not hasattr(signature, "__dataclass_fields__")
    try:
        return get_type_hints(signature.__init__ if is_plain_class else signature)
    except (NameError, TypeError):  # annotations of somebody's own part that cannot be resolved
        return {}


def as_type(value: Any, hint: Any, where: str) -> Any:
    """A value brought to the type that a hint asks for.

    Raises:
        RecipeError: If it is of another.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in arguments:
            return value
        listed = ", ".join(repr(choice) for choice in arguments)
        raise RecipeError(f"{where} = {value!r} is not one of {listed}.{nearest(str(value), map(str, arguments))}")
    if origin in (Union, UnionType):
        return _as_one_of(value, arguments, where)
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        return _as_sequence(value, hint, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RecipeError(f"{where} = {value} must be a finite number.")
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not inspect.isclass(hint) or (isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)):
        return value
    raise RecipeError(f"{where} = {value!r} must be {_WORDS.get(hint, hint.__name__)}.")


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "a path in quotes",
}


def _as_one_of(value: Any, hints: Sequence[Any], where: str) -> Any:
    if value is None and NoneType in hints:
        return None
    failures = []
    for hint in hints:
        if hint is NoneType:
            continue
        try:
            return as_type(value, hint, where)
        except RecipeError as error:
            failures.append(error)
    raise failures[0]


def _as_sequence(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{where} = {value!r} must be a list in brackets.")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise RecipeError(f"{where} = {list(value)!r} must be a list of {len(arguments)}.")
        return tuple(as_type(part, kind, where) for part, kind in zip(value, arguments, strict=True))
    items = [as_type(part, arguments[0] if arguments else Any, where) for part in value]
    return items if origin is list else tuple(items)
