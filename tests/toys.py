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
"""Losses that need only the signals, and return one value per signal."""


class TwoFilters(nn.Module):
    """The smallest separator: one FIR filter per source."""

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
    snapshot = copy.deepcopy(state.state_dict())
    # The counts of steps and of faults change in a skipped step too.
    del snapshot["progress"]["step"], snapshot["faults"]
    return snapshot


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
"""Marks on the first sample of the sources, by which `marks` goes wrong in a chosen way."""


def marks(estimate: Tensor, target: Tensor) -> Tensor:
    """Return a squared error that goes wrong where the target is marked."""
    mark = target[..., 0]
    error = squared_error(estimate, target)
    # Where the mark is KINKED the value is 0, but the gradient of the root is infinite: 0 * inf gives NaN.
    kink = (estimate * (mark != KINKED)[..., None]).abs().sum(-1).sqrt()
    return error + 1e-3 * kink + 1e7 * (mark == TOO_LARGE) - 100.0 * (mark == EASY)


def marked(batch: Batch, mark: float, *examples: int) -> Batch:
    batch.sources[list(examples), ..., 0] = mark
    return batch
