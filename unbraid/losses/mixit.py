"""MixIT: which outputs, added up, make up each of the mixtures."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from unbraid.errors import UserError
from unbraid.losses import SignalLoss, bare, by_products
from unbraid.losses.pairwise import Extras, Term, compares, mixture_power, value_of
from unbraid.losses.waveform import neg_sa_sdr
from unbraid.metrics import Products, mean_square, pair_products, ratio_db

MAX_MIXIT_WAYS = 2**16
"""For losses of energies alone, which are found for all ways at once."""

MAX_TRIED_WAYS = 2**8
"""For others, which are taken of all signals anew for each way."""


def mixit_ways(terms: Sequence[Term], estimate: Tensor, target: Tensor, extras: Extras) -> Tensor:
    """Which outputs make up each target: exact, over every way to deal the outputs out.

    Losses of energies alone are found from the products of all signals; others are tried one way after the other.

    Returns:
        Boolean, ``(batch, target, output)``; each output belongs to one target.

    Raises:
        UserError: If there are more ways than can be tried.
    """
    n_outputs, n_targets = estimate.shape[1], target.shape[1]
    at_once = all(by_products(loss) is not None for loss, _ in terms if compares(loss))
    most = MAX_MIXIT_WAYS if at_once else MAX_TRIED_WAYS
    if n_targets**n_outputs > most:
        raise UserError(
            f"assign = 'mixit' would have to try {n_targets}^{n_outputs} ways to deal {n_outputs} outputs out to "
            f"{n_targets} mixtures; take fewer outputs (model.n_sources), {most} ways are the most"
            + (f", or neg_snr, with which {MAX_MIXIT_WAYS} are." if not at_once else ".")
        )
    ways = _all_ways(n_outputs, n_targets, estimate.device)
    with torch.no_grad():
        total = estimate.new_zeros(len(estimate), len(ways))
        for loss, weight in terms:
            by = by_products(loss)
            if by is not None:
                sums = _sum_products(estimate.transpose(1, 2), target.transpose(1, 2), ways)
                found = by(sums._replace(mixture_power=mixture_power(extras))).mean((1, 3))
                if bare(loss) is neg_sa_sdr:
                    found = -ratio_db(mean_square(target).mean((1, 2))[:, None], found, floor=1e-13)
                total = total + weight * found
            elif compares(loss):
                total = total + weight * torch.stack(
                    [_of_sums(loss, estimate, target, way, extras) for way in ways.to(estimate.dtype)], 1
                )
        return ways[total.nan_to_num(torch.inf).argmin(1)]


@lru_cache(maxsize=16)
def _all_ways(n_outputs: int, n_targets: int, device: torch.device) -> Tensor:
    """Boolean, ``(way, target, output)``."""
    dealt = torch.tensor(list(product(range(n_targets), repeat=n_outputs)), device=device)
    return torch.stack([dealt == n for n in range(n_targets)], 1)


def _of_sums(loss: SignalLoss, estimate: Tensor, target: Tensor, way: Tensor, extras: Extras) -> Tensor:
    values = value_of(loss, torch.einsum("no,boct->bnct", way, estimate), target, extras)
    return values.mean((1, 2)) if values.dim() == 3 else values


def _sum_products(estimate: Tensor, target: Tensor, ways: Tensor) -> Products:
    """Products of each target with the sum of the outputs dealt to it, ``(batch, channel, way, target)``."""
    dealt = ways.to(estimate.dtype)
    with_targets = pair_products(estimate, target)
    among = pair_products(estimate, estimate)
    return Products(
        torch.einsum("wno,bcon->bcwn", dealt, with_targets.dot),
        torch.einsum("wno,bcop,wnp->bcwn", dealt, among.dot, dealt).clamp_min(0),
        with_targets.target_power.expand(-1, -1, len(ways), -1),
        torch.einsum("wno,bco->bcwn", dealt, among.estimate_mean[..., 0]),
        with_targets.target_mean.expand(-1, -1, len(ways), -1),
    )
