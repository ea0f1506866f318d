"""Advice that follows from measurements."""

import pytest
from bench_rows import recipe, row, without

from unbraid.bench_advice import advise


def test_the_fastest_variant_is_advised_as_recipe_keys():
    rows = [
        row(step=1.0),
        row("bf16", step=0.5),
        row("fp32", True, step=0.9, first=9),
        row("bf16", True, step=0.25, first=26),
    ]

    advice = advise(rows, recipe(max_steps=1000))

    assert advice.take == {"train.precision": "bf16", "train.compile": "on", "data.batch_size": 2}
    assert 'train.precision = "bf16", train.compile = "on", data.batch_size = 2' in advice.words
    assert "4.00 times as fast as fp32 without compiling" in advice.words
    assert "repaid after 100 steps" in advice.words  # 25 seconds more to start, a quarter of a second saved per step


@pytest.mark.parametrize("budget", [{"max_steps": 99}, {"max_minutes": 0.4}])
def test_compiling_is_advised_only_if_the_budget_repays_it(budget):
    rows = [row(step=0.5), row("fp32", True, step=0.25, first=26)]

    assert advise(rows, recipe(**budget)).take["train.compile"] == "off"
    assert advise(rows, recipe()).take["train.compile"] == "on"


def test_of_equally_fast_variants_the_simplest_is_advised():
    rows = [row(step=1.0), row("bf16", step=0.98), row("bf16", True, step=0.975)]

    assert advise(rows, recipe()).take == {"train.precision": "fp32", "train.compile": "off", "data.batch_size": 2}


def test_a_faster_larger_batch_is_mentioned_but_not_advised():
    faster = advise([row(), row(batch_size=4, step=1.5)], recipe())
    hardly_faster = advise([row(), row(batch_size=4, step=1.9)], recipe())

    assert faster.take["data.batch_size"] == hardly_faster.take["data.batch_size"] == 2
    assert "data.batch_size = 4 processes 1.33 times as many" in faster.words
    assert "batch_size = 4" not in hardly_faster.words


def test_without_memory_for_any_variant_the_advice_says_what_to_lower():
    advice = advise([without(), without("bf16")], recipe())

    assert advice.take == {}
    assert "out of memory" in advice.words
    assert "Lower data.batch_size" in advice.words
