"""The rule on vanishing gradients, on real models."""

import pytest
import torch
from torch import nn
from toys import make_batch

from unbraid.health.gradients import vanishing_or_exploding
from unbraid.health.series import series_from_rows
from unbraid.io import to_json_row
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_snr
from unbraid.train.block_stats import SAMPLE_EVERY_STEPS
from unbraid.train.state import TrainState
from unbraid.train.step import train_step


class Recurrent(nn.Module):
    """An LSTM over frames of 8 samples, without residual connections."""

    def __init__(self, n_layers, scale):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(8, 8, n_layers, batch_first=True, bidirectional=True)
        self.decoder = nn.Linear(16, 16)
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                parameter *= scale if "weight" in name else 1.0

    def forward(self, mixture):
        frames = mixture[:, 0].unflatten(-1, (-1, 8))
        outputs = self.decoder(self.lstm(frames)[0]).unflatten(-1, (2, 8))
        return outputs.movedim(2, 1).flatten(2)[:, :, None]


def sampled_series(model, n=5):
    state = TrainState(model, SeparationLoss(neg_snr), torch.optim.Adam(model.parameters(), lr=1e-4))
    rows = []
    for sample in range(1, n + 1):
        state.step = SAMPLE_EVERY_STEPS * sample - 1
        rows.append(to_json_row(train_step(state, make_batch(seed=sample))))
    return series_from_rows(rows, [], [], {})


def test_vanishing_gradients_in_an_lstm_are_found():
    series = sampled_series(Recurrent(n_layers=6, scale=0.1))

    finding = vanishing_or_exploding(series)

    assert finding is not None
    assert finding.code == "GRADIENTS_VANISH"
    assert "first blocks of lstm.l" in finding.problem
    assert "first of 6 blocks" in finding.evidence


@pytest.mark.parametrize("n_layers", [2, 3])
def test_an_ordinary_lstm_has_no_finding(n_layers):
    assert vanishing_or_exploding(sampled_series(Recurrent(n_layers=n_layers, scale=1.0))) is None


def test_nested_stacks_are_compared_at_every_depth():
    def blocks(*factors):
        return {
            f"dual.{outer}.intra.{inner}": {"grad_norm": outer_factor * inner_factor, "update_ratio": 1e-3}
            for outer, outer_factor in enumerate(factors)
            for inner, inner_factor in enumerate((1.0, 1.0, 2.0))
        }

    def finding_for(*factors):
        rows = [{"step": 50 * k, "outcome": "trained", "blocks": blocks(*factors)} for k in range(1, 6)]
        return vanishing_or_exploding(series_from_rows(rows, [], [], {}))

    assert finding_for(1.0, 1.0, 2.0) is None
    assert "first blocks of dual." in finding_for(1e-4, 1e-2, 1.0).problem
    assert finding_for(1e-4, 1.0) is None  # two are no stack
