"""Other people's loggers: what they hear is true, and none of them is needed or costs a run."""

import json
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_run import run_recipe

from unbraid.cli.main import main
from unbraid.config.recipe import load_recipe
from unbraid.records import Event, StepRecord, ValidationRecord, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train.loggers import LOGGERS, scalars

STEP = StepRecord(
    step=7, epoch=0, outcome="trained", loss=-3.5, grad_norm=8.0, max_norm=5.0, lr=1e-3, loss_scale=1.0, n_trained=2,
    n_filtered=0, n_bad=0, clipped=True, clipped_grad_norm=5.0, si_sdr=(3.0, None, 4.0), examples_per_second=12.0,
)  # fmt: skip

OWN = """
import json
import torch

class RecordingLogger:
    '''Writes every record to a file.'''
    def __init__(self, run, recipe):
        self.file = (run.path.parent / "received.jsonl").open("a")
        self.say("begin", recipe["optim"]["lr"])
    def say(self, *words):
        print(json.dumps(words), file=self.file, flush=True)
    def __call__(self, record):
        self.say(type(record).__name__, record.step)
    def close(self):
        self.say("end")
        self.file.close()

def raises(run, recipe):
    def hear(record):
        if record.step == 3:
            raise ConnectionError("nobody there")
    return hear

class RefusesToClose(RecordingLogger):
    def close(self):
        super().close()
        raise OSError("the line is cut")

def nan_at_third(estimate, target):
    global n_calls
    n_calls += torch.is_grad_enabled()
    return (estimate - target).square().mean(-1) * (float("nan") if n_calls == 3 else 1.0)
n_calls = 0

def refuses(run, recipe):
    raise ValueError("no account")
"""


@pytest.fixture
def own(recipe_file, tmp_path):
    """A recipe beside loggers of one's own."""
    (tmp_path / "own.py").write_text(OWN)
    sys.modules.pop("unbraid_own_own", None)
    return recipe_file


def also(*names):
    return f"train.also_log={json.dumps(names)}"


def heard_in(folder):
    return [json.loads(line) for line in (folder / "received.jsonl").read_text().splitlines()]


def test_a_trained_step_is_logged_with_loss_norms_learning_rate_and_speed():
    assert scalars(STEP) == {
        "train/loss": -3.5,
        "train/grad_norm": 8.0,
        "train/max_norm": 5.0,
        "train/clipped_grad_norm": 5.0,
        "train/si_sdr": 3.5,
        "train/lr": 1e-3,
        "train/examples_per_second": 12.0,
    }


def test_a_skipped_step_is_logged_with_its_reason_and_without_a_loss():
    skipped = replace(STEP, outcome="nonfinite_loss", loss=float("nan"), clipped_grad_norm=None)

    assert scalars(skipped) == {
        "skipped/nonfinite_loss": 1.0,
        "train/lr": 1e-3,
        "train/examples_per_second": 12.0,
    }


def test_nonfinite_or_unknown_values_are_not_logged():
    assert "train/max_norm" not in scalars(replace(STEP, max_norm=float("inf")))
    assert "train/si_sdr" not in scalars(replace(STEP, si_sdr=()))
    validation = ValidationRecord(5, loss=None, si_sdr=float("nan"), si_sdri=2.0, n_items=3, best=False, lr=1e-3)
    assert scalars(validation) == {"valid/si_sdri": 2.0}


def test_a_custom_logger_receives_every_record_and_is_closed(own, tmp_path):
    _, yielded = run_recipe(own(), tmp_path / "run", also("own:RecordingLogger"))

    assert heard_in(tmp_path) == [
        ["begin", 1e-3],
        *([type(record).__name__, record.step] for record in yielded),
        ["end"],
    ]


def test_a_logger_is_closed_when_the_run_is_abandoned(own, tmp_path):
    records = train(load_recipe(own(), [also("own:RecordingLogger")]), RunDirectory(tmp_path / "run"))
    next(records)
    records.close()

    assert heard_in(tmp_path)[-1] == ["end"]


def test_a_logger_that_raises_is_reported_once_and_dropped_and_changes_nothing(own, tmp_path):
    file = own()
    run, yielded = run_recipe(file, tmp_path / "run", also("own:raises", "own:RecordingLogger"))
    plain, _ = run_recipe(file, tmp_path / "plain")

    events = [record for record in yielded if isinstance(record, Event)]
    assert [(event.code, event.step) for event in events] == [("LOGGER_FAILED", 3)]
    assert "own:raises raised ConnectionError: nobody there" in events[0].message
    assert [row["code"] for row in read_rows(run.events)[0]] == ["LOGGER_FAILED"]
    assert ["StepRecord", 6] in heard_in(tmp_path)
    last = ("checkpoints", "step-000006", "model.safetensors")
    assert run.path.joinpath(*last).read_bytes() == plain.path.joinpath(*last).read_bytes()


def test_a_logger_that_cannot_be_closed_is_reported(own, tmp_path):
    run, yielded = run_recipe(own(), tmp_path / "run", also("own:RefusesToClose"))

    assert len([record for record in yielded if isinstance(record, StepRecord)]) == 6
    assert ["the line is cut" in row["message"] for row in read_rows(run.events)[0]] == [True]


