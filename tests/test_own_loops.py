"""`clip_` and `guarded_step` in other training loops, Lightning's among them."""

import math

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from unbraid.robust.clip import AutoClip, FixedClip, ZClip, clip_
from unbraid.robust.guard import guarded_step

OPTIMIZERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}
CLIPPERS = {
    "fixed": lambda: FixedClip(max_norm=0.5),
    "autoclip": lambda: AutoClip(percentile=50),
    "zclip": lambda: ZClip(warmup_steps=2),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def make_batches(n=8):
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=rng), torch.randn(4, 2, generator=rng)) for _ in range(n)]


def with_nan_at(batches, index):
    x, y = batches[index]
    return [*batches[:index], (x * torch.nan, y), *batches[index:]]


def snapshot(model, optimizer):
    """Copies of the weights and of the optimizer state, in one list."""
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*model.parameters(), *moments)]


def equal_bits(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_clip_trains_the_same_weights_as_torchs_clip_grad_norm():
    models = [make_model(), make_model()]
    clipper = FixedClip(max_norm=0.5)
    clip_functions = [lambda p: nn.utils.clip_grad_norm_(p, 0.5), lambda p: clip_(p, clipper)]
    for model, clip in zip(models, clip_functions, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for x, y in make_batches():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            clip(model.parameters())
            optimizer.step()

    for theirs, mine in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(theirs, mine, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("clipper_name", sorted(CLIPPERS))
def test_with_guarded_step_a_nan_batch_has_no_effect(optimizer_name, clipper_name):
    final_states = []
    for batches in (make_batches(), with_nan_at(make_batches(), 4)):
        model = make_model()
        clipper = CLIPPERS[clipper_name]()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        for x, y in batches:
            before = snapshot(model, optimizer)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            step = guarded_step(optimizer, clipper, loss=loss)
            assert bool(step.taken) == math.isfinite(loss.detach())
            assert step.taken or equal_bits(before, snapshot(model, optimizer))
        final_states.append(snapshot(model, optimizer))

    assert equal_bits(*final_states)


def test_without_guarded_step_a_nan_batch_destroys_the_weights():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x, y in with_nan_at(make_batches(), 4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    assert all(p.isnan().any() for p in model.parameters())


class ByHand(lightning.LightningModule):
    """Manual optimization: the step is called in the training step."""

    def __init__(self, optimizer):
        super().__init__()
        self.automatic_optimization = False
        self.model = make_model()
        self.clipper = AutoClip(percentile=50)
        self.optimizer_name = optimizer
        self.taken = []

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        self.manual_backward(loss)
        self.taken.append(bool(guarded_step(optimizer, self.clipper, loss=loss).taken))

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer_name](self.model.parameters())


class ByHook(ByHand):
    """Automatic optimization: Lightning calls the model and backward, and its hook takes the step."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = True

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def optimizer_step(self, epoch, index, optimizer, closure):
        loss = closure()
        self.taken.append(bool(guarded_step(optimizer, self.clipper, loss=loss).taken))


class ByClipping(ByHook):
    """Lightning steps itself; only its clipping is replaced."""

    optimizer_step = lightning.LightningModule.optimizer_step

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_(self.parameters(), self.clipper)


def fit(module, batches, folder):
    """Train one epoch on the CPU, in order; files go to the folder."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


in_lightning = pytest.mark.filterwarnings(  # warnings about these settings, and a deprecation inside Lightning
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


@in_lightning
@pytest.mark.parametrize("module", [ByHand, ByHook])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_in_lightning_a_nan_batch_has_no_effect(module, optimizer, tmp_path):
    with_fault = module(optimizer)
    without = module(optimizer)

    fit(with_fault, with_nan_at(make_batches(), 4), tmp_path)
    fit(without, make_batches(), tmp_path)

    assert with_fault.taken == [index != 4 for index in range(9)]
    assert equal_bits(list(with_fault.parameters()), list(without.parameters()))
    assert torch.equal(with_fault.clipper.state_dict()["norms"], without.clipper.state_dict()["norms"])


@in_lightning
def test_lightning_still_counts_steps(tmp_path):
    assert fit(ByHand("fused Adam"), make_batches(), tmp_path).global_step == 8
    assert fit(ByHook("SGD"), make_batches(), tmp_path).global_step == 8


@in_lightning
def test_lightnings_clipping_alone_can_be_replaced(tmp_path):
    module = ByClipping("SGD")
    plain = make_model()
    fit(module, make_batches(), tmp_path)
    clipper = AutoClip(percentile=50)
    optimizer = OPTIMIZERS["SGD"](plain.parameters())
    for x, y in make_batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        clip_(plain.parameters(), clipper)
        optimizer.step()

    assert equal_bits(list(module.parameters()), list(plain.parameters()))
