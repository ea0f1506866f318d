"""CLIPPERS and FILTERS, by name."""

from collections.abc import Callable

from unbraid.robust.clip import AutoClip, Clipper, FixedClip, NoClip
from unbraid.robust.filter import LossFilter, ThresholdFilter

CLIPPERS: dict[str, Callable[..., Clipper]] = {"fixed": FixedClip, "autoclip": AutoClip, "none": NoClip}

FILTERS: dict[str, Callable[..., LossFilter]] = {"threshold": ThresholdFilter}
