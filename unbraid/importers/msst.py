"""BS-RoFormer and Mel-band RoFormer, as the training code MSST saves them."""

import re

import torch

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import Foreign, Names, check_same, count_of, known, rate_of, size_of, weight_and_bias
from unbraid.importers.safe_reading import Settings, Tensors
from unbraid.models.attention import rotary_angles


def roformer(weights: Tensors, settings: dict[str, Settings]) -> Foreign:
    """Either of them in our words.

    Raises:
        CheckpointError: If ours cannot be it.
    """
    said = settings.get("model", {})
    mel = "final_norm.gamma" not in weights
    origin = f"this {'Mel-band' if mel else 'BS'}-RoFormer"
    if any(".branch." in name or "value_residual" in name for name in weights):
        raise CheckpointError(
            f"{origin} is of the package BS-RoFormer as it is now, with residual streams and value residuals that ours "
            "has not; only what MSST saves is imported."
        )
    model = _roformer_sizes(weights, said, mel=mel) | {"zero_dc": said.get("zero_dc", True)}
    check_same(origin, said, stft_normalized=(False,), stft_win_length=(model["n_fft"],), freq_range=(None,))
    check_same(origin, said, skip_connection=(False,), use_pope=(False,))
    paths = sorted({found[1] for name in weights if (found := re.match(r"layers\.0\.(\d+)\.", name))})
    if len(paths) != 2:
        raise CheckpointError(
            f"{origin} has {len(paths)} transformers in a block, where ours has 2; it is not imported."
        )
    data = rate_of(settings.get("audio", {}).get("sample_rate")) or rate_of(said.get("sample_rate"))
    names: Names = {} if mel else {"norm.weight": ["final_norm.gamma"]}
    names |= _bands(count_of(weights, "band_split.to_features.*."), model["n_sources"], model["n_mask_layers"])
    tables = {}
    for i in range(model["n_blocks"]):
        for p, (path, place) in enumerate(zip(("along_time", "across_bands"), paths, strict=True)):
            for j in range(count_of(weights, f"layers.{i}.{place}.layers.*.")):
                theirs = f"layers.{i}.{place}.layers.{j}"
                names |= _rope_layer(f"blocks.{i}.{path}.{j}", theirs)
                tables[f"{theirs}.0.rotary_embed.freqs"] = rotary_angles(2, model["d_head"], torch.device("cpu"))[1]
            if mel:
                names[f"blocks.{i}.norms.{p}.weight"] = [f"layers.{i}.{place}.norm.gamma"]
    counts = {
        "n_time_layers": count_of(weights, f"layers.0.{paths[0]}.layers.*."),
        "n_band_layers": count_of(weights, f"layers.0.{paths[1]}.layers.*."),
    }
    loss = {"name": "l1", "assign": "fixed"}  # the outputs' level and order mean something
    return Foreign(origin, model | counts, weights, names, tables, ("hop_length",), data, ("split.weight",), loss)


def _roformer_sizes(weights: Tensors, said: Settings, *, mel: bool) -> Settings:
    widths = [
        size_of(weights, f"band_split.to_features.{k}.1.weight", 1) // 2
        for k in range(count_of(weights, "band_split.to_features.*."))
    ]
    n_mask_layers = count_of(weights, "mask_estimators.0.to_freqs.0.0.*.")
    d_model = size_of(weights, "band_split.to_features.0.1.weight", 0)
    path = "layers.0.0.layers.0" if "layers.0.0.layers.0.0.to_gates.weight" in weights else "layers.0.1.layers.0"
    n_heads = size_of(weights, f"{path}.0.to_gates.weight", 0)
    model = {
        "name": "bs_roformer",
        "n_sources": count_of(weights, "mask_estimators.*."),
        "d_model": d_model,
        "n_blocks": count_of(weights, "layers.*."),
        "n_heads": n_heads,
        "d_head": size_of(weights, f"{path}.0.to_qkv.weight", 0) // (3 * n_heads),
        "expansion": size_of(weights, f"{path}.1.net.1.weight", 0) // d_model,
        "n_mask_layers": n_mask_layers,
        "norm": "paths" if mel else "last",
    }
    if n_mask_layers > 1:
        model["mask_expansion"] = size_of(weights, "mask_estimators.0.to_freqs.0.0.0.weight", 0) // d_model
    if said:
        model |= known({"stft_hop_length": 512} | said, {"hop_length": "stft_hop_length"})
    if mel:
        model |= {"bands": "mel", "n_bands": len(widths), "n_fft": 2048, "n_channels": 2 if not said else 1}
        model |= known(said, {"n_fft": "stft_n_fft", "sample_rate": "sample_rate"})
        return model | ({"n_channels": 2} if said.get("stereo") else {})
    n_channels = 2 - sum(widths) % 2  # n_fft / 2 + 1 bins are an odd number
    return model | {
        "n_channels": n_channels,
        "n_fft": 2 * (sum(widths) // n_channels - 1),
        "bands": [width // n_channels for width in widths],
    }


def _bands(n_bands: int, n_sources: int, n_mask_layers: int) -> Names:
    """Small layers of each band, and of each source in each band, which ours keeps together."""
    theirs = {"scale": "0.gamma", "weight": "1.weight", "bias": "1.bias"}
    names = {
        f"split.{ours}": [f"band_split.to_features.{k}.{name}" for k in range(n_bands)] for ours, name in theirs.items()
    }
    for layer in range(n_mask_layers):
        ours = "estimate" if layer == n_mask_layers - 1 else f"estimate.hidden.{layer}"
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = [
                f"mask_estimators.{s}.to_freqs.{k}.0.{2 * layer}.{kind}"
                for k in range(n_bands)
                for s in range(n_sources)
            ]
    return names


def _rope_layer(ours: str, theirs: str) -> Names:
    return {
        f"{ours}.attention_norm.weight": [f"{theirs}.0.norm.gamma"],
        f"{ours}.query_key_value.weight": [f"{theirs}.0.to_qkv.weight"],
        f"{ours}.merge.weight": [f"{theirs}.0.to_out.0.weight"],
        f"{ours}.hidden_norm.weight": [f"{theirs}.1.net.0.gamma"],
        **weight_and_bias(f"{ours}.gates", f"{theirs}.0.to_gates"),
        **weight_and_bias(f"{ours}.widen", f"{theirs}.1.net.1"),
        **weight_and_bias(f"{ours}.narrow", f"{theirs}.1.net.4"),
    }
