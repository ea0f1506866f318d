"""A NaN in any part that remembers is found under its own name, never saved, and never reaches the weights."""

import math

import pytest
import torch
from recipe_run import run_recipe
from toys import TwoFilters, make_batch, make_state

from unbraid.errors import CheckpointError
from unbraid.records import Event, read_rows
from unbraid.robust.clip import AutoClip
from unbraid.robust.guard import guarded_step
from unbraid.run_directory import RunDirectory
from unbraid.train import loop
from unbraid.train.checkpoint import checkpoint_folders, read_checkpoint, save_checkpoint
from unbraid.train.ema import EMA
from unbraid.train.state import first_nonfinite
from unbraid.train.step import train_step


def fill(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nan


def poison_weights(state):
    fill(next(state.model.parameters()))


def poison_ema(state):
    fill(state.ema.weights[0])


def poison_moments(state):
    fill(next(iter(state.optimizer.state.values()))["exp_avg"])


def poison_clipper(state):
    clipper = state.clipper
    if isinstance(clipper, AutoClip):
        clipper._norms._blocks[-1].append(math.nan)
        clipper._norms._n_values += 1
    else:
        fill(clipper._statistics[1:])


def poison_filter(state):
    fill(state.filters[0]._losses._values[10:])  # a slot that the next two steps do not overwrite


def poison_best_loss(state):
    state.best_loss = math.nan


AUTOCLIP = ["clip.name=autoclip"]
ZCLIP = ["clip.name=zclip", "clip.warmup_steps=2"]
PERCENTILE = ['filter=[{name = "percentile", warmup = 2, window = 16}]']
OUTLIER = ['filter=[{name = "outlier", warmup = 2, window = 16}]']
PARTS = {
    "weights": (poison_weights, [], "slope was not finite"),
    "ema": (poison_ema, ["train.ema=0.9"], "the moving average of"),
    "optimizer": (poison_moments, [], "slope was not finite"),  # the same step carries it into the weights
    "autoclip": (poison_clipper, AUTOCLIP, "clipper.norms"),
    "zclip": (poison_clipper, ZCLIP, "clipper.known"),
    "percentile": (poison_filter, PERCENTILE, "filter.0.values"),
    "outlier": (poison_filter, OUTLIER, "filter.0.values"),
    "best_loss": (poison_best_loss, [], "progress.best_loss"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_goes_back_and_ends_as_if_nothing_had_happened(recipe_file, tmp_path, monkeypatch, part):
    poison, overrides, name = PARTS[part]
    file = recipe_file()
    overrides = [*overrides, "save.keep=9"]
    plain, _ = run_recipe(file, tmp_path / "plain", *overrides)
    launch = loop.launch
    is_struck = False

    def strike_once(state, *args, **options):
        nonlocal is_struck
        if state.step == 4 and not is_struck:
            is_struck = True
            poison(state)
        return launch(state, *args, **options)

    monkeypatch.setattr(loop, "launch", strike_once)
    struck, records = run_recipe(file, tmp_path / "struck", *overrides)

    assert is_struck
    [event] = [record for record in records if isinstance(record, Event) and record.code == "WEIGHTS_NONFINITE"]
    assert name in event.message
    assert [path.name for path in checkpoint_folders(struck)] == [path.name for path in checkpoint_folders(plain)]
    for path in checkpoint_folders(plain):
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (struck.checkpoints / path.name / file).read_bytes() == (path / file).read_bytes()
    assert [row["step"] for row in read_rows(struck.steps)[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("part", ["model", "training_weights", "clipper"])
def test_a_nan_is_never_saved_whatever_else_is_finite(tmp_path, part):
    state = make_state(clipper=AutoClip())
    state.ema = EMA(state.model, 0.9)
    train_step(state, make_batch())
    content = state.state_dict()
    fill(content[part]["norms"] if part == "clipper" else content[part]["filters.weight"])
    run = RunDirectory(tmp_path)

    with pytest.raises(CheckpointError, match=rf"not finite: {part}\.\S+ has a NaN"):
        save_checkpoint(run, content, recipe={}, choices={}, best=True, keep=3)
    assert checkpoint_folders(run) == []
    assert not (run.checkpoints / "best").exists()


def test_a_mask_of_infinities_may_be_saved(tmp_path):
    state = make_state()
    state.model.register_buffer("mask", torch.full((2,), -math.inf))

    assert first_nonfinite(state) is None
    path = save_checkpoint(RunDirectory(tmp_path), state.state_dict(), recipe={}, choices={}, best=True, keep=3)
    assert torch.equal(read_checkpoint(path).state["model"]["mask"], state.model.mask)


def test_a_clipper_that_returns_nan_skips_the_step():
    state = make_state(clipper=lambda norm, finite: math.nan)
    before = [p.detach().clone() for p in state.model.parameters()]

    record = train_step(state, make_batch())

    assert (record.outcome, record.n_trained) == ("nonfinite_gradient", 0)
    assert math.isfinite(record.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))


def test_a_clipper_that_returns_nan_skips_a_guarded_step():
    model = TwoFilters()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    sum(p.square().sum() for p in model.parameters()).backward()

    result = guarded_step(optimizer, lambda norm, finite: norm * math.nan)

    assert not result.taken
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_event_blames_the_clipper_and_no_file(recipe_file, tmp_path):
    (tmp_path / "clippers.py").write_text(
        "class NanOnce:\n"
        "    n = 0\n"
        "    def __call__(self, norm, finite):\n"
        "        self.n += 1\n"
        "        return norm * 0 + (float('nan') if self.n == 3 else 1.0)\n"
    )

    _, records = run_recipe(recipe_file(), tmp_path / "run", "clip.name=clippers:NanOnce")

    [event] = [
        record for record in records if isinstance(record, Event) and record.code == "STEP_SKIPPED_NONFINITE_GRADIENT"
    ]
    assert (event.step, event.files) == (3, ())
    assert "the largest norm that the clipper allows is NaN" in event.message
