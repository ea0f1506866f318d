"""CLIPPERS, TRANSFORMS and FILTERS: from the names in a recipe to classes."""

from collections.abc import Callable

from unbraid.robust.clip import AutoClip, Clipper, FixedClip, NoClip, ZClip
from unbraid.robust.filter import LossFilter, OutlierFilter, PercentileFilter, ThresholdFilter
from unbraid.robust.transform import AdaptiveClip, GradientTransform, ValueClip

CLIPPERS: dict[str, Callable[..., Clipper]] = {
    "fixed": FixedClip,
    "autoclip": AutoClip,
    "zclip": ZClip,
    "none": NoClip,
}

TRANSFORMS: dict[str, Callable[..., GradientTransform]] = {"value": ValueClip, "adaptive": AdaptiveClip}

FILTERS: dict[str, Callable[..., LossFilter]] = {
    "threshold": ThresholdFilter,
    "percentile": PercentileFilter,
    "outlier": OutlierFilter,
}
