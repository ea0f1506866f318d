"""Events of bad steps: who is blamed, and how much is said."""

import pytest
from recipe_run import run_recipe

from unbraid.config.recipe import load_recipe
from unbraid.config.registry import _load_module as find_module
from unbraid.errors import TrainingStopped
from unbraid.records import Event, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train import loop

NETS = """
import torch
from torch import nn

class AlwaysNan(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = nn.Conv1d(1, 2, 9, padding=4)
    def forward(self, mixture):
        return self.filters(mixture)[:, :, None] * float("nan")

class NanAtTimes(AlwaysNan):
    value = 1.0
    def forward(self, mixture):
        return self.filters(mixture)[:, :, None] * NanAtTimes.value
"""


@pytest.fixture
def nets(tmp_path, recipe_file):
    (tmp_path / "nets.py").write_text(NETS)
    return recipe_file()


def test_where_all_examples_are_bad_the_model_is_blamed_once_and_no_file(nets, tmp_path):
    run = RunDirectory(tmp_path / "run")
    records = train(load_recipe(nets, ["model.name=nets:AlwaysNan", "train.max_steps=60"]), run)

    with pytest.raises(TrainingStopped, match=r"check the model and the loss, or lower the learning rate") as stopped:
        list(records)

    assert "exclude" not in str(stopped.value)
    assert ".wav" not in str(stopped.value)
    assert "filters" in str(stopped.value)  # the first diagnosis
    first, *others = [row for row in read_rows(run.events)[0] if row["code"] == "STEP_SKIPPED_NONFINITE_LOSS"]
    assert "All 4 examples are bad: the model or its settings are to blame, not the files." in first["message"]
    assert "filters" in first["message"]
    assert {row["message"].partition(": ")[2] for row in others} == {"all 4 examples again."}
    assert {tuple(row["files"]) for row in (first, *others)} == {()}
    assert len(list(run.incidents.iterdir())) == 1


def test_a_good_step_in_between_makes_the_next_bad_one_new(nets, tmp_path, monkeypatch):
    net = find_module(tmp_path / "nets.py").NanAtTimes
    finish = loop.finish

    def finish_and_set_value(state, launched):
        finished = finish(state, launched)
        net.value = float("nan") if state.step + 1 in (2, 4) else 1.0
        return finished

    monkeypatch.setattr(loop, "finish", finish_and_set_value)
    _, records = run_recipe(nets, tmp_path / "run", "model.name=nets:NanAtTimes", "validate.every_steps=0")

    events = [record for record in records if isinstance(record, Event)]
    assert [event.step for event in events] == [2, 4]
    assert all("All 4 examples are bad" in event.message for event in events)
