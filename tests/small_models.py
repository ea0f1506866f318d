"""Every model in two small sizes, for the tests that run over all of `MODELS`."""

import torch

from unbraid.models import MODELS

TINY = {
    "conv_tasnet": {"n_filters": 16, "bottleneck": 8, "hidden": 16, "skip": 8, "n_blocks": 3, "n_repeats": 2},
    "sepformer": {"n_filters": 16, "chunk_size": 10, "n_blocks": 1, "n_layers": 2, "n_heads": 2, "d_hidden": 32},
}
"""Just enough of each to have all its parts."""

SMALL = {
    "conv_tasnet": {"n_filters": 64, "bottleneck": 32, "hidden": 64, "skip": 32, "n_blocks": 5, "n_repeats": 2},
    "sepformer": {"n_filters": 64, "chunk_size": 40, "n_blocks": 2, "n_layers": 2, "n_heads": 4, "d_hidden": 128},
}
"""Wide and deep enough for roundings to behave as in the published sizes."""


def tiny(name, *, seed=0, **sizes):
    return _made(name, TINY[name] | sizes, seed)


def small(name, *, seed=0):
    return _made(name, SMALL[name], seed)


def _made(name, sizes, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](**sizes)
