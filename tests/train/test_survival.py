"""Faults that really strike a whole run: what it survives, what it says, and what it leaves to be looked at."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from recipe_run import event_codes, run_recipe, steps_of, without_times
from toys import assert_same

from unbraid.build import load_model
from unbraid.cli.main import main
from unbraid.config.recipe import load_recipe
from unbraid.config.registry import _load_module as find_module
from unbraid.errors import RecipeError, TrainingStopped
from unbraid.records import StepRecord, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train import loop
from unbraid.train.checkpoint import read_checkpoint

NETS = """
import os
import signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = nn.Conv1d(1, 2, 9, padding=4)
    def forward(self, mixture):
        return self.filters(mixture)[:, :, None]

class NanWeights(Net):
    '''Writes NaN into its own weights, once or in every step from the fifth on.'''
    def __init__(self, *, always: bool = False):
        super().__init__()
        self.always, self.n_calls = always, 0
    def forward(self, mixture):
        self.n_calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and (self.n_calls >= 5 if self.always else self.n_calls == 5):
            with torch.no_grad():
                self.filters.weight[1, 0, 3] = float("nan")
        return super().forward(mixture)

class Explode(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1
    @staticmethod
    def backward(context, gradient):
        return gradient * 1e30

class Steep(nn.Module):
    def forward(self, x):
        return Explode.apply(x)

class Fp16Overflow(Net):
    '''Its gradient overflows fp16 at any loss scale.'''
    def __init__(self):
        super().__init__()
        self.first, self.steep = nn.Conv1d(1, 1, 3, padding=1), Steep()
    def forward(self, mixture):
        return super().forward(self.steep(self.first(mixture)))

class Masked(Net):
    '''Keeps infinities, as attention masks do.'''
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

class OutOfMemoryAboveTwo(Net):
    '''Has the memory for two examples.'''
    def forward(self, mixture):
        if torch.is_grad_enabled() and len(mixture) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(mixture)

class OutOfMemoryLater(Net):
    '''Has the memory for two examples from its tenth batch on.'''
    n_calls = 0
    def forward(self, mixture):
        self.n_calls += self.training
        if self.training and self.n_calls >= 10 and len(mixture) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(mixture)

class OutOfMemoryInValidationToo(Net):
    '''Has the memory for two examples in validation too.'''
    def forward(self, mixture):
        if len(mixture) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(mixture)

class RaisesAtStepFive(Net):
    '''Raises in its fifth step.'''
    n_calls = 0
    def forward(self, mixture):
        RaisesAtStepFive.n_calls += torch.is_grad_enabled()
        if RaisesAtStepFive.n_calls == 5:
            raise KeyError("a mistake of one's own")
        return super().forward(mixture)

a_dict = {}

class Pooled(Net):
    '''Refuses an example alone.'''
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
    def forward(self, mixture):
        return super().forward(mixture) * self.norm(mixture.mean(-1))[:, None, None]

class SilentSecondOutput(Net):
    '''Its second output is silent.'''
    def forward(self, mixture):
        return super().forward(mixture) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)

def nan_where_loud(estimate, target):
    '''A squared error that is NaN for some examples.'''
    loud = target.abs().amax(-1) > torch.quantile(target.abs().amax(-1).flatten(), 0.9)
    return (estimate - target).square().mean(-1) * torch.where(loud, float("nan"), 1.0)

class NanExample:
    '''NaN for the fourteenth example that is trained on, wherever it is met.'''
    target = None
    n_seen = 0
def nan_for_one(estimate, target):
    value = (estimate - target).square().mean(-1)
    if torch.is_grad_enabled() and NanExample.target is None:
        NanExample.n_seen += len(target)
        if NanExample.n_seen > 13:
            NanExample.target = target[1].clone()
    if NanExample.target is not None:
        met = (target == NanExample.target).flatten(1).all(1)
        value = value * torch.where(met, float("nan"), 1.0)[:, None, None]
    return value
