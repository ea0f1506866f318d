"""The code and the recipes in the README and in the docs work."""

import re

import pytest
import torch
from documents import DOCUMENTS, blocks, commands, named_blocks

from unbraid.build import build_model
from unbraid.config.recipe import load_recipe
from unbraid.config.registry import build_loss
from unbraid.models.conv_tasnet import ConvTasNet

TESTED_ELSEWHERE = {"docs/learn/gradient-descent.md"}
"""Its code runs in tests/textbook/test_learn_page.py, which also checks what it prints."""

WITH_GUARD = sorted(name for name, text in DOCUMENTS.items() if "train_plainly" in text)
WITH_WHOLE_STEP = sorted(name for name, text in DOCUMENTS.items() if "train_step(" in "".join(blocks(text, "python")))
WITH_RECIPES = sorted(name for name, text in DOCUMENTS.items() if blocks(text, "toml"))


def names_defined_by(name, marker):
    """Run the code block of a document that contains a marker, and return what it defines."""
    code = next(block for block in blocks(DOCUMENTS[name], "python") if marker in block)
    names = {}
    exec(compile(code, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", WITH_WHOLE_STEP)
def test_a_loop_with_the_whole_step_trains(capsys, name):
    names = names_defined_by(name, "train_step(")
    sources = torch.randn(2, 2, 1, 800, generator=torch.Generator().manual_seed(0))

    names["train"]([(sources.sum(1), sources)] * 2)

    assert re.findall(r"^(\d) (\w+)", capsys.readouterr().out, flags=re.MULTILINE) == [
        ("1", "trained"),
        ("2", "trained"),
    ]


@pytest.mark.parametrize("name", WITH_GUARD)
def test_a_loop_with_the_guard_skips_a_bad_batch(capsys, name):
    names = names_defined_by(name, "guarded_step")
    rng = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 1, 400, generator=rng), torch.randn(2, 2, 1, 400, generator=rng)) for _ in range(3)]
    batches[1][0][0, 0, 3] = torch.nan
    model = ConvTasNet(n_filters=16, bottleneck=8, hidden=16, skip=8, n_blocks=2, n_repeats=1)

    names["train_plainly"](model, batches)

    assert re.findall(r"taken (\w+)", capsys.readouterr().out) == ["True", "False", "True"]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_recipes_build_their_model_and_loss(tmp_path, name):
    text = DOCUMENTS[name]
    for file, block in named_blocks(text).items():
        (tmp_path / file).write_text(block, encoding="utf-8")

    for block in blocks(text, "toml"):
        file = tmp_path / "recipe.toml"
        file.write_text(block, encoding="utf-8")
        recipe = load_recipe(file, ["train.max_steps=1"])  # a part of a recipe names no end
        build_model(recipe)
        build_loss(recipe)


def test_no_code_is_left_untested():
    tested = {*WITH_GUARD, *WITH_WHOLE_STEP, *TESTED_ELSEWHERE}

    for name, text in DOCUMENTS.items():
        assert not blocks(text, "python") or name in tested
        unknown = set(re.findall(r"^```(\w+)", text, flags=re.MULTILINE)) - {"sh", "python", "toml", "text"}
        assert not unknown, name
    assert WITH_GUARD
    assert WITH_WHOLE_STEP
    assert commands(DOCUMENTS["README.md"])
