"""MODELS, by name: ``(batch, channel, time)`` to ``(batch, source, channel, time)``, of the same length."""

from collections.abc import Callable

from torch import nn

from unbraid.models.conv_tasnet import ConvTasNet
from unbraid.models.sepformer import SepFormer

MODELS: dict[str, Callable[..., nn.Module]] = {"conv_tasnet": ConvTasNet, "sepformer": SepFormer}
