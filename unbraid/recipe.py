"""Recipe dataclasses, TOML and ``--set`` overrides: every key is checked against the signature it is meant for."""

import inspect
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from unbraid.data.mixtures import DataSettings
from unbraid.errors import RecipeError, nearest
from unbraid.losses import LOSSES, asks_for, ignores_level
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS
from unbraid.train.optim import OPTIMIZERS, SCHEDULES
from unbraid.train.settings import SaveSettings, TrainSettings, ValidateSettings

Table = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A table with a ``name``: which entry of a registry, and its keyword arguments."""

    name: str
    options: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; what is not in the file has the textbook's defaults.

    Attributes:
        data: Where examples come from.
        model: Which network, from which checkpoint it starts (``init``).
        loss: Which loss on signals, and how estimates are assigned to targets (``assign``).
        optim: Which optimizer.
        schedule: Of the learning rate.
        clip: Of the gradient's norm.
        filters: ``[[filter]]``, in order.
        transforms: ``[[transform]]``, of single gradients, in order.
        train: Budget and rules.
        validate: How often.
        save: How often.
        folder: Where the recipe lies; ``my_file:MyModel`` is looked for there first.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: Part = field(default_factory=lambda: Part("conv_tasnet"))
    loss: Part = field(default_factory=lambda: Part("neg_si_sdr"))
    optim: Part = field(default_factory=lambda: Part("adam"))
    schedule: Part = field(default_factory=lambda: Part("plateau"))
    clip: Part = field(default_factory=lambda: Part("fixed"))
    filters: tuple[Part, ...] = ()
    transforms: tuple[Part, ...] = ()
    train: TrainSettings = field(default_factory=TrainSettings)
    validate: ValidateSettings = field(default_factory=ValidateSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    folder: Path = field(default_factory=Path)

    @property
    def assign(self) -> str:
        """How estimates are assigned to targets."""
        return str(self.loss.options.get("assign", "permutation"))

    @property
    def silent_below_db(self) -> float | None:
        """How far under the loudest an output is meant to be silent, where the loss drives some to silence."""
        return 25.0 if self.loss.options.get("inactive_weight", 0) else None

    @property
    def has_own_code(self) -> bool:
        """Whether a model, loss or data set is named that is not one of ours: what uses it has to be trusted."""
        losses = [part.name for part, _ in self.loss_terms]
        return any(":" in name for name in (self.model.name, *losses, self.data.name))

    @property
    def loss_terms(self) -> list[tuple[Part, float]]:
        """The losses and their weights: those of ``[[loss.terms]]`` where the name is ``sum``, or else the one.

        Raises:
            RecipeError: If the terms are not as they should be.
        """
        options = {key: value for key, value in self.loss.options.items() if key not in ("assign", "inactive_weight")}
        if self.loss.name != "sum":
            return [(Part(self.loss.name, options), 1.0)]
        if set(options) - {"terms"}:
            listed = ", ".join(sorted(set(options) - {"terms"}))
            raise RecipeError(f"[loss] name = 'sum' has no key {listed}; it has terms, assign and inactive_weight.")
        found = []
        for part in _parts_of("loss.terms", options.get("terms", [])):
            weight = _as_type(part.options.get("weight", 1.0), float, "loss.terms.weight")
            found.append((Part(part.name, {k: v for k, v in part.options.items() if k != "weight"}), weight))
        if not found:
            raise RecipeError("[loss] name = 'sum' needs [[loss.terms]], each with a name and a weight.")
        return found

    @property
    def leaves_level_open(self) -> bool:
        """Whether the loss does not care for the level of the model's outputs, which is then taken from the mixture."""
        losses = [LOSSES.get(part.name) for part, _ in self.loss_terms]
        of_sources = [loss for loss in losses if loss is None or "estimate" in asks_for(loss)]
        return bool(of_sources) and all(ignores_level(loss) for loss in of_sources)


