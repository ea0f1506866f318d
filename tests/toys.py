"""Small models, batches and comparisons that the tests of training share."""

import copy

import torch
from torch import Tensor, nn

from unbraid.data.batch import Batch
from unbraid.losses import LOSSES
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.records import ItemId
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import TrainState

SIGNAL_LOSSES = sorted({*LOSSES} - {"deep_clustering", "mask_inference", "neg_sa_sdr", "whitened_kmeans"})
"""Of `LOSSES`, those that need nothing but the signals, and come to one value for each."""


class TwoFilters(nn.Module):
    """The smallest separator: one FIR filter a source."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Conv1d(1, 2, 9, padding=4)

    def forward(self, mixture: Tensor) -> Tensor:
        return self.filters(mixture)[:, :, None]


def squared_error(estimate: Tensor, target: Tensor) -> Tensor:
    return (estimate - target).square().mean(-1)


def make_state(*, seed=0, optimizer="adam", lr=1e-2, dtype=torch.float32, device=None, **parts) -> TrainState:
    torch.manual_seed(seed)
    model = TwoFilters().to(device, dtype)
    parts.setdefault("loss", SeparationLoss(neg_si_sdr))
    return TrainState(model, optimizer=OPTIMIZERS[optimizer](model.parameters(), lr=lr), **parts)


def make_batch(n=2, *, seed=1, time=400, scale=1.0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    sources = scale * torch.randn(n, 2, 1, time, generator=rng)
    items = [ItemId("train", 0, i, (f"a{i}.wav", f"b{i}.wav")) for i in range(n)]
    return Batch.from_tensors(sources.sum(1), sources, items=items)


def with_nan(batch: Batch, example: int) -> Batch:
    batch.mixture[example, 0, 7] = torch.nan
    return batch


def snapshot(state: TrainState):
    kept = copy.deepcopy(state.state_dict())
    del kept["progress"]["step"], kept["faults"]  # the count of steps and of faults is what does move
    return kept


def assert_same(before, after, where=""):
    assert type(before) is type(after), where
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), where
        for i, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert before == after, where


KINKED, TOO_LARGE, EASY = 7.0, 8.0, 9.0
"""Marks on the first sample of the sources."""


def marks(estimate: Tensor, target: Tensor) -> Tensor:
    """A squared error that goes wrong where the target is marked."""
    mark, error = target[..., 0], squared_error(estimate, target)
    kink = (estimate * (mark != KINKED)[..., None]).abs().sum(-1).sqrt()  # where marked 0, with the gradient 0 * inf
    return error + 1e-3 * kink + 1e7 * (mark == TOO_LARGE) - 100.0 * (mark == EASY)


def marked(batch: Batch, mark: float, *examples: int) -> Batch:
    batch.sources[list(examples), ..., 0] = mark
    return batch
