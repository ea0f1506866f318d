import copy
import math

import pytest
import torch
from torch import nn

from unbraid.errors import UserError
from unbraid.robust.clip import AutoClip, FixedClip, NoClip, clip_
from unbraid.robust.guard import guarded_step, supports_found_inf

OPTIMIZERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def parameter_with(*gradient, dtype=torch.float32):
    parameter = nn.Parameter(torch.ones(len(gradient), dtype=dtype))
    parameter.grad = torch.tensor(gradient, dtype=dtype)
    return parameter


def snapshot(optimizer):
    """Copies of the weights and the optimizer state."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict()["state"])


def equal_bits(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_bits, a, b))
    return a == b


@every_optimizer
def test_a_good_step_equals_clip_grad_norm_and_step(name):
    mine = parameter_with(30.0, -40.0)
    theirs = parameter_with(30.0, -40.0)
    optimizers = [OPTIMIZERS[name]([p]) for p in (mine, theirs)]

    result = guarded_step(optimizers[0], FixedClip(max_norm=5.0), loss=torch.tensor(1.0))
    nn.utils.clip_grad_norm_([theirs], 5.0)
    optimizers[1].step()

    assert [x.item() for x in result] == [50.0, 5.0, True]
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(mine, torch.ones(2))


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_nothing_whether_first_or_later(name, bad, where, first):
    parameter = parameter_with(3.0, 4.0)
    clipper = AutoClip()
    optimizer = OPTIMIZERS[name]([parameter])
    if not first:
        guarded_step(optimizer, clipper)
    weights, state = snapshot(optimizer)
    norms = clipper.state_dict()["norms"]
    parameter.grad = torch.tensor([3.0, bad if where == "gradient" else 4.0])

    result = guarded_step(optimizer, clipper, loss=torch.tensor([1.0, bad if where == "loss" else 1.0]))

    assert not result.taken
    assert equal_bits(weights, snapshot(optimizer)[0])
    assert first or equal_bits(state, snapshot(optimizer)[1])
    assert torch.equal(clipper.state_dict()["norms"], norms)


@every_optimizer
def test_a_skipped_first_step_does_not_change_the_next_ones(name):
    with_fault = parameter_with(math.nan, 1.0)
    without = parameter_with(1.0, 2.0)
    optimizers = [OPTIMIZERS[name]([p]) for p in (with_fault, without)]
    guarded_step(optimizers[0], NoClip())
    for gradient in (1.0, -2.0):
        for parameter, optimizer in zip((with_fault, without), optimizers, strict=True):
            parameter.grad = torch.tensor([gradient, 3.0])
            guarded_step(optimizer, NoClip())

    assert torch.equal(with_fault, without)
    assert equal_bits(snapshot(optimizers[0]), snapshot(optimizers[1]))


@every_optimizer
def test_a_scaled_loss_gives_the_same_step(name):
    plain = parameter_with(3.0, 4.0)
    scaled = parameter_with(3.0 * 1024, 4.0 * 1024)

    results = [
        guarded_step(OPTIMIZERS[name]([parameter]), FixedClip(max_norm=1.0), scale=scale)
        for parameter, scale in ((plain, 1.0), (scaled, 1024.0))
    ]

    assert torch.equal(plain, scaled)
    assert results[0].grad_norm.item() == results[1].grad_norm.item() == 5.0


@every_optimizer
def test_the_gradients_are_not_zeroed(name):
    parameter = parameter_with(3.0, math.nan)

    guarded_step(OPTIMIZERS[name]([parameter]), NoClip())

    assert parameter.grad.isnan().tolist() == [False, True]


@every_optimizer
def test_the_norm_is_over_all_groups_and_parameters_without_gradient_stay(name):
    first = parameter_with(3.0)
    second = parameter_with(4.0)
    idle = parameter_with(1.0)
    frozen = parameter_with(1.0)
    idle.grad = None
    frozen.grad = None
    frozen.requires_grad_(False)
    optimizer = OPTIMIZERS[name]([{"params": [first, idle]}, {"params": [second, frozen]}])

    assert guarded_step(optimizer, NoClip()).grad_norm.item() == 5.0
    assert [p.item() == 1.0 for p in (first, second, idle, frozen)] == [False, False, True, True]


def test_without_any_gradient_nothing_moves():
    parameter = parameter_with(1.0)
    parameter.grad = None

    assert guarded_step(torch.optim.SGD([parameter], lr=1.0), AutoClip()).grad_norm.item() == 0
    assert parameter.item() == 1.0


def test_the_clipper_sees_the_unscaled_norm():
    clipper = AutoClip()

    guarded_step(torch.optim.SGD([parameter_with(6.0, 8.0)], lr=1.0), clipper, scale=10.0)

    assert clipper.state_dict()["norms"].tolist() == [1.0]


def test_a_bad_loss_on_another_rank_skips_the_step_here_too(monkeypatch):
    parameter = parameter_with(3.0, 4.0)
    monkeypatch.setattr("unbraid.dist.sum_over_ranks", lambda values: values + 1)

    step = guarded_step(torch.optim.SGD([parameter], lr=1.0), NoClip(), loss=torch.tensor(1.0))

    assert not step.taken
    assert parameter.tolist() == [1.0, 1.0]


def test_lbfgs_is_refused():
    with pytest.raises(UserError, match="LBFGS"):
        guarded_step(torch.optim.LBFGS([parameter_with(1.0)]), NoClip())


class Wrapper(torch.optim.SGD):
    """An optimizer around another, as training frameworks have: its own flags are not those of the optimizer inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.n_steps = 0
        self.param_groups = optimizer.param_groups

    def step(self):
        self.n_steps += 1
        self.optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_in_a_wrapper_is_guarded_and_steps_through_the_wrapper(fused):
    parameter = parameter_with(3.0, math.nan)
    wrapper = Wrapper(torch.optim.SGD([parameter], lr=1.0, fused=fused))

    assert supports_found_inf(wrapper) == fused
    assert not guarded_step(wrapper, NoClip()).taken
    assert parameter.tolist() == [1.0, 1.0]
    parameter.grad = torch.tensor([3.0, 0.0])
    assert guarded_step(wrapper, NoClip()).taken
    assert parameter.tolist() == [-2.0, 1.0]
    assert wrapper.n_steps == (2 if fused else 1)
    assert not hasattr(wrapper.optimizer, "found_inf")


def test_a_custom_clipper_may_return_a_number():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])

    assert clip_([weight], lambda norm, finite: 1.0) == 5.0
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))
    step = guarded_step(torch.optim.SGD([weight], lr=1.0), lambda norm, finite: 0.5)

    assert step.max_norm == 0.5
    assert torch.allclose(weight.detach(), torch.tensor([-0.3, -0.4]))
