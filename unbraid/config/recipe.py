"""Recipe dataclasses, TOML and ``--set`` overrides, each part checked against the signature that it is meant for."""

import inspect
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from unbraid.config.schema import Table, as_type, assignment, checked
from unbraid.data.dataset import DataSettings
from unbraid.errors import RecipeError, nearest
from unbraid.losses import LOSSES, is_scale_invariant, loss_inputs
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS
from unbraid.train.optim import OPTIMIZERS, SCHEDULES
from unbraid.train.settings import SaveSettings, TrainSettings, ValidateSettings
from unbraid.train.validation_audio import AudioOptions


@dataclass(frozen=True)
class Component:
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
    model: Component = field(default_factory=lambda: Component("conv_tasnet"))
    loss: Component = field(default_factory=lambda: Component("neg_si_sdr"))
    optim: Component = field(default_factory=lambda: Component("adam"))
    schedule: Component = field(default_factory=lambda: Component("plateau"))
    clip: Component = field(default_factory=lambda: Component("fixed"))
    filters: tuple[Component, ...] = ()
    transforms: tuple[Component, ...] = ()
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
    def has_custom_code(self) -> bool:
        """Whether a model, loss or data set is named that is not one of ours: what uses it has to be trusted."""
        losses = [part.name for part, _ in self.loss_terms]
        return any(":" in name for name in (self.model.name, *losses, self.data.name))

    @property
    def loss_terms(self) -> list[tuple[Component, float]]:
        """The losses and their weights: those of ``[[loss.terms]]`` where the name is ``sum``, or else the one.

        Raises:
            RecipeError: If the terms are not as they should be.
        """
        options = {key: value for key, value in self.loss.options.items() if key not in ("assign", "inactive_weight")}
        if self.loss.name != "sum":
            return [(Component(self.loss.name, options), 1.0)]
        if set(options) - {"terms"}:
            listed = ", ".join(sorted(set(options) - {"terms"}))
            raise RecipeError(f"[loss] name = 'sum' has no key {listed}; it has terms, assign and inactive_weight.")
        found = []
        for part in _parts_of("loss.terms", options.get("terms", [])):
            weight = as_type(part.options.get("weight", 1.0), float, "loss.terms.weight")
            found.append((Component(part.name, {k: v for k, v in part.options.items() if k != "weight"}), weight))
        if not found:
            raise RecipeError("[loss] name = 'sum' needs [[loss.terms]], each with a name and a weight.")
        return found

    @property
    def loss_is_scale_invariant(self) -> bool:
        """Whether the loss does not care for the level of the model's outputs, which is then taken from the mixture."""
        losses = [LOSSES.get(part.name) for part, _ in self.loss_terms]
        of_sources = [loss for loss in losses if loss is None or "estimate" in loss_inputs(loss)]
        return bool(of_sources) and all(is_scale_invariant(loss) for loss in of_sources)

    @property
    def audio_options(self) -> AudioOptions:
        """How the model's outputs become sound."""
        return AudioOptions(self.data.sample_rate, self.loss_is_scale_invariant, self.silent_below_db)


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
    return recipe_with(table, overrides, path.parent.resolve(), source=str(path))


def recipe_with(table: Table, overrides: Sequence[str], folder: Path, *, source: str) -> Recipe:
    """A recipe given as plain dicts, with ``--set`` overrides laid over it.

    Args:
        table: As `recipe_table` gives it; changed in place.
        overrides: As `load_recipe` takes them.
        folder: Where one's own code is looked for.
        source: What the table is, for messages.

    Raises:
        RecipeError: As `load_recipe`.
    """
    names = {where: _name_of(table, where) for where in _REGISTRIES}
    explicit = {_override(table, override) for override in overrides}
    for where, name in names.items():
        if _name_of(table, where) != name:
            _drop_foreign_keys(table, where, explicit)
    _anchor_paths(table, Path())
    for where, key in _PATHS:
        if isinstance(table.get(where), dict) and table[where].get(key) == "":
            raise RecipeError(f"{where}.{key} is still to be named: --set {where}.{key}=PATH, or in {source}.")
    return recipe_from_table(table, folder)


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
        part: Component = getattr(recipe, name)
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


def _table(table: Table, name: str) -> Table:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise RecipeError(f"{name} = {found!r} must be a table: write [{name}] and its keys below.")
    return found


def _part(where: str, table: Table) -> Component:
    name = table.get("name")
    if not isinstance(name, str):
        raise RecipeError(f'[{where}] needs a name, such as name = "...".')
    return Component(name, {key: value for key, value in table.items() if key != "name"})


def _parts_of(where: str, rows: Any) -> tuple[Component, ...]:
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
    key, parsed = assignment(text)
    names = key.split(".")
    if not all(names):
        raise RecipeError(f"--set {text!r} must look like optim.lr=3e-4.")
    if len(names) == 1 and not isinstance(parsed, (dict, list)):
        raise RecipeError(f"--set {text!r} must name a key of a table, such as optim.lr=3e-4.")
    target: Any = table
    for depth, name in enumerate(names[:-1]):
        if isinstance(target, list):
            if not name.isdigit() or int(name) >= len(target):
                where = ".".join(names[:depth])
                raise RecipeError(f"--set {text!r}: the recipe has {len(target)} of [[{where}]], counted from 0.")
            target = target[int(name)]
        else:
            target = target.setdefault(name, [] if name in _LISTS else {})
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {text!r}: {name} is a value, not a table.")
    if isinstance(target, list):
        raise RecipeError(f"--set {text!r}: name it by its number, such as filter.0.threshold_db=-40.")
    target[names[-1]] = parsed
    return key


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
        "validate.save_audio": recipe.validate.save_audio,
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
