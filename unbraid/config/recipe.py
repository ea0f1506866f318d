"""Read recipes: TOML files and ``--set`` overrides, checked against the signatures of the code they configure."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from unbraid.config.schema import Table, allowed_keys, check_table, convert, parse_override
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
    """A table with a ``name``: an entry of a registry, and its keyword arguments.

    Attributes:
        name: Entry of the registry, or ``my_file:MyClass``.
        options: Keyword arguments.
    """

    name: str
    options: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; every key has a default.

    Attributes:
        data: What the examples are made from.
        model: The network; ``init`` is a checkpoint to start from.
        loss: The loss on signals, and how estimates are assigned to targets (``assign``).
        optim: The optimizer.
        schedule: The learning-rate schedule.
        clip: The gradient clipper.
        filters: The loss filters, ``[[filter]]``, in order.
        transforms: The gradient transforms, ``[[transform]]``, in order.
        train: The budget and the rules of training.
        validate: When and on how much to validate.
        save: When to save, and how many checkpoints to keep.
        folder: Folder of the recipe, where the file of ``my_file:MyModel`` is looked for first.
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
        """Return how estimates are assigned to targets: ``permutation``, ``fixed`` or ``mixit``."""
        return str(self.loss.options.get("assign", "permutation"))

    @property
    def silent_below_db(self) -> float | None:
        """Return how far below the loudest output one counts as silent, in dB; None if none is trained to be silent."""
        return 25.0 if self.loss.options.get("inactive_weight", 0) else None

    @property
    def has_custom_code(self) -> bool:
        """Return whether the model, a loss or the data set is the user's own code, which must be trusted to be run."""
        losses = [component.name for component, _ in self.loss_terms]
        return any(":" in name for name in (self.model.name, *losses, self.data.name))

    @property
    def loss_terms(self) -> list[tuple[Component, float]]:
        """Return the losses and their weights: the entries of ``[[loss.terms]]`` for the name ``sum``, else the one.

        Raises:
            RecipeError: If the terms are missing or malformed.
        """
        options = {key: value for key, value in self.loss.options.items() if key not in ("assign", "inactive_weight")}
        if self.loss.name != "sum":
            return [(Component(self.loss.name, options), 1.0)]
        if unknown := sorted(set(options) - {"terms"}):
            raise RecipeError(
                f"[loss] name = 'sum' has no key {', '.join(unknown)}; its keys are terms, assign and inactive_weight."
            )
        terms = []
        for component in _components("loss.terms", options.get("terms", [])):
            term_options = dict(component.options)
            weight = convert(term_options.pop("weight", 1.0), float, "loss.terms.weight")
            terms.append((Component(component.name, term_options), weight))
        if not terms:
            raise RecipeError("[loss] name = 'sum' needs [[loss.terms]], each with a name and a weight.")
        return terms

    @property
    def loss_is_scale_invariant(self) -> bool:
        """Return whether the loss ignores the level of the estimates; the level is then taken from the mixture."""
        losses = [LOSSES.get(component.name) for component, _ in self.loss_terms]
        # A loss of the embedding alone says nothing about levels. None is the user's own loss, which counts.
        on_estimates = [loss for loss in losses if loss is None or "estimate" in loss_inputs(loss)]
        return bool(on_estimates) and all(is_scale_invariant(loss) for loss in on_estimates)

    @property
    def audio_options(self) -> AudioOptions:
        """Return how the model's outputs become audio files."""
        return AudioOptions(self.data.sample_rate, self.loss_is_scale_invariant, self.silent_below_db)


_SETTINGS: dict[str, type[Any]] = {
    "data": DataSettings,
    "train": TrainSettings,
    "validate": ValidateSettings,
    "save": SaveSettings,
}
_COMPONENTS = ("model", "loss", "optim", "schedule", "clip")
_REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {
    "model": MODELS,
    "loss": LOSSES,
    "optim": OPTIMIZERS,
    "schedule": SCHEDULES,
    "clip": CLIPPERS,
}
_PATHS = (("data", "path"), ("data", "noise"), ("model", "init"))  # keys whose value is a path
_LISTS = ("filter", "transform")  # [[filter]] and [[transform]], of which there may be several
_TABLES = (*_SETTINGS, *_COMPONENTS, *_LISTS)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply ``--set`` overrides.

    Relative paths in the file are relative to the file, those in overrides to the current folder.

    Args:
        path: The file.
        overrides: Such as ``optim.lr=3e-4`` or ``filter.0.threshold_db=-40``; values are TOML, or else plain text.

    Raises:
        RecipeError: If the file cannot be read, or anything in it is invalid.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}.") from error
    _make_paths_absolute(table, path.parent)
    return recipe_with_overrides(table, overrides, path.parent.resolve(), source=str(path))


