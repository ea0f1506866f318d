import math

import pytest
import torch

from unbraid.errors import RecipeError
from unbraid.robust.transform import AdaptiveClip, ValueClip


def test_values_are_clamped_on_both_sides():
    gradient = torch.tensor([-3.0, -0.5, 0.0, 0.2, 7.0])

    ValueClip(max_value=0.5)(torch.zeros(5), gradient)

    assert torch.equal(gradient, torch.tensor([-0.5, -0.5, 0.0, 0.2, 0.5]))


def test_value_clipping_equals_torchs():
    mine, theirs = (torch.nn.Parameter(torch.zeros(40)) for _ in range(2))
    mine.grad = torch.linspace(-3, 3, 40)
    theirs.grad = mine.grad.clone()

    ValueClip(max_value=1.5)(mine, mine.grad)
    torch.nn.utils.clip_grad_value_([theirs], 1.5)

    assert torch.equal(mine.grad, theirs.grad)


def test_an_infinite_value_stays_infinite_and_its_neighbours_are_clamped():
    gradient = torch.tensor([math.inf, -9.0, math.nan])

    ValueClip()(torch.zeros(3), gradient)

    assert gradient[:2].tolist() == [math.inf, -1.0]
    assert gradient[2].isnan()


def test_each_unit_is_clipped_by_its_own_weights():
    weights = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])  # lengths 5, 50 and 0
    gradient = torch.tensor([[0.0, 1.0], [0.0, 0.1], [1.0, 0.0]])

    AdaptiveClip(ratio=0.01, eps=1e-3)(weights, gradient)

    assert torch.allclose(gradient, torch.tensor([[0.0, 0.05], [0.0, 0.1], [1e-5, 0.0]]))


def test_a_convolutions_filter_is_one_unit():
    weights = torch.ones(2, 3, 4)
    gradient = torch.ones(2, 3, 4)
    gradient[1] = 1e-6

    AdaptiveClip(ratio=0.5)(weights, gradient)

    assert torch.allclose(gradient[0], torch.full((3, 4), 0.5))
    assert torch.equal(gradient[1], torch.full((3, 4), 1e-6))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_bias_is_one_unit_as_a_whole(shape):
    bias = torch.full(shape, 2.0)
    gradient = torch.full(shape, 3.0)

    AdaptiveClip(ratio=0.1)(bias, gradient)

    assert torch.allclose(gradient, torch.full(shape, 0.2))


def test_weights_and_gradients_in_bfloat16_are_measured_in_float32():
    weights = torch.full((1, 100_000), 0.01, dtype=torch.bfloat16)
    gradient = torch.full_like(weights, 1.0)

    AdaptiveClip(ratio=0.5)(weights, gradient)

    assert gradient.float().mean().item() == pytest.approx(0.005, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ValueClip, {"max_value": 0}),
        (ValueClip, {"max_value": math.inf}),
        (AdaptiveClip, {"ratio": -0.1}),
        (AdaptiveClip, {"ratio": math.nan}),
        (AdaptiveClip, {"eps": 0}),
    ],
)
def test_an_invalid_option_is_refused_with_the_allowed_range(kind, options):
    with pytest.raises(RecipeError, match=r"\[\[transform\]\] \w+ = .* must be"):
        kind(**options)
