"""Record models of other toolkits with random weights, in each toolkit's format, and their output for a mixture.

Run it with a Python that has the toolkits installed:

    PYTHON scripts/record_peer_models.py tests/importers/recorded                          the files in this repository
    PYTHON scripts/record_peer_models.py OUT --larger --mixture mixture.npy [NAME ...]     for the tests marked peers
"""

import argparse
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(sys.prefix) / "src" / "asteroid"))  # where it is unpacked, if it is not installed
sys.modules.setdefault("pytorch_lightning", types.SimpleNamespace(__version__="2.5.0"))  # Asteroid reads its version
warnings.filterwarnings("ignore")


def main():
    """Record the models that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--mixture", type=Path, help=".npy file (channel, time); noise by default")
    parser.add_argument("--larger", action="store_true", help="larger models than those in the repository")
    args = parser.parse_args()
    for name in args.names or CASES:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        make, tiny, larger, n_samples = CASES[name]
        torch.manual_seed(0)
        separate = make(folder, tiny | (larger if args.larger else {}))
        noise = 0.1 * np.random.default_rng(0).standard_normal((2 if tiny.get("stereo") else 1, n_samples))
        mixture = torch.tensor(np.load(args.mixture) if args.mixture else noise, dtype=torch.float32)
        with torch.no_grad():
            sources = separate(mixture)
        for file in [*folder.glob("*.ckpt"), *folder.glob("*.pth")]:
            compress(file)
        np.savez_compressed(folder / "recorded.npz", mixture=mixture.numpy(), sources=sources.numpy())
        print(folder, tuple(sources.shape))


def compress(file):
    """Compress a file that torch saved; torch can read the result."""
    with zipfile.ZipFile(file) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)


def randomise(module):
    """Change the initial weights so that the sources differ, and no two norms or slopes are the same."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.mul_(1.7) if weight.squeeze().dim() > 1 else weight.add_(0.3 * torch.randn_like(weight))
    return module.eval()


def asteroid(folder, sizes):
    """Save a model of Asteroid as its recipes save the best one; return its separation function."""
    import asteroid.models

    model = randomise(getattr(asteroid.models, sizes["model"])(**{key: sizes[key] for key in sizes if key != "model"}))
    torch.save(model.serialize(), folder / "best_model.pth")
    return lambda mixture: model(mixture[:, None]).transpose(0, 1)


def speechbrain(folder, sizes):
    """Save a separator as SpeechBrain's checkpointer does, built from a YAML file; return its separation function."""
    from hyperpyyaml import load_hyperpyyaml

    text = sizes["yaml"].format(**sizes)
    (folder / "hyperparams.yaml").write_text(text)
    objects = load_hyperpyyaml(text)
    parts = {part: randomise(objects["modules"][part]) for part in ("encoder", "masknet", "decoder")}
    for part, module in parts.items():
        weights = module.state_dict()
        for name in weights:
            if name.endswith("pos_enc.pe") and "rows" in sizes:
                weights[name] = weights[name][:, : sizes["rows"]].clone()
        torch.save(weights, folder / f"{part}.ckpt")

    def separate_channel(mixture):
        encoded = parts["encoder"](mixture)
        sources = [parts["decoder"](encoded * mask).view(-1) for mask in parts["masknet"](encoded)]
        missing = mixture.shape[-1] - sources[0].shape[-1]
        return torch.nn.functional.pad(torch.stack(sources), (0, missing))

    return lambda mixture: torch.cat([separate_channel(channel[None])[:, None] for channel in mixture], 1)


FRONT = """# Made by record_peer_models.py
sample_rate: 8000
num_spks: {n_sources}
width: {width}

Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: !ref <width>

Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: !ref <width>
    out_channels: 1
    kernel_size: 16
    stride: 8
    bias: false

modules:
    encoder: !ref <Encoder>
    decoder: !ref <Decoder>
    masknet: !ref <MaskNet>
"""

