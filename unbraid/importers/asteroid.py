"""Asteroid's models, as `BaseModel.serialize` gives them: weights, and the arguments that the model was made with."""

from unbraid.errors import CheckpointError
from unbraid.importers.key_mapping import (
    LSTM,
    Foreign,
    Names,
    check_same,
    count_of,
    gamma_and_beta,
    known,
    rate_of,
    size_of,
    weight_and_bias,
)
from unbraid.importers.safe_reading import Settings, Tensors

FRONT_SIZES = {"n_sources": "n_src", "n_filters": "n_filters", "kernel_size": "kernel_size", "stride": "stride"}
FRONT_NAMES = {
    "encoder.filters.weight": ["encoder.filterbank._filters"],
    "decoder.filters.weight": ["decoder.filterbank._filters"],
}


def asteroid(model_name: str, model_args: Settings, weights: Tensors) -> Foreign:
    """A model of Asteroid in our words.

    Raises:
        CheckpointError: If ours cannot be it.
    """
    origin = f"Asteroid's {model_name}"
    readers = {"ConvTasNet": conv_tasnet, "DPRNNTasNet": dprnn}
    if model_name not in readers:
        raise CheckpointError(f"{origin} is not one of {', '.join(readers)}, which are imported.")
    args = {key: value for key, value in model_args.items() if isinstance(value, (int, float, str))}  # no None
    check_same(origin, args, fb_name=("free", "FreeFB"), out_chan=(args.get("n_filters"),))
    model, names = readers[model_name](origin, {"encoder_activation": "linear"} | args, weights)
    model |= known(args, FRONT_SIZES)
    return Foreign(origin, model, weights, names, needed=("n_sources",), data=rate_of(args.get("sample_rate")))


def conv_tasnet(origin: str, args: Settings, weights: Tensors) -> tuple[Settings, Names]:
    """Ours and its weights."""
    check_same(origin, args, encoder_activation=("linear", "relu"), causal=(False,), norm_type=("gLN", "cLN"))
    keys = {
        "bottleneck": "bn_chan",
        "hidden": "hid_chan",
        "block_kernel": "conv_kernel_size",
        "n_blocks": "n_blocks",
        "n_repeats": "n_repeats",
        "mask": "mask_act",
    }
    ways = [way for way in ("res_conv", "skip_conv") if f"masker.TCN.0.{way}.weight" in weights]
    skip = size_of(weights, "masker.TCN.0.skip_conv.weight", 0) if len(ways) == 2 else 0
    names = FRONT_NAMES | gamma_and_beta("norm", "masker.bottleneck.0")
    names |= weight_and_bias("narrow", "masker.bottleneck.1") | weight_and_bias("widen", "masker.mask_net.1")
    names["slope"] = ["masker.mask_net.0.weight"]
    for i in range(count_of(weights, "masker.TCN.*.")):
        ours, theirs = f"blocks.{i}", f"masker.TCN.{i}.shared_block"
        names |= weight_and_bias(f"{ours}.inner", f"{theirs}.0")
        names |= gamma_and_beta(f"{ours}.inner_norm", f"{theirs}.2")
        names |= gamma_and_beta(f"{ours}.outer_norm", f"{theirs}.5")
        names |= {f"{ours}.inner_slope": [f"{theirs}.1.weight"], f"{ours}.outer_slope": [f"{theirs}.4.weight"]}
        names |= {f"{ours}.taps": [f"{theirs}.3.weight"], f"{ours}.taps_bias": [f"{theirs}.3.bias"]}
        for kind in ("weight", "bias"):
            names[f"{ours}.outer.{kind}"] = [f"masker.TCN.{i}.{way}.{kind}" for way in ways]
    model = {"name": "conv_tasnet", "skip": skip, "rectify": args["encoder_activation"] == "relu", **known(args, keys)}
    return model | {"norm": str(args.get("norm_type", "gLN")).lower()}, names


def dprnn(origin: str, args: Settings, weights: Tensors) -> tuple[Settings, Names]:
    """Ours and its weights."""
    check_same(origin, args, encoder_activation=("linear", "relu"), norm_type=("gLN",), rnn_type=("LSTM", "lstm"))
    check_same(origin, args, bidirectional=(True,), use_mulcat=(False,), num_layers=(1,))
    check_same(origin, args, mask_act=("sigmoid", "relu"))  # its softmax is over filters
    if isinstance(args.get("chunk_size"), int):
        check_same(origin, args, hop_size=(args["chunk_size"] // 2,))
    keys = {
        "bottleneck": "bn_chan",
        "hidden": "hid_size",
        "chunk_size": "chunk_size",
        "n_blocks": "n_repeats",
        "mask": "mask_act",
    }
    names = FRONT_NAMES | gamma_and_beta("norm", "masker.bottleneck.0") | {"leave.weight": ["masker.mask_net.weight"]}
    names |= {"activation.weight": ["masker.first_out.0.weight"]}
    for ours, theirs in {
        "enter": "bottleneck.1",
        "split": "first_out.1",
        "output": "net_out.0",
        "gate": "net_gate.0",
    }.items():
        names |= weight_and_bias(ours, f"masker.{theirs}")
    for i in range(count_of(weights, "masker.net.*.")):
        for place, path in enumerate(("intra", "inter")):
            ours, theirs = f"paths.{2 * i + place}", f"masker.net.{i}.{path}"
            names |= {f"{ours}.lstm.{name}": [f"{theirs}_RNN.rnn.{name}"] for name in LSTM}
            names |= weight_and_bias(f"{ours}.merge.narrow", f"{theirs}_linear")
            names |= gamma_and_beta(f"{ours}.merge.norm", f"{theirs}_norm")
    rectify = args["encoder_activation"] == "relu"
    return {"name": "dprnn", "ends": "chunk", "rectify": rectify, **known(args, keys)}, names
