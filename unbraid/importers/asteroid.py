"""Importing models of Asteroid, as `BaseModel.serialize` saves them: weights, and the arguments of the model."""

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import (
    LSTM,
    ImportedModel,
    KeyMap,
    axis_size,
    check_supported,
    count_indices,
    gamma_and_beta,
    rename_keys,
    sample_rate_setting,
    weight_and_bias,
)
from unbraid.importers.safe_reading import Settings, Tensors

FILTERBANK_KEYS = {"n_sources": "n_src", "n_filters": "n_filters", "kernel_size": "kernel_size", "stride": "stride"}
FILTERBANK_MAP = {
    "encoder.filters.weight": ["encoder.filterbank._filters"],
    "decoder.filters.weight": ["decoder.filterbank._filters"],
}


def read_asteroid(model_name: str, model_args: Settings, weights: Tensors) -> ImportedModel:
    """Describe a model of Asteroid for unbraid.

    Args:
        model_name: Asteroid's class.
        model_args: The arguments of the class.
        weights: The state dict.

    Raises:
        CheckpointError: If unbraid does not have this model, or not with these arguments.
    """
    origin = f"Asteroid's {model_name}"
    readers = {"ConvTasNet": conv_tasnet, "DPRNNTasNet": dprnn}
    if model_name not in readers:
        raise CheckpointError(f"{origin} is not one of {', '.join(readers)}, which can be imported.")
    args = {
        key: value for key, value in model_args.items() if isinstance(value, (int, float, str))
    }  # None stands for a default
    check_supported(origin, args, fb_name=("free", "FreeFB"), out_chan=(args.get("n_filters"),))
    model, key_map = readers[model_name](origin, {"encoder_activation": "linear"} | args, weights)
    model |= rename_keys(args, FILTERBANK_KEYS)
    data = sample_rate_setting(args.get("sample_rate"))
    return ImportedModel(origin, model, weights, key_map, required_keys=("n_sources",), data_settings=data)


def conv_tasnet(origin: str, args: Settings, weights: Tensors) -> tuple[Settings, KeyMap]:
    """Return the model settings and the key map of a ConvTasNet."""
    check_supported(origin, args, encoder_activation=("linear", "relu"), causal=(False,), norm_type=("gLN", "cLN"))
    keys = {
        "bottleneck": "bn_chan",
        "hidden": "hid_chan",
        "block_kernel": "conv_kernel_size",
        "n_blocks": "n_blocks",
        "n_repeats": "n_repeats",
        "mask": "mask_act",
    }
    # A block may have a residual and a skip output; unbraid computes both in one convolution, residual first.
    outputs = [output for output in ("res_conv", "skip_conv") if f"masker.TCN.0.{output}.weight" in weights]
    skip = axis_size(weights, "masker.TCN.0.skip_conv.weight", 0) if len(outputs) == 2 else 0

    key_map = FILTERBANK_MAP | gamma_and_beta("norm", "masker.bottleneck.0")
    key_map |= weight_and_bias("narrow", "masker.bottleneck.1") | weight_and_bias("widen", "masker.mask_net.1")
    key_map["slope"] = ["masker.mask_net.0.weight"]
    for i in range(count_indices(weights, "masker.TCN.*.")):
        ours = f"blocks.{i}"
        theirs = f"masker.TCN.{i}.shared_block"
        key_map |= weight_and_bias(f"{ours}.inner", f"{theirs}.0")
        key_map |= gamma_and_beta(f"{ours}.inner_norm", f"{theirs}.2")
        key_map |= gamma_and_beta(f"{ours}.outer_norm", f"{theirs}.5")
        key_map |= {f"{ours}.inner_slope": [f"{theirs}.1.weight"], f"{ours}.outer_slope": [f"{theirs}.4.weight"]}
        key_map |= {f"{ours}.taps": [f"{theirs}.3.weight"], f"{ours}.taps_bias": [f"{theirs}.3.bias"]}
        for kind in ("weight", "bias"):
            key_map[f"{ours}.outer.{kind}"] = [f"masker.TCN.{i}.{output}.{kind}" for output in outputs]

    model = {"name": "conv_tasnet", "skip": skip, "rectify": args["encoder_activation"] == "relu"}
    model["norm"] = str(args.get("norm_type", "gLN")).lower()
    return model | rename_keys(args, keys), key_map


def dprnn(origin: str, args: Settings, weights: Tensors) -> tuple[Settings, KeyMap]:
    """Return the model settings and the key map of a DPRNNTasNet."""
    check_supported(origin, args, encoder_activation=("linear", "relu"), norm_type=("gLN",), rnn_type=("LSTM", "lstm"))
    check_supported(origin, args, bidirectional=(True,), use_mulcat=(False,), num_layers=(1,))
    check_supported(origin, args, mask_act=("sigmoid", "relu"))  # Asteroid's softmax is over filters
    if isinstance(args.get("chunk_size"), int):  # chunks overlap by half
        check_supported(origin, args, hop_size=(args["chunk_size"] // 2,))
    keys = {
        "bottleneck": "bn_chan",
        "hidden": "hid_size",
        "chunk_size": "chunk_size",
        "n_blocks": "n_repeats",
        "mask": "mask_act",
    }
    key_map = (
        FILTERBANK_MAP | gamma_and_beta("norm", "masker.bottleneck.0") | {"leave.weight": ["masker.mask_net.weight"]}
    )
    key_map |= {"activation.weight": ["masker.first_out.0.weight"]}
    for ours, theirs in {
        "enter": "bottleneck.1",
        "split": "first_out.1",
        "output": "net_out.0",
        "gate": "net_gate.0",
    }.items():
        key_map |= weight_and_bias(ours, f"masker.{theirs}")
    for i in range(count_indices(weights, "masker.net.*.")):
        # unbraid numbers the paths within and across chunks through all blocks.
        for path_index, path in enumerate(("intra", "inter")):
            ours = f"paths.{2 * i + path_index}"
            theirs = f"masker.net.{i}.{path}"
            key_map |= {f"{ours}.lstm.{name}": [f"{theirs}_RNN.rnn.{name}"] for name in LSTM}
            key_map |= weight_and_bias(f"{ours}.merge.narrow", f"{theirs}_linear")
            key_map |= gamma_and_beta(f"{ours}.merge.norm", f"{theirs}_norm")
    rectify = args["encoder_activation"] == "relu"
    return {"name": "dprnn", "ends": "chunk", "rectify": rectify, **rename_keys(args, keys)}, key_map
