"""Validation examples to hear: the right sound under its name, whole or not there, and never at the run's cost."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_run import run_recipe

from unbraid.audio import read_audio, write_audio
from unbraid.build import build_corpus, load_model
from unbraid.config.recipe import load_recipe
from unbraid.data.batch import Batch
from unbraid.data.dataset import Key
from unbraid.data.loader import collate
from unbraid.errors import AudioError
from unbraid.inference import at_mixture_level, separate
from unbraid.losses.pit import evaluation_loss, match_to_targets
from unbraid.metrics import si_sdr
from unbraid.records import Event, ItemId, StepRecord, ValidationRecord, read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.train.validation_audio import (
    AudioExample,
    AudioOptions,
    audio_examples,
    remove_later_audio,
    save_audio_examples,
    spread,
)


def make_sound(index=0, *, seed=0, n_channels=1, time=400):
    rng = np.random.default_rng(seed)
    references = rng.uniform(-0.5, 0.5, (2, n_channels, time)).astype(np.float32)
    estimates = references + rng.normal(0, 0.01, references.shape).astype(np.float32)
    return AudioExample(index, 8000, references.sum(0), references, estimates, (3.0, 5.0), 4.0)


def scores_of(run, step):
    return json.loads((run.audio / f"step-{step:06d}" / "scores.json").read_text())


def steps_heard(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def content(folder):
    """What is in each file; of sound its samples, as the header says when it was written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        if path.suffix == ".json"
        else read_audio(path)[0].tolist()
        for path in folder.rglob("*.*")
    }


def test_a_run_saves_the_audio_of_the_first_examples_of_each_validation(recipe_file, tmp_path):
    run, _ = run_recipe(recipe_file(), tmp_path / "run")

    assert sorted(path.relative_to(run.audio).as_posix() for path in run.audio.rglob("*") if path.is_file()) == sorted(
        [f"{n:03d}-{name}.wav" for n in (0, 1) for name in ("mixture", "reference-1", "reference-2")]
        + [f"step-00000{step}/{n:03d}-estimate-{k}.wav" for step in (3, 6) for n in (0, 1) for k in (1, 2)]
        + [f"step-00000{step}/scores.json" for step in (3, 6)]
    )


def test_the_saved_audio_is_the_models_estimate_at_the_level_of_the_mixture(recipe_file, tmp_path):
    file = recipe_file()
    run, _ = run_recipe(file, tmp_path / "run")
    recipe = load_recipe(file)
    made = build_corpus(recipe).valid[Key(0, 1)].audio
    model, _ = load_model(run.checkpoints / "last")
    estimate = separate(model, torch.from_numpy(made.mixture)[None])
    sources = torch.from_numpy(made.sources)[None]
    ordered = match_to_targets(estimate, sources, evaluation_loss("permutation"), assign="permutation")

    estimates = [read_audio(run.audio / "step-000006" / f"001-estimate-{k}.wav")[0] for k in (1, 2)]

    assert np.array_equal(read_audio(run.audio / "001-mixture.wav")[0], made.mixture)
    assert np.array_equal(read_audio(run.audio / "001-reference-2.wav")[0], made.sources[1])
    assert np.stack(estimates) == pytest.approx(at_mixture_level(ordered[0].numpy(), made.mixture), abs=1e-5)
    item = scores_of(run, 6)["items"][1]
    drawn = build_corpus(recipe).valid[Key(0, 1)]
    assert item["files"] == list(collate([drawn]).batch.items[0].files)
    assert all(Path(file).is_file() for file in item["files"])
    assert item["si_sdr"] == pytest.approx(si_sdr(ordered, sources)[0, :, 0].tolist(), abs=1e-3)
    before = si_sdr(torch.from_numpy(made.mixture).expand_as(sources[0]), sources[0])[:, 0]
    assert item["si_sdri"] == pytest.approx((si_sdr(ordered, sources)[0, :, 0] - before).mean().item(), abs=1e-3)


