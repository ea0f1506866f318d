"""Importing BS-RoFormer and Mel-band RoFormer, as the training code MSST saves them."""

import re

import torch

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import (
    ImportedModel,
    KeyMap,
    axis_size,
    check_supported,
    count_indices,
    rename_keys,
    sample_rate_setting,
    weight_and_bias,
)
from unbraid.importers.safe_reading import Settings, Tensors
from unbraid.models.attention import rotary_angles


def read_roformer(weights: Tensors, settings: dict[str, Settings]) -> ImportedModel:
    """Describe either model for unbraid.

    Args:
        weights: The state dict.
        settings: Sections of the YAML file.

    Raises:
        CheckpointError: If unbraid does not support the model's settings.
    """
    arguments = settings.get("model", {})
    is_mel = "final_norm.gamma" not in weights  # BS-RoFormer has one last norm, Mel-band RoFormer one in each path
    origin = f"this {'Mel-band' if is_mel else 'BS'}-RoFormer"
    if any(".branch." in name or "value_residual" in name for name in weights):
        raise CheckpointError(
            f"{origin} comes from a recent version of the package BS-RoFormer, with residual streams and value "
            "residuals that unbraid does not have. Only models that MSST saves can be imported."
        )
    model = _roformer_settings(weights, arguments, is_mel=is_mel) | {"zero_dc": arguments.get("zero_dc", True)}
    check_supported(origin, arguments, stft_normalized=(False,), stft_win_length=(model["n_fft"],), freq_range=(None,))
    check_supported(origin, arguments, skip_connection=(False,), use_pope=(False,))
    # The transformers along time and across bands. Their numbers differ, so they are read from the names.
    transformers = sorted({match[1] for name in weights if (match := re.match(r"layers\.0\.(\d+)\.", name))})
    if len(transformers) != 2:
        raise CheckpointError(
            f"{origin} has {len(transformers)} transformers in each block; unbraid's model supports exactly 2."
        )
    data = sample_rate_setting(settings.get("audio", {}).get("sample_rate")) or sample_rate_setting(
        arguments.get("sample_rate")
    )

    # Names of the weights, and the rotary frequencies, which unbraid computes.
    key_map: KeyMap = {} if is_mel else {"norm.weight": ["final_norm.gamma"]}
    key_map |= _band_map(
        count_indices(weights, "band_split.to_features.*."), model["n_sources"], model["n_mask_layers"]
    )
    tables = {}
    for i in range(model["n_blocks"]):
        for p, (path, transformer) in enumerate(zip(("along_time", "across_bands"), transformers, strict=True)):
            for j in range(count_indices(weights, f"layers.{i}.{transformer}.layers.*.")):
                theirs = f"layers.{i}.{transformer}.layers.{j}"
                key_map |= _rope_layer_map(f"blocks.{i}.{path}.{j}", theirs)
                tables[f"{theirs}.0.rotary_embed.freqs"] = rotary_angles(2, model["d_head"], torch.device("cpu"))[1]
            if is_mel:
                key_map[f"blocks.{i}.norms.{p}.weight"] = [f"layers.{i}.{transformer}.norm.gamma"]
    model["n_time_layers"] = count_indices(weights, f"layers.0.{transformers[0]}.layers.*.")
    model["n_band_layers"] = count_indices(weights, f"layers.0.{transformers[1]}.layers.*.")
    return ImportedModel(
        origin,
        model,
        weights,
        key_map,
        expected_tables=tables,
        required_keys=("hop_length",),
        data_settings=data,
        transposed_suffixes=("split.weight",),
        # The outputs are stems in a fixed order, at the level that they have in the mixture.
        loss_settings={"name": "l1", "assign": "fixed"},
    )


