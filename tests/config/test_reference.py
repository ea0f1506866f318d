"""The reference lists every key that a recipe accepts, with its default and a meaning."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbraid.config.recipe import Component, Recipe, recipe_from_table, recipe_table
from unbraid.config.reference import argument_meanings, recipe_keys, type_in_words
from unbraid.config.registry import build_component, build_loss
from unbraid.config.shipped_recipes import recipes_folder
from unbraid.data.dataset import DataSettings
from unbraid.errors import RecipeError
from unbraid.losses import LOSSES
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.train.optim import OPTIMIZERS, SCHEDULES

KEYS = recipe_keys()
LISTED = {(row.table, row.component, row.key) for row in KEYS}
REGISTRIES = {
    "model": MODELS,
    "optim": OPTIMIZERS,
    "schedule": SCHEDULES,
    "clip": CLIPPERS,
    "filter": FILTERS,
    "transform": TRANSFORMS,
}


def accepted_keys(message):
    """Return the keys that a refusal of an unknown key lists."""
    listed = re.search(r"its keys are (.*?)\.( Did|$)", message)[1]
    return set() if listed == "none but name" else set(listed.split(", "))


def listed_options(table, component):
    return {row.key for row in KEYS if (row.table, row.component) == (table, component)}


@pytest.mark.parametrize("row", KEYS, ids=lambda row: f"{row.table}.{row.component}.{row.key}")
def test_every_key_has_a_type_and_a_meaning(row):
    assert row.type
    assert row.meaning[-1] == "."
    assert "\n" not in row.meaning


def test_no_key_is_listed_twice():
    assert len(LISTED) == len(KEYS)


@pytest.mark.parametrize("table", ["data", "train", "validate", "save"])
def test_the_settings_that_a_recipe_accepts_are_the_ones_listed(table):
    with pytest.raises(RecipeError) as caught:
        recipe_from_table({table: {"no_such_key": 1}}, Path())

    assert accepted_keys(str(caught.value)) == {key for where, _, key in LISTED if where == table}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, registry in REGISTRIES.items() for name in registry]
)
def test_the_options_that_a_component_accepts_are_the_ones_listed(table, name):
    component = Component(name, {"no_such_key": 1})
    supplied = {"parameters": [torch.nn.Parameter(torch.zeros(1))]} if table == "optim" else {}

    with pytest.raises(RecipeError, match="no_such_key") as caught:
        build_component(table, component, REGISTRIES[table], None, **supplied)

    assert accepted_keys(str(caught.value)) == listed_options(table, name)


@pytest.mark.parametrize("name", LOSSES)
def test_the_options_that_a_loss_accepts_are_the_ones_listed(name):
    with pytest.raises(RecipeError, match="no_such_key") as caught:
        build_loss(replace(Recipe(), loss=Component(name, {"no_such_key": 1})))

    assert accepted_keys(str(caught.value)) == listed_options("loss", name)


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_every_key_of_the_shipped_recipes_is_listed(path):
    recipe = recipe_from_table(tomllib.loads(path.read_text(encoding="utf-8")), path.parent)
    for table, options in recipe_table(recipe).items():
        for component in options if isinstance(options, list) else [options]:
            for key in component:
                assert key in listed_options(table, "") | listed_options(table, component.get("name", "")), table


def test_the_defaults_are_those_of_a_recipe_without_any_key():
    table = recipe_table(Recipe())
    for row in KEYS:
        if not row.component and row.default and row.table in table and row.key in table[row.table]:
            assert tomllib.loads(f"x = {row.default}")["x"] == table[row.table][row.key], row


def test_a_meaning_is_read_over_several_lines_and_ends_at_the_next_section():
    meanings = argument_meanings(DataSettings)

    assert meanings["seed"] in {row.meaning for row in KEYS if row.key == "seed"}
    assert len(meanings["batch_size"]) > 100
    assert set(meanings) == set(DataSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "integer"),
        (tuple[float, float], "list of 2: number"),
        (tuple[str, ...], "list: text"),
        (Path | None, "path"),
        (bool, "true or false"),
    ],
)
def test_types_are_described_in_words(hint, words):
    assert type_in_words(hint) == words