def recipe_with_overrides(table: Table, overrides: Sequence[str], folder: Path, *, source: str) -> Recipe:
    """Return the recipe of a table of plain dicts, with ``--set`` overrides applied.

    Args:
        table: In the form of `recipe_table`; it is changed in place.
        overrides: As in `load_recipe`.
        folder: Where the files of the user's own code are looked for first.
        source: Where the table comes from, for messages.

    Raises:
        RecipeError: If anything in it is invalid.
    """
    # An override that names another component must not leave it with the options of the one before.
    names_before = {where: _component_name(table, where) for where in _REGISTRIES}
    overridden = {_apply_override(table, override) for override in overrides}
    for where, name_before in names_before.items():
        if _component_name(table, where) != name_before:
            _remove_unknown_keys(table, where, overridden)
    # Paths of the file are absolute by now, so only those of overrides are still relative.
    _make_paths_absolute(table, Path())
    recipe = recipe_from_table(table, folder)
    # Only now: a misspelt key is the likelier reason for a path that is still empty.
    for where, key in _PATHS:
        if isinstance(table.get(where), dict) and table[where].get(key) == "":
            raise RecipeError(f"{where}.{key} is empty. Set it in {source}, or with --set {where}.{key}=PATH.")
    return recipe


def recipe_from_table(table: Table, folder: Path) -> Recipe:
    """Return the recipe of a table of plain dicts, after checking it.

    Args:
        table: In the form of `recipe_table`; missing keys get their defaults.
        folder: Where the files of the user's own code are looked for first.

    Raises:
        RecipeError: If anything in it is invalid.
    """
    for name in table:
        if name not in _TABLES:
            raise RecipeError(f"[{name}] is unknown. The tables are {', '.join(_TABLES)}.{nearest(name, _TABLES)}")
    settings = {name: kind(**check_table(name, kind, _subtable(table, name))) for name, kind in _SETTINGS.items()}
    components: dict[str, Any] = {
        name: _component(name, {"name": _default_name(name), **_subtable(table, name)})
        for name in _COMPONENTS
        if name in table
    }
    lists: dict[str, Any] = {f"{name}s": _components(name, table.get(name, [])) for name in _LISTS}
    recipe = Recipe(**settings, **components, **lists, folder=folder)
    _check_ranges(recipe)
    return recipe


def recipe_table(recipe: Recipe) -> Table:
    """Return the whole recipe as plain dicts with all defaults, as run directories and checkpoints store it."""
    table: Table = {name: _plain(asdict(getattr(recipe, name))) for name in _SETTINGS}
    for name in _COMPONENTS:
        component: Component = getattr(recipe, name)
        table[name] = _plain({"name": component.name, **component.options})
    for name in _LISTS:
        table[name] = [_plain({"name": each.name, **each.options}) for each in getattr(recipe, f"{name}s")]
    return table


def to_toml(recipe: Recipe) -> str:
    """Return the whole recipe as TOML."""
    return tomli_w.dumps(recipe_table(recipe))


def differences(before: Table, after: Table) -> dict[str, tuple[Any, Any]]:
    """Return the keys, such as ``optim.lr``, whose values differ between two recipes, and both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= {f"{name}.{key}": pair for key, pair in differences(old, new).items()}
        elif old != new:
            changed[name] = (old, new)
    return changed


def _subtable(table: Table, name: str) -> Table:
    subtable = table.get(name, {})
    if not isinstance(subtable, dict):
        raise RecipeError(f"{name} = {subtable!r} must be a table: write [{name}] and its keys below.")
    return subtable


def _component(where: str, table: Table) -> Component:
    name = table.get("name")
    if not isinstance(name, str):
        raise RecipeError(f'[{where}] needs a name, such as name = "...".')
    return Component(name, {key: value for key, value in table.items() if key != "name"})


def _components(where: str, rows: Any) -> tuple[Component, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"A {where} is written as [[{where}]], with two brackets: there can be several.")
    return tuple(_component(where, row) for row in rows)


def _make_paths_absolute(table: Table, folder: Path) -> None:
    """Replace the table's relative paths by absolute ones, taken as relative to a folder; expand ``~``."""
    for where, key in _PATHS:
        section = table.get(where)
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
            try:
                section[key] = str((folder / Path(section[key]).expanduser()).absolute())
            except RuntimeError as error:
                raise RecipeError(f"{where}.{key} = {section[key]!r} cannot be found ({error}).") from error


def _component_name(table: Table, where: str) -> object:
    section = table.get(where)
    return section.get("name", _default_name(where)) if isinstance(section, dict) else _default_name(where)


def _default_name(where: str) -> str:
    component: Component = getattr(Recipe(), where)
    return component.name