"""


@pytest.fixture
def nets(tmp_path, recipe_file, monkeypatch):
    """A recipe whose model and loss can be set to those above."""
    monkeypatch.chdir(tmp_path)  # where a replay looks for them
    (tmp_path / "nets.py").write_text(NETS)
    return recipe_file


def load_nets(file):
    return find_module(file.parent / "nets.py")


def weights(run, step):
    return (run.checkpoints / f"step-{step:06d}" / "model.safetensors").read_bytes()


def test_nonfinite_weights_roll_the_run_back_to_its_last_checkpoint(nets, tmp_path):
    file = nets()
    struck, yielded = run_recipe(file, tmp_path / "struck", "model.name=nets:NanWeights")
    sound, _ = run_recipe(file, tmp_path / "sound", "model.name=nets:Net")

    assert event_codes(yielded) == ["STEP_SKIPPED_NONFINITE_LOSS", "WEIGHTS_NONFINITE"]
    assert [row["code"] for row in read_rows(struck.events)[0]] == event_codes(yielded)
    assert [record.step for record in steps_of(yielded)] == [1, 2, 3, 4, 5, 5, 6]
    assert [row["step"] for row in read_rows(struck.steps)[0]] == [1, 2, 3, 4, 5, 6]
    assert weights(struck, 6) == weights(sound, 6)
    first, event = read_rows(struck.events)[0]
    assert "the weight filters.weight is nan" in first["message"]
    assert first["files"] == []  # none of them is to blame
    assert event["step"] == 5
    assert "filters.weight" in event["message"]
    assert "step-000004" in event["message"]


def test_a_run_that_rolling_back_does_not_help_ends_with_a_reason(nets, tmp_path):
    with pytest.raises(TrainingStopped, match=r"filters\.weight is not finite .*going back did not help"):
        run_recipe(nets(), tmp_path / "run", "model.name=nets:NanWeights", "model.always=true")


def test_a_loss_scale_that_collapses_ends_the_run_within_20_steps_with_the_module_and_a_cure(nets, tmp_path):
    file = nets()
    with pytest.raises(TrainingStopped) as ended:
        run_recipe(
            file, tmp_path / "run", "model.name=nets:Fp16Overflow", "train.precision=fp16", "train.max_steps=100"
        )

    rows = read_rows(tmp_path / "run" / "steps.jsonl")[0]
    assert [row["outcome"] for row in rows] == ["fp16_overflow"] * 20
    assert 'train.precision = "bf16"' in str(ended.value)
    assert "backward of steep" in str(ended.value)


def test_the_doctor_finds_a_dead_output_within_200_steps(nets, tmp_path, capsys):
    run_recipe(
        nets(), tmp_path / "run", "model.name=nets:SilentSecondOutput", "train.max_steps=200", "save.every_steps=0"
    )

    assert main(["doctor", str(tmp_path / "run"), "--all"]) > 0
    report = capsys.readouterr().out
    assert "DEAD_OUTPUT" in report
    assert "utput 2" in report


def test_intended_infinities_are_not_a_fault(nets, tmp_path):
    file = nets('[loss]\nname = "nets:nan_for_one"\nassign = "fixed"\n')

    run, yielded = run_recipe(file, tmp_path / "run", "model.name=nets:Masked")

    assert event_codes(yielded) == ["STEP_SKIPPED_NONFINITE_LOSS"]
    assert "its loss is nan" in read_rows(run.events)[0][0]["message"]
    assert (run.checkpoints / "last").read_text().strip() == "step-000006"


def test_a_model_that_rejects_single_examples_continues_and_all_are_named(nets, tmp_path):
    file = nets('[loss]\nname = "nets:nan_for_one"\nassign = "fixed"\n')

    run, yielded = run_recipe(file, tmp_path / "run", "model.name=nets:Pooled")

    assert event_codes(yielded) == ["STEP_SKIPPED_NONFINITE_LOSS"]
    assert [record.outcome for record in steps_of(yielded)].count("trained") == 5
    assert "the examples together" in read_rows(run.events)[0][0]["message"]


def test_out_of_memory_is_reported_once_and_recorded(nets, tmp_path):
    file = nets()
    short, yielded = run_recipe(file, tmp_path / "short", "model.name=nets:OutOfMemoryAboveTwo")
    plain, _ = run_recipe(file, tmp_path / "plain", "model.name=nets:Net")

    assert event_codes(yielded) == ["OUT_OF_MEMORY"]
    assert {record.n_micro_batches for record in steps_of(yielded)} == {2}
    for one, other in zip(read_rows(short.steps)[0], read_rows(plain.steps)[0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_out_of_memory_in_validation_cuts_batches_too(nets, tmp_path):
    file = nets()
    short, _ = run_recipe(file, tmp_path / "short", "model.name=nets:OutOfMemoryInValidationToo")
    plain, _ = run_recipe(file, tmp_path / "plain", "model.name=nets:Net")

    for one, other in zip(read_rows(short.validation)[0], read_rows(plain.validation)[0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.parametrize("n_ahead", [0, 1])
def test_training_before_the_users_model_raised_is_saved_and_can_be_resumed(nets, tmp_path, monkeypatch, n_ahead):
    monkeypatch.setattr("unbraid.train.loop._Loop.max_ahead", property(lambda self: n_ahead))
    file, run = nets(), RunDirectory(tmp_path / "run")
    sound, _ = run_recipe(file, tmp_path / "sound", "model.name=nets:Net")
    load_nets(file).RaisesAtStepFive.n_calls = 0
    others = {child.pid for child in multiprocessing.active_children()}

    with pytest.raises(KeyError, match="of one's own"):
        run_recipe(file, run.path, "model.name=nets:RaisesAtStepFive", "save.every_steps=0", "data.workers=1")

    event = read_rows(run.events)[0][0]
    assert (event["code"], event["step"]) == ("STEP_RAISED", 4)
    assert "KeyError" in event["message"]
    assert "--resume" in event["message"]
    assert (run.checkpoints / "last").read_text().strip() == "step-000004"
    assert [row["step"] for row in read_rows(run.steps)[0]] == [1, 2, 3, 4]
    assert {child.pid for child in multiprocessing.active_children()} <= others  # no data worker is left
    run_recipe(file, run.path, "model.name=nets:RaisesAtStepFive", "save.every_steps=0", resume=True)
    assert weights(run, 6) == weights(sound, 6)


def test_an_object_that_is_not_callable_is_refused_as_a_model(nets, tmp_path):
    with pytest.raises(RecipeError, match="is a dict, not a class or function"):
        run_recipe(nets(), tmp_path / "run", "model.name=nets:a_dict")


def test_a_nonfinite_optimizer_state_is_never_saved_and_the_run_rolls_back(nets, tmp_path):
    (tmp_path / "nets.py").write_text(NETS + SPOILS_THE_OPTIMIZER)
    file = nets()
    struck, yielded = run_recipe(file, tmp_path / "struck", "optim.name=nets:adam_with_nan", "model.name=nets:Net")
    sound, _ = run_recipe(file, tmp_path / "sound", "model.name=nets:Net")

    assert event_codes(yielded) == ["WEIGHTS_NONFINITE"]
    assert "optimizer's state of filters.weight" in read_rows(struck.events)[0][0]["message"]
    assert weights(struck, 6) == weights(sound, 6)


SPOILS_THE_OPTIMIZER = """
from unbraid.train.optim import adam

