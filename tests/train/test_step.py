"""The training step: the formula, and what must never reach the weights."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import (
    EASY,
    KINKED,
    TOO_LARGE,
    TwoFilters,
    assert_same,
    make_batch,
    make_state,
    marked,
    marks,
    snapshot,
    squared_error,
    with_nan,
)

from unbraid.data.batch import Batch
from unbraid.robust import CLIPPERS
from unbraid.robust.clip import AutoClip, FixedClip, NoClip
from unbraid.robust.filter import OutlierFilter, PercentileFilter, ThresholdFilter
from unbraid.robust.guard import initialise_optimizer_state
from unbraid.robust.precision import PRECISIONS, Precision
from unbraid.train.ema import EMA
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import FaultWindow, TrainState
from unbraid.train.step import train_step


def reference_gradient(model: nn.Module, loss, batch: Batch, weights: Tensor) -> list[Tensor]:
    """Written out: sum of w_i grad l_i over sum of w_i, one example at a time."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i, weight in enumerate(weights.tolist()):
        value = loss(model(batch.mixture[i : i + 1]), batch.sources[i : i + 1]).mean()
        for sum_, gradient in zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True):
            sum_ += weight * gradient
    return [gradient / weights.sum() for gradient in total]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_nan_sample_in_a_batch_of_two_leaves_the_weights_alone_and_the_next_step_trains(precision):
    state = make_state(clipper=AutoClip(), precision=Precision(precision))
    train_step(state, make_batch(seed=5))
    before = snapshot(state)

    record = train_step(state, with_nan(make_batch(), 1))

    assert record.outcome == "nonfinite_loss"
    assert_same(before, snapshot(state))
    assert train_step(state, make_batch(seed=6)).outcome == "trained"
    assert not torch.equal(before["model"]["filters.weight"], state.model.filters.weight)
    assert all(p.isfinite().all() for p in state.model.parameters())


@pytest.mark.parametrize("kind", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_skipping_the_first_step_does_not_change_the_second_with_momentum(kind):
    def sgd(model):
        return OPTIMIZERS["sgd"](model.parameters(), lr=0.1, **kind)

    states = [make_state(), make_state()]
    for state in states:
        state.optimizer = sgd(state.model)
        initialise_optimizer_state(state.optimizer)
    train_step(states[0], with_nan(make_batch(), 0))
    for state in states:
        for seed in (1, 2):
            train_step(state, make_batch(seed=seed))

    plain = make_state()
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1, foreach=False, fused=False, **kind)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        optimizer.zero_grad()
        plain.loss(plain.model(batch.mixture), batch.sources).mean().backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 5.0)
        optimizer.step()

    assert torch.equal(states[0].model.filters.weight, states[1].model.filters.weight)
    assert torch.allclose(states[0].model.filters.weight, plain.model.filters.weight, atol=1e-6)


FAULTS = {
    "nonfinite_loss": lambda: with_nan(make_batch(), 0),
    "over_limit": lambda: marked(make_batch(), TOO_LARGE, 1),
    "nonfinite_gradient": lambda: marked(make_batch(), KINKED, 1),
    "all_filtered": lambda: marked(make_batch(), EASY, 0, 1),
    "out_of_memory": lambda: make_batch(time=3000),
}


class OutOfMemoryAboveTwo(TwoFilters):
    """Has not the memory for long mixtures."""

    n_refused = 0

    def forward(self, mixture: Tensor) -> Tensor:
        if mixture.shape[-1] > 2000:
            self.n_refused += 1
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(mixture)


EVERY_PART = {(optimizer, "autoclip", precision) for optimizer in OPTIMIZERS for precision in PRECISIONS}
EVERY_PART |= {("adam", clipper, "fp32") for clipper in CLIPPERS}


