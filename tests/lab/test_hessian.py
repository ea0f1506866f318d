"""The Hessian by its products: against the dense one, in closed form, and where second derivatives are missing."""

import numpy as np
import pytest
import torch
from small_models import TINY, as_it_is
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from unbraid.errors import UserError
from unbraid.lab.hessian import WAYS, best_way, exact_float32, extremes, gradient, hessian_product
from unbraid.lab.landscape import measured
from unbraid.losses.waveform import neg_si_sdr
from unbraid.model_output import sources_of


def symmetric(values, seed=0):
    """A matrix of these eigenvalues, and its vectors as columns."""
    torch.manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return turned @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turned.T, turned


def start(n, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(n)).to(dtype)


@pytest.mark.parametrize("n_kept", [6, 24])
def test_both_ends_of_a_known_spectrum_are_found_with_their_residuals(n_kept):
    values = [*np.linspace(-0.5, 1.0, 97), -9.5, 9.9, 10.0]
    matrix, vectors = symmetric(values)
    found = extremes(lambda v: matrix @ v, start(100), tolerance=1e-9, n_kept=n_kept, n_products=500)

    assert found.converged
    assert found.lowest_converged
    assert found.highest == pytest.approx(10.0, rel=1e-12)
    assert found.lowest == pytest.approx(-9.5, rel=1e-12)
    assert abs(float(found.vector @ vectors[:, -1])) == pytest.approx(1)
    off = (matrix @ found.vector - found.highest * found.vector).norm() / found.highest
    assert found.residual == pytest.approx(float(off), abs=1e-11)


def test_too_few_products_are_told_as_not_converged():
    matrix, _ = symmetric(list(np.linspace(-1, 1, 200)))
    found = extremes(lambda v: matrix @ v, start(200), n_products=5, tolerance=1e-6)

    assert found.n_products == 5
    assert not found.converged
    off = (matrix @ found.vector - found.highest * found.vector).norm() / found.highest
    assert found.residual == pytest.approx(float(off))


def test_a_listener_can_end_it():
    matrix, _ = symmetric(list(np.linspace(-1, 1, 50)))
    heard = []
    found = extremes(lambda v: matrix @ v, start(50), heard=lambda so_far: heard.append(so_far) or len(heard) < 3)

    assert found.n_products == 3 == len(heard)


@pytest.mark.parametrize("values", [[3.0], [-2.0, 5.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
def test_small_matrices_are_solved_whole(values):
    matrix, _ = symmetric(values)
    found = extremes(lambda v: matrix @ v, start(len(values)))

    assert (found.lowest, found.highest) == pytest.approx((min(values), max(values)), abs=1e-12)
    assert found.converged
    assert found.lowest_converged


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not finite"):
        extremes(lambda v: v * torch.nan, start(5))


@pytest.fixture
def net():
    """A net of 37 weights in float64, two losses on different examples, and the dense Hessian of their sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for n in (3, 6)]
    losses = [lambda m, x=x, y=y: (m(x) - y).square().mean() for x, y in data]
    shares = [1 / 3, 2 / 3]
    names, weights = zip(*model.named_parameters(), strict=True)

    def whole(flat):
        parts = torch.split(flat, [w.numel() for w in weights])
        given = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        return sum(
            c * (functional_call(model, given, (x,)) - y).square().mean()
            for c, (x, y) in zip(shares, data, strict=True)
        )

    dense = hessian(whole, torch.cat([w.detach().flatten() for w in weights]))
    return model, losses, shares, dense


def test_products_are_those_of_the_dense_hessian_and_so_are_the_ends(net):
    model, losses, shares, dense = net
    before = [w.clone() for w in model.parameters()]
    vector = start(len(dense))

    for way, tolerance in zip(WAYS, (1e-12, 1e-12, 1e-6), strict=True):
        product = hessian_product(model, losses, shares, way=way)
        torch.testing.assert_close(product(vector), dense @ vector, rtol=tolerance, atol=tolerance)
        found = extremes(product, vector, tolerance=1e-6)
        ends = torch.linalg.eigvalsh(dense)
        assert (found.lowest, found.highest) == pytest.approx((float(ends[0]), float(ends[-1])), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_without_curvature_has_a_hessian_of_zeros():
    model = nn.Linear(3, 1)
    given, way = torch.randn(5, 3), WAYS[0]

    product = hessian_product(model, [lambda m: m(given).mean()], [1.0], way=way)

    assert torch.equal(product(torch.ones(4)), torch.zeros(4))


def test_gradients_are_summed_over_the_losses(net):
    model, losses, shares, _ = net
    whole = torch.autograd.grad(sum(c * f(model) for c, f in zip(shares, losses, strict=True)), model.parameters())

    torch.testing.assert_close(gradient(model, losses, shares), torch.cat([part.flatten() for part in whole]))


@pytest.mark.parametrize("asked", ["highest", "medium"])
def test_float32_is_exact_within_and_all_is_put_back_after(net, asked):
    cudnn, seen = torch.backends.cudnn, []
    model, (loss, _), _, dense = net

    def state():
        return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.enabled, cudnn.deterministic

    def looked(some):
        seen.append(state())
        return loss(some)

    torch.set_float32_matmul_precision(asked)
    try:
        before = state()
        for way in WAYS:
            gradient(model, [looked], [1.0], way=way)
            hessian_product(model, [looked], [1.0], way=way)(start(len(dense)))
        measured(model, looked)({})
        with pytest.raises(ValueError, match="x"), exact_float32():
            raise ValueError("x")
        assert state() == before
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")

    assert before[0]
    assert len(seen) == 8
    assert not any(part for one in seen for part in one[:2])
    assert [one[2] for one in seen] == [True] * 2 + [False] * 5 + [True]


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx, given):
        ctx.save_for_backward(given)
        return given.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_without_second_derivatives_gradients_are_subtracted():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 1.0]]).double()
    given = torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    def loss(some):
        return Once.apply(some(given)).square().sum()  # the fourth power

    assert best_way(model, loss) == WAYS[2]
    found = hessian_product(model, [loss], [1.0], way=WAYS[2])(torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(found, 12 * 3**2 * torch.tensor([1.0, 2.0]).double())


def test_an_error_that_is_none_of_derivatives_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"):
        best_way(nn.Linear(2, 1), lambda model: model(torch.ones(1, 3)).sum())


@pytest.mark.parametrize("name", TINY)
def test_every_model_has_second_derivatives(name):
    model = as_it_is(name).eval()
    torch.manual_seed(0)
    given, target = torch.randn(2, 1, 200), torch.randn(2, 2, 1, 200)

    assert best_way(model, lambda some: neg_si_sdr(sources_of(some(given)), target).mean()) in WAYS[:2]
