"""LOSSES by name: ``(estimate, target)``, both ``(..., time)``, to one value per signal; lower is better.

A loss receives more inputs if it has parameters of these names: ``mixture``, ``(batch, channel, time)``, and, from a
model that returns a `ModelOutput`, its ``embedding`` with the ``n_fft`` and ``hop_length`` of the spectrum. Such a loss
is called with signals ``(batch, source, channel, time)`` and may return one value per example, ``(batch,)``. All other
keyword arguments are options, set in the recipe.
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
from unbraid.losses.waveform import (
    l1,
    neg_sa_sdr,
    neg_si_sdr,
    neg_snr,
    neg_thresholded_snr,
    neg_thresholded_snr_from_moments,
)
from unbraid.metrics import PairMoments, mse_from_moments, si_sdr_from_moments, snr_from_moments

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
"""Losses in dB. Only for these is a threshold in dB meaningful."""

SCALE_INVARIANT: frozenset[SignalLoss] = frozenset({neg_si_sdr})
"""Losses that ignore the gain of the estimate and are undefined for a silent target."""

MOMENT_LOSSES: dict[SignalLoss, Callable[..., Tensor]] = {
    neg_si_sdr: lambda moments: -si_sdr_from_moments(moments),
    neg_snr: lambda moments: -snr_from_moments(moments),
    neg_thresholded_snr: neg_thresholded_snr_from_moments,
    # The error energies of all sources add up inside SA-SDR's one ratio, so the sum of the errors ranks the orders.
    neg_sa_sdr: mse_from_moments,
}
"""Forms of the losses that compare all pairs of signals at once, from `PairMoments` and the options of the loss."""

LOSS_INPUTS = ("estimate", "target", "mixture", "embedding", "n_fft", "hop_length")
"""The inputs that the training step supplies to parameters of these names."""


def unwrap_partial(loss: SignalLoss | None) -> SignalLoss | None:
    """Return the loss function itself, without the options that a recipe has bound to it."""
    return loss.func if isinstance(loss, functools.partial) else loss


def is_scale_invariant(loss: SignalLoss | None) -> bool:
    """Return whether a loss ignores the gain of the estimate, as those in `SCALE_INVARIANT` do.

    A custom loss declares this with the attribute ``is_scale_invariant = True``.
    """
    function = unwrap_partial(loss)
    return function in SCALE_INVARIANT or getattr(function, "is_scale_invariant", False) is True


def is_in_db(loss: SignalLoss) -> bool:
    """Return whether a loss is in dB: one of `IN_DB`, or a custom loss with the attribute ``unit = "dB"``."""
    function = unwrap_partial(loss)
    return function in IN_DB or getattr(function, "unit", None) == "dB"


def loss_from_moments(loss: SignalLoss) -> Callable[[PairMoments], Tensor] | None:
    """Return the form of a loss that takes `PairMoments`, with its options bound; None if it has no such form."""
    function = unwrap_partial(loss)
    moment_loss = None if function is None else MOMENT_LOSSES.get(function)
    if moment_loss is not None and isinstance(loss, functools.partial):
        return functools.partial(moment_loss, **loss.keywords)
    return moment_loss


def loss_inputs(loss: SignalLoss) -> dict[str, bool]:
    """Return the names in `LOSS_INPUTS` that a loss receives, each with whether the loss requires it.

    Estimate and target are the first two parameters, whatever their names. Only a loss with a parameter ``embedding``
    and no ``estimate`` does not receive the estimate.
    """
    bound: dict[str, Any] = loss.keywords if isinstance(loss, functools.partial) else {}
    try:
        # Module.__call__ takes *args; the parameters are those of forward.
        parameters = dict(inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters)
    except (TypeError, ValueError):  # functions written in C have no signature
        parameters = {}
    required = {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in parameters.items()
        if name in LOSS_INPUTS and name not in bound
    }
    if "embedding" in required and "estimate" not in required:
        return required
    extra_inputs = {name: is_required for name, is_required in required.items() if name in LOSS_INPUTS[2:]}
    return {"estimate": True, "target": True} | extra_inputs
