"""The loss at many points: interrupted at any of them, and resumed."""

import math
import os
import signal

import numpy as np
import pytest
import torch

from unbraid.errors import UserError
from unbraid.lab.landscape import WeightPoints
from unbraid.lab.landscape_points import evaluate_points, points_file_name, read_points, write_points
from unbraid.signals import stop_on_signals

KEY = {"around": "abc", "span": 1.0}
POINTS = WeightPoints([{"a": torch.ones(1)}], np.arange(10.0)[:, None], KEY)


def test_a_signal_keeps_the_points_so_far_and_the_next_call_resumes(tmp_path):
    path = tmp_path / "points.json"
    computed = []

    def loss(weights):
        computed.append(float(weights["a"]))
        if len(computed) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return computed[-1] / 3

    with stop_on_signals() as stop:
        first = evaluate_points(POINTS, loss, path, KEY, stop=stop)
    second = evaluate_points(POINTS, loss, path, KEY)
    third = evaluate_points(POINTS, loss, path, KEY)

    assert (first.signal, first.n_done, first.n_new) == (signal.SIGTERM, 4, 4)
    assert np.isnan(first.losses[4:]).all()
    assert (second.signal, second.n_done, second.n_new) == (0, 10, 6)
    assert computed == list(range(10))
    assert second.losses.tolist() == [index / 3 for index in range(10)] == third.losses.tolist()
    assert third.n_new == 0
    assert math.isnan(third.points_per_second)


def test_a_second_ctrl_c_interrupts_at_once_and_loses_no_point(tmp_path):
    path = tmp_path / "points.json"

    def loss(weights):
        if float(weights["a"]) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        evaluate_points(POINTS, loss, path, KEY, stop=stop)

    assert read_points(path, KEY) == [1.0, 1.0]


def test_nonfinite_losses_survive_the_file(tmp_path):
    write_points(tmp_path / "points.json", KEY, [1.5, math.inf, -math.inf, math.nan])

    assert str(read_points(tmp_path / "points.json", KEY)) == "[1.5, inf, -inf, nan]"


def test_points_of_another_key_are_refused_and_have_another_file_name(tmp_path):
    path = tmp_path / "points.json"
    other_key = KEY | {"span": 2.0}
    write_points(path, KEY, [1.0])

    assert points_file_name(KEY) != points_file_name(other_key)
    with pytest.raises(UserError, match="something else"):
        read_points(path, other_key)
    path.write_text("[1, 2")
    with pytest.raises(UserError, match="remove it"):
        read_points(path, KEY)


def test_progress_reports_points_and_their_rate(tmp_path):
    reports = []
    path = tmp_path / "points.json"
    evaluate_points(POINTS, lambda weights: 0.0, path, KEY, progress=lambda done, text: reports.append((done, text)))

    assert [done for done, _ in reports] == list(range(1, 11))
    assert all(text.endswith(" points/s") for _, text in reports)