DUAL_PATH = """
MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: !ref <num_spks>
    in_channels: !ref <width>
    out_channels: !ref <width>
    num_layers: {n_blocks}
    K: {chunk_size}   # frames
    intra_model: !ref <intra>
    inter_model: !ref <inter>
    norm: ln
    linear_layer_after_inter_intra: {linear}
    skip_around_intra: true
"""

TRANSFORMER = """
{path}: !new:speechbrain.lobes.models.{kind}
    num_layers: {n_layers}
    d_model: !ref <width>
    nhead: {n_heads}
    d_ffn: {hidden}
    dropout: 0
    use_positional_encoding: true
    norm_before: true
"""

LSTM = """
{path}: !new:speechbrain.lobes.models.dual_path.SBRNNBlock
    input_size: !ref <width>
    hidden_channels: {hidden}
    num_layers: 1
    dropout: 0
    bidirectional: true
"""

RESOURCE_EFFICIENT = """
MaskNet: !new:speechbrain.lobes.models.resepformer.ResourceEfficientSeparator
    input_dim: !ref <width>
    num_spk: !ref <num_spks>
    causal: false
    unit: 256
    segment_size: {chunk_size}
    layer: {n_blocks}
    mem_type: 'av'
    seg_model: !ref <intra>
    mem_model: !ref <inter>
"""


def yaml(path, masknet, kind=""):
    """Return a YAML file like those of SpeechBrain's recipes, with placeholders for the sizes."""
    paths = [path.replace("{path}", name).replace("{kind}", kind) for name in ("intra", "inter")]
    return FRONT + "".join(paths) + masknet


def roformer(folder, sizes):
    """Save a model of the package BS-RoFormer in MSST's format, without what MSST's copy of the package lacks."""
    import bs_roformer

    options = {key: sizes[key] for key in sizes if key not in ("model", "rate", "yaml")}
    model = randomise(getattr(bs_roformer, sizes["model"])(**options, num_residual_streams=1))
    for module in model.modules():
        for mix in ("to_value_residual_mix", "learned_value_residual_mix"):
            if hasattr(module, mix):
                setattr(module, mix, None)
    names = [re.sub(r"\.branch\.", ".", name) for name in model.state_dict()]
    if sizes["model"] == "MelBandRoformer":  # its list has an empty entry for the linear transformer
        names = [re.sub(r"^layers\.(\d+)\.(\d+)", lambda m: f"layers.{m[1]}.{int(m[2]) - 1}", name) for name in names]
    torch.save(dict(zip(names, model.state_dict().values(), strict=True)), folder / "model.ckpt")
    lines = [f"audio:\n  sample_rate: {sizes['rate']}\n\nmodel:"]
    for key, value in options.items():
        if key == "freqs_per_bands":
            lines += [f"  {key}: !!python/tuple", *(f"    - {n}" for n in value)]
        else:
            lines.append(f"  {key}: {str(value).lower()}")
    lines.append("\ntraining:\n  instruments: ['vocals', 'other']\n  target_instrument: null\n")
    (folder / "config.yaml").write_text("\n".join(lines))
    n_stems = options["num_stems"]
    n_channels = 2 if options["stereo"] else 1

    def separate(mixture):
        sources = model(mixture.view(-1, n_channels, mixture.shape[-1]))
        return sources.view(-1, n_stems, n_channels, mixture.shape[-1]).transpose(0, 1).flatten(1, 2)

    return separate


