"""MixIT (mixture invariant training): find the outputs whose sum gives each of the reference mixtures."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from unbraid.errors import UserError
from unbraid.losses import loss_from_moments, unwrap_partial
from unbraid.losses.pairwise import Extras, Term, call_loss, mixture_power, uses_estimate
from unbraid.losses.waveform import neg_sa_sdr
from unbraid.metrics import PairMoments, mean_square, pair_moments, ratio_db

MAX_MIXING_MATRICES = 2**16
"""The limit for losses that follow from `PairMoments`: these are computed for all mixing matrices at once."""

MAX_MIXING_MATRICES_ONE_BY_ONE = 2**8
"""The limit for all other losses: these are computed from whole signals, once for each mixing matrix."""


def best_mixing_matrix(terms: Sequence[Term], estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """Return the mixing matrix with the smallest loss for each example, by exhaustive search.

    Args:
        terms: The losses and their weights.
        estimate: Outputs of the model, ``(batch, output, channel, time)``.
        target: Reference mixtures, ``(batch, target, channel, time)``.
        extras: Further inputs of the losses.

    Returns:
        Boolean, ``(batch, target, output)``; each output belongs to exactly one target.

    Raises:
        UserError: If there are too many mixing matrices to try.
    """
    n_outputs = estimate.shape[1]
    n_targets = target.shape[1]
    all_from_moments = all(loss_from_moments(loss) is not None for loss, _ in terms if uses_estimate(loss))
    limit = MAX_MIXING_MATRICES if all_from_moments else MAX_MIXING_MATRICES_ONE_BY_ONE
    if n_targets**n_outputs > limit:
        raise UserError(
            f"assign = 'mixit' would have to try {n_targets}^{n_outputs} assignments of {n_outputs} outputs to "
            f"{n_targets} mixtures; the limit is {limit}"
            + (f" for this loss and {MAX_MIXING_MATRICES} for neg_snr" if not all_from_moments else "")
            + ". Reduce the number of outputs (model.n_sources)."
        )
    matrices = all_mixing_matrices(n_outputs, n_targets, estimate.device)

    # The search needs no gradient: the caller computes the loss once more, for the chosen sums alone.
    with torch.no_grad():
        total = estimate.new_zeros(len(estimate), len(matrices))
        for loss, weight in terms:
            from_moments = loss_from_moments(loss)
            if from_moments is not None:
                moments = _moments_of_sums(estimate.transpose(1, 2), target.transpose(1, 2), matrices)
                values = from_moments(moments._replace(mixture_power=mixture_power(extras))).mean((1, 3))
                if unwrap_partial(loss) is neg_sa_sdr:  # its moment form is the error alone, not yet a ratio in dB
                    values = -ratio_db(mean_square(target).mean((1, 2))[:, None], values, floor=1e-13)
                total = total + weight * values
            elif uses_estimate(loss):
                by_matrix = []
                for matrix in matrices.to(estimate.dtype):
                    sums = torch.einsum("no,boct->bnct", matrix, estimate)
                    values = call_loss(loss, sums, target, extras)
                    by_matrix.append(values.mean((1, 2)) if values.dim() == 3 else values)
                total = total + weight * torch.stack(by_matrix, 1)
        # A NaN would otherwise win the argmin.
        return matrices[total.nan_to_num(torch.inf).argmin(1)]


@lru_cache(maxsize=16)
def all_mixing_matrices(n_outputs: int, n_targets: int, device: torch.device) -> Tensor:
    """Return every assignment of outputs to targets, boolean, ``(matrix, target, output)``."""
    target_of_output = torch.tensor(list(product(range(n_targets), repeat=n_outputs)), device=device)
    return torch.stack([target_of_output == n for n in range(n_targets)], 1)


def _moments_of_sums(estimate: Tensor, target: Tensor, matrices: Tensor) -> PairMoments:
    """Return the moments of each target with the sum of its outputs, ``(batch, channel, matrix, target)``.

    Moments of sums are sums of moments, so no summed waveform is computed. In the einsums ``w`` is the matrix, ``n``
    the target, and ``o`` and ``p`` are outputs.
    """
    weights = matrices.to(estimate.dtype)
    with_targets = pair_moments(estimate, target)
    among_outputs = pair_moments(estimate, estimate)
    return PairMoments(
        torch.einsum("wno,bcon->bcwn", weights, with_targets.dot),
        # Products of different outputs can be negative, so that rounding could leave a power below zero.
        torch.einsum("wno,bcop,wnp->bcwn", weights, among_outputs.dot, weights).clamp_min(0),
        with_targets.target_power.expand(-1, -1, len(matrices), -1),
        torch.einsum("wno,bco->bcwn", weights, among_outputs.estimate_mean[..., 0]),
        with_targets.target_mean.expand(-1, -1, len(matrices), -1),
    )
