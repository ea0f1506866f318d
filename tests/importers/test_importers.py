"""Imported models give the output of the original toolkit; anything else is refused in one sentence.

`tests/importers/recorded` holds tiny models of other toolkits with random weights, and their output for noise, made by
scripts/record_peer_models.py.
"""

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.torch_version import TorchVersion

from unbraid.build import load_model
from unbraid.cli.main import main
from unbraid.importers.safe_reading import UNPARSED, parse_plain_yaml

RECORDED = Path(__file__).parent / "recorded"
RECORDER = Path(__file__).parents[2] / "scripts" / "record_peer_models.py"
SPEECH = Path(__file__).resolve().parents[3] / "shared" / "data" / "speech"
PEERS = os.environ.get("UNBRAID_PEERS")

MODELS = {
    "asteroid-conv_tasnet": "conv_tasnet",
    "asteroid-conv_tasnet-linear": "conv_tasnet",
    "asteroid-dprnn": "dprnn",
    "asteroid-dprnn-rectified": "dprnn",
    "speechbrain-sepformer": "sepformer",
    "speechbrain-re_sepformer": "re_sepformer",
    "speechbrain-dprnn": "dprnn",
    "msst-bs_roformer": "bs_roformer",
    "msst-mel_band_roformer": "bs_roformer",
}
IN_TREE = sorted(path.name for path in RECORDED.iterdir())


def files_of(folder):
    """The paths on the command line: a folder for SpeechBrain, files for the others."""
    if folder.name.startswith("speechbrain"):
        return [folder]
    return sorted(path for path in folder.iterdir() if path.suffix != ".npz")


def import_model(capsys, files, out, *options):
    assert main(["import", *map(str, files), "-o", str(out), *map(str, options)]) == 0, capsys.readouterr().err
    return load_model(out)


def import_fails(capsys, files, out, *options):
    """Run an import that must fail; return its one line of output, after checking that it wrote nothing."""
    status = main(["import", *map(str, files), "-o", str(out), *map(str, options)])
    printed, err = capsys.readouterr()
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert err.startswith("unbraid: ")
    assert not out.exists()
    return err


def check_same_output(model, folder):
    """Check that the output is within 1e-5 of the toolkit's, relative to its norm; 1e-4 is promised."""
    recorded = np.load(folder / "recorded.npz")
    theirs = torch.from_numpy(recorded["sources"])
    with torch.no_grad():
        ours = model(torch.from_numpy(recorded["mixture"])[None])[0]
    assert ours.shape == theirs.shape
    assert min(source.norm() for source in theirs) > 0.1 * theirs.norm()
    assert len(theirs) == 1 or (theirs[0] - theirs[1]).norm() > 0.1 * theirs.norm()
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture
def model_copy(tmp_path):
    """A function that copies a recorded model, to be changed, and returns the folder."""

    def copy(name):
        return Path(shutil.copytree(RECORDED / name, tmp_path / name))

    return copy