CONV_TASNET = {
    "model": "ConvTasNet",
    "n_src": 2,
    "n_filters": 16,
    "kernel_size": 8,
    "stride": 4,
    "bn_chan": 6,
    "hid_chan": 10,
    "skip_chan": 7,
    "n_blocks": 2,
    "n_repeats": 2,
}
LARGER_CONV_TASNET = {"n_src": 3, "n_filters": 256, "bn_chan": 64, "hid_chan": 128, "skip_chan": 48, "n_blocks": 6}
SEPFORMER = {
    "yaml": yaml(TRANSFORMER, DUAL_PATH, "dual_path.SBTransformerBlock"),
    "n_sources": 2,
    "width": 4,
    "n_layers": 2,
    "n_heads": 2,
    "hidden": 6,
    "n_blocks": 1,
    "chunk_size": 10,
    "linear": "false",
}
RE_SEPFORMER = {
    "yaml": yaml(TRANSFORMER, RESOURCE_EFFICIENT, "resepformer.SBTransformerBlock_wnormandskip"),
    "rows": 1000,  # of the 100,000 of the table of positions, to keep the file small
}
SPEECHBRAIN_DPRNN = {"yaml": yaml(LSTM, DUAL_PATH), "linear": "true"}
LARGER_SEPFORMER = {
    "rows": None,
    "n_sources": 3,
    "width": 64,
    "n_heads": 4,
    "hidden": 128,
    "n_blocks": 2,
    "chunk_size": 100,
}
DPRNN = {
    "model": "DPRNNTasNet",
    "n_src": 2,
    "n_filters": 6,
    "kernel_size": 8,
    "stride": 4,
    "bn_chan": 5,
    "hid_size": 4,
    "chunk_size": 12,
    "n_repeats": 2,
}
LARGER_DPRNN = {"n_src": 3, "n_filters": 64, "bn_chan": 32, "hid_size": 48, "chunk_size": 100, "mask_act": "relu"}
ROFORMER = {
    "rate": 8000,
    "dim": 4,
    "depth": 1,
    "stereo": True,
    "num_stems": 2,
    "time_transformer_depth": 1,
    "freq_transformer_depth": 2,
    "dim_head": 4,
    "heads": 3,
    "zero_dc": True,
    "mask_estimator_depth": 2,
}
BANDS = {"model": "BSRoformer", "freqs_per_bands": (2, 2, 3, 5, 5), "stft_n_fft": 32, "stft_win_length": 32}
MEL = {
    "model": "MelBandRoformer",
    "stereo": False,
    "num_bands": 4,
    "sample_rate": 8000,
    "stft_n_fft": 64,
    "stft_win_length": 64,
}
CASES = {
    "asteroid-conv_tasnet": (asteroid, CONV_TASNET | {"encoder_activation": "relu"}, LARGER_CONV_TASNET, 500),
    "asteroid-conv_tasnet-linear": (
        asteroid,
        CONV_TASNET | {"norm_type": "cLN", "skip_chan": 0},
        LARGER_CONV_TASNET,
        500,
    ),
    "asteroid-dprnn": (asteroid, DPRNN, LARGER_DPRNN, 500),
    "asteroid-dprnn-rectified": (asteroid, DPRNN | {"encoder_activation": "relu"}, LARGER_DPRNN, 500),
    "speechbrain-sepformer": (speechbrain, SEPFORMER, LARGER_SEPFORMER, 504),
    "speechbrain-re_sepformer": (speechbrain, SEPFORMER | RE_SEPFORMER, LARGER_SEPFORMER, 504),
    "speechbrain-dprnn": (speechbrain, SEPFORMER | SPEECHBRAIN_DPRNN, LARGER_SEPFORMER, 504),
    "msst-bs_roformer": (roformer, ROFORMER | BANDS | {"stft_hop_length": 8}, {"dim": 64, "depth": 3}, 480),
    "msst-mel_band_roformer": (
        roformer,
        ROFORMER | MEL | {"stft_hop_length": 16, "linear_transformer_depth": 0},
        {"dim": 64, "depth": 3, "stereo": True, "num_stems": 2, "mask_estimator_depth": 1},
        480,
    ),
}
"""For each name: function, sizes, changes for ``--larger``, and the number of samples of noise."""


if __name__ == "__main__":
    main()