@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
@pytest.mark.parametrize("outcome", FAULTS)
@pytest.mark.parametrize(("optimizer", "clipper", "precision"), sorted(EVERY_PART))
def test_a_skipped_step_changes_nothing(optimizer, clipper, precision, outcome, first):
    torch.manual_seed(0)
    model = OutOfMemoryAboveTwo()
    state = TrainState(
        model,
        marks,
        OPTIMIZERS[optimizer](model.parameters(), lr=1e-2),
        CLIPPERS[clipper](),
        filters=[ThresholdFilter(threshold_db=-30.0), PercentileFilter(percentile=0.0), OutlierFilter(at_least_db=1e3)],
        precision=Precision(precision, scale=Precision.MIN_SCALE),  # where an overflow is a fault like any other
        ema=EMA(model, 0.9),
        loss_upper_limit=1e6,
    )
    if not first:
        for seed in (5, 6):
            assert train_step(state, make_batch(seed=seed)).trained
    before = snapshot(state)
    if outcome == "all_filtered":  # no fault: what filters remember may move, and nothing else
        before = {name: part for name, part in before.items() if not name.startswith("filter")}

    record = train_step(state, FAULTS[outcome]())
    if outcome == "out_of_memory":
        assert state.n_pieces == 2  # tried again with single examples, in vain
        state.n_pieces = 1

    assert (record.outcome, record.n_trained) == (outcome, 0)
    assert_same(before, {name: part for name, part in snapshot(state).items() if name in before})


def test_a_run_with_a_bad_step_ends_with_the_weights_of_the_run_without_it():
    with_fault, without = make_state(clipper=AutoClip()), make_state(clipper=AutoClip())
    for seed in range(6):
        if seed == 3:
            train_step(with_fault, with_nan(make_batch(seed=99), 0))
        train_step(with_fault, make_batch(seed=seed))
        train_step(without, make_batch(seed=seed))

    assert_same(without.model.state_dict(), with_fault.model.state_dict())


def test_an_example_that_is_bad_is_named_by_its_files():
    record = train_step(make_state(), with_nan(make_batch(3), 2))

    assert [item.files for item in record.bad_items] == [("a2.wav", "b2.wav")]
    assert (record.n_bad, record.n_trained) == (1, 0)


def test_a_skipped_step_is_recorded_with_its_true_loss_and_never_zero():
    assert math.isnan(train_step(make_state(), with_nan(make_batch(), 0)).loss)


def test_a_loss_of_minus_infinity_does_not_pass():
    def minus_infinity(estimate: Tensor, target: Tensor) -> Tensor:
        return estimate.sum(-1) * 0 - torch.inf

    state = make_state(loss=minus_infinity)
    before = snapshot(state)

    assert train_step(state, make_batch()).outcome == "nonfinite_loss"
    assert_same(before, snapshot(state))


def test_an_infinite_loss_does_not_pass_an_infinite_limit():
    state = make_state(loss=lambda e, t: squared_error(e, t) - torch.inf, loss_upper_limit=math.inf)

    assert train_step(state, make_batch()).outcome == "nonfinite_loss"


def test_at_the_smallest_scale_an_overflow_is_a_fault():
    precision = Precision("fp16", scale=Precision.MIN_SCALE)
    state = make_state(loss=lambda e, t: squared_error(e, t) * 1e30, loss_upper_limit=1e38, precision=precision)

    assert train_step(state, make_batch(scale=100)).outcome == "nonfinite_gradient"
    assert state.precision.scale == Precision.MIN_SCALE


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_over_the_limit_on_either_side_skips_the_step(sign):
    state = make_state(loss=lambda e, t: sign * 1e3 + squared_error(e, t) * 0, loss_upper_limit=100.0)
    before = snapshot(state)

    record = train_step(state, make_batch())

    assert (record.outcome, record.n_bad) == ("over_limit", 2)
    assert record.loss == pytest.approx(sign * 1e3)
    assert_same(before, snapshot(state))


def test_a_nonfinite_gradient_of_a_finite_loss_skips_the_step():
    def kink(estimate: Tensor, target: Tensor) -> Tensor:
        return (estimate * 0).sum(-1).sqrt()  # 0, with the gradient 0 * inf

    state = make_state(loss=kink, clipper=AutoClip())
    before = snapshot(state)

    record = train_step(state, make_batch())

    assert (record.outcome, len(record.bad_items)) == ("nonfinite_gradient", 2)
    assert_same(before, snapshot(state))