def adam_with_nan(parameters, *, lr: float = 1e-3):
    parameters = list(parameters)
    optimizer, calls = adam(parameters, lr=lr), []
    def write_nan(optimizer, *_):
        calls.append(1)
        if len(calls) == 7:  # the first makes its state; this is step 6, after which a checkpoint is due
            optimizer.state[parameters[0]]["exp_avg_sq"][0, 0, 3] = float("nan")
    optimizer.register_step_post_hook(write_nan)
    return optimizer
"""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.name=schedule_free"], "schedule.name = 'constant'"),
        (["optim.name=schedule_free", "schedule.name=constant", "train.ema=0.9"], "remove one of them"),
        (["train.ema=1.0"], "train.ema = 1 must be from 0"),
        (["train.on_bad_example=rescu"], "Did you mean 'rescue'?"),
        (['transform=[{name = "adaptiv"}]'], "Did you mean 'adaptive'?"),
        (['transform=[{name = "value", max_value = 0}]'], "max_value = 0"),
        (['filter=[{name = "percentile", percentile = 101}]'], "percentile"),
        (["clip.name=zclip", "clip.alpha=2"], "alpha"),
        (["save.incidents=-1"], "save.incidents = -1"),
        (["train.accumulate=5"], "data.batch_size = 4"),
        (["optim.name=muon", "optim.betas=[2.0, 3.0]"], "betas [2.0, 3.0]"),
        (["optim.name=schedule_free", "schedule.name=constant", "optim.lr=-1"], "lr = -1"),
        (["optim.name=rmsprop", "optim.alpha=3"], "alpha = 3"),
    ],
)
def test_invalid_components_are_refused_in_one_line(recipe_file, tmp_path, capsys, overrides, words):
    options = [word for override in overrides for word in ("--set", override)]

    assert main(["train", str(recipe_file()), "--run", str(tmp_path / "run"), *options]) == 2

    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error


def test_a_collapsed_loss_scale_does_not_affect_another_precision(nets, tmp_path):
    run = RunDirectory(tmp_path / "run")
    file, budget = nets(), ["model.name=nets:Fp16Overflow", "train.max_steps=22", "train.precision=fp16"]
    with pytest.raises(TrainingStopped):
        run_recipe(file, run.path, *budget)

    _, yielded = run_recipe(file, run.path, *budget[:2], "train.precision=bf16", resume=True)

    assert [record.loss_scale for record in steps_of(yielded)] == [1.0, 1.0]


OWN_LOSS = '[loss]\nassign = "fixed"\nname = "nets:nan_for_one"\n'
IN_A_SUM = '[loss]\nassign = "fixed"\nname = "sum"\nterms = [{name = "l1"}, {name = "nets:nan_for_one"}]\n'


@pytest.mark.parametrize(("rule", "loss"), [("skip", OWN_LOSS), ("rescue", OWN_LOSS), ("skip", IN_A_SUM)])
def test_a_bad_example_is_named_and_saved_for_replay(nets, tmp_path, rule, loss, capsys, monkeypatch):
    file = nets(loss)

    run, yielded = run_recipe(file, tmp_path / "run", f"train.on_bad_example={rule}")

    records = steps_of(yielded)
    bad = next(record for record in records if record.n_bad)
    assert [record.outcome for record in records if record is not bad] == ["trained"] * 5
    assert (bad.outcome, bad.n_trained) == {"skip": ("nonfinite_loss", 0), "rescue": ("trained", 3)}[rule]
    assert len(bad.bad_items) == bad.n_bad == 1
    assert event_codes(yielded) == [{"skip": "STEP_SKIPPED_NONFINITE_LOSS", "rescue": "STEP_RESCUED"}[rule]]
    incident = run.incidents / f"step-{bad.step:06d}-rank-0"
    event = read_rows(run.events)[0][0]
    assert event["files"] == list(bad.bad_items[0].files)
    assert str(incident) in event["message"]
    assert sorted(path.name for path in incident.iterdir()) == [
        "batch.safetensors",
        "incident.json",
        "model.safetensors",
    ]

    assert f"unbraid replay {incident} --trust" in event["message"]
    assert str(tmp_path / "speech") not in (incident / "incident.json").read_text()
    assert main(["replay", str(incident), "--trust"]) == 0

    printed = capsys.readouterr().out
    monkeypatch.chdir("/")  # its own code is looked for where the bundle lies, too
    assert main(["replay", str(incident), "--trust"]) == 0
    assert capsys.readouterr().out == printed
    assert " + ".join("/".join(Path(file).parts[-2:]) for file in bad.bad_items[0].files) in printed
    assert "its loss is nan" in printed
    assert "The fault occurs in every precision" in printed


def test_a_replay_names_the_layer_and_the_precision_that_cures_it(nets, tmp_path, capsys):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(TrainingStopped):
        run_recipe(nets(), run.path, "model.name=nets:Fp16Overflow", "train.precision=fp16", "train.max_steps=100")
    incident = next(run.incidents.iterdir())
    torch.manual_seed(1)

    assert main(["replay", str(incident), "--trust"]) == 0

    out = capsys.readouterr().out
    assert "Rerun: In fp16, example 0" in out
    assert "backward of steep" in out
    assert "The fault does not occur in" in out
    assert "fp32" in out.splitlines()[-1]


def test_a_replay_runs_custom_code_only_when_trusted(nets, tmp_path, capsys):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(TrainingStopped):
        run_recipe(nets(), run.path, "model.name=nets:Fp16Overflow", "train.precision=fp16", "train.max_steps=100")

    assert main(["replay", str(next(run.incidents.iterdir()))]) == 2
    assert "--trust" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["a byte", "a missing file", "another folder", "no JSON", "a missing word"])
def test_a_damaged_incident_is_refused_in_one_sentence(nets, tmp_path, capsys, damage):
    run, _ = run_recipe(nets('[loss]\nname = "nets:nan_for_one"\nassign = "fixed"\n'), tmp_path / "run")
    incident = next(run.incidents.iterdir())
    if damage == "a byte":
        content = bytearray((incident / "batch.safetensors").read_bytes())
        content[-5] ^= 1
        (incident / "batch.safetensors").write_bytes(content)
    elif damage == "a missing file":
        (incident / "model.safetensors").unlink()
    elif damage == "a missing word":
        about = json.loads((incident / "incident.json").read_text())
        (incident / "incident.json").write_text(json.dumps({key: about[key] for key in about if key != "seed"}))
    elif damage == "another folder":
        incident = run.checkpoints / "step-000006"
    else:
        (incident / "incident.json").write_text('{"schema": 1')

    assert main(["replay", str(incident), "--trust"]) == 2

    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert str(incident) in error


def test_the_number_of_saved_incidents_is_limited(nets, tmp_path):
    file = nets('[loss]\nname = "nets:nan_where_loud"\nassign = "fixed"\n')
    with pytest.raises(TrainingStopped):
        run_recipe(file, tmp_path / "run", "train.max_steps=60", "save.incidents=3")

    run = RunDirectory(tmp_path / "run")
    assert len(list(run.incidents.iterdir())) == 3
    assert len(read_rows(run.events)[0]) == 11


def test_an_incident_that_cannot_be_written_does_not_end_the_run(nets, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.incidents.write_text("in the way")

    _, yielded = run_recipe(nets('[loss]\nname = "nets:nan_for_one"\nassign = "fixed"\n'), run.path)

    assert sorted(event_codes(yielded)) == ["INCIDENT_FAILED", "STEP_SKIPPED_NONFINITE_LOSS"]
    assert steps_of(yielded)[-1].step == 6


def test_the_moving_average_is_what_is_validated_saved_and_loaded(recipe_file, tmp_path):
    file = recipe_file()
    plain, _ = run_recipe(file, tmp_path / "plain")
    averaged, yielded = run_recipe(file, tmp_path / "averaged", "train.ema=0.9")

    state = read_checkpoint(averaged.checkpoints / "step-000006").state
    trained = read_checkpoint(plain.checkpoints / "step-000006").state["model"]
    assert all(torch.equal(state["training_weights"][name], trained[name]) for name in trained)
    assert not any(torch.equal(state["model"][name], trained[name]) for name in trained if trained[name].dim() > 1)
    loaded = load_model(averaged.checkpoints / "step-000006")[0].state_dict()
    assert all(torch.equal(loaded[name].cpu(), state["model"][name]) for name in loaded)
    losses = {run.path: [row["loss"] for row in read_rows(run.validation)[0]] for run in (plain, averaged)}
    assert losses[plain.path] != losses[averaged.path]
    assert [record.loss for record in steps_of(yielded)] == [row["loss"] for row in read_rows(plain.steps)[0]]


EVERYTHING = [
    "train.ema=0.9",
    "clip.name=zclip",
    "clip.warmup_steps=2",
    'filter=[{name = "percentile", warmup = 8, window = 16}, {name = "outlier", warmup = 8, window = 16}]',
    'transform=[{name = "adaptive", ratio = 0.5}, {name = "value", max_value = 10.0}]',
]


@pytest.mark.parametrize(
    "overrides",
    [
        EVERYTHING,
        ["optim.name=muon"],
        ["optim.name=schedule_free", "schedule.name=constant"],
        ["optim.name=rmsprop", "clip.name=autoclip"],
    ],
    ids=["everything", "muon", "schedule_free", "rmsprop"],
)
def test_a_run_with_other_components_resumes_bit_for_bit(recipe_file, tmp_path, overrides):
    file = recipe_file()
    overrides = [*overrides, "train.max_steps=12"]
    whole, _ = run_recipe(file, tmp_path / "whole", *overrides)
    run = RunDirectory(tmp_path / "stopped")
    records = train(load_recipe(file, overrides), run)
    while not isinstance(record := next(records), StepRecord) or record.step < 7:
        pass
    records.close()

    run_recipe(file, run.path, *overrides, resume=True)

    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run.checkpoints / "step-000012" / name).read_bytes() == (
            whole.checkpoints / "step-000012" / name
        ).read_bytes()
    states = [read_checkpoint(r.checkpoints / "step-000012").state for r in (run, whole)]
    for state in states:
        assert state["progress"].pop("elapsed_seconds") > 0
    assert_same(*states)


@pytest.mark.slow
@pytest.mark.parametrize("strike", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_data_workers_that_are_lost_are_replaced_at_the_same_example(recipe_file, tmp_path, strike):
    file = recipe_file()
    budget = ["data.workers=2", "train.max_steps=40", "data.worker_timeout_seconds=5"]
    whole, _ = run_recipe(file, tmp_path / "whole", *budget)
    run = RunDirectory(tmp_path / "struck")
    yielded = []
    struck = []
    for record in train(load_recipe(file, budget), run):
        yielded.append(record)
        if isinstance(record, StepRecord) and record.step in (5, 15):
            workers = multiprocessing.active_children()
            for worker in workers:
                os.kill(worker.pid, strike)
            struck += workers

    assert len(struck) == 4
    assert event_codes(yielded) == ["DATA_WORKER_LOST"] * 2
    assert [record.step for record in steps_of(yielded)] == list(range(1, 41))
    assert weights(run, 40) == weights(whole, 40)
    assert [worker for worker in struck if worker.is_alive()] == []


@pytest.mark.parametrize(
    "case",
    [
        [],
        ["train.precision=fp16"],
        ["clip.name=autoclip", "train.ema=0.9", "validate.every_steps=5", "save.every_steps=4"],
        ["loss.name=nets:nan_for_one", "loss.assign=fixed"],
        ["model.name=nets:NanWeights"],
        ["model.name=nets:Fp16Overflow", "train.precision=fp16"],
        ["model.name=nets:OutOfMemoryLater"],
    ],
    ids=["plain", "fp16", "at intervals", "a bad example", "nan weights", "a scale that collapses", "out of memory"],
)
def test_a_step_launched_ahead_of_time_changes_nothing(nets, tmp_path, monkeypatch, case):
    """As it is done on an accelerator; here on the CPU, where it can be compared."""
    file, ended = nets(), {}
    for name in ("plain", "ahead"):
        load_nets(file).NanExample.target, load_nets(file).NanExample.n_seen = None, 0
        if name == "ahead":
            monkeypatch.setattr("unbraid.train.loop._Loop.max_ahead", property(lambda self: 1))
        try:
            run_recipe(file, tmp_path / name, "train.max_steps=23", *case)
            ended[name] = ""
        except TrainingStopped as error:
            ended[name] = str(error).split(" To run it again")[0].replace(str(tmp_path / name), "RUN")

    plain, ahead = (RunDirectory(tmp_path / name) for name in ("plain", "ahead"))
    logs = [(without_times(run.steps), without_times(run.validation)) for run in (plain, ahead)]
    assert logs[0] == logs[1]
    assert ended["plain"] == ended["ahead"]
    last = (plain.checkpoints / "last").read_text().strip()
    assert weights(plain, int(last[5:])) == weights(ahead, int(last[5:]))


def test_a_signal_while_a_step_is_repeated_still_saves_that_step(nets, tmp_path, monkeypatch):
    """The step launched after it is to be repeated as well, and is dropped: nobody waits for it."""
    stop = StopRequest()

    def launch_and_ask_to_stop(state, batches, **options):
        if state.n_pieces > 1:
            stop.signal = signal.SIGTERM
        return launch(state, batches, **options)

    launch = loop.launch
    monkeypatch.setattr(loop, "launch", launch_and_ask_to_stop)
    monkeypatch.setattr("unbraid.train.loop._Loop.max_ahead", property(lambda self: 1))
    run = RunDirectory(tmp_path / "run")
    recipe = load_recipe(
        nets(),
        ["model.name=nets:OutOfMemoryLater", "save.every_steps=0", "validate.every_steps=0", "train.max_steps=20"],
    )

    records = steps_of(train(recipe, run, stop=stop))

    assert [record.n_micro_batches for record in records] == [1] * (len(records) - 1) + [2]
    assert len(records) < 20
    assert (run.checkpoints / "last").read_text().strip() == f"step-{len(records):06d}"