_SETTINGS: dict[str, type[Any]] = {
    "data": DataSettings,
    "train": TrainSettings,
    "validate": ValidateSettings,
    "save": SaveSettings,
}
_PARTS = ("model", "loss", "optim", "schedule", "clip")
_REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {
    "model": MODELS,
    "loss": LOSSES,
    "optim": OPTIMIZERS,
    "schedule": SCHEDULES,
    "clip": CLIPPERS,
}
_PATHS = (("data", "path"), ("data", "noise"), ("model", "init"))
_LISTS = ("filter", "transform")
_TABLES = (*_SETTINGS, *_PARTS, *_LISTS)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and lay ``--set`` overrides over it.

    Relative paths in the file are relative to the file, those in overrides to the current folder.

    Args:
        path: The file.
        overrides: Such as ``optim.lr=3e-4`` or ``filter.0.threshold_db=-40``; values are TOML, or else plain text.

    Raises:
        RecipeError: If anything in it is not as it should be; one sentence.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}.") from error
    _anchor_paths(table, path.parent)
    names = {where: _name_of(table, where) for where in _REGISTRIES}
    explicit = {_override(table, override) for override in overrides}
    for where, name in names.items():
        if _name_of(table, where) != name:
            _drop_foreign_keys(table, where, explicit)
    _anchor_paths(table, Path())
    for where, key in _PATHS:
        if isinstance(table.get(where), dict) and table[where].get(key) == "":
            raise RecipeError(f"{where}.{key} is still to be named: --set {where}.{key}=PATH, or in {path}.")
    return recipe_from_table(table, path.parent.resolve())


def recipe_from_table(table: Table, folder: Path) -> Recipe:
    """Check a recipe given as plain dicts.

    Raises:
        RecipeError: As `load_recipe`.
    """
    for name in table:
        if name not in _TABLES:
            raise RecipeError(f"[{name}] is not one of the tables {', '.join(_TABLES)}.{nearest(name, _TABLES)}")
    settings = {name: kind(**checked(name, kind, _table(table, name))) for name, kind in _SETTINGS.items()}
    parts: dict[str, Any] = {name: _part(name, _table(table, name)) for name in _PARTS if name in table}
    lists: dict[str, Any] = {f"{name}s": _parts_of(name, table.get(name, [])) for name in _LISTS}
    recipe = Recipe(**settings, **parts, **lists, folder=folder)
    _check_ranges(recipe)
    return recipe


def recipe_table(recipe: Recipe) -> Table:
    """The whole recipe as plain dicts, defaults written out: what a run directory and a checkpoint keep."""
    table: Table = {name: _plain(asdict(getattr(recipe, name))) for name in _SETTINGS}
    for name in _PARTS:
        part: Part = getattr(recipe, name)
        table[name] = _plain({"name": part.name, **part.options})
    for name in _LISTS:
        table[name] = [_plain({"name": part.name, **part.options}) for part in getattr(recipe, f"{name}s")]
    return table


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML."""
    return tomli_w.dumps(recipe_table(recipe))


def differences(before: Table, after: Table) -> dict[str, tuple[Any, Any]]:
    """Keys, such as ``optim.lr``, whose values differ between two recipes."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= {f"{name}.{key}": pair for key, pair in differences(old, new).items()}
        elif old != new:
            found[name] = (old, new)
    return found


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
    return {key: _as_type(value, hints.get(key, Any), f"{where}.{key}") for key, value in table.items()}


def _hints(signature: Callable[..., Any]) -> dict[str, Any]:
    is_plain_class = inspect.isclass(signature) and not hasattr(signature, "__dataclass_fields__")
    try:
        return get_type_hints(signature.__init__ if is_plain_class else signature)
    except (NameError, TypeError):  # annotations of somebody's own part that cannot be resolved
        return {}


def _as_type(value: Any, hint: Any, where: str) -> Any:
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
            return _as_type(value, hint, where)
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
        return tuple(_as_type(part, kind, where) for part, kind in zip(value, arguments, strict=True))
    items = [_as_type(part, arguments[0] if arguments else Any, where) for part in value]
    return items if origin is list else tuple(items)


def _table(table: Table, name: str) -> Table:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise RecipeError(f"{name} = {found!r} must be a table: write [{name}] and its keys below.")
    return found


def _part(where: str, table: Table) -> Part:
    name = table.get("name")
    if not isinstance(name, str):
        raise RecipeError(f'[{where}] needs a name, such as name = "...".')
    return Part(name, {key: value for key, value in table.items() if key != "name"})


def _parts_of(where: str, rows: Any) -> tuple[Part, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"A {where} is written as [[{where}]], with two brackets: there can be several.")
    return tuple(_part(where, row) for row in rows)


