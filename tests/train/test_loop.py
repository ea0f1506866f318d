"""A whole run, in one process: records, events, stop rules, and going on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
from recipe_run import run_recipe, without_events, without_times

from unbraid.config.recipe import load_recipe
from unbraid.data.folders import list_speakers
from unbraid.data.splits import assign_splits
from unbraid.errors import CheckpointError, TrainingStopped, UserError
from unbraid.records import Event, StepRecord, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import newest_checkpoint, read_checkpoint


def weights(run, step):
    return (run.checkpoints / f"step-{step:06d}" / "model.safetensors").read_bytes()


def write_nan(path, index=100):
    audio, rate = soundfile.read(path, dtype="float32")
    audio[index] = np.nan
    soundfile.write(path, audio, rate, subtype="FLOAT")


def test_a_run_writes_every_file_of_the_design(recipe_file, tmp_path):
    run, records = run_recipe(recipe_file(), tmp_path / "run")
    records = without_events(records)

    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {record.outcome for record in steps} == {"trained"}
    assert [row["step"] for row in read_rows(run.validation)[0]] == [3, 6]
    assert (run.checkpoints / "last").read_text().strip() == "step-000006"
    environment = json.loads(run.environment.read_text())
    assert (environment["chosen"]["precision"], environment["loss_in_db"]) == ("fp32", True)
    assert json.loads(run.data.read_text())["splits"] == {
        "train": {"files": 8, "speakers": 4},
        "valid": {"files": 4, "speakers": 2},
    }
    assert load_recipe(run.recipe).optim.options["lr"] == 1e-3


def test_yielded_records_are_the_written_ones(recipe_file, tmp_path):
    run, records = run_recipe(recipe_file(), tmp_path / "run")
    records = without_events(records)

    assert [row["loss"] for row in read_rows(run.steps)[0]] == [r.loss for r in records if isinstance(r, StepRecord)]


def test_the_same_recipe_gives_the_same_weights_bit_for_bit(recipe_file, tmp_path):
    file = recipe_file()
    runs = [run_recipe(file, tmp_path / name)[0] for name in ("a", "b")]

    assert weights(runs[0], 6) == weights(runs[1], 6)


def test_data_workers_change_nothing(recipe_file, tmp_path):
    file = recipe_file()
    alone = run_recipe(file, tmp_path / "a")[0]
    helped = run_recipe(file, tmp_path / "b", "data.workers=2")[0]

    assert weights(alone, 6) == weights(helped, 6)


def test_micro_batches_change_nothing_but_memory(recipe_file, tmp_path):
    file = recipe_file()
    one = without_events(run_recipe(file, tmp_path / "a")[1])
    four = without_events(run_recipe(file, tmp_path / "b", "train.accumulate=4")[1])

    for first, second in zip(one, four, strict=True):
        assert second.loss == pytest.approx(first.loss, abs=1e-4)


def test_a_nan_file_is_named_and_the_run_equals_one_that_excludes_it(recipe_file, speaker_folder, tmp_path):
    folder = speaker_folder()
    bad = next(track.path for track in assign_splits(list_speakers(folder), n_sources=2) if track.split == "train")
    write_nan(bad)
    file = recipe_file(path=folder)
    with_fault, records = run_recipe(file, tmp_path / "a", "data.items_per_epoch=8", "train.max_steps=8")
    records = without_events(records)
    without, _ = run_recipe(
        file, tmp_path / "b", "data.items_per_epoch=8", "train.max_steps=8", f"data.exclude=['{bad}']"
    )

    events = read_rows(with_fault.events)[0]
    assert [(event["code"], event["files"]) for event in events] == [("AUDIO_NONFINITE", [str(bad)])]
    assert "index 100" in events[0]["message"]
    assert {r.outcome for r in records if isinstance(r, StepRecord)} == {"trained"}
    assert weights(with_fault, 8) == weights(without, 8)
    assert read_rows(without.events)[0] == []


def test_more_bad_files_than_the_budget_end_the_run_with_their_list(recipe_file, speaker_folder, tmp_path):
    folder = speaker_folder(n_speakers=10, n_files=3)
    for path in sorted(folder.rglob("*.wav")):
        if path.parent.name < "speaker-08" and path.stem != "02":
            write_nan(path)

    with pytest.raises(TrainingStopped, match=r"More than 5 files are bad.*AUDIO_NONFINITE"):
        run_recipe(recipe_file(path=folder), tmp_path / "run", "train.max_steps=40")


def test_a_run_with_only_nan_losses_stops_soon_with_a_reason(recipe_file, tmp_path):
    file = recipe_file('[loss]\nname = "sick:nan_loss"\n')
    (tmp_path / "sick.py").write_text("def nan_loss(estimate, target):\n    return estimate.sum(-1) * float('nan')\n")

    with pytest.raises(TrainingStopped, match=r"of the last .* steps were skipped"):
        run_recipe(file, tmp_path / "run", "train.max_steps=60")

    rows, torn = read_rows(tmp_path / "run" / "steps.jsonl")
    assert torn == 0
    assert {row["outcome"] for row in rows} == {"nonfinite_loss"}
    assert {(row["loss"], row["loss_text"]) for row in rows} == {(None, "nan")}
    assert len(rows) == 11


def test_on_bad_example_stop_ends_the_run_at_once(recipe_file, tmp_path):
    file = recipe_file('[loss]\nname = "sick:nan_loss"\n')
    (tmp_path / "sick.py").write_text("def nan_loss(estimate, target):\n    return estimate.sum(-1) * float('nan')\n")

    with pytest.raises(TrainingStopped, match="step 1 by nonfinite loss"):
        run_recipe(file, tmp_path / "run", "train.on_bad_example=stop")


def test_a_first_validation_that_is_nan_is_never_best(recipe_file, tmp_path):
    file = recipe_file('[loss]\nname = "sick:nan_at_first"\n')
    (tmp_path / "sick.py").write_text(
        "import torch\n"
        "validations = []\n"
        "def nan_at_first(estimate, target):\n"
        "    value = (estimate - target).square().mean(-1)\n"
        "    if torch.is_grad_enabled() or estimate.shape[1] == 1:  # training, or a pair whose order is sought\n"
        "        return value\n"
        "    validations.append(value)\n"
        "    return value * float('nan') if len(validations) == 1 else value\n"
    )

    _, records = run_recipe(file, tmp_path / "run")
    records = without_events(records)

    validations = [record for record in records if not isinstance(record, StepRecord)]
    assert not validations[0].best
    assert np.isnan(validations[0].loss)
    assert validations[-1].best


def test_a_failed_checkpoint_is_reported_and_the_run_continues(recipe_file, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = []
    for record in train(load_recipe(recipe_file(), ["save.every_steps=1"]), RunDirectory(tmp_path / "run")):
        records.append(record)
        if isinstance(record, StepRecord):
            limit = 5_000 if record.step == 3 else before[0]  # steps.jsonl is smaller, the weights are larger
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    events = read_rows(tmp_path / "run" / "events.jsonl")[0]
    assert [event["code"] for event in events] == ["AUDIO_NOT_SAVED", "CHECKPOINT_FAILED"]
    assert [record.step for record in records if isinstance(record, StepRecord)] == [1, 2, 3, 4, 5, 6]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_with_a_reason(recipe_file, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = train(load_recipe(recipe_file()), RunDirectory(tmp_path / "run"))
    while not isinstance(record := next(records), StepRecord) or record.step < 5:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(TrainingStopped, match="last checkpoint, of step 6, could not be written"):
            list(records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [event["code"] for event in read_rows(tmp_path / "run" / "events.jsonl")[0]] == [
        "AUDIO_NOT_SAVED",
        "CHECKPOINT_FAILED",
    ]
    assert (tmp_path / "run" / "checkpoints" / "last").read_text().strip() == "step-000004"


def test_a_log_that_cannot_be_written_stays_readable_and_the_run_continues(recipe_file, tmp_path):
    import resource

    run = RunDirectory(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yielded = []
    for record in train(load_recipe(recipe_file(), ["save.every_steps=0"]), run):
        yielded.append(record)
        if isinstance(record, StepRecord):
            full = run.steps.stat().st_size + 10 if record.step == 2 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))

    rows, torn = read_rows(run.steps)
    assert torn == 0
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]
    assert [event.code for event in yielded if isinstance(event, Event)].count("LOG_FAILED") == 1


def test_events_are_yielded_as_they_are_written(recipe_file, speaker_folder, tmp_path):
    folder = speaker_folder()
    write_nan(next(track.path for track in assign_splits(list_speakers(folder), n_sources=2) if track.split == "valid"))
    run = RunDirectory(tmp_path / "run")

    yielded = list(train(load_recipe(recipe_file(path=folder), ["validate.n_items=8"]), run))

    events = [record for record in yielded if isinstance(record, Event)]
    assert [event.code for event in events] == ["AUDIO_NONFINITE"]
    assert [row["code"] for row in read_rows(run.events)[0]] == ["AUDIO_NONFINITE"]


def test_a_run_ended_by_a_stop_rule_resumes_once_its_files_are_excluded(recipe_file, speaker_folder, tmp_path):
    folder = speaker_folder(n_speakers=10, n_files=3)
    bad = [p for p in sorted(folder.rglob("*.wav")) if p.parent.name < "speaker-08" and p.stem != "02"]
    for path in bad:
        write_nan(path)
    file = recipe_file(path=folder)
    with pytest.raises(TrainingStopped, match=r"More than 5 files are bad"):
        run_recipe(file, tmp_path / "run", "train.max_steps=40")
    listed = [str(path) for path in bad]

    _, records = run_recipe(file, tmp_path / "run", "train.max_steps=40", f"data.exclude={listed}", resume=True)
    records = without_events(records)

    assert records[-1].step == 40


def test_a_missed_last_validation_is_done_on_resuming(recipe_file, tmp_path):
    file = recipe_file()
    whole, _ = run_recipe(file, tmp_path / "whole", "validate.every_steps=4")
    run = RunDirectory(tmp_path / "run")
    records = train(load_recipe(file, ["validate.every_steps=4", "train.max_steps=9"]), run)
    while not isinstance(record := next(records), StepRecord) or record.step < 7:  # its checkpoint is that of step 6
        pass
    records.close()

    run_recipe(file, run.path, "validate.every_steps=4", resume=True)

    assert without_times(run.validation) == without_times(whole.validation)
    assert [row["step"] for row in read_rows(run.validation)[0]] == [4, 6]


def test_a_directory_can_be_used_again_after_a_model_did_not_fit(recipe_file, tmp_path):
    file = recipe_file()
    (tmp_path / "wrong.py").write_text(
        "from torch import nn\nclass Net(nn.Conv1d):\n    def __init__(self):\n        super().__init__(1, 2, 3)\n"
    )

    with pytest.raises(UserError, match=r"The model returned \(4, 2, 3998\)\. .* it must return"):
        run_recipe(file, tmp_path / "run", "model.name=wrong:Net")
    _, records = run_recipe(file, tmp_path / "run")
    records = without_events(records)

    assert records[-1].step == 6


def test_a_bad_example_does_not_reach_the_statistics_of_layers(recipe_file, tmp_path):
    file = recipe_file('[loss]\nname = "sick:nan_once"\n')
    (tmp_path / "sick.py").write_text(
        "import torch\n"
        "calls = []\n"
        "def nan_once(estimate, target):\n"
        "    value = (estimate - target).square().mean(-1)\n"
        "    if torch.is_grad_enabled():\n"
        "        calls.append(1)\n"
        "        if len(calls) == 2:\n"
        "            return value * float('nan')\n"
        "    return value\n"
    )
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.filters, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2)\n"
        "    def forward(self, mixture):\n"
        "        return self.norm(self.filters(mixture))[:, :, None]\n"
    )

    run, records = run_recipe(file, tmp_path / "run", "model.name=normed:Net")
    records = without_events(records)

    assert [r.outcome for r in records if isinstance(r, StepRecord)].count("nonfinite_loss") == 1
    assert read_checkpoint(run.checkpoints / "step-000006").state["model"]["norm.num_batches_tracked"] == 5


def test_a_second_run_in_the_same_directory_is_refused(recipe_file, tmp_path):
    file = recipe_file()
    run_recipe(file, tmp_path / "run")

    with pytest.raises(CheckpointError, match="already holds a run"):
        run_recipe(file, tmp_path / "run")


def test_two_runs_at_once_in_one_directory_are_refused(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file())
    first = train(recipe, RunDirectory(tmp_path / "run"))
    next(first)

    with pytest.raises(CheckpointError, match=r"Another run .* is writing to"):
        next(train(recipe, RunDirectory(tmp_path / "run"), resume=True))
    first.close()


def test_a_run_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one(recipe_file, tmp_path):
    file = recipe_file('[clip]\nname = "autoclip"\n[schedule]\nname = "plateau"\npatience = 0\n')
    whole, _ = run_recipe(file, tmp_path / "whole")
    for stop_at in (1, 2, 3, 5):
        run = RunDirectory(tmp_path / f"stopped-{stop_at}")
        records = train(load_recipe(file), run)
        while not isinstance(record := next(records), StepRecord) or record.step < stop_at:
            pass
        records.close()  # nothing is written any more, as when the process is killed here

        run_recipe(file, run.path, resume=True)

        assert weights(run, 6) == weights(whole, 6)
        assert without_times(run.steps) == without_times(whole.steps)
        assert without_times(run.validation) == without_times(whole.validation)


def test_resuming_skips_a_damaged_checkpoint_and_reports_it(recipe_file, tmp_path):
    file = recipe_file()
    whole, _ = run_recipe(file, tmp_path / "whole")
    run, _ = run_recipe(file, tmp_path / "run")
    damaged = run.checkpoints / "step-000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    run_recipe(file, run.path, resume=True)

    codes = [event["code"] for event in read_rows(run.events)[0]]
    assert codes == ["CHECKPOINT_SKIPPED", "RUN_RESUMED"]
    assert weights(run, 6) == weights(whole, 6)
    assert without_times(run.steps) == without_times(whole.steps)


def test_checkpoints_written_after_damaged_ones_were_skipped_are_kept(recipe_file, tmp_path):
    file = recipe_file()
    run, _ = run_recipe(file, tmp_path / "run", "save.keep=3")
    for step in (4, 6):
        (run.checkpoints / f"step-{step:06d}" / "model.safetensors").write_bytes(b"")

    records = train(load_recipe(file, ["save.keep=1"]), run, resume=True)
    while not isinstance(record := next(records), StepRecord) or record.step < 5:
        pass
    records.close()

    assert newest_checkpoint(run)[0].path.name == "step-000004"


def test_a_run_without_an_undamaged_checkpoint_is_not_restarted_over_its_records(recipe_file, tmp_path):
    file = recipe_file()
    run, _ = run_recipe(file, tmp_path / "run")
    for path in run.checkpoints.glob("step-*/model.safetensors"):
        path.write_bytes(b"")

    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        run_recipe(file, run.path, resume=True)
    assert len(read_rows(run.steps)[0]) == 6


def test_resuming_with_a_harmful_change_is_refused_with_the_difference(recipe_file, tmp_path):
    file = recipe_file()
    run_recipe(file, tmp_path / "run")

    with pytest.raises(CheckpointError, match=r"optim\.lr was 0\.001, is 0\.01"):
        run_recipe(file, tmp_path / "run", "optim.lr=0.01", resume=True)


def test_a_finished_run_resumes_with_a_larger_budget(recipe_file, tmp_path):
    file = recipe_file()
    longer, _ = run_recipe(file, tmp_path / "longer", "train.max_steps=9")
    run, _ = run_recipe(file, tmp_path / "run")
    run_recipe(file, run.path, "train.max_steps=9", resume=True)

    assert weights(run, 9) == weights(longer, 9)


def test_starting_from_another_runs_weights(recipe_file, tmp_path):
    file = recipe_file()
    first, _ = run_recipe(file, tmp_path / "first")
    second, _ = run_recipe(file, tmp_path / "second", f"model.init={first.path}", "optim.lr=0", "train.max_steps=1")

    start = read_checkpoint(second.checkpoints / "step-000001").state["model"]
    best = (first.checkpoints / "best").read_text().strip()
    given = read_checkpoint(first.checkpoints / best).state["model"]
    assert all(start[name].equal(given[name]) for name in given)


def launch(file, path, *extra):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unbraid", "train", str(file), "--run", str(path), *extra]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=120):
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, out + errors


def wait_for_steps(run, n_steps, process):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_rows(run.steps)[0]) >= n_steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run did not come to step {n_steps}: {process.communicate()[1]}")


@pytest.mark.slow
def test_kill_9_in_mid_epoch_and_resume_is_bit_equal_to_an_uninterrupted_run(recipe_file, tmp_path):
    file = recipe_file('[clip]\nname = "autoclip"\n[schedule]\nname = "plateau"\npatience = 0\n')
    budget = ["--set", "train.max_steps=60", "--set", "data.workers=2", "--set", "save.every_steps=7"]
    whole, killed = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "killed")
    assert finish(launch(file, whole.path, *budget))[0] == 0
    process = launch(file, killed.path, *budget)
    wait_for_steps(killed, 25, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert len(read_rows(killed.steps)[0]) < 60

    assert finish(launch(file, killed.path, *budget, "--resume"))[0] == 0

    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole.checkpoints / "step-000060" / name).read_bytes() == (
            killed.checkpoints / "step-000060" / name
        ).read_bytes()
    assert without_times(killed.steps) == without_times(whole.steps)
    assert without_times(killed.validation) == without_times(whole.validation)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="children are looked up in /proc")  # noqa: PTH112
def test_data_workers_end_when_the_run_is_killed(recipe_file, tmp_path):
    process = launch(recipe_file(), tmp_path / "run", "--set", "train.max_steps=100000", "--set", "data.workers=2")
    wait_for_steps(RunDirectory(tmp_path / "run"), 3, process)
    family = descendants(process.pid)
    assert len(family) >= 3  # the fork server and two workers

    process.kill()
    finish(process)

    deadline = time.monotonic() + 20
    while (left := [pid for pid in family if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def descendants(pid):
    parents = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:  # noqa: PTH123
                    parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found, todo = [], [pid]
    while todo:
        children = [child for child, parent in parents.items() if parent == todo[0]]
        found += children
        todo = todo[1:] + children
    return found


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("to", ["one rank", "the group"])
def test_sigterm_to_one_of_two_ranks_or_to_all_and_their_workers_ends_both_with_a_checkpoint(recipe_file, tmp_path, to):
    run = RunDirectory(tmp_path / "run")
    words = ["train", str(recipe_file()), "--run-dir", str(run.path)]
    words += ["--set", "train.max_steps=100000", "--set", "save.every_steps=0", "--set", "data.workers=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "unbraid"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(run, 5, process)
    ranks = [pid for pid in descendants(process.pid) if b"--run-dir" in command_line(pid)]
    assert len(ranks) == 2
    if to == "one rank":
        os.kill(ranks[1], signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)  # torchrun passes it on to the process groups of its ranks

    _, out = finish(process, timeout=90)

    last = int((run.checkpoints / "last").read_text().strip()[5:])
    assert last == len(read_rows(run.steps)[0]), out


@pytest.mark.slow
def test_sigterm_finishes_the_step_writes_a_checkpoint_and_ends_with_143(recipe_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    process = launch(recipe_file(), run.path, "--set", "train.max_steps=100000", "--set", "save.every_steps=0")
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    status, out = finish(process, timeout=60)

    assert status == 128 + signal.SIGTERM
    assert "--resume" in out
    last = int((run.checkpoints / "last").read_text().strip()[5:])
    assert last == len(read_rows(run.steps)[0])
    assert asdict(read_checkpoint(run.checkpoints / f"step-{last:06d}"))["state"]["progress"]["step"] == last
