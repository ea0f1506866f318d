"""A step done again: on its clean examples, or in smaller pieces."""

import pytest
import torch
from torch import nn
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

from unbraid.robust.clip import AutoClip, NoClip
from unbraid.robust.filter import ThresholdFilter
from unbraid.robust.precision import Precision
from unbraid.robust.transform import ValueClip
from unbraid.train.ema import EMA
from unbraid.train.state import TrainState
from unbraid.train.step import train_step


class Normed(nn.Module):
    """Has running statistics, and notices each batch size it is given; memory for so many samples."""

    def __init__(self, memory=10**9):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.filters = TwoFilters()
        self.memory, self.seen = memory, []

    def forward(self, mixture):
        self.seen.append(len(mixture))
        if mixture.numel() > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        return self.filters(self.norm(mixture))


def normed_state(**parts):
    torch.manual_seed(0)
    model = Normed()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    parts.setdefault("clipper", AutoClip())
    return TrainState(model, marks, optimizer, **parts)


BAD = {
    "NaN in the audio": lambda batch: with_nan(batch, 1),
    "a loss over the limit": lambda batch: marked(batch, TOO_LARGE, 1),
    "a gradient that is not finite": lambda batch: marked(batch, KINKED, 1),
}


@pytest.mark.parametrize("cut", [None, 2], ids=["one batch", "two micro-batches"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", BAD)
def test_a_rescued_step_is_the_step_without_its_bad_example(bad, precision, cut):
    rescuing, without = (
        normed_state(on_bad_example="rescue", loss_upper_limit=1e6, precision=Precision(precision), ema=None)
        for _ in range(2)
    )
    for state in (rescuing, without):
        train_step(state, make_batch(seed=5))
    batch = BAD[bad](make_batch(4))
    parts = [batch] if cut is None else [batch.select([0, 1]), batch.select([2, 3])]
    kept = [batch.select([0, 2, 3])] if cut is None else [batch.select([0]), batch.select([2, 3])]

    record = train_step(rescuing, parts)
    plain = train_step(without, kept)

    assert (record.outcome, record.n_trained, record.n_bad) == ("trained", 3, 1)
    assert [item.index for item in record.bad_items] == [1]
    assert (record.loss, record.grad_norm) == (plain.loss, plain.grad_norm)
    assert_same(snapshot(without), snapshot(rescuing))


@pytest.mark.parametrize("bad", BAD)
def test_without_a_clean_example_there_is_nothing_to_rescue(bad):
    state = normed_state(on_bad_example="rescue", loss_upper_limit=1e6)
    train_step(state, make_batch(seed=5))
    before = snapshot(state)

    record = train_step(state, BAD[bad](make_batch()).select([1]))

    assert record.outcome in ("nonfinite_loss", "over_limit", "nonfinite_gradient")
    assert_same(before, snapshot(state))


def test_an_overflow_of_fp16_is_not_rescued_but_scaled():
    state = make_state(loss=squared_error, precision=Precision("fp16", scale=2.0**40), on_bad_example="rescue")

    record = train_step(state, make_batch(scale=100))

    assert (record.outcome, record.n_bad, state.precision.scale) == ("fp16_overflow", 0, 2.0**39)


def test_without_a_fault_rescue_changes_nothing():
    states = [make_state(on_bad_example=rule) for rule in ("skip", "rescue")]
    for state in states:
        for seed in range(3):
            train_step(state, make_batch(seed=seed))

    assert_same(snapshot(states[0]), snapshot(states[1]))


def memory_state(memory, **parts):
    torch.manual_seed(0)
    model = Normed(memory).double()
    model.norm = nn.Identity()  # statistics of a batch are another thing in pieces
    return TrainState(model, squared_error, torch.optim.SGD(model.parameters(), lr=0.1), NoClip(), **parts)


def double(batch):
    batch = batch.select(range(len(batch.mixture)))
    return type(batch)(batch.mixture.double(), batch.sources.double(), batch.weight.double(), None, batch.items)


@pytest.mark.parametrize(("examples", "pieces"), [(5, 1), (4, 2), (2, 4), (1, 8)])
def test_after_out_of_memory_the_step_in_smaller_pieces_is_the_same_step(examples, pieces):
    batch = double(make_batch(5))
    batch.weight[:] = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    plenty, short = memory_state(10**9), memory_state(400 * examples)

    wanted, record = train_step(plenty, batch), train_step(short, batch)

    assert (record.outcome, record.n_trained, short.n_pieces) == ("trained", 4, pieces)
    assert max(short.model.seen[-record.n_micro_batches :]) <= examples
    assert record.loss == pytest.approx(wanted.loss, abs=1e-12)
    assert torch.allclose(short.model.filters.filters.weight, plenty.model.filters.filters.weight, atol=1e-12)


def test_the_number_of_pieces_that_fit_is_kept_for_later_steps_and_in_the_checkpoint():
    state, resumed = memory_state(800), memory_state(800)
    train_step(state, double(make_batch(4)))
    n_tried = len(state.model.seen)
    train_step(state, double(make_batch(4)))
    resumed.load_state_dict(state.state_dict())
    train_step(resumed, double(make_batch(4)))

    assert state.model.seen[n_tried:] == resumed.model.seen == [2, 2]


def test_a_single_example_that_does_not_fit_is_skipped_and_named():
    record = train_step(memory_state(10), double(make_batch(2)))

    assert (record.outcome, record.n_trained, len(record.bad_items)) == ("out_of_memory", 0, 2)


def test_transforms_see_the_averaged_and_unscaled_gradient():
    limit = 1e-3
    state = make_state(
        optimizer="sgd", lr=1.0, loss=squared_error, clipper=NoClip(), transforms=[ValueClip(max_value=limit)],
        precision=Precision("fp16", scale=64.0),
    )  # fmt: skip
    plain = make_state(optimizer="sgd", lr=1.0, loss=squared_error, clipper=NoClip())
    before = state.model.filters.weight.detach().clone()
    parts = [make_batch(2).select([0]), make_batch(2).select([1])]

    record, unclipped = train_step(state, parts), train_step(plain, make_batch(2))

    wanted = (before - plain.model.filters.weight.detach()).clamp(-limit, limit)
    assert torch.allclose(before - state.model.filters.weight.detach(), wanted, atol=2e-5)
    assert record.grad_norm == pytest.approx(unclipped.grad_norm, rel=1e-2)
    assert record.clipped_grad_norm < record.grad_norm


def test_filtered_examples_are_distinguished_from_bad_ones_in_a_rescued_step():
    state = normed_state(on_bad_example="rescue", loss_upper_limit=1e6, filters=[ThresholdFilter()])
    batch = marked(with_nan(make_batch(4), 0), EASY, 1)

    record = train_step(state, batch)

    assert (record.n_trained, record.n_filtered, record.n_bad) == (2, 1, 1)


def test_the_moving_average_moves_only_with_steps_that_were_taken():
    state = make_state(ema=None)
    state.ema = EMA(state.model, 0.5)
    expected = state.model.filters.weight.detach().clone()
    for seed, decay in ((1, 2 / 11), (2, 3 / 12), (3, 4 / 13)):
        train_step(state, with_nan(make_batch(), 0))
        train_step(state, make_batch(seed=seed))
        expected = decay * expected + (1 - decay) * state.model.filters.weight.detach()

    assert torch.allclose(state.ema.weights[0], expected, atol=1e-6)


def test_out_of_memory_during_a_rescue_does_not_end_the_run():
    class Counting(Normed):
        """Memory for three examples runs out from the second forward on."""

        def forward(self, mixture):
            self.memory = 10**9 if not self.seen else 2 * 400
            return super().forward(mixture)

    torch.manual_seed(0)
    model = Counting()
    model.norm = nn.Identity()
    state = TrainState(model, marks, torch.optim.SGD(model.parameters(), lr=0.1), NoClip(), on_bad_example="rescue")

    record = train_step(state, with_nan(make_batch(4), 1))

    assert (record.outcome, record.n_trained, record.n_bad, state.n_pieces) == ("trained", 3, 1, 2)


def test_a_rescued_step_with_only_filtered_examples_left_is_no_fault_and_names_its_bad_example():
    state = make_state(loss=marks, on_bad_example="rescue", filters=[ThresholdFilter()])

    record = train_step(state, marked(with_nan(make_batch(3), 2), EASY, 0, 1))

    assert (record.outcome, record.n_filtered, record.n_bad) == ("all_filtered", 2, 1)
    assert [item.index for item in record.bad_items] == [2]
