"""ImportedModel, the common form of all imported models; helpers that map settings and names of weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unbraid.errors import CheckpointError
from unbraid.importers.safe_reading import UNPARSED, Settings, Tensors

KeyMap = dict[str, list[str]]
"""From the name of a weight in unbraid to the names of the other toolkit."""

LSTM = [
    f"{kind}_{gate}_l0{direction}"
    for kind in ("weight", "bias")
    for gate in ("ih", "hh")
    for direction in ("", "_reverse")
]
"""Names of the weights of torch's bidirectional LSTM with one layer."""


@dataclass(frozen=True)
class ImportedModel:
    """A model of another toolkit, described by what unbraid needs to build the same one.

    Attributes:
        origin: The toolkit and the model, for messages.
        model_settings: The table ``[model]`` of the recipe, without keys that could not be determined.
        weights: The weights, by the toolkit's names.
        key_map: For each weight of unbraid's model the toolkit's name, or several names of weights to concatenate along
            their first axis; an empty list if the toolkit has no such weight, and unbraid's is zero.
        expected_tables: Fixed tables that the toolkit may save and unbraid computes, by the toolkit's names.
        required_keys: Keys of ``model_settings`` that no weight's shape reveals.
        data_settings: What is known of the table ``[data]``.
        transposed_suffixes: Ends of the names of unbraid's weights whose axes are in another order in the toolkit.
        loss_settings: The table ``[loss]``; it determines whether the outputs have a meaningful level and order.
    """

    origin: str
    model_settings: Settings
    weights: Tensors
    key_map: KeyMap
    expected_tables: Tensors = field(default_factory=dict)
    required_keys: Sequence[str] = ()
    data_settings: Settings = field(default_factory=dict)
    transposed_suffixes: tuple[str, ...] = ("decoder.filters.weight", ".taps")
    loss_settings: Settings = field(default_factory=lambda: {"name": "neg_si_sdr"})


def check_supported(origin: str, settings: Settings, **supported: tuple[Any, ...]) -> None:
    """Raise an error if a setting has a value that unbraid's model does not support; missing settings pass.

    If the toolkit's default is not supported, ``settings`` must contain the default.
    """
    for key, values in supported.items():
        if key in settings and settings[key] not in values:
            value = "an expression that is not read" if settings[key] is UNPARSED else repr(settings[key])
            raise CheckpointError(
                f"{origin} has {key} = {value}, but unbraid's model only supports {' or '.join(map(repr, values))}."
            )


def rename_keys(settings: Settings, keys: Mapping[str, str]) -> Settings:
    """Return settings under unbraid's keys, given the toolkit's key for each; missing settings are skipped."""
    return {ours: settings[theirs] for ours, theirs in keys.items() if settings.get(theirs) not in (UNPARSED, None)}


def sample_rate_setting(value: Any) -> Settings:
    """Return ``{"sample_rate": value}``, or an empty dict if the value cannot be a sample rate in Hz."""
    # True is an int in Python, but not a sample rate.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e7:
        return {"sample_rate": round(value)}
    return {}


def axis_size(weights: Tensors, name: str, axis: int) -> int:
    """Return the length of one axis of a weight with two or more axes.

    Raises:
        CheckpointError: If there is no such weight.
    """
    # A file may contain anything under this name, even a scalar.
    if name not in weights or weights[name].dim() < 2:
        raise CheckpointError(f"There is no {name} to read a size from. The files are incomplete.")
    return weights[name].shape[axis]


def count_indices(weights: Tensors, pattern: str) -> int:
    """Count the different numbers at ``*`` in names that begin with the pattern, such as ``layers.*.``."""
    prefix = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return len({match[1] for name in weights if (match := prefix.match(name))})


def weight_and_bias(ours: str, theirs: str) -> KeyMap:
    """Map weight and bias of a layer."""
    return {f"{ours}.{kind}": [f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def gamma_and_beta(ours: str, theirs: str) -> KeyMap:
    """Map scale and shift of a norm that the toolkit calls gamma and beta."""
    return {f"{ours}.weight": [f"{theirs}.gamma"], f"{ours}.bias": [f"{theirs}.beta"]}
