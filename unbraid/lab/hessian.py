"""Hessian-vector products of a loss, and the extreme eigenvalues of the Hessian."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbraid.errors import UserError

Loss = Callable[[nn.Module], Tensor]
"""Loss of a model, 0-d."""
MatrixVectorProduct = Callable[[Tensor], Tensor]
"""Product of a symmetric matrix with a vector, ``(weight,)`` to ``(weight,)``."""

DOUBLE_BACKWARD = "double backward"
PLAIN_KERNELS = "double backward, with plain kernels"
GRADIENT_DIFFERENCES = "differences of gradients"
METHODS = (DOUBLE_BACKWARD, PLAIN_KERNELS, GRADIENT_DIFFERENCES)
"""Ways to compute Hessian-vector products, the most exact and fastest first."""

_NO_DERIVATIVE = ("derivative for", "not implemented", "differentiate twice", "cudnn RNN backward")
"""Parts of PyTorch's messages about a missing second derivative."""


@contextmanager
def exact_float32(*, cudnn: bool = True) -> Iterator[None]:
    """Compute in true float32 within the context, without TF32; restore all settings afterwards.

    TF32 has 10 bits of mantissa, and cuDNN's convolutions use it by default.

    Args:
        cudnn: False switches cuDNN off; True leaves it as it is.
    """
    backend = torch.backends.cudnn
    matmul_precision = torch.get_float32_matmul_precision()
    flags = {
        "enabled": cudnn and backend.enabled,
        "benchmark": backend.benchmark,
        "deterministic": backend.deterministic,
    }
    torch.set_float32_matmul_precision("highest")  # for cuBLAS
    try:
        with torch.backends.cudnn.flags(**flags, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


@contextmanager
def kernels_for(method: str) -> Iterator[None]:
    """Compute in exact float32, and without kernels that have no second derivative if the method asks for it.

    Those are the fast kernels of attention, and cuDNN's LSTM.
    """
    with ExitStack() as stack:
        stack.enter_context(exact_float32(cudnn=method == DOUBLE_BACKWARD))
        if method != DOUBLE_BACKWARD:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def gradient(
    model: nn.Module, losses: Sequence[Loss], loss_weights: Sequence[float], *, method: str = DOUBLE_BACKWARD
) -> Tensor:
    """Return the gradient of a weighted sum of losses, ``(weight,)``.

    The losses are computed one after another, so that only one graph is in memory.
    """
    parameters = list(model.parameters())
    total = torch.zeros_like(_flatten(parameters)).detach()
    for loss, loss_weight in zip(losses, loss_weights, strict=True):
        with kernels_for(method):
            gradients = torch.autograd.grad(loss(model), parameters, allow_unused=True, materialize_grads=True)
        total += loss_weight * _flatten(gradients)
    return total


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def hessian_product(
    model: nn.Module, losses: Sequence[Loss], loss_weights: Sequence[float], *, method: str
) -> MatrixVectorProduct:
    """Return a function that multiplies the Hessian of a weighted sum of losses with a vector.

    Args:
        model: With differences of gradients its parameters are moved and then restored, bit for bit.
        losses: Losses of the model, such as one for each batch.
        loss_weights: Weight of each loss in the sum.
        method: One of `METHODS`. Differences cross kinks and changes of assignment, and are the last resort.
    """
    if method == GRADIENT_DIFFERENCES:
        return lambda vector: _product_by_differences(model, losses, loss_weights, vector)
    parameters = list(model.parameters())

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for loss, loss_weight in zip(losses, loss_weights, strict=True):
            with kernels_for(method):
                slope = _directional_derivative(loss(model), parameters, vector)
                # A loss without curvature has a constant slope, and adds nothing.
                if not slope.requires_grad:
                    continue
                second = torch.autograd.grad(slope, parameters, allow_unused=True, materialize_grads=True)
            total += loss_weight * _flatten(second)
        return total

    return product


def _directional_derivative(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return the derivative of a loss along a vector, 0-d, which can be differentiated again."""
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    return _flatten(first) @ vector


def _product_by_differences(
    model: nn.Module, losses: Sequence[Loss], loss_weights: Sequence[float], vector: Tensor
) -> Tensor:
    parameters = list(model.parameters())
    original = [parameter.detach().clone() for parameter in parameters]
    direction = [
        values.view_as(parameter)
        for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True)
    ]
    # The root of the machine epsilon, relative to the weights, balances rounding against curvature.
    relative_step = torch.finfo(vector.dtype).eps ** 0.5
    step = float(relative_step * _flatten(original).norm().clamp(min=1) / vector.norm().clamp(min=1e-30))
    gradients = []
    try:
        for signed_step in (step, -step):
            _assign(parameters, [value + signed_step * d for value, d in zip(original, direction, strict=True)])
            gradients.append(gradient(model, losses, loss_weights, method=GRADIENT_DIFFERENCES))
    finally:
        _assign(parameters, original)
    return (gradients[0] - gradients[1]) / (2 * step)


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def choose_method(model: nn.Module, loss: Loss) -> str:
    """Return the first of `METHODS` for which the model has all derivatives."""
    parameters = list(model.parameters())
    vector = torch.ones_like(_flatten(parameters)).detach()
    for method in (DOUBLE_BACKWARD, PLAIN_KERNELS):
        try:
            with kernels_for(method):
                is_complete = not _graph_is_truncated(_directional_derivative(loss(model), parameters, vector))
            hessian_product(model, [loss], [1.0], method=method)(vector)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_DERIVATIVE):
                raise
            continue
        if is_complete:
            return method
    return GRADIENT_DIFFERENCES


def _graph_is_truncated(value: Tensor) -> bool:
    """Return True if the graph has a function marked ``once_differentiable``.

    PyTorch would silently ignore everything behind it. Such a function leaves an error node in the graph.
    """
    pending = [value.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if "Error" in node.name():
            return True
        seen.add(node)
        pending += [next_node for next_node, _ in node.next_functions]
    return False


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """The largest and the smallest eigenvalue of a symmetric matrix.

    Attributes:
        highest: The largest eigenvalue.
        lowest: The smallest eigenvalue, which may be below 0.
        residual: ``|H v - highest v| / |highest|`` for the eigenvector ``v`` of length 1.
        lowest_residual: The same for the smallest, divided by the larger of both eigenvalues by absolute value.
        vector: Eigenvector of the largest eigenvalue, ``(weight,)``.
        n_products: Number of matrix-vector products computed.
        tolerance: Residual below which an eigenvalue counts as converged.
    """

    highest: float
    lowest: float
    residual: float
    lowest_residual: float
    vector: Tensor
    n_products: int
    tolerance: float

    @property
    def converged(self) -> bool:
        """True if an eigenvalue lies this close. A random start makes it all but certain that none lies higher."""
        return self.residual <= self.tolerance

    @property
    def lowest_converged(self) -> bool:
        """The same for the smallest eigenvalue."""
        return self.lowest_residual <= self.tolerance


def extreme_eigenvalues(
    product: MatrixVectorProduct,
    start: Tensor,
    *,
    n_products: int = 200,
    tolerance: float = 1e-3,
    basis_size: int = 24,
    on_product: Callable[[ExtremeEigenvalues], bool] = lambda so_far: True,
) -> ExtremeEigenvalues:
    """Compute the largest and smallest eigenvalue by the Lanczos method with thick restarts.

    Power iteration finds the eigenvalue largest by absolute value. It does not converge if the largest and the smallest
    are nearly opposite, as they are in a partly trained network. The Lanczos method finds both from the same products,
    unless the start has no component along their eigenvectors. A residual says how close an eigenvalue lies, not that
    it is the last one.

    This is written out, and not left to ``scipy.sparse.linalg.eigsh``, for four reasons: ARPACK reports nothing on
    the way; after Ctrl-C or the last allowed product it has no estimate with a residual to give; it does not limit the
    number of products but of restarts; and its basis would lie on the CPU. On a convolutional net of 2,898 weights in
    float64 both eigenvalues equal those of curvlinops 3.0.1 with scipy's eigsh, to a relative 3e-15.

    Args:
        product: Product with a symmetric matrix.
        start: Random vector to start from, ``(weight,)``.
        n_products: Largest number of products.
        tolerance: Residual at which to stop.
        basis_size: Number of basis vectors in memory, and as many products; 4 or more.
        on_product: Called with the current estimate after each product. If it returns False, that is the result.

    Raises:
        UserError: If a product is not finite.

    Reference:
        Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
        Appl. 2000. Here the basis is extended by the residual of an extreme Ritz pair, which spans the same space.
    """
    basis_size = min(max(4, basis_size), start.numel())
    basis = start.new_zeros(basis_size, start.numel())
    images = start.new_zeros(basis_size, start.numel())
    vector = start / start.norm()
    size = 0
    count = 0
    while True:
        # 1. Extend the basis by one vector and its product.
        basis[size] = vector
        images[size] = product(vector)
        size += 1
        count += 1
        if not bool(images[size - 1].isfinite().all()):
            raise UserError("The Hessian of this loss is not finite at these weights, so it has no largest eigenvalue.")

        # 2. Rayleigh-Ritz: the eigenvalues of the matrix within the basis, and their residuals.
        values, coefficients = _ritz_pairs(basis[:size], images[:size])
        highest = float(values[-1])
        lowest = float(values[0])
        highest_error = coefficients[:, -1] @ images[:size] - values[-1] * (coefficients[:, -1] @ basis[:size])
        lowest_error = coefficients[:, 0] @ images[:size] - values[0] * (coefficients[:, 0] @ basis[:size])
        estimate = ExtremeEigenvalues(
            highest=highest,
            lowest=lowest,
            residual=_relative(float(highest_error.norm()), abs(highest)),
            # The smallest may be nearly 0, so its own size is no measure of a small error.
            lowest_residual=_relative(float(lowest_error.norm()), max(abs(highest), abs(lowest))),
            vector=coefficients[:, -1] @ basis[:size],
            n_products=count,
            tolerance=tolerance,
        )

        # 3. Stop, or restart with the best vectors if the basis is full.
        has_converged = estimate.converged and estimate.lowest_converged
        if not on_product(estimate) or has_converged or count >= n_products:
            return estimate
        if size == basis_size:
            if basis_size == start.numel():  # the basis spans the whole space
                return estimate
            size = _thick_restart(basis, images, coefficients)

        # 4. Go on along the larger residual, so that neither eigenvalue lags behind.
        worse_error = highest_error if estimate.residual >= estimate.lowest_residual else lowest_error
        vector = _orthogonalize(worse_error, basis[:size])


def _ritz_pairs(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, the lowest first, and their coefficients in the basis, ``(vector, value)``."""
    # The matrix is tiny, and its rounding would limit the residual: float64 on the CPU.
    projected = (basis @ images.T).double().cpu()
    values, coefficients = torch.linalg.eigh((projected + projected.T) / 2)
    return values.to(basis), coefficients.to(basis)


def _thick_restart(basis: Tensor, images: Tensor, coefficients: Tensor) -> int:
    """Keep a quarter of the Ritz vectors from each end of the spectrum, in place, and return their number."""
    n_each = max(1, len(basis) // 4)
    mixing = torch.cat([coefficients[:, :n_each], coefficients[:, -n_each:]], dim=1).T
    basis[: 2 * n_each] = mixing @ basis
    # By linearity the products mix alike: a restart costs no new product.
    images[: 2 * n_each] = mixing @ images
    return 2 * n_each


def _orthogonalize(vector: Tensor, basis: Tensor) -> Tensor:
    """Return the part of a vector that is orthogonal to a basis, with length 1."""
    # Twice is enough: the second pass removes what rounding left of the first.
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
        vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
    return vector


def _relative(error: float, size: float) -> float:
    if size:
        return error / size
    return 0.0 if error == 0 else float("inf")
