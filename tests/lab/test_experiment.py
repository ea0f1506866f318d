"""An experiment: the same weights and mixtures on every call, and no run directory changed."""

import hashlib

import pytest
import torch
from toys import assert_same

from unbraid.cli import main as cli
from unbraid.config.recipe import load_recipe
from unbraid.errors import CheckpointError, DataError, RecipeError
from unbraid.lab.experiment import experiment_from_checkpoint, experiment_from_recipe, mean_loss
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


def test_two_states_of_an_experiment_train_alike_and_leave_it_unchanged(recipe_file):
    experiment = experiment_from_recipe(load_recipe(recipe_file()), "tiny")
    before = {name: weight.clone() for name, weight in experiment.weights.items()}
    trained = []
    for _ in range(2):
        state = experiment.new_state()
        batches = experiment.training_batches()
        for _ in range(3):
            train_step(state, next(batches))
        trained.append(state.unwrapped_model.state_dict())

    assert_same(trained[0], trained[1])
    assert_same(before, dict(experiment.weights))
    assert not all(torch.equal(before[name], trained[0][name]) for name in before)


def test_an_experiment_from_a_recipe_trains_as_the_command_does(recipe_file, tmp_path):
    file = recipe_file()
    assert cli.main(["train", str(file), "--run", str(tmp_path / "run"), "--set", "validate.every_steps=0"]) == 0
    trained = experiment_from_checkpoint(tmp_path / "run")
    experiment = experiment_from_recipe(load_recipe(file), "tiny")
    state = experiment.new_state()
    batches = experiment.training_batches()
    for _ in range(6):
        train_step(state, next(batches))

    assert trained.step == 6
    for name, weight in state.unwrapped_model.state_dict().items():
        torch.testing.assert_close(weight, trained.weights[name])


def test_training_batches_can_start_at_any_step(recipe_file):
    experiment = experiment_from_recipe(load_recipe(recipe_file(), ["train.accumulate=2"]), "tiny")
    batches = experiment.training_batches()
    steps = [next(batches) for _ in range(3)]
    later = next(experiment.training_batches(first_step=2))

    assert [len(micro_batch.mixture) for micro_batch in later] == [2, 2]
    assert all(torch.equal(a.mixture, b.mixture) for a, b in zip(steps[2], later, strict=True))


def test_an_experiment_from_a_checkpoint_changes_no_byte_of_its_run(run):
    before = contents(run)
    experiment = experiment_from_checkpoint(run)
    train_step(experiment.new_state(), next(experiment.training_batches()))

    assert contents(run) == before


def test_the_mean_loss_weighs_examples_equally_in_batches_of_any_size(recipe_file):
    experiment = experiment_from_recipe(load_recipe(recipe_file()), "tiny")
    model = experiment.copy_model()
    loss = experiment.build_loss()
    precision = Precision("fp32")
    single_batch = experiment.fixed_batches(5, batch_size=5)
    uneven_batches = experiment.fixed_batches(5, batch_size=2)
    losses = [compute_losses(model, loss, precision, batch)[1] for batch in experiment.fixed_batches(5, batch_size=1)]

    assert [len(batch.mixture) for batch in uneven_batches] == [2, 2, 1]
    torch.testing.assert_close(mean_loss(model, loss, precision, uneven_batches), torch.cat(losses).mean())
    torch.testing.assert_close(mean_loss(model, loss, precision, single_batch), torch.cat(losses).mean())


def test_custom_code_of_a_checkpoint_runs_only_when_trusted(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom torch.optim import SGD\nPath('imported').touch()\n"
        "def slow(parameters, *, lr: float = 1e-3):\n    return SGD(parameters, lr)\n"
    )
    monkeypatch.chdir(tmp_path)
    file = recipe_file()
    out = tmp_path / "run"
    assert cli.main(["train", str(file), "--run", str(out), "--set", "optim.name=mine:slow"]) == 0
    (tmp_path / "imported").unlink()
    monkeypatch.delitem(__import__("sys").modules, "unbraid_own_mine")
    experiment = experiment_from_checkpoint(out)

    with pytest.raises(RecipeError, match="pass --trust to run it"):
        experiment.new_state()
    assert not (tmp_path / "imported").exists()
    experiment_from_checkpoint(out, trust=True).new_state()
    assert (tmp_path / "imported").exists()


def test_set_finds_recordings_that_have_moved(run, speaker_folder, tmp_path):
    moved = speaker_folder(root=tmp_path / "moved")
    experiment = experiment_from_checkpoint(run, overrides=[f"data.path={moved}"])

    assert experiment.recipe.data.path == moved


def test_weights_of_another_model_are_refused(run):
    with pytest.raises(CheckpointError, match="weights of another model"):
        experiment_from_checkpoint(run, overrides=["model.hidden=8"])


def test_the_error_about_missing_recordings_names_the_option(run, speaker_folder, tmp_path):
    (tmp_path / "speech").rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"speech.* --set data\.path=FOLDER"):
        experiment_from_checkpoint(run)
