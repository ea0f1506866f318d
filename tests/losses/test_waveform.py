import pytest
import torch

from unbraid.losses import is_in_db
from unbraid.losses.waveform import l1, neg_si_sdr, neg_snr
from unbraid.metrics import si_sdr, snr


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("loss", "metric"), [(neg_si_sdr, si_sdr), (neg_snr, snr)])
def test_the_loss_is_the_metric_with_its_sign_turned(loss, metric):
    estimate, target = signals(3, 500), signals(3, 500, seed=1)

    assert torch.equal(loss(estimate, target), -metric(estimate, target))


def test_l1_is_the_mean_distance():
    assert l1(torch.tensor([[1.0, -1.0, 0.0, 2.0]]), torch.zeros(1, 4)).item() == 1.0


def test_the_gradient_of_si_sdr_is_at_right_angles_to_the_estimate():
    """Gain changes nothing, so no gradient can point along the estimate."""
    estimate, target = signals(2, 800).double().requires_grad_(), signals(2, 800, seed=1).double()
    (gradient,) = torch.autograd.grad(neg_si_sdr(estimate + target, target).sum(), estimate)

    along = (gradient * (estimate + target)).sum(-1) / gradient.norm(dim=-1) / (estimate + target).norm(dim=-1)

    torch.testing.assert_close(along, torch.zeros(2).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [neg_si_sdr, neg_snr, l1])
def test_the_gradient_is_the_slope(loss):
    estimate, target = signals(2, 20).double().requires_grad_(), signals(2, 20, seed=1).double()

    assert torch.autograd.gradcheck(lambda e: loss(e, target), estimate)


@pytest.mark.parametrize("loss", [neg_snr, l1])
def test_a_silent_target_pushes_its_output_down(loss):
    estimate = signals(1, 800).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(estimate, torch.zeros(1, 800)).sum(), estimate)

    assert gradient.isfinite().all()
    assert (gradient * estimate).sum() > 0


def test_only_ratios_and_losses_that_say_so_are_in_db():
    def own(estimate, target):
        return estimate

    assert [is_in_db(loss) for loss in (neg_si_sdr, neg_snr, l1, own)] == [True, True, False, False]
    own.unit = "dB"
    assert is_in_db(own)
