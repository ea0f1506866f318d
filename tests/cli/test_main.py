"""The command line as users see it: help, and for each user error one line on stderr and status 2."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from unbraid.audio import read_audio
from unbraid.cli.main import main
from unbraid.config.recipe import load_recipe
from unbraid.metrics import si_sdr
from unbraid.records import read_rows


def fails(capsys, *arguments):
    """Run a command that must end with a user error; returns its line on stderr."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.count("\n") == 1
    assert err.startswith("unbraid: ")
    assert "Traceback" not in out + err
    return err


def write_wav(path, audio, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype="FLOAT")


@pytest.fixture
def trained(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(recipe_file()), "--run", str(run)]) == 0
    capsys.readouterr()
    return run


def test_help_imports_no_torch():
    script = "import sys\nfrom unbraid.cli.main import parser\nparser().format_help()\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["separate"], ["demo"]])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*command, "--help"])
    assert exited.value.code == 0
    assert "usage: unbraid" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["evaluate", "x", "--n-items", "0"], ["doctor", "x", "--last"]]
)
def test_wrong_arguments_print_one_line_and_return_2(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert err.count("\n") == 1
    assert "--help" in err


def test_an_unknown_recipe_lists_the_built_in_ones_and_suggests_the_nearest(capsys):
    line = fails(capsys, "train", "conv_tasnet_smal")

    assert "sepformer" in line
    assert "Did you mean 'conv_tasnet_small'?" in line


def test_a_built_in_recipe_is_found_by_name_and_asks_for_data(capsys):
    assert "--set data.path=PATH" in fails(capsys, "train", "conv_tasnet_small")


def test_an_unknown_key_is_reported_with_the_nearest(recipe_file, capsys):
    line = fails(capsys, "train", recipe_file(), "--set", "train.max_stepz=3")

    assert "'max_stepz'" in line
    assert "Did you mean 'max_steps'?" in line


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["does not exist"]),
        (lambda folder: folder.mkdir(), ["has no speakers"]),
        (lambda folder: (folder / "a" / "x.txt").parent.mkdir(parents=True), ["has no speakers"]),
        (lambda folder: folder.write_text("hello"), ["neither a folder nor a .csv"]),
    ],
    ids=["missing", "empty", "no audio", "another file"],
)
def test_missing_data_is_reported(make, words, recipe_file, tmp_path, capsys):
    folder = tmp_path / "data"
    make(folder)

    line = fails(capsys, "train", recipe_file(), "--set", f"data.path={folder}", "--run", tmp_path / "run")

    assert [word for word in words if word not in line] == []
    assert str(folder) in line


@pytest.mark.parametrize(
    ("folder", "override", "words"),
    [
        ({"n_speakers": 1}, "data.n_sources=2", ["1 speaker cannot be split"]),
        ({"seconds": 0.3}, "data.excerpt_seconds=0.5", ["as long as an excerpt of 0.5 s", "0.30 s"]),
        ({"sample_rate": 16000}, "data.sample_rate=8000", ["16000 Hz", "data.resample = true"]),
    ],
    ids=["one speaker", "too short", "another rate"],
)
def test_data_that_does_not_fit_the_recipe_is_reported(
    folder, override, words, recipe_file, speaker_folder, tmp_path, capsys
):
    line = fails(
        capsys, "train", recipe_file(path=speaker_folder(**folder)), "--set", override, "--run", tmp_path / "r"
    )

    assert [word for word in words if word not in line] == []


def test_a_split_with_one_speaker_is_reported(recipe_file, speaker_folder, tmp_path, capsys):
    speaker_folder(n_speakers=1, root=tmp_path / "data" / "train")
    speaker_folder(n_speakers=3, root=tmp_path / "data" / "valid")

    line = fails(capsys, "train", recipe_file(path=tmp_path / "data"), "--run", tmp_path / "run")

    assert "'train'" in line
    assert "1 speaker," in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_silent_corpus_ends_the_run_with_one_line(workers, recipe_file, speaker_folder, tmp_path, capsys):
    folder = speaker_folder(n_speakers=8, n_files=1)
    for path in folder.rglob("*.wav"):
        write_wav(path, np.zeros(8000, np.float32))

    file = recipe_file(path=folder)
    line = fails(capsys, "train", file, "--run", tmp_path / "run", "--set", f"data.workers={workers}")

    assert "is silent" in line
    assert ".wav" in line