def _anchor_paths(table: Table, folder: Path) -> None:
    """Make the file's relative paths relative to the file."""
    for where, key in _PATHS:
        section = table.get(where)
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
            try:
                section[key] = str((folder / Path(section[key]).expanduser()).absolute())
            except RuntimeError as error:
                raise RecipeError(f"{where}.{key} = {section[key]!r} cannot be found ({error}).") from error


def _name_of(table: Table, where: str) -> object:
    section = table.get(where)
    return section.get("name") if isinstance(section, dict) else None


def _drop_foreign_keys(table: Table, where: str, explicit: set[str]) -> None:
    """After ``--set clip.name=...``, leave out the file's keys that belong to the part it named before."""
    section = table[where]
    if not isinstance(section, dict):
        return
    part = _REGISTRIES[where].get(str(section.get("name")))
    known = {"name", "init", "assign", "inactive_weight", *(inspect.signature(part).parameters if part else ())}
    table[where] = {key: value for key, value in section.items() if key in known or f"{where}.{key}" in explicit}


def _override(table: Table, text: str) -> str:
    """Lay one override over the table, and return its key."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"--set {text!r} must look like optim.lr=3e-4.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if len(names) == 1 and not isinstance(parsed, (dict, list)):
        raise RecipeError(f"--set {text!r} must name a key of a table, such as optim.lr=3e-4.")
    target: Any = table
    for name in names[:-1]:
        if isinstance(target, list):
            if not name.isdigit() or int(name) >= len(target):
                raise RecipeError(f"--set {text!r}: the recipe has {len(target)} {names[0]}s, counted from 0.")
            target = target[int(name)]
        else:
            target = target.setdefault(name, [] if name in _LISTS else {})
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {text!r}: {name} is a value, not a table.")
    if isinstance(target, list):
        raise RecipeError(f"--set {text!r}: name it by its number, such as filter.0.threshold_db=-40.")
    target[names[-1]] = parsed
    return key.strip()


def _check_ranges(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    positive = {
        "data.sample_rate": data.sample_rate,
        "data.n_sources": data.n_sources,
        "data.excerpt_seconds": data.excerpt_seconds,
        "data.batch_size": data.batch_size,
        "train.accumulate": train.accumulate,
        "train.loss_upper_limit": train.loss_upper_limit,
        "validate.n_items": recipe.validate.n_items,
        "save.keep": recipe.save.keep,
        "the number of samples in an excerpt": data.n_samples,
    }
    not_negative = {
        "data.workers": data.workers,
        "data.items_per_epoch": data.items_per_epoch,
        "train.max_steps": train.max_steps,
        "train.max_minutes": train.max_minutes,
        "validate.every_steps": recipe.validate.every_steps,
        "save.every_steps": recipe.save.every_steps,
        "save.incidents": recipe.save.incidents,
        "train.compare_every_steps": train.compare_every_steps,
    }
    for name, value in positive.items():
        if not value > 0:
            raise RecipeError(f"{name} = {value} must be above 0.")
    for name, value in not_negative.items():
        if not value >= 0:
            raise RecipeError(f"{name} = {value} must be 0 or more.")
    for name, (low, high) in {"data.gains_db": data.gains_db, "data.noise_snr_db": data.noise_snr_db}.items():
        if not low <= high:
            raise RecipeError(f"{name} = [{low:g}, {high:g}] must be given from low to high.")
    if not -120 <= data.level_db <= 0:
        raise RecipeError(f"data.level_db = {data.level_db:g} must be from -120 to 0, in dB of full scale.")
    if train.accumulate > data.batch_size:
        raise RecipeError(
            f"train.accumulate = {train.accumulate} splits a step into more pieces than it has examples, "
            f"data.batch_size = {data.batch_size}."
        )
    if not 0 <= train.ema < 1:
        raise RecipeError(f"train.ema = {train.ema:g} must be from 0, for none, to below 1, such as 0.999.")
    if train.max_steps == 0 and train.max_minutes == 0:
        raise RecipeError("The run has no end: set train.max_steps, train.max_minutes, or both.")


def _plain(value: Any) -> Any:
    """Values as TOML knows them: paths as text, no nulls."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