def test_an_fp16_overflow_changes_the_loss_scale_and_nothing_else():
    state = make_state(loss=squared_error, precision=Precision("fp16", scale=2.0**40), clipper=AutoClip())
    before = snapshot(state)

    record = train_step(state, make_batch(scale=100))

    after = snapshot(state)
    assert record.outcome == "fp16_overflow"
    assert after.pop("precision")["scale"] == before.pop("precision")["scale"] / 2
    assert_same(before, after)


def test_fp16_with_scaling_gives_the_gradient_of_fp32():
    plain = make_state(loss=squared_error, optimizer="sgd", clipper=NoClip())
    scaled = make_state(
        loss=squared_error, optimizer="sgd", clipper=NoClip(), precision=Precision("fp16", scale=1024.0)
    )

    norms = [train_step(state, make_batch()).grad_norm for state in (plain, scaled)]

    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
    assert torch.allclose(plain.model.filters.weight, scaled.model.filters.weight, atol=1e-4)


def test_filtered_examples_do_not_contribute_to_the_gradient():
    def easy_where_marked(estimate: Tensor, target: Tensor) -> Tensor:
        return squared_error(estimate, target) - 50.0 * (target[..., 0] == 7.0)

    hard, mixed = make_batch(2), make_batch(3)
    mixed.mixture[:2], mixed.sources[:2], mixed.sources[2, ..., 0] = hard.mixture, hard.sources, 7.0
    parts = {"optimizer": "sgd", "loss": easy_where_marked, "clipper": NoClip()}
    filtered, alone = make_state(filters=[ThresholdFilter(threshold_db=-30.0)], **parts), make_state(**parts)

    record = train_step(filtered, mixed)
    train_step(alone, hard)

    assert (record.n_trained, record.n_filtered) == (2, 1)
    assert torch.allclose(filtered.model.filters.weight, alone.model.filters.weight, atol=1e-7)


def test_a_batch_of_filtered_examples_is_neither_a_fault_nor_a_step():
    state = make_state(filters=[ThresholdFilter(threshold_db=1e6)], clipper=AutoClip())
    before = snapshot(state)

    record = train_step(state, make_batch())

    assert (record.outcome, record.n_filtered, record.n_bad) == ("all_filtered", 2, 0)
    assert math.isfinite(record.loss)
    assert record.loss != 0
    assert state.faults.n_in_a_row == 0
    assert_same(before, snapshot(state))


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 3.0), min_size=4, max_size=8),
    cuts=st.sets(st.integers(1, 7), max_size=3),
    zero=st.integers(0, 7),
)
def test_the_gradient_is_the_weighted_mean_however_the_batch_is_cut(weights, cuts, zero):
    weights = torch.tensor(weights, dtype=torch.float64)
    if zero < len(weights):
        weights[zero] = 0.0
    batch = make_batch(len(weights))
    batch = Batch.from_tensors(batch.mixture.double(), batch.sources.double(), weight=weights)
    state = make_state(optimizer="sgd", lr=1.0, loss=squared_error, clipper=NoClip(), dtype=torch.float64)
    before = [p.detach().clone() for p in state.model.parameters()]
    wanted = reference_gradient(state.model, squared_error, batch, weights)
    edges = [0, *sorted(c for c in cuts if c < len(weights)), len(weights)]
    parts = [
        Batch.from_tensors(batch.mixture[a:b], batch.sources[a:b], weight=weights[a:b]) for a, b in pairwise(edges)
    ]

    record = train_step(state, parts)

    taken = [old - new.detach() for old, new in zip(before, state.model.parameters(), strict=True)]
    for mine, theirs in zip(taken, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert record.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in wanted]).norm()), rel=1e-5)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_clipping_equals_torch_clip_grad_norm(optimizer):
    state, plain = make_state(optimizer=optimizer, clipper=FixedClip(max_norm=0.5)), make_state(optimizer=optimizer)
    batch = make_batch()

    record = train_step(state, batch)
    plain.loss(plain.model(batch.mixture), batch.sources).mean().backward()
    norm = nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
    plain.optimizer.step()

    assert record.clipped
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert torch.allclose(state.model.filters.weight, plain.model.filters.weight, rtol=1e-4, atol=1e-6)


def test_a_gradient_ten_thousand_times_too_long_does_not_poison_the_second_moment():
    state = make_state(clipper=FixedClip(max_norm=1.0), loss=squared_error)

    train_step(state, make_batch(scale=100))

    assert max(float(s["exp_avg_sq"].sum()) for s in state.optimizer.state.values()) <= 1.001e-3