def test_a_run_directory_that_is_a_file_is_reported(recipe_file, tmp_path, capsys):
    (tmp_path / "file").touch()

    assert "cannot be created" in fails(capsys, "train", recipe_file(), "--run", tmp_path / "file")


def test_an_excluded_file_that_is_missing_is_reported(recipe_file, tmp_path, capsys):
    line = fails(capsys, "train", recipe_file(), "--set", "data.exclude=['nowhere.wav']", "--run", tmp_path / "run")

    assert "nowhere.wav" in line


def test_two_runs_in_one_directory_are_refused(trained, recipe_file, capsys):
    line = fails(capsys, "train", recipe_file(), "--run", trained)

    assert "--resume" in line


def test_resuming_without_a_run_is_reported(recipe_file, tmp_path, capsys):
    assert "holds no run to resume" in fails(capsys, "train", recipe_file(), "--run", tmp_path / "none", "--resume")


@pytest.mark.parametrize(
    "command", [["evaluate"], ["separate", "x.wav", "-o", "out", "-m"]], ids=["evaluate", "separate"]
)
def test_a_path_that_is_no_checkpoint_is_reported(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "x.wav", np.zeros(100, np.float32))

    assert "is no checkpoint" in fails(capsys, *command, tmp_path)


def test_a_flipped_bit_in_a_checkpoint_is_reported(trained, capsys):
    for path in trained.rglob("model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    assert "is damaged" in fails(capsys, "evaluate", trained)


def test_evaluate_writes_a_row_per_mixture_and_audio_of_the_first(trained, capsys):
    assert main(["evaluate", str(trained), "--n-items", "4", "--save-audio", "2"]) == 0

    with (trained / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    out = capsys.readouterr().out
    mean = sum(float(row["si_sdri"]) for row in rows) / 4
    assert f"{mean:.2f} ±" in out
    names = sorted(path.name for path in (trained / "evaluation-audio").iterdir())
    assert len(names) == 2 * 5
    assert names[0] == "000-estimate-1.wav"


def test_evaluate_saves_audio_of_the_first_and_worst_and_removes_older_audio(trained, capsys):
    main(["evaluate", str(trained), "--n-items", "8", "--save-audio", "8"])
    capsys.readouterr()

    assert main(["evaluate", str(trained), "--n-items", "8", "--save-audio", "1", "--save-worst", "3"]) == 0

    with (trained / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    worst = sorted(rows, key=lambda row: float(row["si_sdri"]))[:3]
    folder = trained / "evaluation-audio"
    saved = {path.name[:3] for path in folder.iterdir()}
    assert saved == {"000", *(f"{int(row['index']):03d}" for row in worst)}
    assert len(list(folder.iterdir())) == 5 * len(saved)
    worst_first = ", ".join(f"{int(row['index']):03d} {float(row['si_sdri']):+.2f} dB" for row in worst)
    assert f"Worst first: {worst_first}" in " ".join(capsys.readouterr().out.split())
    for row in worst:
        mixture, estimate, reference = (
            torch.from_numpy(read_audio(folder / f"{int(row['index']):03d}-{name}.wav")[0])
            for name in ("mixture", "estimate-1", "reference-1")
        )
        improvement = si_sdr(estimate, reference) - si_sdr(mixture, reference)
        assert improvement.item() == pytest.approx(float(row["si_sdri_1"]), abs=1e-2)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["-o", "table.txt"], ["table.txt", ".csv or .parquet"]),
        (["-o", "/dev/null/x.csv"], ["/dev/null/x.csv cannot be written"]),
        (["nowhere"], ["nowhere", "does not exist"]),
        (["--seconds", "99"], ["as long as an excerpt of 99 s"]),
    ],
)
def test_evaluate_reports_wrong_options_before_the_work(trained, option, words, capsys):
    line = fails(capsys, "evaluate", trained, *option)

    assert [word for word in words if word not in line] == []


