"""Starting a run: what is refused before step 1, and what a refused or failed run leaves behind."""

import numpy as np
import pytest
import soundfile
from recipe_run import event_codes, run_recipe, steps_of

from unbraid.cli.main import main
from unbraid.config.recipe import load_recipe
from unbraid.data.excerpt import check_file
from unbraid.errors import DataError
from unbraid.records import read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train.checkpoint import newest_checkpoint


def write_nan(path):
    audio, rate = soundfile.read(path, dtype="float32")
    audio[100] = np.nan
    soundfile.write(path, audio, rate, subtype="FLOAT")


@pytest.fixture
def split_folder(tmp_path, speaker_folder):
    """Five speakers for training and two for validation, in folders train and valid."""
    speaker_folder(5, root=tmp_path / "split" / "train")
    speaker_folder(2, root=tmp_path / "split" / "valid")
    return tmp_path / "split"


def test_a_validation_split_that_makes_no_mixture_is_refused_before_step_1(recipe_file, split_folder, tmp_path):
    for path in (split_folder / "valid" / "speaker-01").iterdir():
        write_nan(path)

    with pytest.raises(DataError, match=r"mixture of the valid split gave no usable audio.*speaker-01"):
        run_recipe(recipe_file(path=split_folder), tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_a_speaker_with_unreadable_files_only_does_not_count(recipe_file, split_folder, tmp_path):
    for path in (split_folder / "valid" / "speaker-01").iterdir():
        path.write_bytes(b"")

    with pytest.raises(DataError, match=r"'valid' .* has 1 speaker \(1 more only with files that cannot be used\)"):
        run_recipe(recipe_file(path=split_folder), tmp_path / "runs" / "a")


def test_a_file_that_becomes_unusable_costs_no_step(recipe_file, split_folder, tmp_path):
    file = recipe_file(path=split_folder)
    run = RunDirectory(tmp_path / "run")
    records = []

    def train_and_lose_the_validation_files():
        for record in train(load_recipe(file, ["save.every_steps=0"]), run):
            records.append(record)
            if record.step == 1:
                for path in (split_folder / "valid").rglob("*.wav"):
                    path.unlink()
                check_file.cache_clear()  # a file is checked once in a process

    # The first validation is after step 3.
    with pytest.raises(DataError, match="gave no usable audio"):
        train_and_lose_the_validation_files()

    assert [record.step for record in steps_of(records)] == [1, 2, 3]
    assert event_codes(records)[-1] == "DATA_UNUSABLE"
    assert newest_checkpoint(run)[0].path.name == "step-000003"
    assert len(read_rows(run.steps)[0]) == 3


@pytest.mark.parametrize("override", ["data.batch_size=0", "data.path=nowhere", "optim.name=adamm"])
def test_a_start_that_is_refused_leaves_nothing(recipe_file, tmp_path, monkeypatch, capsys, override):
    file = recipe_file()
    monkeypatch.chdir(tmp_path)

    assert main(["train", str(file), "--set", override]) == 2
    assert not (tmp_path / "runs").exists()


def test_a_refused_start_leaves_a_folder_that_was_there(recipe_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()

    assert main(["train", str(recipe_file()), "--run", str(tmp_path / "run"), "--set", "data.path=nowhere"]) == 2
    assert list((tmp_path / "run").iterdir()) == []


def test_what_was_passed_over_is_an_event_of_a_new_run_alone(recipe_file, speaker_folder, tmp_path):
    folder = speaker_folder()
    (folder / "speaker-00" / "voice.m4a").write_bytes(b"x")
    file = recipe_file(path=folder)

    run, records = run_recipe(file, tmp_path / "run")
    _, resumed = run_recipe(file, run.path, "train.max_steps=8", resume=True)

    assert event_codes(records) == ["DATA_PASSED_OVER"]
    assert "1 .m4a files (convert them to FLAC or WAV)" in read_rows(run.events)[0][0]["message"]
    assert "DATA_PASSED_OVER" not in event_codes(resumed)
