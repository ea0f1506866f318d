"""The loss at many points: stopped at any of them, and gone on with."""

import math
import os
import signal

import numpy as np
import pytest
import torch

from unbraid.errors import UserError
from unbraid.lab.landscape import Chart
from unbraid.lab.landscape_points import kept_name, read_points, survey, write_points
from unbraid.signals import stop_on_signals

KEY = {"around": "abc", "span": 1.0}
CHART = Chart([{"a": torch.ones(1)}], np.arange(10.0)[:, None], KEY)


def test_a_signal_keeps_the_points_so_far_and_the_next_goes_on_with_them(tmp_path):
    kept, asked = tmp_path / "points.json", []

    def measure(weights):
        asked.append(float(weights["a"]))
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked[-1] / 3

    with stop_on_signals() as stop:
        first = survey(CHART, measure, kept, KEY, stop=stop)
    second, third = (survey(CHART, measure, kept, KEY) for _ in range(2))

    assert (first.signal, first.n_done, first.n_new) == (signal.SIGTERM, 4, 4)
    assert np.isnan(first.losses[4:]).all()
    assert (second.signal, second.n_done, second.n_new) == (0, 10, 6)
    assert asked == list(range(10))
    assert second.losses.tolist() == [place / 3 for place in range(10)] == third.losses.tolist()
    assert third.n_new == 0
    assert math.isnan(third.points_per_second)


def test_a_second_ctrl_c_is_not_held_back_and_loses_nothing(tmp_path):
    kept = tmp_path / "points.json"

    def measure(weights):
        if float(weights["a"]) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        survey(CHART, measure, kept, KEY, stop=stop)

    assert read_points(kept, KEY) == [1.0, 1.0]


def test_losses_that_are_not_finite_are_kept_as_they_are(tmp_path):
    write_points(tmp_path / "points.json", KEY, [1.5, math.inf, -math.inf, math.nan])

    assert str(read_points(tmp_path / "points.json", KEY)) == "[1.5, inf, -inf, nan]"


def test_points_of_something_else_are_refused_and_have_another_name(tmp_path):
    path, other = tmp_path / "points.json", KEY | {"span": 2.0}
    write_points(path, KEY, [1.0])

    assert kept_name(KEY) != kept_name(other)
    with pytest.raises(UserError, match="something else"):
        read_points(path, other)
    path.write_text("[1, 2")
    with pytest.raises(UserError, match="remove it"):
        read_points(path, KEY)


def test_progress_tells_points_and_their_rate(tmp_path):
    heard = []
    path = tmp_path / "points.json"
    survey(CHART, lambda weights: 0.0, path, KEY, progress=lambda done, text: heard.append((done, text)))

    assert [done for done, _ in heard] == list(range(1, 11))
    assert all(text.endswith(" points/s") for _, text in heard)