def test_a_loss_that_depends_on_level_leaves_the_estimate_unscaled(recipe_file, tmp_path):
    file = recipe_file('[loss]\nname = "neg_snr"\n')
    run, _ = run_recipe(file, tmp_path / "run")
    made = build_corpus(load_recipe(file)).valid[Key(0, 0)].audio
    model, _ = load_model(run.checkpoints / "last")
    power = separate(model, torch.from_numpy(made.mixture)[None])[0].square().sum().item()

    estimates = np.stack([read_audio(run.audio / "step-000006" / f"000-estimate-{k}.wav")[0] for k in (1, 2)])

    assert (estimates**2).sum() == pytest.approx(power, rel=1e-4)


def test_saving_audio_changes_no_bit_of_training_and_can_be_turned_off(recipe_file, tmp_path):
    file = recipe_file()
    loud, yielded = run_recipe(file, tmp_path / "loud", "validate.save_audio=3")
    quiet, silent = run_recipe(file, tmp_path / "quiet", "validate.save_audio=0")

    weights = [(run.checkpoints / "step-000006" / "model.safetensors").read_bytes() for run in (loud, quiet)]
    assert weights[0] == weights[1]
    losses = [
        [r.loss for r in records if isinstance(r, StepRecord | ValidationRecord)] for records in (yielded, silent)
    ]
    assert losses[0] == losses[1]
    assert len(list(loud.audio.glob("*-mixture.wav"))) == 3
    assert not quiet.audio.exists()


def test_a_resumed_run_saves_the_same_audio_as_an_uninterrupted_one(recipe_file, tmp_path):
    file = recipe_file()
    whole, _ = run_recipe(file, tmp_path / "whole", "train.max_steps=9")
    stopped, _ = run_recipe(file, tmp_path / "stopped", "train.max_steps=9", "save.every_steps=4")
    for step in (8, 9):
        folder = stopped.checkpoints / f"step-{step:06d}"
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    (stopped.audio / "step-000012").mkdir()

    run_recipe(file, tmp_path / "stopped", "train.max_steps=9", resume=True)

    assert steps_heard(stopped.audio) == [3, 6, 9]
    assert content(stopped.audio) == content(whole.audio)


def test_the_number_of_kept_checkpoints_may_change_on_resuming(recipe_file, tmp_path):
    file = recipe_file()
    run_recipe(file, tmp_path / "run", "train.max_steps=3")

    run, _ = run_recipe(file, tmp_path / "run", "validate.save_audio=1", resume=True)

    assert [len(scores_of(run, step)["items"]) for step in (3, 6)] == [2, 1]


def test_a_full_disk_is_reported_once_and_the_run_continues(recipe_file, tmp_path):
    run, yielded = RunDirectory(tmp_path / "run"), []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for record in train(load_recipe(recipe_file(), ["validate.every_steps=1", "save.every_steps=0"]), run):
            yielded.append(record)
            if isinstance(record, StepRecord):
                limit = 12_000 if record.step in (3, 4) else before[0]  # a WAV of half a second is larger
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    events = [record for record in yielded if isinstance(record, Event)]
    assert [event.code for event in events if event.code != "CHECKPOINT_FAILED"] == ["AUDIO_NOT_SAVED"]
    assert [row["step"] for row in read_rows(run.steps)[0]] == [1, 2, 3, 4, 5, 6]
    assert steps_heard(run.audio) == [1, 2, 5, 6]


def test_a_nonfinite_estimate_is_skipped_and_reported(recipe_file, tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Conv1d):\n"
        "    def __init__(self):\n"
        "        super().__init__(1, 2, 9, padding=4)\n"
        "    def forward(self, mixture):\n"
        "        sources = super().forward(mixture)[:, :, None]\n"
        "        if not torch.is_grad_enabled():\n"
        "            sources[1, 0, 0, 7] = float('nan')\n"
        "        return sources\n"
    )

    run, yielded = run_recipe(recipe_file(), tmp_path / "run", "model.name=nets:Net")

    events = [record for record in yielded if isinstance(record, Event)]
    assert [event.code for event in events] == ["AUDIO_NOT_SAVED"]
    assert "estimates of validation example 1 are not finite" in events[0].message
    assert [item["index"] for item in scores_of(run, 6)["items"]] == [0]


