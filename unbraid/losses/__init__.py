"""LOSSES, by name: ``(estimate, target)``, both ``(..., time)``, to one value per signal; lower is better.

A loss may ask for more, by the names of its parameters: the ``mixture``, ``(batch, channel, time)``; and of a model
that returns a `ModelOutput` the ``embedding``, and ``n_fft`` and ``hop_length`` of its spectrum. Those that do are
given signals ``(batch, source, channel, time)``, and may return one value per example, ``(batch,)``. Keyword arguments
of other names are keys of the recipe.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from unbraid.losses.spectral import (
    deep_clustering,
    mask_inference,
    multi_resolution_l1,
    multi_resolution_stft,
    whitened_kmeans,
)
from unbraid.losses.waveform import l1, neg_sa_sdr, neg_si_sdr, neg_snr, neg_thresholded_snr, neg_thresholded_snr_of
from unbraid.metrics import Products, distortion_of, si_sdr_of, snr_of

SignalLoss = Callable[..., Tensor]

LOSSES: dict[str, SignalLoss] = {
    "neg_si_sdr": neg_si_sdr,
    "neg_snr": neg_snr,
    "neg_thresholded_snr": neg_thresholded_snr,
    "neg_sa_sdr": neg_sa_sdr,
    "l1": l1,
    "multi_resolution_stft": multi_resolution_stft,
    "multi_resolution_l1": multi_resolution_l1,
    "mask_inference": mask_inference,
    "deep_clustering": deep_clustering,
    "whitened_kmeans": whitened_kmeans,
}

IN_DB: frozenset[SignalLoss] = frozenset({neg_si_sdr, neg_snr, neg_thresholded_snr, neg_sa_sdr})
"""Losses whose values are in dB, so that a threshold in dB means something."""

SCALE_INVARIANT: frozenset[SignalLoss] = frozenset({neg_si_sdr})
"""Losses that do not care for an estimate's gain, and to which a silent target means nothing."""

BY_PRODUCTS: dict[SignalLoss, Callable[..., Tensor]] = {
    neg_si_sdr: lambda products: -si_sdr_of(products),
    neg_snr: lambda products: -snr_of(products),
    neg_thresholded_snr: neg_thresholded_snr_of,
    neg_sa_sdr: distortion_of,
}
"""What to compare pairs of signals by, from `Products` and the loss's own options; their sums decide on the order."""

NAMES = ("estimate", "target", "mixture", "embedding", "n_fft", "hop_length")
"""What the step supplies, if a loss has a parameter of that name."""


def bare(loss: SignalLoss | None) -> SignalLoss | None:
    """The function itself, where a recipe's options were bound to it."""
    return loss.func if isinstance(loss, functools.partial) else loss


def is_scale_invariant(loss: SignalLoss | None) -> bool:
    """Return whether a loss ignores the level, as those in `SCALE_INVARIANT` do.

    A loss of your own says so with the attribute ``is_scale_invariant = True``.
    """
    return bare(loss) in SCALE_INVARIANT or getattr(bare(loss), "is_scale_invariant", False) is True


def is_in_db(loss: SignalLoss) -> bool:
    """Whether a loss is in dB: one of `IN_DB`, or one of your own with ``unit = "dB"`` as an attribute."""
    return bare(loss) in IN_DB or getattr(bare(loss), "unit", None) == "dB"


def by_products(loss: SignalLoss) -> Callable[[Products], Tensor] | None:
    """How pairs are compared without going through them one by one: an entry of `BY_PRODUCTS`, or None."""
    function = bare(loss)
    found = None if function is None else BY_PRODUCTS.get(function)
    return functools.partial(found, **loss.keywords) if found and isinstance(loss, functools.partial) else found


def loss_inputs(loss: SignalLoss) -> dict[str, bool]:
    """Which of `NAMES` a loss is given, and whether it cannot do without.

    Estimate and target are its first two parameters, whatever they are called, unless it asks for an embedding
    instead of the estimate.
    """
    bound: dict[str, Any] = loss.keywords if isinstance(loss, functools.partial) else {}
    try:
        parameters = dict(inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters)
    except (TypeError, ValueError):  # something written in C
        parameters = {}
    found = {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in parameters.items()
        if name in NAMES and name not in bound
    }
    if "embedding" in found and "estimate" not in found:
        return found
    return {"estimate": True, "target": True} | {name: needed for name, needed in found.items() if name in NAMES[2:]}