def _roformer_settings(weights: Tensors, arguments: Settings, *, is_mel: bool) -> Settings:
    """Return the model settings: sizes from the weights' shapes, the rest from the YAML's arguments."""
    # Real and imaginary part are separate inputs of a band, hence the half.
    widths = [
        axis_size(weights, f"band_split.to_features.{k}.1.weight", 1) // 2
        for k in range(count_indices(weights, "band_split.to_features.*."))
    ]
    n_mask_layers = count_indices(weights, "mask_estimators.0.to_freqs.0.0.*.")
    d_model = axis_size(weights, "band_split.to_features.0.1.weight", 0)
    path = "layers.0.0.layers.0" if "layers.0.0.layers.0.0.to_gates.weight" in weights else "layers.0.1.layers.0"
    n_heads = axis_size(weights, f"{path}.0.to_gates.weight", 0)
    model = {
        "name": "bs_roformer",
        "n_sources": count_indices(weights, "mask_estimators.*."),
        "d_model": d_model,
        "n_blocks": count_indices(weights, "layers.*."),
        "n_heads": n_heads,
        "d_head": axis_size(weights, f"{path}.0.to_qkv.weight", 0) // (3 * n_heads),
        "expansion": axis_size(weights, f"{path}.1.net.1.weight", 0) // d_model,
        "n_mask_layers": n_mask_layers,
        "norm": "paths" if is_mel else "last",
    }
    if n_mask_layers > 1:
        model["mask_expansion"] = axis_size(weights, "mask_estimators.0.to_freqs.0.0.0.weight", 0) // d_model

    # 512 and 2048 are MSST's defaults; the hop is required if there is no YAML.
    if arguments:
        model |= rename_keys({"stft_hop_length": 512} | arguments, {"hop_length": "stft_hop_length"})
    if is_mel:
        # Mel bands overlap, so their widths do not reveal the number of channels.
        n_channels = 2 if not arguments or arguments.get("stereo") else 1
        model |= {"bands": "mel", "n_bands": len(widths), "n_fft": 2048, "n_channels": n_channels}
        return model | rename_keys(arguments, {"n_fft": "stft_n_fft", "sample_rate": "sample_rate"})
    # Each channel has n_fft / 2 + 1 bins, an odd number: the sum is odd for mono and even for stereo.
    n_channels = 2 - sum(widths) % 2
    return model | {
        "n_channels": n_channels,
        "n_fft": 2 * (sum(widths) // n_channels - 1),
        "bands": [width // n_channels for width in widths],
    }


def _band_map(n_bands: int, n_sources: int, n_mask_layers: int) -> KeyMap:
    """Map the layers of each band, and of each source in each band, which unbraid keeps in one weight."""
    theirs = {"scale": "0.gamma", "weight": "1.weight", "bias": "1.bias"}
    key_map = {
        f"split.{ours}": [f"band_split.to_features.{k}.{name}" for k in range(n_bands)] for ours, name in theirs.items()
    }
    for layer in range(n_mask_layers):
        ours = "estimate" if layer == n_mask_layers - 1 else f"estimate.hidden.{layer}"
        for kind in ("weight", "bias"):
            key_map[f"{ours}.{kind}"] = [
                f"mask_estimators.{s}.to_freqs.{k}.0.{2 * layer}.{kind}"
                for k in range(n_bands)
                for s in range(n_sources)
            ]
    return key_map


def _rope_layer_map(ours: str, theirs: str) -> KeyMap:
    return {
        f"{ours}.attention_norm.weight": [f"{theirs}.0.norm.gamma"],
        f"{ours}.query_key_value.weight": [f"{theirs}.0.to_qkv.weight"],
        f"{ours}.merge.weight": [f"{theirs}.0.to_out.0.weight"],
        f"{ours}.hidden_norm.weight": [f"{theirs}.1.net.0.gamma"],
        **weight_and_bias(f"{ours}.gates", f"{theirs}.0.to_gates"),
        **weight_and_bias(f"{ours}.widen", f"{theirs}.1.net.1"),
        **weight_and_bias(f"{ours}.narrow", f"{theirs}.1.net.4"),
    }
