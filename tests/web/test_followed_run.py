"""A run directory is followed while it grows, is truncated on resume, and contains damaged lines."""

import numpy as np
from runs import add_steps, write_run

from unbraid.web import followed_run
from unbraid.web.followed_run import FollowedRun
from unbraid.web.step_columns import COLUMNS

LOSS = COLUMNS.index("loss")


def read(path):
    run = FollowedRun(path)
    while run.read_more():
        pass
    return run


def test_new_steps_are_read_as_they_are_written(tmp_path):
    path = write_run(tmp_path / "run", n_steps=100)
    run = read(path)
    add_steps(path, 101, 5)

    assert run.read_more()
    assert not run.read_more()
    assert run.last_step == 105
    assert run.n_steps == 105


def test_an_incomplete_line_is_read_when_it_is_complete(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    run = read(path)
    line = '{"step": 11, "outcome": "trained", "loss": -1.0}\n'
    with (path / "steps.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        run.read_more()
        assert run.last_step == 10
        file.write(line[20:])

    run.read_more()

    assert run.last_step == 11
    assert run.n_torn == 0


def test_torn_lines_of_all_files_are_counted(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    for name in ("steps", "validation", "events"):
        with (path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 11, "lo\n')
    add_steps(path, 11, 2)

    run = read(path)

    assert (run.last_step, run.n_torn) == (12, 3)


def test_a_run_resumed_from_an_earlier_checkpoint_is_read_again(tmp_path):
    path = write_run(tmp_path / "run", n_steps=100)
    run = read(path)
    lines = (path / "steps.jsonl").read_text().splitlines(keepends=True)[:60]
    (path / "steps.jsonl").write_text("".join(lines))
    add_steps(path, 61, 100)  # longer than before: the length alone would not show it

    while run.read_more():
        pass

    steps = run.downsample(0, 10**6, 10**6).steps
    np.testing.assert_array_equal(steps, np.arange(1, 161))


def test_a_short_window_shows_every_step_of_a_long_run(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", n_steps=600)
    exact = read(path).downsample(301, 320, 100)
    monkeypatch.setattr(followed_run.Buckets.__init__, "__kwdefaults__", {"capacity": 16})
    run = read(path)
    assert run.buckets.width == 64

    window = run.downsample(301, 320, 100)

    np.testing.assert_array_equal(window.steps, np.arange(301, 321))
    np.testing.assert_allclose(window.mean[LOSS], exact.mean[LOSS], rtol=1e-6)


def test_a_file_that_was_just_truncated_ends_the_window(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", n_steps=600)
    monkeypatch.setattr(followed_run.Buckets.__init__, "__kwdefaults__", {"capacity": 16})
    run = read(path)
    (path / "steps.jsonl").write_text("")

    assert run.downsample(301, 320, 100).steps.size == 0


def test_the_mean_loss_is_over_trained_steps_only(tmp_path):
    def skip_two_steps(run):
        run.steps[3].update(outcome="nonfinite_loss", loss=None, loss_text="nan")
        run.steps[4].update(outcome="all_filtered", loss=-40.0)

    run = read(write_run(tmp_path / "run", n_steps=10, change=skip_two_steps))

    buckets = run.downsample(1, 10, 10)

    assert np.isnan(buckets.mean[LOSS, 3:5]).all()
    assert buckets.total[COLUMNS.index("nonfinite_loss")].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert buckets.total[COLUMNS.index("all_filtered")].sum() == 1


def test_a_rescued_step_is_counted(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10, change=lambda run: run.steps[4].update(n_bad=1))

    buckets = read(path).downsample(1, 10, 10)

    assert buckets.total[COLUMNS.index("rescued")].tolist() == [0] * 4 + [1] + [0] * 5


def test_a_run_without_files_is_empty(tmp_path):
    (tmp_path / "run").mkdir()

    run = FollowedRun(tmp_path / "run")

    assert not run.read_more()
    assert run.downsample(0, 10, 10).steps.size == 0


def test_three_megabytes_of_unreadable_lines_do_not_stop_the_reading(tmp_path):
    path = write_run(tmp_path / "run", n_steps=10)
    with (path / "steps.jsonl").open("a") as file:
        file.write(f"{'x' * 99}\n" * 30_000)
    add_steps(path, 11, 5)

    run = read(path)

    assert (run.last_step, run.n_torn, run.unread_bytes) == (15, 30_000, 0)


def test_very_many_validations_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(followed_run, "MAX_VALIDATIONS", 4)
    path = write_run(tmp_path / "run", n_steps=2000)

    run = read(path)

    assert run.n_validations == 20
    assert len(run.validations) <= 20
    assert set(run.validations[0]) == {"step", "loss", "si_sdr", "si_sdri", "best"}