def test_gradients_do_not_accumulate_from_step_to_step():
    state = make_state(optimizer="sgd", lr=0.0, clipper=NoClip())

    norms = [train_step(state, make_batch()).grad_norm for _ in range(3)]

    assert norms[0] == norms[1] == norms[2]


@pytest.mark.parametrize("caller_seed", [1, 2])
def test_dropout_does_not_depend_on_the_callers_generator(caller_seed):
    def losses(seed: int) -> list[float | None]:
        state = make_state(optimizer="sgd")
        state.model = nn.Sequential(state.model, nn.Dropout(0.5))
        torch.manual_seed(seed)
        return [train_step(state, make_batch()).loss for _ in range(3)]

    first = losses(0)

    assert first == losses(caller_seed)
    assert len(set(first)) == 3


def test_the_callers_generator_is_not_moved():
    state = make_state()
    torch.manual_seed(3)
    expected = torch.rand(1)

    torch.manual_seed(3)
    train_step(state, make_batch())

    assert torch.equal(torch.rand(1), expected)


def test_twenty_faults_in_a_row_end_the_run_and_nineteen_do_not():
    window = FaultWindow()
    for _ in range(19):
        window.add("fp16_overflow")
    assert window.reason_to_stop() is None
    window.add("fp16_overflow")
    assert "20 steps in a row" in window.reason_to_stop()


def test_more_than_one_percent_of_faults_end_the_run():
    window = FaultWindow()
    for i in range(1000):
        window.add("nonfinite_loss" if i % 100 == 0 else "trained")
    assert window.reason_to_stop() is None
    window.add("trained")
    for _ in range(2):
        window.add("nonfinite_loss")
    assert "of the last 1000 steps" in window.reason_to_stop()


def test_filtered_batches_never_end_a_run():
    window = FaultWindow()
    for _ in range(50):
        window.add("all_filtered")
    assert window.reason_to_stop() is None


def makes_nan(parameter, gradient):
    gradient.view(-1)[0] = torch.nan


def test_a_transform_that_makes_nan_does_not_reach_the_weights():
    state = make_state(transforms=[makes_nan], clipper=AutoClip())
    before = snapshot(state)

    record = train_step(state, make_batch())

    assert (record.outcome, record.n_trained) == ("nonfinite_gradient", 0)
    assert_same(before, snapshot(state))


class Levelled(TwoFilters):
    """Keeps a buffer in the usual way, by putting another tensor in its place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, mixture: Tensor) -> Tensor:
        self.level = 0.9 * self.level + 0.1 * mixture.square().mean() * self.filters.weight.sum()
        return super().forward(mixture) / (1 + self.level.detach())


@pytest.mark.parametrize("rule", ["skip", "rescue"])
def test_a_buffer_replaced_in_forward_is_restored_after_a_bad_step(rule):
    torch.manual_seed(0)
    model = Levelled()
    state = TrainState(model, marks, OPTIMIZERS["adam"](model.parameters(), lr=1e-2), on_bad_example=rule)
    held = model.level
    train_step(state, make_batch())
    before = model.level.clone()

    record = train_step(state, with_nan(make_batch(1), 0))

    assert record.outcome == "nonfinite_loss"
    assert torch.equal(model.level, before)
    assert model.level is held
    assert train_step(state, make_batch()).trained
    assert not torch.equal(model.level, before)


def test_a_custom_clipper_may_return_a_number():
    state = make_state(loss=squared_error, clipper=lambda norm, finite: 0.25)

    assert train_step(state, make_batch()).max_norm == 0.25


def test_nonfinite_weights_do_not_reach_their_moving_average():
    state = make_state()
    state.ema = EMA(state.model, 0.9)
    train_step(state, make_batch())
    before = [weights.clone() for weights in state.ema.weights]
    with torch.no_grad():
        state.model.filters.weight[0, 0, 0] = torch.nan

    assert train_step(state, make_batch()).outcome == "nonfinite_loss"
    assert_same(before, state.ema.weights)


def test_a_step_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch of weight 0"):
        train_step(make_state(), [])
