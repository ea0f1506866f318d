import math

import pytest
import torch

from unbraid.robust import TRANSFORMS

every_transform = pytest.mark.parametrize("name", sorted(TRANSFORMS))
every_shape = pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (3, 2, 5), (2, 3, 2, 2)])


def random_pair(shape, *, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype), 100 * torch.randn(shape, generator=rng).to(dtype)


@every_transform
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_changed_in_place_and_the_parameter_is_not(name, shape, dtype):
    parameter, gradient = random_pair(shape, dtype=dtype)
    before, address = parameter.clone(), gradient.data_ptr()

    assert TRANSFORMS[name]()(parameter, gradient) is None

    assert torch.equal(parameter, before)
    assert (gradient.data_ptr(), gradient.dtype, gradient.shape) == (address, dtype, torch.Size(shape))


@every_transform
@every_shape
def test_no_element_grows_or_changes_sign(name, shape):
    parameter, gradient = random_pair(shape)
    before = gradient.clone()

    TRANSFORMS[name]()(parameter, gradient)

    assert (gradient.abs() <= before.abs()).all()
    assert (gradient * before >= 0).all()


@every_transform
@every_shape
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_stays_nonfinite(name, shape, bad):
    parameter, gradient = random_pair(shape)
    gradient.view(-1)[-1] = bad

    TRANSFORMS[name]()(parameter, gradient)

    assert not gradient.norm().isfinite()


@every_transform
def test_zeros_stay_zeros(name):
    gradient = torch.zeros(3, 4)

    TRANSFORMS[name]()(torch.zeros(3, 4), gradient)

    assert torch.equal(gradient, torch.zeros(3, 4))


@every_transform
def test_a_trainable_parameter_is_allowed(name):
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    parameter.square().sum().backward()

    TRANSFORMS[name]()(parameter, parameter.grad)

    assert parameter.is_leaf
    assert not parameter.grad.requires_grad