def load(path):
    with torch.serialization.safe_globals([TorchVersion]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", IN_TREE)
def test_the_output_equals_the_original_toolkits(name, tmp_path, capsys):
    model, recipe = import_model(capsys, files_of(RECORDED / name), tmp_path / "out")

    check_same_output(model, RECORDED / name)
    assert recipe.model.name == MODELS[name]
    assert recipe.data.sample_rate == 8000


@pytest.mark.parametrize("name", ["asteroid-conv_tasnet", "msst-bs_roformer", "speechbrain-sepformer"])
def test_a_folder_may_be_named_instead_of_its_files(name, tmp_path, capsys):
    model, _ = import_model(capsys, [RECORDED / name], tmp_path / "out")

    check_same_output(model, RECORDED / name)


def test_several_files_of_weights_are_ambiguous(model_copy, tmp_path, capsys):
    first = model_copy("asteroid-conv_tasnet")
    second = model_copy("asteroid-dprnn")
    same_name = [first / "best_model.pth", second / "best_model.pth"]

    assert "are both named" in import_fails(capsys, same_name, tmp_path / "out")
    assert "are both named" in import_fails(
        capsys, [model_copy("speechbrain-dprnn"), RECORDED / "speechbrain-sepformer"], tmp_path / "o"
    )
    shutil.copy(same_name[1], first / "another.pth")
    message = import_fails(capsys, [first], tmp_path / "out")
    assert "several files of weights (another.pth, best_model.pth)" in message


@pytest.fixture(scope="module", params=["noise", "speech"])
def peers(request, tmp_path_factory):
    """A folder of larger models and their outputs, made now by the other toolkits."""
    if not PEERS:
        pytest.skip("UNBRAID_PEERS does not name a Python with the other toolkits")
    if request.param == "noise":
        mixture = 0.1 * np.random.default_rng(1).standard_normal((2, 4000))
    elif SPEECH.exists():
        talkers = [soundfile.read(path, frames=16000)[0] for path in sorted(SPEECH.rglob("*.flac"))[:200:50]]
        mixture = np.stack([talkers[0] + talkers[1], talkers[2] + talkers[3]])
    else:
        pytest.skip("the real recordings are not next to this checkout")
    folder = tmp_path_factory.mktemp(request.param)
    np.save(folder / "mixture.npy", mixture)
    command = [PEERS, RECORDER, folder, *MODELS, "--larger", "--mixture", folder / "mixture.npy"]
    subprocess.run([str(argument) for argument in command], check=True, capture_output=True, timeout=600)
    return folder


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_output_of_a_larger_model_equals_the_original_toolkits(name, peers, tmp_path, capsys):
    model, _ = import_model(capsys, files_of(peers / name), tmp_path / "out")

    check_same_output(model, peers / name)


def test_an_incomplete_last_frame_is_separated_as_if_padded(tmp_path, capsys):
    """Other toolkits return silence for an incomplete last frame, but the same as unbraid for the padded mixture."""
    model, _ = import_model(capsys, files_of(RECORDED / "asteroid-conv_tasnet"), tmp_path / "out")
    recorded = np.load(RECORDED / "asteroid-conv_tasnet" / "recorded.npz")
    mixture = torch.from_numpy(recorded["mixture"])[None]
    mixture[..., -3:] = 0

    with torch.no_grad():
        torch.testing.assert_close(model(mixture[..., :-3]), model(mixture)[..., :-3])


def test_an_imported_model_separates_files_and_starts_a_training(tmp_path, recipe_file, capsys):
    out = tmp_path / "imported"
    import_model(capsys, files_of(RECORDED / "asteroid-conv_tasnet"), out)
    soundfile.write(tmp_path / "in.wav", 0.1 * np.random.default_rng(0).standard_normal(800), 8000)
    sizes = ["kernel_size=8", "bottleneck=6", "hidden=10", "skip=7", "n_repeats=2"]
    overrides = [argument for size in [*sizes, f"init={out}"] for argument in ("--set", f"model.{size}")]

    assert main(["separate", str(tmp_path / "in.wav"), "-m", str(out), "-o", str(tmp_path / "sources")]) == 0
    assert main(["train", str(recipe_file()), "--run", str(tmp_path / "run"), *overrides]) == 0

    assert len(list((tmp_path / "sources").iterdir())) == 2
    before, after = (load_model(folder)[0].decoder.filters.weight for folder in (out, tmp_path / "run"))
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_the_loss_in_the_recipe_says_whether_levels_matter(tmp_path, capsys):
    _, music = import_model(capsys, files_of(RECORDED / "msst-bs_roformer"), tmp_path / "music")
    _, speech = import_model(capsys, files_of(RECORDED / "speechbrain-sepformer"), tmp_path / "speech")

    assert (music.loss_is_scale_invariant, music.assign) == (False, "fixed")
    assert (speech.loss_is_scale_invariant, speech.assign) == (True, "permutation")


def test_without_yaml_the_options_give_what_no_shape_reveals(model_copy, tmp_path, capsys):
    folder = model_copy("speechbrain-sepformer")
    (folder / "hyperparams.yaml").unlink()
    options = ["--set", "model.n_heads=2", "--set", "model.chunk_size=10"]

    assert "--set model.n_heads=... --set model.chunk_size=..." in import_fails(capsys, [folder], tmp_path / "out")
    assert "add --sample-rate" in import_fails(capsys, [folder], tmp_path / "out", *options)
    model, _ = import_model(capsys, [folder], tmp_path / "out", *options, "--sample-rate", 8000)

    check_same_output(model, folder)


def test_speechbrains_three_files_may_be_named_one_by_one(tmp_path, capsys):
    folder = RECORDED / "speechbrain-sepformer"
    files = [folder / name for name in ("decoder.ckpt", "hyperparams.yaml", "masknet.ckpt", "encoder.ckpt")]

    check_same_output(import_model(capsys, files, tmp_path / "out")[0], folder)


def test_a_training_checkpoint_of_msst_from_several_gpus_is_read(model_copy, tmp_path, capsys):
    folder = model_copy("msst-bs_roformer")
    weights = {f"module.{name}": weight for name, weight in load(folder / "model.ckpt").items()}
    torch.save({"epoch": 3, "model_state_dict": weights}, folder / "model.ckpt")

    check_same_output(import_model(capsys, files_of(folder), tmp_path / "out")[0], folder)


class Payload:
    """Creates a folder when it is unpickled without protection."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("position", ["weight", "other entry"])
def test_code_in_a_pickle_does_not_run(save, position, tmp_path, capsys):
    file = tmp_path / "model.pth"
    created = tmp_path / "created"
    weights = {"a": torch.ones(2), "b": Payload(created)}
    save(weights if position == "weight" else {"state_dict": {"a": torch.ones(2)}, "infos": Payload(created)}, file)

    line = import_fails(capsys, [file], tmp_path / "out")

    assert "model.pth" in line
    assert not created.exists()
    with file.open("rb") as opened:  # without protection, the payload does run
        (torch.load(file, weights_only=False) if save is torch.save else pickle.load(opened))  # noqa: S301
    assert created.exists()


def test_code_in_a_pickle_is_named(tmp_path, capsys):
    torch.save({"a": Payload(tmp_path / "created")}, tmp_path / "model.pth")

    assert "mkdir" in import_fails(capsys, [tmp_path / "model.pth"], tmp_path / "out")


def test_code_in_speechbrains_masknet_does_not_run(model_copy, tmp_path, capsys):
    folder = model_copy("speechbrain-sepformer")
    torch.save({"norm.weight": Payload(tmp_path / "created")}, folder / "masknet.ckpt")

    assert "masknet.ckpt" in import_fails(capsys, [folder], tmp_path / "out")
    assert not (tmp_path / "created").exists()


def test_code_in_a_yaml_does_not_run(model_copy, tmp_path, capsys):
    folder = model_copy("speechbrain-sepformer")
    yaml = folder / "hyperparams.yaml"
    created = tmp_path / "created"
    payload = f"created: !apply:os.mkdir [{created}]\nmore: !!python/object/apply:os.mkdir ['{created}']\n"
    yaml.write_text(payload + yaml.read_text())

    import_model(capsys, [folder], tmp_path / "out")

    assert not created.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of weights"),
        (b"hello", "is not a file of weights"),
        (np.random.default_rng(0).bytes(300), "is not a file of weights"),
        ({}, "contains no weights"),
        ([torch.ones(1)], "contains a list"),
        (torch.ones(1), "contains a Tensor"),
        ({"state_dict": {}}, "contains no weights"),
        ({"a": torch.ones(1), "b": 3}, "contains 'b', a int"),
        ({"conv.weight": torch.ones(1)}, "is not a known model"),
        ({"model_name": "DCUNet", "model_args": {}, "state_dict": {"a": torch.ones(1)}}, "DCUNet is not one of"),
        (
            {"model_name": "DPRNNTasNet", "model_args": {}, "state_dict": {"a": torch.ones(1)}},
            "do not contain n_sources of Asteroid's DPRNNTasNet",
        ),
        ({"band_split.to_features.0.0.gamma": torch.ones(1)}, "There is no band_split"),
    ],
)
def test_a_file_that_is_no_model_is_refused_in_one_sentence(content, message, tmp_path, capsys):
    file = tmp_path / "model.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)

    assert message in import_fails(capsys, [file], tmp_path / "out", "--sample-rate", 8000)


@pytest.mark.parametrize("newer", ["layers.0.0.layers.0.0.branch.to_qkv.weight", "layers.0.0.to_value_residual_mix"])
def test_models_of_the_newer_bs_roformer_package_are_refused(newer, model_copy, tmp_path, capsys):
    folder = model_copy("msst-bs_roformer")
    weights = load(folder / "model.ckpt")
    torch.save(weights | {newer: torch.zeros(3)}, folder / "model.ckpt")

    assert "Only models that MSST saves can be imported" in import_fails(capsys, [folder], tmp_path / "out")


def test_missing_files_are_named(model_copy, tmp_path, capsys):
    folder = model_copy("speechbrain-sepformer")
    (folder / "masknet.ckpt").unlink()
    (tmp_path / "empty").mkdir()

    assert "masknet.ckpt" in import_fails(capsys, [folder], tmp_path / "out")
    assert "nowhere" in import_fails(capsys, [tmp_path / "nowhere"], tmp_path / "out")
    assert "has no file of weights" in import_fails(capsys, [tmp_path / "empty"], tmp_path / "out")
    two = [RECORDED / "msst-bs_roformer" / "model.ckpt", RECORDED / "asteroid-dprnn" / "best_model.pth"]
    assert "2 files of weights" in import_fails(capsys, two, tmp_path / "out")


def test_an_unsupported_network_of_speechbrain_is_refused(tmp_path, capsys):
    for part, name in {"encoder": "conv1d", "masknet": "temporal_conv_net.layers", "decoder": "deconv"}.items():
        torch.save({f"{name}.weight": torch.ones(1)}, tmp_path / f"{part}.ckpt")

    assert "pads its convolutions in another way" in import_fails(capsys, [tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["state_dict"].pop("masker.bottleneck.1.bias"), "lacks"),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["state_dict"].update(x=torch.ones(1)), "has x, which"),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["model_args"].update(bn_chan=9), "has the shape"),
        (
            "asteroid-conv_tasnet",
            "best_model.pth",
            lambda c: c["model_args"].update(n_blocks=3),
            "lacks the weight that unbraid calls blocks.4",
        ),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["model_args"].update(n_blocks="x"), "model.n_blocks"),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["model_args"].update(mask_act="tanh"), "'tanh'"),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["model_args"].update(causal=True), "causal = True"),
        ("asteroid-conv_tasnet", "best_model.pth", lambda c: c["model_args"].pop("sample_rate"), "--sample-rate"),
        ("asteroid-dprnn", "best_model.pth", lambda c: c["model_args"].update(hop_size=3), "hop_size = 3"),
        ("asteroid-dprnn", "best_model.pth", lambda c: c["model_args"].update(mask_act="softmax"), "'softmax'"),
        ("asteroid-dprnn", "best_model.pth", lambda c: c["model_args"].update(rnn_type="GRU"), "rnn_type = 'GRU'"),
        ("speechbrain-sepformer", "masknet.ckpt", lambda c: c["dual_mdl.0.intra_mdl.pos_enc.pe"].add_(1), "the table"),
        ("speechbrain-sepformer", "masknet.ckpt", lambda c: c["conv2d.weight"].resize_(8, 0), "fit no model"),
        (
            "speechbrain-sepformer",
            "masknet.ckpt",
            lambda c: c["dual_mdl.0.intra_mdl.pos_enc.pe"].resize_(5),
            "fit no model",
        ),
        ("speechbrain-sepformer", "encoder.ckpt", lambda c: c.clear(), "contains no weights"),
        ("speechbrain-dprnn", "masknet.ckpt", lambda c: c.pop("dual_mdl.0.inter_linear.w.bias"), "inter_linear.w.bias"),
        ("msst-bs_roformer", "model.ckpt", lambda c: c["final_norm.gamma"].fill_(torch.nan), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(name, file, change, message, model_copy, tmp_path, capsys):
    folder = model_copy(name)
    content = load(folder / file)
    change(content)
    torch.save(content, folder / file)

    assert message in import_fails(capsys, files_of(folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "line", "replacement", "message"),
    [
        ("speechbrain-sepformer", "norm_before: true", "norm_before: false", "norm_before = False"),
        ("speechbrain-sepformer", "    norm_before: true\n", "", "norm_before = False"),
        ("speechbrain-sepformer", "dropout: 0", "activation: gelu", "activation = 'gelu'"),
        ("speechbrain-sepformer", "norm: ln", "norm: cln", "norm = 'cln'"),
        (
            "speechbrain-sepformer",
            "skip_around_intra: true",
            "skip_around_intra: !ref <a b>",
            "an expression that is not read",
        ),
        ("speechbrain-sepformer", "K: 10 ", "K: !ref <half> * 2", "do not contain chunk_size"),
        ("speechbrain-sepformer", "K: 10 ", "K: 9 ", "must be even"),
        ("speechbrain-sepformer", "nhead: 2", "nhead: 3", "multiple of n_heads"),
        ("msst-bs_roformer", "stft_win_length: 32", "stft_win_length: 16", "stft_win_length = 16"),
        ("msst-mel_band_roformer", "sample_rate: 8000\n  stft", "sample_rate: 4000\n  stft", "has the shape"),
    ],
)
def test_unsupported_settings_are_named(name, line, replacement, message, model_copy, tmp_path, capsys):
    folder = model_copy(name)
    [yaml] = folder.glob("*.yaml")
    assert line in yaml.read_text()
    yaml.write_text(yaml.read_text().replace(line, replacement))

    assert message in import_fails(capsys, files_of(folder), tmp_path / "out")


def test_a_rate_that_contradicts_the_file_is_refused(tmp_path, capsys):
    files = files_of(RECORDED / "asteroid-dprnn")

    assert "8000 Hz, not 16000" in import_fails(capsys, files, tmp_path / "out", "--sample-rate", 16000)


@pytest.mark.parametrize("override", ["n_heads=2", "model.=2", "model.n_heads", "data.seed=1"])
def test_an_override_of_something_else_is_refused(override, tmp_path, capsys):
    assert "must look like" in import_fails(
        capsys, files_of(RECORDED / "asteroid-dprnn"), tmp_path / "out", "--set", override
    )


def test_a_folder_that_is_not_empty_is_not_touched(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    assert main(["import", *map(str, files_of(RECORDED / "asteroid-dprnn")), "-o", str(tmp_path / "out")]) == 2

    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_simple_lines_of_yaml_are_read_and_the_rest_is_skipped():
    settings = parse_plain_yaml(
        "# a comment: no\n"
        "rate: 8000 # Hz\n"
        "rates: [8000, 1.6e4]\n"
        "word: 'a: #b'\n"
        "nothing: null\n"
        "net: !new:some.package.Net\n"
        "  size: !ref <rate>\n"
        "  other: !ref <rate> // 2\n"
        "  unknown: !ref <missing>\n"
        "  layers:\n"
        "    size: 3\n"
        "  on: True\n"
        "bands: !!python/tuple\n"
        "  - 2\n"
    )

    assert settings[""]["rate"] == 8000
    assert settings[""]["rates"] == [8000, 1.6e4]
    assert settings[""]["nothing"] is None
    assert settings["net"]["!new"] == "some.package.Net"
    assert (settings["net"]["size"], settings["net"]["on"]) == (8000, True)
    assert settings["net"]["other"] is settings["net"]["unknown"] is settings[""]["bands"] is UNPARSED
    assert settings["bands"] == {}
