import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from unbraid.seeding import generator, seeded_torch

PURPOSES = st.sampled_from(["train", "valid", "test", "train-order", "initial weights"])
POSITIONS = st.tuples(
    st.integers(0, 2**31), PURPOSES, st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 100)
)


@given(POSITIONS)
def test_the_same_position_draws_the_same_numbers(position):
    assert np.array_equal(generator(*position).random(4), generator(*position).random(4))


@given(POSITIONS, POSITIONS)
def test_another_position_draws_other_numbers(one, other):
    assume(one != other)

    assert not np.array_equal(generator(*one).random(4), generator(*other).random(4))


def test_a_negative_seed_is_accepted():
    assert not np.array_equal(generator(-1, "train", 0).random(4), generator(1, "train", 0).random(4))


def test_another_process_draws_the_same_numbers():
    code = "from unbraid.seeding import generator; print(generator(3, 'train', 1, 2).integers(2**40))"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert int(done.stdout) == generator(3, "train", 1, 2).integers(2**40)


def test_neighbouring_positions_are_uncorrelated():
    first = np.array([generator(0, "train", 0, index, 0).random() for index in range(4000)])

    assert first.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(0, abs=4 / 4000**0.5)


def test_torch_draws_the_same_numbers_at_the_same_position():
    drawn = []
    for position in ((0, "step", 5, 0), (0, "step", 5, 0), (0, "step", 5, 1)):
        with seeded_torch(*position):
            drawn.append(torch.rand(4))

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_global_stream_is_not_changed(fails):
    torch.manual_seed(7)
    torch.rand(3)
    expected = torch.rand(4)

    torch.manual_seed(7)
    torch.rand(3)
    try:
        with seeded_torch(0, "step", 1):
            torch.rand(100)
            if fails:
                raise KeyError
    except KeyError:
        pass

    assert torch.equal(torch.rand(4), expected)
