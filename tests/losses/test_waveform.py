import pytest
import torch

from unbraid.losses import is_in_db
from unbraid.losses.waveform import l1, neg_sa_sdr, neg_si_sdr, neg_snr, neg_thresholded_snr
from unbraid.metrics import si_sdr, snr


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("loss", "metric"), [(neg_si_sdr, si_sdr), (neg_snr, snr)])
def test_the_loss_is_the_negative_metric(loss, metric):
    estimate, target = signals(3, 500), signals(3, 500, seed=1)

    assert torch.equal(loss(estimate, target), -metric(estimate, target))


def test_l1_is_the_mean_distance():
    assert l1(torch.tensor([[1.0, -1.0, 0.0, 2.0]]), torch.zeros(1, 4)).item() == 1.0


def test_the_gradient_of_si_sdr_is_orthogonal_to_the_estimate():
    """Gain changes nothing, so no gradient can point along the estimate."""
    estimate, target = signals(2, 800).double().requires_grad_(), signals(2, 800, seed=1).double()
    (gradient,) = torch.autograd.grad(neg_si_sdr(estimate + target, target).sum(), estimate)

    along = (gradient * (estimate + target)).sum(-1) / gradient.norm(dim=-1) / (estimate + target).norm(dim=-1)

    torch.testing.assert_close(along, torch.zeros(2).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [neg_si_sdr, neg_snr, l1])
def test_the_gradient_matches_finite_differences(loss):
    estimate, target = signals(2, 20).double().requires_grad_(), signals(2, 20, seed=1).double()

    assert torch.autograd.gradcheck(lambda e: loss(e, target), estimate)


@pytest.mark.parametrize("loss", [neg_snr, l1])
def test_a_silent_target_pushes_its_output_down(loss):
    estimate = signals(1, 800).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(estimate, torch.zeros(1, 800)).sum(), estimate)

    assert gradient.isfinite().all()
    assert (gradient * estimate).sum() > 0


def test_only_ratios_and_losses_with_the_unit_db_are_in_db():
    def own(estimate, target):
        return estimate

    assert [is_in_db(loss) for loss in (neg_si_sdr, neg_snr, l1, own)] == [True, True, False, False]
    own.unit = "dB"
    assert is_in_db(own)


def test_thresholded_snr_saturates():
    target, noise = 0.1 * torch.randn(3, 8000), torch.randn(3, 8000)
    noise *= target.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    at = lambda snr_db: -neg_thresholded_snr(target + 10 ** (-snr_db / 20) * noise, target, max_db=30.0)  # noqa: E731

    for snr_db, expected in ((0, -0.0043), (20, 19.586), (30, 26.99), (60, 29.996)):
        torch.testing.assert_close(at(snr_db), torch.full((3,), expected), atol=2e-3, rtol=0)


def test_with_the_mixture_a_silent_target_counts_in_the_same_units():
    mixture, silence = 0.1 * torch.randn(2, 1, 8000), torch.zeros(2, 2, 1, 8000)
    loud = mixture[:, None].expand(2, 2, 1, 8000)

    torch.testing.assert_close(
        neg_thresholded_snr(loud, silence, mixture), torch.full((2, 2, 1), 0.0043), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(neg_thresholded_snr(silence, silence, mixture), torch.full((2, 2, 1), -30.0))


@pytest.mark.parametrize("max_db", [0.0, -3.0, 200.0])
def test_max_db_out_of_range_raises_an_error(max_db):
    with pytest.raises(ValueError, match="max_db"):
        neg_thresholded_snr(torch.ones(5), torch.ones(5), max_db=max_db)


def test_sa_sdr_is_the_ratio_of_the_total_energies():
    target, error = torch.randn(4, 3, 1, 500), 0.1 * torch.randn(4, 3, 1, 500)
    expected = -10 * torch.log10(target.square().sum((1, 2, 3)) / error.square().sum((1, 2, 3)))

    torch.testing.assert_close(neg_sa_sdr(target + error, target), expected)