def _remove_unknown_keys(table: Table, where: str, overridden: set[str]) -> None:
    """Remove the file's keys that the component now named does not have; keys that were overridden stay."""
    section = table[where]
    if not isinstance(section, dict):
        return
    component = _REGISTRIES[where].get(str(section.get("name")))
    keys = {"name", "init", "assign", "inactive_weight", *(allowed_keys(component) if component else ())}
    table[where] = {key: value for key, value in section.items() if key in keys or f"{where}.{key}" in overridden}


def _apply_override(table: Table, text: str) -> str:
    """Apply one override to the table, and return its key."""
    key, value = parse_override(text)
    names = key.split(".")
    if not all(names):
        raise RecipeError(f"--set {text!r} must look like optim.lr=3e-4.")
    if len(names) == 1 and not isinstance(value, (dict, list)):
        raise RecipeError(f"--set {text!r} must name a key of a table, such as optim.lr=3e-4.")

    # Walk down to the table that holds the key, creating tables on the way; [[filter]] is walked by number.
    target: Any = table
    for depth, name in enumerate(names[:-1]):
        if isinstance(target, list):
            if not name.isdigit() or int(name) >= len(target):
                where = ".".join(names[:depth])
                raise RecipeError(
                    f"--set {text!r}: the recipe has {len(target)} of [[{where}]]; the first is {where}.0."
                )
            target = target[int(name)]
        else:
            target = target.setdefault(name, [] if name in _LISTS else {})
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {text!r}: {name} is a value, not a table.")
    if isinstance(target, list):
        raise RecipeError(f"--set {text!r}: add the number of the entry, such as filter.0.threshold_db=-40.")
    target[names[-1]] = value
    return key


_HIGHEST = {
    "data.sample_rate": 10**6,
    "data.n_sources": 1000,
    "data.excerpt_seconds": 10**5,
    "data.batch_size": 10**6,
    "data.workers": 1024,
    "data.items_per_epoch": 10**9,
    "train.max_steps": 10**12,
    "validate.n_items": 10**7,
}
"""Beyond these a number is a slip of the keyboard, and would end the run in a MemoryError or an OverflowError."""

_MAX_BATCH_BYTES = 2**40


def _check_ranges(recipe: Recipe) -> None:
    """Raise RecipeError if a number is out of its range, or two numbers contradict each other."""
    data = recipe.data
    train = recipe.train
    positive = {
        "data.sample_rate": data.sample_rate,
        "data.n_sources": data.n_sources,
        "data.excerpt_seconds": data.excerpt_seconds,
        "data.batch_size": data.batch_size,
        "train.accumulate": train.accumulate,
        "train.loss_upper_limit": train.loss_upper_limit,
        "validate.n_items": recipe.validate.n_items,
        "save.keep": recipe.save.keep,
    }
    not_negative = {
        "data.workers": data.workers,
        "data.worker_timeout_seconds": data.worker_timeout_seconds,
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
    for name, highest in _HIGHEST.items():
        where, key = name.split(".")
        value = getattr(getattr(recipe, where), key)
        if not value <= highest:
            raise RecipeError(f"{name} = {value:g} must be at most {highest:g}.")
    if data.n_samples < 1:
        raise RecipeError(
            f"data.excerpt_seconds = {data.excerpt_seconds:g} makes excerpts of 0 samples; it must be longer."
        )
    batch_bytes = 4 * data.batch_size * (data.n_sources + 1) * data.n_samples
    if batch_bytes > _MAX_BATCH_BYTES:
        raise RecipeError(
            f"A batch of {data.batch_size} excerpts of {data.excerpt_seconds:g} s would take {batch_bytes / 2**40:.3g} "
            "TiB. Lower data.batch_size or data.excerpt_seconds."
        )
    for name, (low, high) in {"data.gains_db": data.gains_db, "data.noise_snr_db": data.noise_snr_db}.items():
        if not low <= high:
            raise RecipeError(f"{name} = [{low:g}, {high:g}] must be in order, from low to high.")
    if not -120 <= data.level_db <= 0:
        raise RecipeError(f"data.level_db = {data.level_db:g} must be from -120 to 0, in dB of full scale.")
    if train.accumulate > data.batch_size:
        raise RecipeError(
            f"train.accumulate = {train.accumulate} must not be above "
            f"data.batch_size = {data.batch_size}: every micro-batch needs an example."
        )
    if not 0 <= train.ema < 1:
        raise RecipeError(f"train.ema = {train.ema:g} must be from 0 (no average) to below 1, such as 0.999.")
    if train.max_steps == 0 and train.max_minutes == 0:
        raise RecipeError("The run has no end: set train.max_steps, train.max_minutes, or both.")


def _plain(value: Any) -> Any:
    """Return a value in TOML's types: paths as text, without None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
