"""Checkpoints: whole or not at all, verified before use, nothing of a pickle."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch
from torch import nn

from unbraid.errors import CheckpointError
from unbraid.robust.clip import AutoClip
from unbraid.robust.precision import Precision
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    repair_checkpoints,
    save_checkpoint,
)
from unbraid.train.ema import EMA
from unbraid.train.optim import OPTIMIZERS, Plateau
from unbraid.train.state import TrainState


def squared_error(estimate, target):
    return (estimate - target).square().mean(-1)


def make_state(seed=0, optimizer="adam"):
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    state = TrainState(
        model,
        squared_error,
        OPTIMIZERS[optimizer](model.parameters(), lr=1e-2, **options),
        AutoClip(),
        precision=Precision("fp16"),
        schedule=Plateau(),
    )
    for step in range(3):
        state.optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        state.optimizer.step()
        state.clipper(torch.tensor(1.0 + step), torch.tensor(True))
    state.step, state.bad_files = 3, {"a<b>.wav": "AUDIO_NONFINITE"}
    return state


def save(run, state, *, best=False, keep=9):
    return save_checkpoint(run, state.state_dict(), recipe={"data": {"seed": 1}}, choices={}, best=best, keep=keep)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_saved_state_is_restored_bit_for_bit_and_trains_alike(run, optimizer):
    state, other = make_state(0, optimizer), make_state(1, optimizer)

    other.load_state_dict(read_checkpoint(save(run, state)).state)

    assert other.step == 3
    assert other.best_loss == math.inf
    assert other.bad_files == {"a<b>.wav": "AUDIO_NONFINITE"}
    data = torch.randn(4, 3)
    for each in (state, other):
        each.optimizer.zero_grad()
        each.model(data).square().mean().backward()
        each.optimizer.step()
    assert torch.equal(state.model.weight, other.model.weight)
    norms = [each.clipper(torch.tensor(0.5), torch.tensor(True)) for each in (state, other)]
    assert torch.equal(*norms)


def test_the_learning_rate_of_a_plateau_schedule_is_restored(run):
    state, other = make_state(), make_state()
    for loss in (1.0, 2.0, 2.0, 2.0, 2.0):
        state.schedule.observe(loss)

    other.load_state_dict(read_checkpoint(save(run, state)).state)

    assert other.schedule.factor(1, 0.0) == state.schedule.factor(1, 0.0) < 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove"])
def test_a_damaged_file_makes_the_checkpoint_before_it_the_newest(run, name, damage):
    state = make_state()
    older = save(run, state)
    state.step = 6
    path = save(run, state) / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flip":
        content[middle] ^= 1
    elif damage == "truncate":
        del content[middle:]
    elif damage == "zero":
        content[:] = bytes(len(content))
    path.unlink()
    if damage != "remove":
        path.write_bytes(content)

    found, passed_over = newest_checkpoint(run)

    assert found.path == older
    assert len(passed_over) == 1
    assert "step-000006" in passed_over[0]


def test_a_folder_without_a_manifest_is_no_checkpoint(run):
    path = save(run, make_state())
    (path / "manifest.json").unlink()

    assert newest_checkpoint(run)[0] is None
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        find_checkpoint(path)


def test_a_partial_checkpoint_is_reported_and_skipped(run):
    whole = save(run, make_state())
    partial = run.checkpoints / ".step-000009.4711.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")

    found, passed_over = newest_checkpoint(run)

    assert found.path == whole
    assert [".step-000009" in message for message in passed_over] == [True]


@pytest.mark.parametrize(
    "given", ["", "checkpoints", "checkpoints/best", "checkpoints/last", "checkpoints/step-000003"]
)
def test_every_way_to_name_a_checkpoint_leads_to_it(run, given):
    path = save(run, make_state(), best=True)

    assert find_checkpoint(run.path / given).resolve() == path.resolve()


def test_a_run_directory_stands_for_its_best_checkpoint(run):
    state = make_state()
    best = save(run, state, best=True)
    state.step = 6
    save(run, state)

    assert find_checkpoint(run.path) == best


def test_old_checkpoints_are_removed_except_the_best(run):
    state = make_state()
    for step in range(1, 7):
        state.step = step
        save(run, state, best=step == 2, keep=2)

    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-000002", "step-000005", "step-000006"]


def test_a_model_that_is_not_finite_is_never_saved(run):
    state = make_state()
    with torch.no_grad():
        state.model.bias[1] = torch.nan

    with pytest.raises(CheckpointError, match=r"not finite: model\.bias has a NaN"):
        save(run, state)
    assert not list(run.checkpoints.glob("*"))


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_the_old_checkpoint_intact_and_nothing_partial(run):
    import resource

    older = save(run, make_state())
    state = make_state(1)
    state.step = 6

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(run, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert read_checkpoint(older).state["progress"]["step"] == 3
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == [older.name]


def test_a_newer_schema_is_refused_by_name(run):
    path = save(run, make_state())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))

    with pytest.raises(CheckpointError, match="schema 99"):
        read_checkpoint(path)


def test_no_file_of_a_checkpoint_is_a_pickle(run):
    for path in save(run, make_state()).iterdir():
        assert path.suffix in (".json", ".safetensors")
        assert path.read_bytes()[:1] != b"\x80"


def test_a_checkpoint_of_schema_2_is_read_with_its_moving_average(run):
    state = make_state()
    state.ema = EMA(state.model, 0.9)
    state.ema.update(state.model, torch.tensor(True))
    path = save(run, state)
    about = json.loads((path / "state.json").read_text())
    about["schema"] = 2
    for entry in about["state"]["dict"]:
        entry[0] = "average" if entry[0] == "ema" else entry[0]
    (path / "state.json").write_text(json.dumps(about))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["schema"] = 2
    manifest["sha256"]["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))

    resumed = make_state(1)
    resumed.ema = EMA(resumed.model, 0.9)
    resumed.load_state_dict(read_checkpoint(path).state)

    assert int(resumed.ema.n_steps) == 1
    assert all(map(torch.equal, resumed.ema.weights, state.ema.weights))


POINTS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
"""Calls of `os` by which a save changes the disk, or makes sure that it has changed."""


def killed_at(k, action):
    """Run an action in a child process that is killed with SIGKILL before its k-th change of the disk.

    Returns:
        Whether it was killed; False if it made fewer changes and ended by itself.
    """
    child = os.fork()
    if child == 0:
        n_changes = 0

        def strike_before(change):
            def counted(*args, **options):
                nonlocal n_changes
                n_changes += 1
                if n_changes == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return counted

        for name in POINTS:
            setattr(os, name, strike_before(getattr(os, name)))
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def best_loss_of(path):
    return read_checkpoint(find_checkpoint(path)).state["progress"]["best_loss"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of fork; the child starts no thread
@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are POSIX")
@pytest.mark.parametrize("saved_before", [False, True], ids=["new folder", "folder saved again"])
def test_a_kill_at_any_point_loses_no_best_checkpoint(tmp_path, saved_before):
    for k in itertools.count(1):
        run = RunDirectory(tmp_path / str(k))
        state = make_state()
        for step, loss in ((3, 60.0), (6, 51.5)):
            state.step = state.best_step = step
            state.best_loss = loss
            save(run, state, best=True, keep=1)
        state.step = 9
        if saved_before:
            save(run, state, keep=1)
        state.best_step, state.best_loss = 9, 3.1

        was_killed = killed_at(k, lambda run=run, state=state: save(run, state, best=True, keep=1))

        # Before anything is repaired, the best is the best of what is there.
        is_there = (run.checkpoints / "step-000009").exists() and best_step_of(run, "step-000009") == 9
        expected = 3.1 if is_there else 51.5
        assert best_loss_of(run.path) == expected, k

        # After the next start, the pointers agree, and nothing half-written is left.
        newest, _ = newest_checkpoint(run)
        repair_checkpoints(run, newest)
        assert (run.checkpoints / "last").read_text().strip() == newest.path.name
        assert (run.checkpoints / "best").read_text().strip() == find_checkpoint(run.path).name
        assert list(run.checkpoints.glob(".*")) == []

        # And the best outlives the saves that follow.
        other = make_state(1)
        other.load_state_dict(newest.state)
        for step in (12, 15):
            other.step = step
            save(run, other, keep=1)
        assert best_loss_of(run.path) == expected, k
        if not was_killed:
            break
    assert k > 15


def best_step_of(run, name):
    return json.loads((run.checkpoints / name / "manifest.json").read_text())["best_step"]


def save_best_and_last(run):
    """Save step 3 as the best, and step 6 after it."""
    state = make_state()
    state.best_step = 3
    best = save(run, state, best=True)
    state.step = 6
    return best, save(run, state)


def test_a_best_checkpoint_that_is_missing_is_an_error_and_not_another_one(run):
    best, last = save_best_and_last(run)
    shutil.rmtree(best)

    for given in (run.path, run.checkpoints, run.checkpoints / "best"):
        with pytest.raises(CheckpointError, match=r"of step 3, is missing.*step-000006"):
            find_checkpoint(given)
    assert find_checkpoint(run.checkpoints / "last") == last


def test_the_best_checkpoint_of_an_earlier_version_is_known_by_its_state(run):
    best, last = save_best_and_last(run)
    for path in (best, last):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["best"], manifest["best_step"]
        (path / "manifest.json").write_text(json.dumps(manifest))

    assert find_checkpoint(run.path) == best
