"""MODELS, by name: ``(batch, channel, time)`` to ``(batch, source, channel, time)``, of the same length."""

from collections.abc import Callable

from torch import nn

from unbraid.models.blstm import BLSTM, Chimera
from unbraid.models.bs_roformer import BSRoFormer
from unbraid.models.conv_tasnet import ConvTasNet
from unbraid.models.dprnn import DPRNN
from unbraid.models.sepformer import RESepFormer, SepFormer
from unbraid.models.sepreformer import SepReformer
from unbraid.models.tf_locoformer import TFLocoformer

MODELS: dict[str, Callable[..., nn.Module]] = {
    "blstm": BLSTM,
    "bs_roformer": BSRoFormer,
    "chimera": Chimera,
    "conv_tasnet": ConvTasNet,
    "dprnn": DPRNN,
    "re_sepformer": RESepFormer,
    "sepformer": SepFormer,
    "sepreformer": SepReformer,
    "tf_locoformer": TFLocoformer,
}
