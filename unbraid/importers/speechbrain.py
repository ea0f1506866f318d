"""Importing separators of SpeechBrain: three state dicts, and the simple lines of the YAML that built the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import (
    LSTM,
    ImportedModel,
    KeyMap,
    axis_size,
    check_supported,
    count_indices,
    rename_keys,
    sample_rate_setting,
    weight_and_bias,
)
from unbraid.importers.safe_reading import Settings, Tensors, extract_state_dict, read_weights
from unbraid.models.sepformer import sinusoidal_positions

PARTS = ("encoder", "masknet", "decoder")
"""Parts of a model; each is saved in a file of that name."""


def read_speechbrain(files: Mapping[str, Path], settings: dict[str, Settings]) -> ImportedModel | None:
    """Describe a separator of SpeechBrain for unbraid; return None if the model is unknown.

    Args:
        files: The file of each part.
        settings: Sections of the YAML file.

    Raises:
        CheckpointError: If a file is missing, or unbraid does not support the model's settings.
    """
    for part in PARTS:
        if part not in files:
            raise CheckpointError(f"{next(iter(files.values()))} is one part of a model; name its {part}.ckpt as well.")
    weights = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in extract_state_dict(files[part], read_weights(files[part])).items()
    }
    data = sample_rate_setting(settings[""].get("sample_rate"))
    # The names of the weights tell the models apart.
    if "masknet.dual_mdl.0.intra_mdl.mdl.layers.0.self_att.att.in_proj_weight" in weights:
        return sepformer(weights, settings, data)
    if "masknet.dual_mdl.0.intra_mdl.mdl.rnn.weight_ih_l0" in weights:
        return dprnn(weights, settings, data)
    if "masknet.model.seg_model.0.mdl.layers.0.self_att.att.in_proj_weight" in weights:
        return re_sepformer(weights, settings, data)
    if any(name.startswith("masknet.temporal_conv_net.") for name in weights):
        raise CheckpointError(
            "SpeechBrain's Conv-TasNet cannot be imported: it pads its convolutions in another way than unbraid's."
        )
    return None


def sepformer(weights: Tensors, settings: dict[str, Settings], data: Settings) -> ImportedModel:
    """Describe a SepFormer."""
    origin = "SpeechBrain's SepFormer"
    model, key_map = _dual_path_parts(origin, weights, settings)
    model |= _transformer_settings(origin, "SBTransformerBlock", settings)
    model["n_layers"] = count_indices(weights, "masknet.dual_mdl.0.intra_mdl.mdl.layers.*.")
    model["d_hidden"] = axis_size(weights, "masknet.dual_mdl.0.intra_mdl.mdl.layers.0.pos_ffn.ffn.0.weight", 0)
    tables: Tensors = {}
    for i in range(model["n_blocks"]):
        for path, kind in (("within", "intra"), ("across", "inter")):
            theirs = f"masknet.dual_mdl.{i}.{kind}"
            key_map |= weight_and_bias(f"{path}.{i}.norm", f"{theirs}_norm")
            key_map |= _transformer_map(f"{path}.{i}", f"{theirs}_mdl", model["n_layers"])
            tables |= _position_tables(origin, f"{theirs}_mdl", weights)
    return ImportedModel(
        origin, model | {"name": "sepformer"}, weights, key_map, tables, ("n_heads", "chunk_size"), data
    )


def dprnn(weights: Tensors, settings: dict[str, Settings], data: Settings) -> ImportedModel:
    """Describe a DPRNN."""
    origin = "SpeechBrain's DPRNN"
    model, key_map = _dual_path_parts(origin, weights, settings)
    for i in range(model["n_blocks"]):
        # unbraid numbers the paths within and across chunks through all blocks.
        for path_index, path in enumerate(("intra", "inter")):
            ours = f"paths.{2 * i + path_index}"
            theirs = f"masknet.dual_mdl.{i}.{path}"
            key_map |= {f"{ours}.lstm.{name}": [f"{theirs}_mdl.mdl.rnn.{name}"] for name in LSTM}
            key_map |= weight_and_bias(f"{ours}.merge.narrow", f"{theirs}_linear.w")
            key_map |= weight_and_bias(f"{ours}.merge.norm", f"{theirs}_norm")
    key_map["enter.bias"] = []  # SpeechBrain's layer has none
    model |= {
        "name": "dprnn",
        "bottleneck": axis_size(weights, "masknet.conv1d.weight", 0),
        "hidden": axis_size(weights, "masknet.dual_mdl.0.intra_mdl.mdl.rnn.weight_hh_l0", 1),
        "mask": "relu",
        "rectify": True,
        "ends": "pairs",
    }
    return ImportedModel(origin, model, weights, key_map, required_keys=("chunk_size",), data_settings=data)


def re_sepformer(weights: Tensors, settings: dict[str, Settings], data: Settings) -> ImportedModel:
    """Describe a RE-SepFormer."""
    origin = "SpeechBrain's RE-SepFormer"
    layers = "masknet.model.seg_model.0.mdl.layers"
    end = "masknet.model.output_fc"
    n_filters = axis_size(weights, "encoder.conv1d.weight", 0)
    model: Settings = {
        "name": "re_sepformer",
        "n_filters": n_filters,
        "kernel_size": axis_size(weights, "encoder.conv1d.weight", -1),
        "n_sources": axis_size(weights, f"{end}.1.weight", 0) // n_filters,
        "n_blocks": count_indices(weights, "masknet.model.seg_model.*."),
        "n_layers": count_indices(weights, f"{layers}.*."),
        "d_hidden": axis_size(weights, f"{layers}.0.pos_ffn.ffn.0.weight", 0),
    } | _transformer_settings(origin, "SBTransformerBlock_wnormandskip", settings)
    for section in _sections_of_class("ResourceEfficientSeparator", settings):
        # SpeechBrain's defaults, under what the YAML sets.
        arguments = {"causal": True, "mem_type": "hc", "segment_size": 20} | section
        check_supported(origin, arguments, causal=(False,), mem_type=("av",), nonlinear=("relu",))
        model |= rename_keys(arguments, {"chunk_size": "segment_size"})

    key_map = _filterbank_map() | {"activation.weight": [f"{end}.0.weight"]} | weight_and_bias("split", f"{end}.1")
    tables: Tensors = {}
    for path, kind in (("within", "seg_model"), ("across", "mem_model")):
        for i in range(count_indices(weights, f"masknet.model.{kind}.*.")):
            theirs = f"masknet.model.{kind}.{i}"
            key_map |= weight_and_bias(f"{path}.{i}.norm", f"{theirs}.norm")
            key_map |= _transformer_map(f"{path}.{i}", theirs, model["n_layers"])
            tables |= _position_tables(origin, theirs, weights)

    # SpeechBrain orders the outputs of the last layer filter by filter, unbraid source by source.
    for name in (f"{end}.1.weight", f"{end}.1.bias"):
        if name in weights and len(weights[name]) == model["n_sources"] * n_filters:  # else load_weights refuses it
            by_filter = weights[name].unflatten(0, (n_filters, model["n_sources"]))
            weights[name] = by_filter.transpose(0, 1).flatten(0, 1)
    return ImportedModel(origin, model, weights, key_map, tables, ("n_heads", "chunk_size"), data)


def _filterbank_map() -> KeyMap:
    return {"encoder.filters.weight": ["encoder.conv1d.weight"], "decoder.filters.weight": ["decoder.weight"]}


def _dual_path_parts(origin: str, weights: Tensors, settings: dict[str, Settings]) -> tuple[Settings, KeyMap]:
    """Return the settings and the key map that all networks of the class `Dual_Path_Model` share."""
    model = {
        "n_filters": axis_size(weights, "encoder.conv1d.weight", 0),
        "kernel_size": axis_size(weights, "encoder.conv1d.weight", -1),
        "n_sources": axis_size(weights, "masknet.conv2d.weight", 0) // axis_size(weights, "masknet.conv2d.weight", 1),
        "n_blocks": count_indices(weights, "masknet.dual_mdl.*."),
    }
    for section in _sections_of_class("Dual_Path_Model", settings):
        check_supported(origin, section, norm=("ln", "gln"), skip_around_intra=(True,), use_global_pos_enc=(False,))
        model |= rename_keys({"K": 200} | section, {"chunk_size": "K"})  # 200 is SpeechBrain's default
    key_map = _filterbank_map() | {
        "enter.weight": ["masknet.conv1d.weight"],
        "leave.weight": ["masknet.end_conv1x1.weight"],
    }
    key_map |= {"activation.weight": ["masknet.prelu.weight"]}
    for ours, theirs in {"norm": "norm", "split": "conv2d", "output": "output.0", "gate": "output_gate.0"}.items():
        key_map |= weight_and_bias(ours, f"masknet.{theirs}")
    return model, key_map


def _transformer_settings(origin: str, kind: str, settings: dict[str, Settings]) -> Settings:
    """Return the settings of the transformers that no weight's shape reveals; they must be equal in all of them."""
    shared: Settings = {}
    for section in _sections_of_class(kind, settings):
        arguments = {"norm_before": False} | section  # SpeechBrain's default, which unbraid does not support
        check_supported(origin, arguments, norm_before=(True,), activation=("relu",), attention_type=("regularMHA",))
        check_supported(origin, arguments, causal=(False,), use_norm=(True,), use_skip=(True,), norm_type=("gln", "ln"))
        if "nhead" in shared:
            check_supported(origin, arguments, nhead=(shared["nhead"],))
        shared["nhead"] = arguments.get("nhead")
    return rename_keys(shared, {"n_heads": "nhead"})