def test_all_speakers_of_a_folder_given_to_evaluate_are_evaluated_on(trained, speaker_folder, tmp_path):
    folder = speaker_folder(12, root=tmp_path / "twelve")

    assert main(["evaluate", str(trained), str(folder), "--n-items", "40", "-o", str(tmp_path / "table.csv")]) == 0

    files = (tmp_path / "table.csv").read_text()
    assert [n for n in range(12) if f"speaker-{n:02d}" not in files] == []


def test_the_training_folder_named_again_is_divided_as_in_training(trained, tmp_path):
    table = tmp_path / "named.csv"
    folder = load_recipe(trained / "recipe.toml").data.path

    assert main(["evaluate", str(trained), "--n-items", "9"]) == 0
    assert main(["evaluate", str(trained), str(folder), "--n-items", "9", "-o", str(table)]) == 0

    assert table.read_text() == (trained / "evaluation.csv").read_text()


def test_four_speakers_are_enough_to_evaluate_on(trained, speaker_folder, tmp_path):
    folder = speaker_folder(4, root=tmp_path / "four")

    assert main(["evaluate", str(trained), str(folder), "--n-items", "2", "-o", str(tmp_path / "table.csv")]) == 0


def test_evaluate_with_two_runs_says_what_to_use_instead(trained, capsys):
    line = fails(capsys, "evaluate", trained, trained)

    assert "is a run, and evaluate takes one run and its data" in line
    assert "unbraid dashboard" in line


def test_resume_if_present_starts_a_run_and_then_resumes_it(recipe_file, tmp_path, capsys):
    command = ["train", str(recipe_file()), "--run", str(tmp_path / "run"), "--resume-if-present"]

    assert main(command) == 0
    assert main([*command, "--set", "train.max_steps=8"]) == 0

    assert [row["step"] for row in read_rows(tmp_path / "run" / "steps.jsonl")[0]] == list(range(1, 9))


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(8000, 1, 0.7), (44100, 2, 0.5), (16000, 6, 0.0001)])
def test_separate_keeps_rate_channels_and_length(trained, tmp_path, rate, channels, seconds, capsys):
    n_samples = max(1, round(rate * seconds))
    write_wav(tmp_path / "in.wav", 0.1 * np.random.default_rng(0).standard_normal((n_samples, channels)), rate)

    assert main(["separate", str(tmp_path / "in.wav"), "-m", str(trained), "-o", str(tmp_path / "out")]) == 0

    for n in (1, 2):
        info = soundfile.info(tmp_path / "out" / f"in.source-{n}.wav")
        assert (info.samplerate, info.channels, info.frames) == (rate, channels, n_samples)
    assert capsys.readouterr().out.count(".wav") == 2


