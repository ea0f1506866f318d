"""The subject of an experiment: the same weights and mixtures each time, and nothing of a run touched."""

import hashlib

import pytest
import torch
from toys import assert_same

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import CheckpointError, DataError, RecipeError
from unbraid.lab.experiment import mean_loss, of_checkpoint, of_recipe
from unbraid.robust.precision import Precision
from unbraid.train.forward import compute_losses
from unbraid.train.step import train_step


@pytest.fixture
def run(recipe_file, tmp_path):
    """A run of six steps, trained by the command."""
    assert cli.main(["train", str(recipe_file()), "--run", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def contents(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_forks_of_a_subject_train_alike_and_leave_it_as_it_was(recipe_file):
    subject = of_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in subject.weights.items()}
    ends = []
    for _ in range(2):
        state, stream = subject.fork(), subject.steps()
        for _ in range(3):
            train_step(state, next(stream))
        ends.append(state.unwrapped_model.state_dict())

    assert_same(ends[0], ends[1])
    assert_same(before, dict(subject.weights))
    assert not all(torch.equal(before[name], ends[0][name]) for name in before)


def test_a_recipe_starts_where_its_training_would(recipe_file, tmp_path):
    file = recipe_file()
    assert cli.main(["train", str(file), "--run", str(tmp_path / "run"), "--set", "validate.every_steps=0"]) == 0
    trained = of_checkpoint(tmp_path / "run")
    subject = of_recipe(load_recipe(file), "tiny")
    state, stream = subject.fork(), subject.steps()
    for _ in range(6):
        train_step(state, next(stream))

    assert trained.step == 6
    for name, weight in state.unwrapped_model.state_dict().items():
        torch.testing.assert_close(weight, trained.weights[name])


def test_the_stream_can_be_taken_up_at_any_step(recipe_file):
    subject = of_recipe(load_recipe(recipe_file(), ["train.accumulate=2"]), "tiny")
    stream = subject.steps()
    whole = [next(stream) for _ in range(3)]
    later = next(subject.steps(first_step=2))

    assert [len(part.mixture) for part in later] == [2, 2]
    assert all(torch.equal(a.mixture, b.mixture) for a, b in zip(whole[2], later, strict=True))


def test_looking_at_a_checkpoint_changes_no_byte_of_its_run(run):
    before = contents(run)
    subject = of_checkpoint(run)
    train_step(subject.fork(), next(subject.steps()))

    assert contents(run) == before


def test_the_mean_loss_weighs_examples_alike_whatever_the_batches(recipe_file):
    subject = of_recipe(load_recipe(recipe_file()), "tiny")
    model, loss, precision = subject.model(), subject.loss(), Precision("fp32")
    whole, cut = subject.fixed(5, batch_size=5), subject.fixed(5, batch_size=2)
    each = [compute_losses(model, loss, precision, one)[1] for one in subject.fixed(5, batch_size=1)]

    assert [len(batch.mixture) for batch in cut] == [2, 2, 1]
    torch.testing.assert_close(mean_loss(model, loss, precision, cut), torch.cat(each).mean())
    torch.testing.assert_close(mean_loss(model, loss, precision, whole), torch.cat(each).mean())


def test_code_that_came_with_a_checkpoint_runs_only_when_trusted(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom torch.optim import SGD\nPath('ran').touch()\n"
        "def slow(parameters, *, lr: float = 1e-3):\n    return SGD(parameters, lr)\n"
    )
    monkeypatch.chdir(tmp_path)
    file, out = recipe_file(), tmp_path / "run"
    assert cli.main(["train", str(file), "--run", str(out), "--set", "optim.name=mine:slow"]) == 0
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(__import__("sys").modules, "unbraid_own_mine")
    subject = of_checkpoint(out)

    with pytest.raises(RecipeError, match="--trust lets it run"):
        subject.fork()
    assert not (tmp_path / "ran").exists()
    of_checkpoint(out, trust=True).fork()
    assert (tmp_path / "ran").exists()


def test_recordings_that_moved_are_found_by_a_set(run, speaker_folder, tmp_path):
    elsewhere = speaker_folder(root=tmp_path / "moved")
    subject = of_checkpoint(run, overrides=[f"data.path={elsewhere}"])

    assert subject.recipe.data.path == elsewhere


def test_weights_of_another_model_are_refused(run):
    with pytest.raises(CheckpointError, match="weights of another model"):
        of_checkpoint(run, overrides=["model.hidden=8"])


def test_recordings_that_moved_are_told_of_with_what_to_do(run, speaker_folder, tmp_path):
    (tmp_path / "speech").rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"speech.* --set data\.path=THERE"):
        of_checkpoint(run)
