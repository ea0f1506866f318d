"""A run directory is followed as it grows, is cut back, breaks off, and comes and goes."""

import json

import numpy as np
from runs import add_steps, write_run

from unbraid.web import jsonl_tail
from unbraid.web.jsonl_tail import Followed, runs_in
from unbraid.web.step_columns import COLUMNS

LOSS = COLUMNS.index("loss")


def read(path):
    run = Followed(path)
    while run.advance():
        pass
    return run


def test_lines_are_read_once_as_they_come(tmp_path):
    path = write_run(tmp_path / "run", n_steps=100)
    run = read(path)
    add_steps(path, 101, 5)

    assert run.advance()
    assert not run.advance()
    assert run.last_step == 105
    assert run.n_steps == 105


def test_a_line_is_read_when_it_is_whole(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    run = read(path)
    line = json.dumps({"step": 11, "outcome": "trained", "loss": -1.0}) + "\n"
    with (path / "steps.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        run.advance()
        assert run.last_step == 10
        file.write(line[20:])

    run.advance()

    assert run.last_step == 11
    assert run.n_torn == 0


def test_a_torn_line_is_counted_and_passed_over(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    with (path / "steps.jsonl").open("a") as file:
        file.write('{"step": 11, "lo\n')
    add_steps(path, 11, 2)

    run = read(path)

    assert (run.last_step, run.n_torn) == (12, 1)


def test_a_run_that_goes_back_to_a_checkpoint_is_read_anew(tmp_path):
    path = write_run(tmp_path / "run", n_steps=100)
    run = read(path)
    lines = (path / "steps.jsonl").read_text().splitlines(keepends=True)[:60]
    (path / "steps.jsonl").write_text("".join(lines))
    add_steps(path, 61, 100)  # longer than before: the length alone would not show it

    while run.advance():
        pass

    steps = run.thinned(0, 10**6, 10**6).steps
    np.testing.assert_array_equal(steps, np.arange(1, 161))


def test_zoomed_far_in_each_step_is_shown_though_buckets_hold_many(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", n_steps=600)
    exact = read(path).thinned(301, 320, 100)
    monkeypatch.setattr(jsonl_tail.Buckets.__init__, "__kwdefaults__", {"capacity": 16})
    run = read(path)
    assert run.buckets.width == 64

    near = run.thinned(301, 320, 100)

    np.testing.assert_array_equal(near.steps, np.arange(301, 321))
    np.testing.assert_allclose(near.mean[LOSS], exact.mean[LOSS], rtol=1e-6)


def test_the_mean_loss_is_that_of_trained_steps_alone(tmp_path):
    def sick(run):
        run.steps[3].update(outcome="nonfinite_loss", loss=None, loss_text="nan")
        run.steps[4].update(outcome="all_filtered", loss=-40.0)

    run = read(write_run(tmp_path / "run", n_steps=10, change=sick))

    thinned = run.thinned(1, 10, 10)

    assert np.isnan(thinned.mean[LOSS, 3:5]).all()
    assert thinned.total[COLUMNS.index("nonfinite_loss")].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert thinned.total[COLUMNS.index("all_filtered")].sum() == 1


def test_runs_are_found_below_a_folder_and_links_are_not_followed(tmp_path):
    one = write_run(tmp_path / "runs" / "one", n_steps=3)
    two = write_run(tmp_path / "runs" / "deep" / "two", n_steps=3)
    write_run(tmp_path / "elsewhere", n_steps=3)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")

    assert runs_in([tmp_path / "runs"]) == [two, one]
    assert runs_in([one, one]) == [one]


def test_files_that_are_not_there_yet_are_no_fault(tmp_path):
    (tmp_path / "run").mkdir()

    run = Followed(tmp_path / "run")

    assert not run.advance()
    assert run.thinned(0, 10, 10).steps.size == 0


def test_a_megabyte_that_cannot_be_read_does_not_end_the_reading(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    with (path / "steps.jsonl").open("a") as file:
        file.write(f"{'x' * 99}\n" * 30_000)
    add_steps(path, 11, 5)

    run = read(path)

    assert (run.last_step, run.n_torn, run.unread_bytes) == (15, 30_000, 0)


def test_a_line_without_an_end_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_tail, "LONGEST", 5000)
    monkeypatch.setattr(jsonl_tail.Lines.next, "__defaults__", (1000,))
    path = write_run(tmp_path / "run", n_steps=10)
    with (path / "steps.jsonl").open("ab") as file:
        file.write(bytes(12_000) + b"\n")
    add_steps(path, 11, 5)

    run = read(path)

    assert run.last_step == 15
    assert run.n_torn >= 1


def test_a_step_that_was_rescued_is_counted(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10, change=lambda run: run.steps[4].update(n_bad=1))

    assert read(path).thinned(1, 10, 10).total[COLUMNS.index("rescued")].tolist() == [0] * 4 + [1] + [0] * 5


def test_very_many_validations_are_kept_in_bounded_room(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_tail, "VALIDATIONS_KEPT", 4)
    path = write_run(tmp_path / "run", n_steps=2000)
    run = read(path)

    assert run.n_validations == 20
    assert len(run.validations) <= 20
    assert set(run.validations[0]) == {"step", "loss", "si_sdr", "si_sdri", "best"}
