"""Silence, a gain of 1e-4 and a gain of 300 through every model, in fp16 and bf16 (fault N11)."""

import pytest
import torch
from small_models import small

from unbraid.data.batch import Batch
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.models import MODELS
from unbraid.robust.precision import PRECISIONS, Precision
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import TrainState
from unbraid.train.step import train_step

GAINS = [1e-4, 1.0, 300.0]
LOSS_SCALE = {"fp16": 2.0**8, "bf16": 1.0, "fp32": 1.0}

every_model = pytest.mark.parametrize("name", sorted(MODELS))
halves = pytest.mark.parametrize("precision", ["fp16", "bf16"])
every_gain = pytest.mark.parametrize("gain", GAINS)


def noise(gain, *, seed=0, time=2000):
    """Two sources at -20 dBFS times the gain, ``(2, 2, 1, time)``."""
    return gain * 0.1 * torch.randn(2, 2, 1, time, generator=torch.Generator().manual_seed(seed))


def run(model, mixture, precision):
    with Precision(precision).autocast(mixture.device):
        return model(mixture)


def error(estimate, exact):
    return ((estimate.float() - exact).norm() / exact.norm()).item()


@every_model
@halves
@pytest.mark.parametrize("seed", [0, 1])
@every_gain
def test_half_precision_is_within_1_percent_of_fp32_at_any_gain(name, precision, gain, seed):
    model, mixture = small(name, seed=seed).eval(), noise(gain, seed=seed).sum(1)

    with torch.no_grad():
        exact, rounded = run(model, mixture, "fp32"), run(model, mixture, precision)

    assert rounded.isfinite().all()
    assert error(rounded, exact) <= {"fp16": 0.002, "bf16": 0.01}[precision]


@every_model
@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_silence_stays_silent_with_finite_gradients(name, precision):
    model, silence = small(name), torch.zeros(2, 2, 1, 2000)

    estimate = run(model, silence.sum(1), precision)
    (SeparationLoss(neg_si_sdr)(estimate, silence).mean() * LOSS_SCALE[precision]).backward()

    assert not estimate.any()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@every_model
@halves
@every_gain
def test_the_gradient_of_si_sdr_is_finite_and_close_to_fp32_at_any_gain(name, precision, gain):
    """SI-SDR's gradient grows as the estimate falls: what must not overflow in fp16 is what still has a level."""
    gradients = {}
    for each in ("fp32", precision):
        model, sources = small(name), noise(gain)
        loss = SeparationLoss(neg_si_sdr)(run(model, sources.sum(1), each), sources).mean()
        (loss * LOSS_SCALE[each]).backward()
        gradients[each] = (
            torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]) / LOSS_SCALE[each]
        )

    assert gradients[precision].isfinite().all()
    assert error(gradients[precision], gradients["fp32"]) <= {"fp16": 0.05, "bf16": 0.15}[precision]


@every_model
@every_gain
def test_fp16_trains_at_any_gain_after_recorded_overflows(name, gain):
    model, sources = small(name), noise(gain)
    state = TrainState(
        model,
        loss=SeparationLoss(neg_si_sdr),
        optimizer=OPTIMIZERS["adam"](model.parameters(), lr=1e-4),
        precision=Precision("fp16"),
    )

    outcomes = [train_step(state, Batch.from_tensors(sources.sum(1), sources)).outcome for _ in range(10)]

    assert set(outcomes) <= {"fp16_overflow", "trained"}
    assert outcomes[-1] == "trained"
    assert state.precision.scale >= LOSS_SCALE["fp16"]
