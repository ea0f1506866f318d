"""What is drawn of a run: every step counted once, thinned without losing a spike, however long it was."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import BLOCKS, Run

from unbraid import curves as module
from unbraid.curves import bin_starts, read_curves, running_mean, shares, thin
from unbraid.errors import CheckpointError, UserError
from unbraid.records import RunDirectory


def written(folder, rows, validations=()):
    folder.mkdir()
    run = RunDirectory(folder)
    run.steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.validation.write_text("".join(json.dumps(row) + "\n" for row in validations))
    return run


def leave_out(row, outcome="nonfinite_loss"):
    row |= {"outcome": outcome, "loss": None, "loss_text": "nan", "clipped": False}


def test_a_long_run_is_read_in_pieces_as_a_short_one_is_in_one(tmp_path, monkeypatch):
    rows = Run(120).steps
    leave_out(rows[60])
    run = written(tmp_path / "run", rows)
    whole = read_curves(run)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 7)

    pieces = read_curves(run)

    for name, values in whole.of_step.items():
        assert np.array_equal(values, pieces.of_step[name], equal_nan=True)
    assert np.array_equal(whole.outcome, pieces.outcome)
    assert np.array_equal(whole.ratios, pieces.ratios)
    assert (pieces.blocks, pieces.sampled.tolist()) == (BLOCKS, [50.0, 100.0])


def test_a_step_that_was_left_out_is_in_no_curve_of_what_was_trained(tmp_path):
    rows = Run(10).steps
    leave_out(rows[3])
    leave_out(rows[4], "all_easy")
    curves = read_curves(written(tmp_path / "run", rows))

    assert curves.of_trained("loss")[0].tolist() == [1, 2, 3, 6, 7, 8, 9, 10]
    assert {reason: np.flatnonzero(marked).tolist() for reason, marked in curves.left_out.items()} == {
        "nonfinite_loss": [3],
        "all_easy": [4],
    }


def test_a_torn_line_is_read_past(tmp_path):
    run = written(tmp_path / "run", Run(5).steps)
    with run.steps.open("a") as file:
        file.write('{"step": 6, "loss"')

    assert len(read_curves(run).outcome) == 5


def test_where_there_is_nothing_to_draw_it_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no steps\.jsonl"):
        read_curves(RunDirectory(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no steps yet"):
        read_curves(written(tmp_path / "run", []))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 20))
def test_thinned_a_curve_keeps_its_extremes_and_its_order(values, n_bins):
    x, y = np.arange(len(values), dtype=float), np.array(values)

    at, kept = thin(x, y, n_bins)

    assert len(at) <= max(2 * n_bins, 1)
    assert (np.diff(at) > 0).all()
    assert np.array_equal(kept, y[at.astype(int)])
    assert (kept.min(), kept.max()) == (y.min(), y.max())


def test_the_running_mean_begins_with_what_there_is():
    assert running_mean(np.array([2.0, 4.0, 6.0, 8.0]), 2) == pytest.approx([2.0, 3.0, 5.0, 7.0])


def test_shares_count_among_those_that_can_be_marked():
    marked = np.array([True, False, True, True, False, False])
    among = np.array([True, True, True, False, False, False])

    found = shares(marked, among, bin_starts(6, 3))

    assert found[:2].tolist() == [0.5, 1.0]
    assert np.isnan(found[2])


@pytest.mark.slow
def test_a_million_steps_take_seconds_and_no_gigabyte(tmp_path):
    run = written(tmp_path / "run", Run(10_000).steps)
    block = run.steps.read_bytes()
    with run.steps.open("ab") as file:
        for _ in range(99):
            file.write(block)
    script = (
        "import resource, sys; from pathlib import Path; from unbraid.plots import draw_plots; "
        "from unbraid.records import RunDirectory; draw_plots(RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])); "
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime, used.ru_maxrss)"
    )

    command = [sys.executable, "-c", script, str(run.path), str(tmp_path / "plots")]
    told = subprocess.run(command, check=True, timeout=480, capture_output=True, text=True).stdout

    seconds, kilobytes = map(float, told.split())
    assert seconds < 90
    assert kilobytes < 1_000_000
