"""Unbraid: trains source-separation networks, and keeps the training healthy.

The names below are imported when they are first used, so ``import unbraid`` is instant and loads no torch. Everything
else is imported from its own file, such as ``from unbraid.losses.spectral import deep_clustering``.
"""

# Type checkers take a variable of this name for true. Importing typing's own would double the time of this import.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from unbraid.build import load_model
    from unbraid.config.recipe import load_recipe
    from unbraid.data.batch import Batch
    from unbraid.inference import separate
    from unbraid.losses.pit import SeparationLoss
    from unbraid.losses.waveform import neg_si_sdr
    from unbraid.metrics import si_sdr
    from unbraid.models.conv_tasnet import ConvTasNet
    from unbraid.robust.clip import AutoClip, clip_
    from unbraid.robust.guard import guarded_step
    from unbraid.train.state import TrainState
    from unbraid.train.step import train_step

__version__ = "0.1.0"

__all__ = [
    "AutoClip",
    "Batch",
    "ConvTasNet",
    "SeparationLoss",
    "TrainState",
    "clip_",
    "guarded_step",
    "load_model",
    "load_recipe",
    "neg_si_sdr",
    "separate",
    "si_sdr",
    "train_step",
]

_MODULES = {
    "AutoClip": "unbraid.robust.clip",
    "Batch": "unbraid.data.batch",
    "ConvTasNet": "unbraid.models.conv_tasnet",
    "SeparationLoss": "unbraid.losses.pit",
    "TrainState": "unbraid.train.state",
    "clip_": "unbraid.robust.clip",
    "guarded_step": "unbraid.robust.guard",
    "load_model": "unbraid.build",
    "load_recipe": "unbraid.config.recipe",
    "neg_si_sdr": "unbraid.losses.waveform",
    "separate": "unbraid.inference",
    "si_sdr": "unbraid.metrics",
    "train_step": "unbraid.train.step",
}

# Type checkers read the imports above. They must not see this function: it would make every misspelt name valid.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value  # from now on an ordinary attribute
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