def test_channels_stay_together(tmp_path):
    save_audio_examples(tmp_path, 5, [make_sound(n_channels=2)])

    assert soundfile.info(tmp_path / "000-mixture.wav").channels == 2
    assert soundfile.info(tmp_path / "step-000005" / "000-estimate-2.wav").channels == 2


def test_a_silent_source_has_no_score():
    sources = torch.stack([torch.linspace(-1, 1, 200), torch.zeros(200)])[None, :, None]
    batch = Batch.from_tensors(sources.sum(1), sources, items=[ItemId("valid", 0, 4)])
    ratios = si_sdr(sources + 0.1, sources)

    [sound] = audio_examples(AudioOptions(8000), batch, sources, [0], scores=(ratios, torch.tensor([1.5])))

    assert (sound.index, sound.si_sdri) == (4, 1.5)
    assert sound.si_sdr[0] == pytest.approx(ratios[0, 0, 0].item())
    assert np.isnan(sound.si_sdr[1])


def test_the_score_of_a_silent_source_is_null(tmp_path):
    save_audio_examples(tmp_path, 5, [replace(make_sound(), si_sdr=(3.0, float("nan")))])

    assert json.loads((tmp_path / "step-000005" / "scores.json").read_text())["items"][0]["si_sdr"] == [3.0, None]


def test_mixture_and_references_are_written_once_and_again_where_they_are_missing_or_damaged(tmp_path):
    save_audio_examples(tmp_path, 1, [make_sound()])
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")}
    whole = content(tmp_path)
    (tmp_path / "000-mixture.wav").unlink()
    (tmp_path / "000-reference-2.wav").write_bytes((tmp_path / "000-reference-2.wav").read_bytes()[:700])

    save_audio_examples(tmp_path, 1, [make_sound()])

    assert content(tmp_path) == whole
    assert (tmp_path / "000-reference-1.wav").stat().st_mtime_ns == times["000-reference-1.wav"]


def test_estimates_of_another_mixture_are_removed(tmp_path):
    save_audio_examples(tmp_path, 1, [make_sound(seed=0)])

    save_audio_examples(tmp_path, 2, [make_sound(seed=1)])

    assert steps_heard(tmp_path) == [2]


def test_a_folder_without_scores_is_removed(tmp_path):
    (tmp_path / "step-000001").mkdir()
    write_audio(tmp_path / "step-000001" / "000-estimate-1.wav", np.zeros((1, 10), np.float32), 8000)

    save_audio_examples(tmp_path, 2, [make_sound()])

    assert steps_heard(tmp_path) == [2]


def test_a_folder_that_cannot_be_written_completely_is_removed(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unbraid.train.validation_audio.write_json", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_audio_examples(tmp_path, 1, [make_sound()])

    assert steps_heard(tmp_path) == []


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "audio").touch()

    with pytest.raises(AudioError, match="cannot be written"):
        save_audio_examples(tmp_path / "audio", 1, [make_sound()])


def test_going_back_drops_what_came_after(tmp_path):
    for step in (10, 20, 30):
        save_audio_examples(tmp_path, step, [make_sound()])

    remove_later_audio(tmp_path, 20)

    assert steps_heard(tmp_path) == [10, 20]
    assert (tmp_path / "000-mixture.wav").exists()


def test_24_of_many_validations_are_kept(tmp_path):
    for step in range(10, 310, 10):
        save_audio_examples(tmp_path, step, [make_sound(time=8)])

    kept = steps_heard(tmp_path)
    assert len(kept) == 24
    assert (kept[0], kept[-1]) == (10, 300)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(2, 30))
def test_thinning_keeps_the_first_and_the_last_step(gaps, n_kept):
    kept = []
    for step in np.cumsum(gaps):
        kept = spread([*kept, int(step)], n_kept)
        assert (kept[0], kept[-1]) == (gaps[0], step)
        assert len(kept) <= n_kept
        assert kept == sorted(kept)


def test_evenly_spaced_steps_stay_evenly_spaced():
    kept = []
    for step in range(1, 2000):
        kept = spread([*kept, step], 24)
        assert len(kept) == min(step, 24)
        assert step < 24 or max(np.diff(kept)) < 2 * (step - 1) / 23
