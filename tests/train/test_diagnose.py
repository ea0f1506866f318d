"""The example and the layer to blame."""

import math

import pytest
import torch
from torch import nn
from toys import KINKED, TOO_LARGE, TwoFilters, make_batch, marked, marks, squared_error, with_nan

from unbraid.robust.precision import Precision
from unbraid.train.diagnose import bad_by_gradient, bad_by_loss, diagnose


class Layered(nn.Module):
    """Three named layers, and one between them that can be made to break."""

    def __init__(self, middle=None):
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3, padding=1)
        self.middle = middle or nn.Identity()
        self.last = nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, mixture):
        return self.last(self.middle(self.first(mixture)))[:, :, None]


class Logarithm(nn.Module):
    def forward(self, x):
        return (x - 1e6).log()


class Root(nn.Module):
    """0, with the gradient 0 * inf where what comes in is loud."""

    def forward(self, x):
        return (x * (x.abs().amax() < 30)).abs().sqrt()


class Large(nn.Module):
    def forward(self, x):
        return x * 1e5


def look(model, batch, *, loss=squared_error, precision="fp32", scale=1.0, **parts):
    return diagnose(model, loss, Precision(precision, scale=scale), batch, seed=0, step=1, **parts)


def make_model(middle=None):
    torch.manual_seed(0)
    return Layered(middle)


def test_without_a_fault_nothing_is_found_and_the_model_is_unchanged():
    model = Layered(nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert look(model, make_batch()).kind == "none"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_in_the_audio_is_found_with_its_position_and_files():
    verdict = look(make_model(), with_nan(make_batch(3), 2))

    assert (verdict.kind, verdict.index, verdict.position) == ("mixture", 2, (0, 0, 7))
    assert "a2.wav + b2.wav" in verdict.sentence()


def test_nan_in_a_source_alone_is_found():
    batch = make_batch(3)
    batch.sources[1, 1, 0, 5] = math.inf

    verdict = look(make_model(), batch)

    assert (verdict.kind, verdict.index, verdict.position, verdict.value) == ("sources", 1, (0, 1, 0, 5), math.inf)


def test_a_weight_that_is_not_finite_is_named_before_any_example():
    model = make_model()
    with torch.no_grad():
        model.last.weight[1, 2, 0] = math.nan

    verdict = look(model, make_batch())

    assert (verdict.kind, verdict.index, verdict.layer, verdict.position) == ("weights", None, "last.weight", (1, 2, 0))


def test_the_first_layer_whose_output_is_not_finite_is_named():
    verdict = look(make_model(Logarithm()), make_batch())

    assert (verdict.kind, verdict.index, verdict.layer) == ("forward", 0, "middle")


def test_the_layer_in_whose_backward_the_gradient_breaks_is_named_and_the_example():
    batch = make_batch(3)
    batch.mixture[1] *= 1e4

    verdict = look(make_model(Root()), batch)

    assert (verdict.kind, verdict.index) == ("backward", 1)
    assert verdict.layer.startswith("middle")


def test_a_loss_whose_gradient_breaks_is_named():
    verdict = look(TwoFilters(), marked(make_batch(), KINKED, 1), loss=marks)

    assert (verdict.kind, verdict.index) == ("backward", 1)
    assert verdict.layer.startswith("the loss")


@pytest.mark.parametrize(("limit", "kind"), [(1e3, "over_limit"), (1e8, "none")])
def test_a_loss_over_the_limit_is_named(limit, kind):
    assert look(TwoFilters(), marked(make_batch(), TOO_LARGE, 1), loss=marks, loss_upper_limit=limit).kind == kind


def test_an_overflow_of_fp16_is_found_in_fp16_and_in_no_other_precision():
    model = make_model(Large())

    kinds = {name: look(model, make_batch(), precision=name).kind for name in ("fp32", "bf16", "fp16")}

    assert kinds == {"fp32": "none", "bf16": "none", "fp16": "forward"}


def test_an_overflow_of_scaled_gradients_is_found_only_at_that_scale():
    model = make_model()

    assert look(model, make_batch(scale=10), precision="fp16", scale=2.0**30).kind == "backward"
    assert look(model, make_batch(scale=10), precision="fp16", scale=16.0).kind == "none"


def test_blocks_of_a_compiled_model_are_recorded():
    model = make_model(Logarithm())
    model.compile(backend="eager")

    assert look(model, make_batch()).layer == "middle"


def test_bad_examples_are_found_by_their_own_gradient_or_loss():
    batch = marked(make_batch(4), KINKED, 1, 3)
    where = {"seed": 0, "step": 1, "rank": 0}

    assert bad_by_gradient(TwoFilters(), marks, Precision(), batch, **where) == [1, 3]
    assert bad_by_loss(TwoFilters(), marks, Precision(), with_nan(batch, 2), limit=1e6, **where) == [2]
