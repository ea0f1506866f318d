"""SpeechBrain's separators: three state dicts, and of the YAML that made them its plain lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import (
    LSTM,
    Foreign,
    Names,
    check_same,
    count_of,
    known,
    rate_of,
    size_of,
    weight_and_bias,
)
from unbraid.importers.safe_reading import Settings, Tensors, read_weights, state_dict
from unbraid.models.sepformer import sinusoidal_positions

PARTS = ("encoder", "masknet", "decoder")
"""Each in a file of that name."""


def speechbrain(files: Mapping[str, Path], settings: dict[str, Settings]) -> Foreign | None:
    """A separator of SpeechBrain in our words; None if it is none that is known.

    Raises:
        CheckpointError: If a file is missing, or ours cannot be what is in them.
    """
    for part in PARTS:
        if part not in files:
            raise CheckpointError(f"Beside {next(iter(files.values()))} there must be a {part}.ckpt; name it as well.")
    weights = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in state_dict(files[part], read_weights(files[part])).items()
    }
    data = rate_of(settings[""].get("sample_rate"))
    if "masknet.dual_mdl.0.intra_mdl.mdl.layers.0.self_att.att.in_proj_weight" in weights:
        return sepformer(weights, settings, data)
    if "masknet.dual_mdl.0.intra_mdl.mdl.rnn.weight_ih_l0" in weights:
        return dprnn(weights, settings, data)
    if "masknet.model.seg_model.0.mdl.layers.0.self_att.att.in_proj_weight" in weights:
        return re_sepformer(weights, settings, data)
    if any(name.startswith("masknet.temporal_conv_net.") for name in weights):
        raise CheckpointError("SpeechBrain's Conv-TasNet pads its convolutions in another way than ours; not imported.")
    return None


def sepformer(weights: Tensors, settings: dict[str, Settings], data: Settings) -> Foreign:
    """SepFormer and its weights."""
    origin = "SpeechBrain's SepFormer"
    model, names = _dual_path(origin, weights, settings)
    model |= _transformers(origin, "SBTransformerBlock", settings)
    model["n_layers"] = count_of(weights, "masknet.dual_mdl.0.intra_mdl.mdl.layers.*.")
    model["d_hidden"] = size_of(weights, "masknet.dual_mdl.0.intra_mdl.mdl.layers.0.pos_ffn.ffn.0.weight", 0)
    tables: Tensors = {}
    for i in range(model["n_blocks"]):
        for path, kind in (("within", "intra"), ("across", "inter")):
            theirs = f"masknet.dual_mdl.{i}.{kind}"
            names |= weight_and_bias(f"{path}.{i}.norm", f"{theirs}_norm")
            names |= _transformer(f"{path}.{i}", f"{theirs}_mdl", model["n_layers"])
            tables |= _positions(origin, f"{theirs}_mdl", weights)
    return Foreign(origin, model | {"name": "sepformer"}, weights, names, tables, ("n_heads", "chunk_size"), data)


def dprnn(weights: Tensors, settings: dict[str, Settings], data: Settings) -> Foreign:
    """DPRNN and its weights."""
    origin = "SpeechBrain's DPRNN"
    model, names = _dual_path(origin, weights, settings)
    for i in range(model["n_blocks"]):
        for place, path in enumerate(("intra", "inter")):
            ours, theirs = f"paths.{2 * i + place}", f"masknet.dual_mdl.{i}.{path}"
            names |= {f"{ours}.lstm.{name}": [f"{theirs}_mdl.mdl.rnn.{name}"] for name in LSTM}
            names |= weight_and_bias(f"{ours}.merge.narrow", f"{theirs}_linear.w")
            names |= weight_and_bias(f"{ours}.merge.norm", f"{theirs}_norm")
    names["enter.bias"] = []
    model |= {
        "name": "dprnn",
        "bottleneck": size_of(weights, "masknet.conv1d.weight", 0),
        "hidden": size_of(weights, "masknet.dual_mdl.0.intra_mdl.mdl.rnn.weight_hh_l0", 1),
        "mask": "relu",
        "rectify": True,
        "ends": "pairs",
    }
    return Foreign(origin, model, weights, names, needed=("chunk_size",), data=data)


def re_sepformer(weights: Tensors, settings: dict[str, Settings], data: Settings) -> Foreign:
    """RE-SepFormer and its weights."""
    origin = "SpeechBrain's RE-SepFormer"
    layers, end = "masknet.model.seg_model.0.mdl.layers", "masknet.model.output_fc"
    n_filters = size_of(weights, "encoder.conv1d.weight", 0)
    model: Settings = {
        "name": "re_sepformer",
        "n_filters": n_filters,
        "kernel_size": size_of(weights, "encoder.conv1d.weight", -1),
        "n_sources": size_of(weights, f"{end}.1.weight", 0) // n_filters,
        "n_blocks": count_of(weights, "masknet.model.seg_model.*."),
        "n_layers": count_of(weights, f"{layers}.*."),
        "d_hidden": size_of(weights, f"{layers}.0.pos_ffn.ffn.0.weight", 0),
    } | _transformers(origin, "SBTransformerBlock_wnormandskip", settings)
    for said in _made_by("ResourceEfficientSeparator", settings):
        its = {"causal": True, "mem_type": "hc", "segment_size": 20} | said
        check_same(origin, its, causal=(False,), mem_type=("av",), nonlinear=("relu",))
        model |= known(its, {"chunk_size": "segment_size"})
    names = _front() | {"activation.weight": [f"{end}.0.weight"]} | weight_and_bias("split", f"{end}.1")
    tables: Tensors = {}
    for path, kind in (("within", "seg_model"), ("across", "mem_model")):
        for i in range(count_of(weights, f"masknet.model.{kind}.*.")):
            theirs = f"masknet.model.{kind}.{i}"
            names |= weight_and_bias(f"{path}.{i}.norm", f"{theirs}.norm")
            names |= _transformer(f"{path}.{i}", theirs, model["n_layers"])
            tables |= _positions(origin, theirs, weights)
    for name in (f"{end}.1.weight", f"{end}.1.bias"):
        if name in weights and len(weights[name]) == model["n_sources"] * n_filters:  # else its shape is refused
            of_filters = weights[name].unflatten(0, (n_filters, model["n_sources"]))
            weights[name] = of_filters.transpose(0, 1).flatten(0, 1)  # source after source
    return Foreign(origin, model, weights, names, tables, ("n_heads", "chunk_size"), data)


def _front() -> Names:
    return {"encoder.filters.weight": ["encoder.conv1d.weight"], "decoder.filters.weight": ["decoder.weight"]}


def _dual_path(origin: str, weights: Tensors, settings: dict[str, Settings]) -> tuple[Settings, Names]:
    """What the networks of `Dual_Path_Model` have in common."""
    model = {
        "n_filters": size_of(weights, "encoder.conv1d.weight", 0),
        "kernel_size": size_of(weights, "encoder.conv1d.weight", -1),
        "n_sources": size_of(weights, "masknet.conv2d.weight", 0) // size_of(weights, "masknet.conv2d.weight", 1),
        "n_blocks": count_of(weights, "masknet.dual_mdl.*."),
    }
    for said in _made_by("Dual_Path_Model", settings):
        check_same(origin, said, norm=("ln", "gln"), skip_around_intra=(True,), use_global_pos_enc=(False,))
        model |= known({"K": 200} | said, {"chunk_size": "K"})
    names = _front() | {"enter.weight": ["masknet.conv1d.weight"], "leave.weight": ["masknet.end_conv1x1.weight"]}
    names |= {"activation.weight": ["masknet.prelu.weight"]}
    for ours, theirs in {"norm": "norm", "split": "conv2d", "output": "output.0", "gate": "output_gate.0"}.items():
        names |= weight_and_bias(ours, f"masknet.{theirs}")
    return model, names


def _transformers(origin: str, kind: str, settings: dict[str, Settings]) -> Settings:
    """What only the YAML says of the transformers, which must all be of one kind."""
    found: Settings = {}
    for said in _made_by(kind, settings):
        its = {"norm_before": False} | said
        check_same(origin, its, norm_before=(True,), activation=("relu",), attention_type=("regularMHA",))
        check_same(origin, its, causal=(False,), use_norm=(True,), use_skip=(True,), norm_type=("gln", "ln"))
        if "nhead" in found:
            check_same(origin, its, nhead=(found["nhead"],))
        found |= {"nhead": its.get("nhead")}
    return known(found, {"n_heads": "nhead"})


def _transformer(ours: str, theirs: str, n_layers: int) -> Names:
    names = weight_and_bias(f"{ours}.last_norm", f"{theirs}.mdl.norm.norm")
    for j in range(n_layers):
        our, its = f"{ours}.layers.{j}", f"{theirs}.mdl.layers.{j}"
        for kind in ("weight", "bias"):
            names[f"{our}.query_key_value.{kind}"] = [f"{its}.self_att.att.in_proj_{kind}"]
        names |= weight_and_bias(f"{our}.merge", f"{its}.self_att.att.out_proj")
        names |= weight_and_bias(f"{our}.attention_norm", f"{its}.norm1.norm")
        names |= weight_and_bias(f"{our}.hidden_norm", f"{its}.norm2.norm")
        names |= weight_and_bias(f"{our}.widen", f"{its}.pos_ffn.ffn.0")
        names |= weight_and_bias(f"{our}.narrow", f"{its}.pos_ffn.ffn.3")
    return names


def _positions(origin: str, theirs: str, weights: Tensors) -> Tensors:
    table = weights.get(f"{theirs}.pos_enc.pe")
    if table is None:
        raise CheckpointError(f"{origin} has no positions in {theirs}, where ours has; it is not imported.")
    return {f"{theirs}.pos_enc.pe": sinusoidal_positions(min(1000, table.shape[-2]), table.shape[-1], table.device)}


def _made_by(name: str, settings: dict[str, Settings]) -> list[dict[str, Any]]:
    """The sections that make objects of a class."""
    return [said for said in settings.values() if str(said.get("!new", "")).rpartition(".")[2] == name]