def test_a_bad_file_does_not_stop_the_others(trained, tmp_path, capsys):
    for name, value in (("a", 0.1), ("b", np.nan), ("c", 0.1)):
        write_wav(tmp_path / "in" / f"{name}.wav", np.full(800, value, np.float32))

    assert main(["separate", str(tmp_path / "in"), "-m", str(trained), "-o", str(tmp_path / "out")]) == 2

    output = capsys.readouterr()
    skipped, error = output.err.splitlines()
    assert skipped.startswith("Skipped: ")
    assert "b.wav has NaN or infinite samples, the first at index 0" in skipped
    assert error == f"unbraid: 1 of 3 files could not be separated; the others are in {tmp_path / 'out'}."
    written = [f"{name}.source-{n}.wav" for name in "ac" for n in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    assert [line.rsplit("/", 1)[-1] for line in output.out.splitlines()] == written


@pytest.mark.parametrize("out", ["in", "in/separated", "out"])
def test_a_second_run_separates_the_same_files_and_no_hidden_ones(trained, tmp_path, capsys, out):
    for name in ("a.wav", "sub/b.wav", "c.source-9.wav"):
        write_wav(tmp_path / "in" / name, np.full(800, 0.1, np.float32))
    (tmp_path / "in" / "._a.wav").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    command = ["separate", str(tmp_path / "in"), "-m", str(trained), "-o", str(tmp_path / out)]

    assert main(command) == 0
    first = capsys.readouterr()
    assert main(command) == 0
    second = capsys.readouterr()

    assert "Passed over in folders: 1 hidden." in first.err
    assert len(first.out.splitlines()) == 6
    assert second.out == first.out
    assert ("6 written by an earlier run" in second.err) == (out != "out")


def test_separate_refuses_two_files_with_the_same_output_before_writing(trained, tmp_path, capsys):
    for folder in ("one", "two"):
        write_wav(tmp_path / folder / "a.wav", np.zeros(800, np.float32))

    files = [tmp_path / folder / "a.wav" for folder in ("one", "two")]
    line = fails(capsys, "separate", *files, "-m", trained, "-o", tmp_path / "out")

    assert "rename one" in line
    assert not (tmp_path / "out").exists()


def test_separate_refuses_an_empty_file_and_an_output_folder_that_is_a_file(trained, tmp_path, capsys):
    write_wav(tmp_path / "empty.wav", np.zeros(0, np.float32))
    write_wav(tmp_path / "a.wav", np.full(800, 0.1, np.float32))

    line = fails(capsys, "separate", tmp_path / "empty.wav", "-m", trained, "-o", tmp_path / "out")
    assert "has no samples" in line
    line = fails(capsys, "separate", tmp_path / "a.wav", "-m", trained, "-o", tmp_path / "a.wav")
    assert "cannot be used as the output folder" in line


def test_separate_takes_folders_and_keeps_their_subfolders(trained, tmp_path):
    for name in ("x/a.wav", "y/a.wav"):
        write_wav(tmp_path / "in" / name, np.full(800, 0.1, np.float32))

    assert main(["separate", str(tmp_path / "in"), "-m", str(trained), "-o", str(tmp_path / "out")]) == 0

    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.wav"))
    assert written == ["x/a.source-1.wav", "x/a.source-2.wav", "y/a.source-1.wav", "y/a.source-2.wav"]


def test_code_of_a_checkpoint_runs_only_with_trust(recipe_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "class Net(nn.Conv1d):\n"
        "    def __init__(self):\n"
        "        super().__init__(1, 2, 9, padding=4)\n"
        "    def forward(self, mixture):\n"
        "        return super().forward(mixture)[:, :, None]\n"
        f"Path({str(tmp_path / 'executed')!r}).touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    file = recipe_file()
    assert main(["train", str(file), "--run", "run", "--set", "model.name=mine:Net"]) == 0
    (tmp_path / "executed").unlink()
    sys.modules.pop("unbraid_own_mine")
    capsys.readouterr()

    assert "--trust" in fails(capsys, "evaluate", "run", "--n-items", "1")
    assert not (tmp_path / "executed").exists()
    assert main(["evaluate", "run", "--n-items", "1", "--trust"]) == 0


def test_evaluate_says_if_outputs_were_summed(recipe_file, tmp_path, capsys):
    changes = ["loss.name=neg_snr", "loss.assign=mixit", "model.n_sources=3", "train.max_steps=1"]
    sets = [word for change in changes for word in ("--set", change)]
    assert main(["train", str(recipe_file()), "--run", str(tmp_path / "run"), *sets]) == 0
    capsys.readouterr()

    assert main(["evaluate", str(tmp_path / "run"), "--n-items", "1"]) == 0
    assert "outputs summed" in " ".join(capsys.readouterr().out.split())


def test_a_custom_data_set_of_a_checkpoint_runs_only_with_trust(recipe_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("from unbraid.data.folders import list_speakers as go\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe_file()), "--run", "run", "--set", "data.name=mine:go"]) == 0
    capsys.readouterr()

    assert "--trust" in fails(capsys, "evaluate", "run", "--n-items", "1")


@pytest.mark.slow
def test_a_user_error_under_torchrun_prints_its_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "unbraid", "train", "nope"]
    process = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode != 0
    assert "unbraid: There is no recipe nope" in process.stderr
