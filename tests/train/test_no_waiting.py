"""No step waits for the host: what would, on an accelerator, is counted here on the CPU."""

import pytest
import torch
from toys import make_batch, make_state
from waits import counted_waits

from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS, clip
from unbraid.robust.precision import Precision
from unbraid.robust.quantile import DeviceQuantile
from unbraid.train.ema import EMA
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.step import finish, launch


def on_a_device(_device, window):
    return DeviceQuantile(window)


DEVICE_OPTIMIZERS = ["adam", "adamw", "sgd"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clipper", sorted(CLIPPERS))
@pytest.mark.parametrize("optimizer", DEVICE_OPTIMIZERS)
def test_a_step_launches_without_waiting_and_ends_with_one_transfer(monkeypatch, optimizer, clipper, precision):
    monkeypatch.setattr(clip, "quantile_for", on_a_device)
    state = make_state(
        optimizer=optimizer,
        clipper=CLIPPERS[clipper](),
        precision=Precision(precision, scale=8.0),
        filters=[FILTERS[name]() for name in sorted(FILTERS)],
        transforms=[TRANSFORMS[name]() for name in sorted(TRANSFORMS)],
    )
    state.ema = EMA(state.model, 0.99)
    launch(state, [make_batch()])
    state.step = 48
    for step in (49, 50):  # a plain one, and one that is looked at closely
        with counted_waits(monkeypatch) as launching:
            launched = launch(state, [make_batch(seed=step), make_batch(seed=step + 1)])
        with counted_waits(monkeypatch) as finishing:
            record, _ = finish(state, launched)

        assert record.trained
        assert launching == {}
        assert finishing == {"tolist": 1}
        assert bool(record.items) == (step == 50)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - set(DEVICE_OPTIMIZERS)))
def test_a_decision_of_the_host_needs_one_transfer(monkeypatch, optimizer):
    state = make_state(optimizer=optimizer)
    launch(state, [make_batch()])
    with counted_waits(monkeypatch) as waits:
        record, _ = finish(state, launch(state, [make_batch(seed=2)]))

    assert record.trained
    assert waits["tolist"] == 1


def test_a_step_can_be_launched_before_the_one_before_it_is_finished():
    ahead, plain = (
        make_state(precision=Precision("fp16", scale=2.0**12)),
        make_state(precision=Precision("fp16", scale=2.0**12)),
    )
    batches = [make_batch(seed=seed) for seed in range(5)]
    plain_records = [finish(plain, launch(plain, [batch]))[0] for batch in batches]
    records, waiting = [], None
    for batch in [*batches, None]:
        launched = launch(ahead, [batch]) if batch is not None else None
        if waiting is not None:
            records.append(finish(ahead, waiting)[0])
        waiting = launched

    assert [r.loss for r in records] == [r.loss for r in plain_records]
    assert [r.step for r in records] == [1, 2, 3, 4, 5]
    assert torch.equal(ahead.model.filters.weight, plain.model.filters.weight)