@pytest.mark.parametrize(("name", "modules"), [(name, [name]) for name in ("wandb", "trackio")])
def test_a_missing_package_is_reported_before_anything_is_written(own, tmp_path, monkeypatch, capsys, name, modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)

    assert main(["train", str(own()), "--run", str(tmp_path / "run"), "--set", also("own:RecordingLogger", name)]) == 2

    line = capsys.readouterr().err
    assert (
        line == f'unbraid: train.also_log names {name}, which is not installed. Run: pip install "unbraid[{name}]".\n'
    )
    assert not (tmp_path / "run" / "steps.jsonl").exists()
    assert heard_in(tmp_path)[-1] == ["end"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("own:refuses", "own:refuses could not start (ValueError: no account)"),
    ],
)
def test_a_logger_that_cannot_be_created_is_a_one_line_error(own, tmp_path, capsys, name, words):
    assert main(["train", str(own()), "--run", str(tmp_path / "run"), "--set", also(name)]) == 2

    assert words in capsys.readouterr().err


def test_loggers_may_change_on_resuming(own, tmp_path):
    file = own()
    run_recipe(file, tmp_path / "run", "train.max_steps=3")
    run_recipe(file, tmp_path / "run", also("own:RecordingLogger"), resume=True)

    assert ["StepRecord", 4] in heard_in(tmp_path)
    assert ["StepRecord", 3] not in heard_in(tmp_path)


def read_event_files(folder):
    """Return what TensorBoard reads from event files: steps and values, by name; and the texts of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    values = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0].decode() for e in found.Tensors("events/text_summary")]
    return values, texts


def test_tensorboard_holds_the_values_of_the_records(own, tmp_path):
    pytest.importorskip("tensorboard")
    file = own('[loss]\nname = "own:nan_at_third"\nassign = "fixed"\n')

    run, _ = run_recipe(file, tmp_path / "run", also("tensorboard"))

    rows = read_rows(run.steps)[0]
    assert [row["outcome"] for row in rows] == ["trained"] * 2 + ["nonfinite_loss"] + ["trained"] * 3
    values, texts = read_event_files(run.path / "tensorboard")
    trained = [row for row in rows if row["outcome"] == "trained"]
    assert values["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in trained]
    assert values["train/grad_norm"] == [(row["step"], pytest.approx(row["grad_norm"])) for row in trained]
    assert values["skipped/nonfinite_loss"] == [(3, 1.0)]
    assert [step for step, _ in values["train/lr"]] == [1, 2, 3, 4, 5, 6]
    valid = read_rows(run.validation)[0]
    assert values["valid/si_sdri"] == [(row["step"], pytest.approx(row["si_sdri"])) for row in valid]
    assert [text.split(":")[0] for text in texts] == ["STEP_SKIPPED_NONFINITE_LOSS"]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(own, tmp_path):
    pytest.importorskip("tensorboard")
    file = own()
    run, _ = run_recipe(file, tmp_path / "run", also("tensorboard"), "train.max_steps=5")
    for path in (run.checkpoints / "step-000005").iterdir():
        path.unlink()
    (run.checkpoints / "step-000005").rmdir()

    run_recipe(file, tmp_path / "run", also("tensorboard"), resume=True)

    values, texts = read_event_files(run.path / "tensorboard")
    assert values["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in read_rows(run.steps)[0]]
    assert any(text.startswith("RUN_RESUMED") for text in texts)


class StandIn(types.ModuleType):
    """What `wandb` and `trackio` document: init gives a run that logs dicts and is finished."""

    def __init__(self):
        super().__init__("stand_in")
        self.calls = []

    def init(self, project=None, *, name=None, dir=None, config=None):  # noqa: A002
        self.calls.append(("init", project, name, config["optim"]["name"]))
        return self

    def define_metric(self, name, *, step_metric=None):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, data, step=None):
        json.dumps(data, allow_nan=False)
        self.calls.append(("log", data, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_loggers_receive_the_values_of_the_records(own, tmp_path, monkeypatch, name):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, name, stand_in)
    file = own('[loss]\nname = "own:nan_at_third"\nassign = "fixed"\n')

    _, yielded = run_recipe(file, tmp_path / "run", also(name))

    assert stand_in.calls[0] == ("init", "unbraid", "run", "adam")
    assert stand_in.calls[-1] == ("finish",)
    logged = [call[1:] for call in stand_in.calls if call[0] == "log"]
    assert [data.get("step", step) for data, step in logged] == [record.step for record in yielded]
    for record, (data, _) in zip(yielded, logged, strict=True):
        if isinstance(record, Event):
            assert data["event"] == f"{record.code}: {record.message}"
        else:
            assert data.items() >= scalars(record).items()
    assert any("skipped/nonfinite_loss" in data for data, _ in logged)


def test_every_logger_of_ours_names_its_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert {*LOGGERS} <= {*project["optional-dependencies"]}
