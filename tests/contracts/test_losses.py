import pytest
import torch
from toys import SIGNAL_LOSSES

from unbraid.losses import IN_DB, LOSSES

every_loss = pytest.mark.parametrize("name", SIGNAL_LOSSES)


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_loss
@pytest.mark.parametrize("shape", [(500,), (3, 500), (2, 3, 1, 500), (1, 1, 2, 1)])
def test_there_is_one_value_per_signal(name, shape):
    assert LOSSES[name](signals(*shape), signals(*shape, seed=1)).shape == shape[:-1]


@every_loss
@pytest.mark.parametrize("shape", [(2, 1, 500), (3, 500), (2, 3, 499)])
def test_shapes_are_never_broadcast(name, shape):
    with pytest.raises(ValueError, match="same shape"):
        LOSSES[name](signals(*shape), signals(2, 3, 500))


@every_loss
def test_the_closer_estimate_has_the_smaller_loss(name):
    target, noise = signals(4, 500), signals(4, 500, seed=1)

    losses = torch.stack([LOSSES[name](target + share * noise, target) for share in (0.0, 0.01, 0.1, 1.0)])

    assert (losses.diff(dim=0) > 0).all()


@every_loss
def test_a_gradient_step_reduces_the_loss(name):
    target = signals(4, 500)
    estimate = (target + signals(4, 500, seed=1)).requires_grad_()
    before = LOSSES[name](estimate, target)
    (gradient,) = torch.autograd.grad(before.sum(), estimate)
    step = 1e-3 * estimate.detach().norm(dim=-1, keepdim=True) / gradient.norm(dim=-1, keepdim=True)

    assert (LOSSES[name](estimate - step * gradient, target) < before).all()


@every_loss
def test_the_value_of_a_signal_does_not_depend_on_the_others(name):
    estimate, target = signals(5, 2, 500), signals(5, 2, 500, seed=1)
    alone = torch.stack([LOSSES[name](one, other) for one, other in zip(estimate, target, strict=True)])
    estimate[2] = torch.nan

    losses = LOSSES[name](estimate, target)

    keep = [0, 1, 3, 4]
    torch.testing.assert_close(losses[keep], alone[keep])
    assert losses[2].isnan().all()


@every_loss
def test_autocast_changes_neither_value_nor_gradient(name):
    estimate, target = signals(4, 500), signals(4, 500, seed=1)
    estimate = (target + 1e-2 * estimate).requires_grad_()

    def value_and_gradient():
        losses = LOSSES[name](estimate, target)
        return losses.detach(), torch.autograd.grad(losses.sum(), estimate)[0]

    plain = value_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = value_and_gradient()

    assert all(map(torch.equal, plain, under_autocast))


@every_loss
@pytest.mark.parametrize(
    "case", ["silent estimate", "silent target", "both silent", "perfect", "constant", "quiet", "loud"]
)
def test_value_and_gradient_are_finite_in_hard_cases(name, case):
    sound, silence = signals(2, 500), torch.zeros(2, 500)
    estimate, target = {
        "silent estimate": (silence, sound),
        "silent target": (sound, silence),
        "both silent": (silence, silence),
        "perfect": (sound, sound),
        "constant": (torch.full((2, 500), 0.5), torch.full((2, 500), 0.5)),
        "quiet": (1e-9 * sound, 1e-9 * signals(2, 500, seed=1)),
        "loud": (1e5 * sound, 1e5 * signals(2, 500, seed=1)),
    }[case]
    estimate = estimate.clone().requires_grad_()

    losses = LOSSES[name](estimate, target)
    losses.sum().backward()

    assert losses.isfinite().all()
    assert estimate.grad.isfinite().all()


@every_loss
def test_float32_agrees_with_float64(name):
    estimate, target = signals(4, 24_000), signals(4, 24_000, seed=1)

    torch.testing.assert_close(
        LOSSES[name](estimate, target).double(), LOSSES[name](estimate.double(), target.double()), atol=1e-3, rtol=1e-5
    )


@pytest.mark.parametrize("name", [n for n in SIGNAL_LOSSES if LOSSES[n] in IN_DB and n != "neg_thresholded_snr"])
def test_a_loss_in_db_falls_by_20_where_the_noise_is_a_tenth(name):
    target, noise = signals(4, 24_000).double(), 0.01 * signals(4, 24_000, seed=1).double()

    change = LOSSES[name](target + 0.1 * noise, target) - LOSSES[name](target + noise, target)

    torch.testing.assert_close(change, torch.full((4,), -20.0).double(), atol=0.05, rtol=0)
