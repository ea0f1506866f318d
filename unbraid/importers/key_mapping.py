"""How a peer's model is said in our words, and what reading one from its settings and weights takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unbraid.errors import CheckpointError
from unbraid.importers.safe_reading import UNREAD, Settings, Tensors

Names = dict[str, list[str]]

LSTM = [f"{kind}_{gate}_l0{way}" for kind in ("weight", "bias") for gate in ("ih", "hh") for way in ("", "_reverse")]
"""Weights of torch's LSTM of one layer and two directions."""


@dataclass(frozen=True)
class Foreign:
    """A peer's model in our words.

    Attributes:
        origin: What it is, for messages.
        model: The table ``[model]`` that makes ours; what could not be found out is left out of it.
        weights: By the peer's names.
        names: For each weight of ours the peer's, or several that are joined along their first axis; where the peer
            has none, ours is zero.
        tables: What the peer may keep beside its weights and ours computes, by the peer's names.
        needed: Keys of ``model`` that no weight's shape tells.
        data: Of the table ``[data]`` what is known.
        turned: How names of ours end that have the axes of the peers' weights in another order.
        loss: The table ``[loss]``, as far as it tells what the outputs' level and order mean.
    """

    origin: str
    model: Settings
    weights: Tensors
    names: Names
    tables: Tensors = field(default_factory=dict)
    needed: Sequence[str] = ()
    data: Settings = field(default_factory=dict)
    turned: tuple[str, ...] = ("decoder.filters.weight", ".taps")
    loss: Settings = field(default_factory=lambda: {"name": "neg_si_sdr"})


def check_same(origin: str, said: Settings, **allowed: tuple[Any, ...]) -> None:
    """Refuse what ours cannot be; the peer's own defaults, where they are others, are among what is said."""
    for key, values in allowed.items():
        if key in said and said[key] not in values:
            given = "something that is not written plainly" if said[key] is UNREAD else repr(said[key])
            raise CheckpointError(
                f"{origin} has {key} = {given}, where ours has {' or '.join(map(repr, values))}; it is not imported."
            )


def known(said: Settings, keys: Mapping[str, str]) -> Settings:
    """Our keys for the peer's, where the peer says something."""
    return {ours: said[theirs] for ours, theirs in keys.items() if said.get(theirs) not in (UNREAD, None)}


def rate_of(said: Any) -> Settings:
    """The key ``sample_rate`` of ``[data]``, where something sensible is said."""
    return (
        {"sample_rate": round(said)}
        if isinstance(said, (int, float)) and not isinstance(said, bool) and 0 < said < 1e7
        else {}
    )


def size_of(weights: Tensors, name: str, axis: int) -> int:
    """Length of one axis of a matrix."""
    if name not in weights or weights[name].dim() < 2:
        raise CheckpointError(f"There is no {name} to read a size from; the files are not whole.")
    return weights[name].shape[axis]


def count_of(weights: Tensors, pattern: str) -> int:
    """How many numbers stand in the place of ``*`` in names that begin so."""
    begin = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return len({found[1] for name in weights if (found := begin.match(name))})


def weight_and_bias(ours: str, theirs: str) -> dict[str, list[str]]:
    """Weight and bias of a layer."""
    return {f"{ours}.{kind}": [f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def gamma_and_beta(ours: str, theirs: str) -> dict[str, list[str]]:
    """Scale and shift of a norm, where the peer calls them gamma and beta."""
    return {f"{ours}.weight": [f"{theirs}.gamma"], f"{ours}.bias": [f"{theirs}.beta"]}
