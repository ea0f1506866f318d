"""Every model in two small sizes, for the tests that run over all of `MODELS`."""

import torch

from unbraid.model_output import get_sources, iter_tensors
from unbraid.models import MODELS

TINY = {
    "blstm": {"hidden": 12, "n_layers": 2, "n_fft": 16, "hop_length": 8},
    "bs_roformer": {"n_sources": 2, "n_channels": 1, "n_fft": 32, "hop_length": 8, "bands": [1, 1, 2, 2, 4, 7]}
    | {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_head": 8, "expansion": 2, "mask_expansion": 2},
    "chimera": {"hidden": 12, "n_layers": 2, "embedding_dim": 4, "n_fft": 16, "hop_length": 8},
    "conv_tasnet": {"n_filters": 16, "bottleneck": 8, "hidden": 16, "skip": 8, "n_blocks": 3, "n_repeats": 2},
    "dprnn": {"n_filters": 16, "bottleneck": 8, "hidden": 8, "chunk_size": 10, "n_blocks": 2},
    "re_sepformer": {"n_filters": 16, "chunk_size": 10, "n_blocks": 2, "n_layers": 1, "n_heads": 2, "d_hidden": 32},
    "sepformer": {"n_filters": 16, "chunk_size": 10, "n_blocks": 1, "n_layers": 2, "n_heads": 2, "d_hidden": 32},
    "sepreformer": {
        "n_filters": 16,
        "d_model": 8,
        "n_stages": 1,
        "n_heads": 2,
        "n_split_layers": 1,
        "n_rebuild_layers": 1,
        "local_kernel": 5,
        "max_distance": 20,
        "layer_scale": 1.0,
    },
    "tf_locoformer": {"n_fft": 16, "hop_length": 8, "n_layers": 1, "d_model": 16, "d_hidden": 16, "d_attention": 16},
}
"""The smallest sizes with all parts of each model."""

SMALL = {
    "blstm": {"hidden": 64, "n_layers": 3, "n_fft": 64, "hop_length": 16},
    "bs_roformer": {"n_sources": 2, "n_channels": 1, "n_fft": 256, "hop_length": 64, "bands": "mel", "n_bands": 12}
    | {"sample_rate": 8000, "n_blocks": 2, "d_model": 64, "n_heads": 4, "d_head": 16},
    "chimera": {"hidden": 64, "n_layers": 3, "embedding_dim": 20, "n_fft": 64, "hop_length": 16},
    "conv_tasnet": {"n_filters": 64, "bottleneck": 32, "hidden": 64, "skip": 32, "n_blocks": 5, "n_repeats": 2},
    "dprnn": {"n_filters": 32, "bottleneck": 32, "hidden": 32, "chunk_size": 40, "n_blocks": 3},
    "re_sepformer": {"n_filters": 64, "chunk_size": 40, "n_blocks": 2, "n_layers": 2, "n_heads": 4, "d_hidden": 128},
    "sepformer": {"n_filters": 64, "chunk_size": 40, "n_blocks": 2, "n_layers": 2, "n_heads": 4, "d_hidden": 128},
    "sepreformer": {
        "n_filters": 64,
        "stride": 8,
        "d_model": 32,
        "n_stages": 2,
        "n_heads": 4,
        "n_split_layers": 1,
        "n_rebuild_layers": 1,
        "local_kernel": 17,
        "layer_scale": 0.5,
    },
    "tf_locoformer": {"n_fft": 64, "hop_length": 32, "n_layers": 2, "d_model": 32, "d_hidden": 32, "kernel_size": 4}
    | {"d_attention": 32},
}
"""Wide and deep enough for roundings to behave as in the published sizes."""


def make_model(name, *, seed=0, sizes=TINY, **options):
    """Build a model from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](**sizes[name] | options)


def tiny(name, *, all_outputs=False, **options):
    """Build a model that returns its sources alone, or with ``all_outputs`` all tensors flattened into one."""
    model = make_model(name, **options)
    model.register_forward_hook(
        lambda _model, _inputs, output: flatten_outputs(output) if all_outputs else get_sources(output)
    )
    return model


def small(name, *, seed=0):
    return tiny(name, seed=seed, sizes=SMALL)


def flatten_outputs(output):
    return torch.cat([tensor.float().flatten() for tensor in iter_tensors(output)])
