"""What is advised on what was measured."""

import pytest
from bench_rows import recipe, row, without

from unbraid.bench_advice import advise


def test_the_fastest_is_advised_in_the_recipes_own_words():
    rows = [
        row(step=1.0),
        row("bf16", step=0.5),
        row("fp32", True, step=0.9, first=9),
        row("bf16", True, step=0.25, first=26),
    ]

    advice = advise(rows, recipe(max_steps=1000))

    assert advice.take == {"train.precision": "bf16", "train.compile": "on", "data.batch_size": 2}
    assert 'train.precision = "bf16", train.compile = "on", data.batch_size = 2' in advice.words
    assert "4.00 times fp32 not compiled" in advice.words
    assert "comes back in 100 steps" in advice.words  # 25 seconds more, a quarter of a second saved each time


@pytest.mark.parametrize("budget", [{"max_steps": 99}, {"max_minutes": 0.4}])
def test_what_compiling_takes_must_come_back_within_the_budget(budget):
    rows = [row(step=0.5), row("fp32", True, step=0.25, first=26)]

    assert advise(rows, recipe(**budget)).take["train.compile"] == "off"
    assert advise(rows, recipe()).take["train.compile"] == "on"


def test_what_asks_for_less_is_advised_where_it_is_as_fast():
    rows = [row(step=1.0), row("bf16", step=0.98), row("bf16", True, step=0.975)]

    assert advise(rows, recipe()).take == {"train.precision": "fp32", "train.compile": "off", "data.batch_size": 2}


def test_a_larger_batch_is_told_of_where_it_does_more_and_not_advised():
    more, less = (
        advise([row(), row(batch_size=4, step=1.5)], recipe()),
        advise([row(), row(batch_size=4, step=1.9)], recipe()),
    )

    assert more.take["data.batch_size"] == less.take["data.batch_size"] == 2
    assert "data.batch_size = 4 does 1.33 times as many" in more.words
    assert "batch_size = 4" not in less.words


def test_where_nothing_fits_it_is_said_what_to_lower():
    advice = advise([without(), without("bf16")], recipe())

    assert advice.take == {}
    assert "out of memory" in advice.words
    assert "Lower data.batch_size" in advice.words