def _transformer_map(ours: str, theirs: str, n_layers: int) -> KeyMap:
    key_map = weight_and_bias(f"{ours}.last_norm", f"{theirs}.mdl.norm.norm")
    for j in range(n_layers):
        our_layer = f"{ours}.layers.{j}"
        their_layer = f"{theirs}.mdl.layers.{j}"
        for kind in ("weight", "bias"):
            key_map[f"{our_layer}.query_key_value.{kind}"] = [f"{their_layer}.self_att.att.in_proj_{kind}"]
        key_map |= weight_and_bias(f"{our_layer}.merge", f"{their_layer}.self_att.att.out_proj")
        key_map |= weight_and_bias(f"{our_layer}.attention_norm", f"{their_layer}.norm1.norm")
        key_map |= weight_and_bias(f"{our_layer}.hidden_norm", f"{their_layer}.norm2.norm")
        key_map |= weight_and_bias(f"{our_layer}.widen", f"{their_layer}.pos_ffn.ffn.0")
        key_map |= weight_and_bias(f"{our_layer}.narrow", f"{their_layer}.pos_ffn.ffn.3")
    return key_map


def _position_tables(origin: str, theirs: str, weights: Tensors) -> Tensors:
    table = weights.get(f"{theirs}.pos_enc.pe")
    if table is None:
        raise CheckpointError(f"{origin} has no positions in {theirs}, but unbraid's model always has.")
    # The first 1000 rows are enough to recognise the table; SpeechBrain's may have 100,000.
    return {f"{theirs}.pos_enc.pe": sinusoidal_positions(min(1000, table.shape[-2]), table.shape[-1], table.device)}


def _sections_of_class(name: str, settings: dict[str, Settings]) -> list[dict[str, Any]]:
    """Return the sections of the YAML that create objects of a class."""
    return [section for section in settings.values() if str(section.get("!new", "")).rpartition(".")[2] == name]
