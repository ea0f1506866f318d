"""Hessian-vector products and extreme eigenvalues, compared with dense matrices and closed forms."""

import numpy as np
import pytest
import torch
from small_models import TINY, make_model
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from unbraid.errors import UserError
from unbraid.lab.hessian import (
    DOUBLE_BACKWARD,
    GRADIENT_DIFFERENCES,
    METHODS,
    choose_method,
    exact_float32,
    extreme_eigenvalues,
    gradient,
    hessian_product,
)
from unbraid.lab.landscape import loss_of_weights
from unbraid.losses.waveform import neg_si_sdr
from unbraid.model_output import get_sources


def symmetric(values, seed=0):
    """Return a matrix with these eigenvalues, and its eigenvectors as columns."""
    torch.manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T, rotation


def random_vector(n, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(n)).to(dtype)


@pytest.mark.parametrize("basis_size", [6, 24])
def test_extreme_eigenvalues_and_residuals_of_a_known_spectrum(basis_size):
    values = [*np.linspace(-0.5, 1.0, 97), -9.5, 9.9, 10.0]
    matrix, vectors = symmetric(values)
    result = extreme_eigenvalues(
        lambda v: matrix @ v, random_vector(100), tolerance=1e-9, basis_size=basis_size, n_products=500
    )

    assert result.converged
    assert result.lowest_converged
    assert result.highest == pytest.approx(10.0, rel=1e-12)
    assert result.lowest == pytest.approx(-9.5, rel=1e-12)
    assert abs(float(result.vector @ vectors[:, -1])) == pytest.approx(1)
    residual = (matrix @ result.vector - result.highest * result.vector).norm() / result.highest
    assert result.residual == pytest.approx(float(residual), abs=1e-11)


def test_too_few_products_have_not_converged():
    matrix, _ = symmetric(list(np.linspace(-1, 1, 200)))
    result = extreme_eigenvalues(lambda v: matrix @ v, random_vector(200), n_products=5, tolerance=1e-6)

    assert result.n_products == 5
    assert not result.converged
    residual = (matrix @ result.vector - result.highest * result.vector).norm() / result.highest
    assert result.residual == pytest.approx(float(residual))


def test_callback_returning_false_stops():
    matrix, _ = symmetric(list(np.linspace(-1, 1, 50)))
    estimates = []
    result = extreme_eigenvalues(
        lambda v: matrix @ v,
        random_vector(50),
        on_product=lambda so_far: estimates.append(so_far) or len(estimates) < 3,
    )

    assert result.n_products == 3 == len(estimates)


@pytest.mark.parametrize("values", [[3.0], [-2.0, 5.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
def test_small_matrices_are_solved_exactly(values):
    matrix, _ = symmetric(values)
    result = extreme_eigenvalues(lambda v: matrix @ v, random_vector(len(values)))

    assert (result.lowest, result.highest) == pytest.approx((min(values), max(values)), abs=1e-12)
    assert result.converged
    assert result.lowest_converged


def test_nonfinite_hessian_is_refused():
    with pytest.raises(UserError, match="not finite"):
        extreme_eigenvalues(lambda v: v * torch.nan, random_vector(5))


@pytest.fixture
def net():
    """Return a net of 37 weights in float64, two losses on different examples, and the dense Hessian of their sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for n in (3, 6)]
    losses = [lambda m, x=x, y=y: (m(x) - y).square().mean() for x, y in data]
    loss_weights = [1 / 3, 2 / 3]
    names, weights = zip(*model.named_parameters(), strict=True)

    def total_loss(flat):
        parts = torch.split(flat, [w.numel() for w in weights])
        named = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        return sum(
            c * (functional_call(model, named, (x,)) - y).square().mean()
            for c, (x, y) in zip(loss_weights, data, strict=True)
        )

    dense = hessian(total_loss, torch.cat([w.detach().flatten() for w in weights]))
    return model, losses, loss_weights, dense


def test_products_and_eigenvalues_equal_those_of_the_dense_hessian(net):
    model, losses, loss_weights, dense = net
    before = [w.clone() for w in model.parameters()]
    vector = random_vector(len(dense))

    for method, tolerance in zip(METHODS, (1e-12, 1e-12, 1e-6), strict=True):
        product = hessian_product(model, losses, loss_weights, method=method)
        torch.testing.assert_close(product(vector), dense @ vector, rtol=tolerance, atol=tolerance)
        result = extreme_eigenvalues(product, vector, tolerance=1e-6)
        exact = torch.linalg.eigvalsh(dense)
        assert (result.lowest, result.highest) == pytest.approx((float(exact[0]), float(exact[-1])), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_linear_loss_has_a_zero_hessian():
    model = nn.Linear(3, 1)
    inputs = torch.randn(5, 3)

    product = hessian_product(model, [lambda m: m(inputs).mean()], [1.0], method=DOUBLE_BACKWARD)

    assert torch.equal(product(torch.ones(4)), torch.zeros(4))


def test_gradient_is_the_weighted_sum_over_losses(net):
    model, losses, loss_weights, _ = net
    total = sum(c * f(model) for c, f in zip(loss_weights, losses, strict=True))
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(total, model.parameters())])

    torch.testing.assert_close(gradient(model, losses, loss_weights), expected)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_float32_is_exact_inside_and_settings_are_restored_after(net, precision):
    cudnn = torch.backends.cudnn
    seen = []
    model, (loss, _), _, dense = net

    def settings():
        return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.enabled, cudnn.deterministic

    def recording_loss(model):
        seen.append(settings())
        return loss(model)

    torch.set_float32_matmul_precision(precision)
    try:
        before = settings()
        for method in METHODS:
            gradient(model, [recording_loss], [1.0], method=method)
            hessian_product(model, [recording_loss], [1.0], method=method)(random_vector(len(dense)))
        loss_of_weights(model, recording_loss)({})
        with pytest.raises(ValueError, match="x"), exact_float32():
            raise ValueError("x")
        assert settings() == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")

    assert before[0]
    assert len(seen) == 8
    assert not any(allow_tf32 for cudnn_tf32, matmul_tf32, *_ in seen for allow_tf32 in (cudnn_tf32, matmul_tf32))
    assert [enabled for _, _, enabled, _ in seen] == [True] * 2 + [False] * 5 + [True]


class SquareOnce(torch.autograd.Function):
    """A square that can be differentiated only once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_gradient_differences_replace_missing_second_derivatives():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 1.0]]).double()
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    def loss(model):
        return SquareOnce.apply(model(x)).square().sum()  # the fourth power

    assert choose_method(model, loss) == GRADIENT_DIFFERENCES
    product = hessian_product(model, [loss], [1.0], method=GRADIENT_DIFFERENCES)(torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(product, 12 * 3**2 * torch.tensor([1.0, 2.0]).double())


def test_unrelated_errors_are_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        choose_method(nn.Linear(2, 1), lambda model: model(torch.ones(1, 3)).sum())


@pytest.mark.parametrize("name", TINY)
def test_every_model_has_second_derivatives(name):
    model = make_model(name).eval()
    torch.manual_seed(0)
    mixture = torch.randn(2, 1, 200)
    target = torch.randn(2, 2, 1, 200)

    assert choose_method(model, lambda model: neg_si_sdr(get_sources(model(mixture)), target).mean()) in METHODS[:2]
