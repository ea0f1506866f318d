import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.audio import write_audio
from unbraid.data.dataset import DataSettings, Key, make_dataset
from unbraid.data.folders import list_noises, list_speakers
from unbraid.data.loader import StepSampler, ValidationSampler, batches, collate
from unbraid.data.splits import assign_splits
from unbraid.data.tracks import write_manifest
from unbraid.dsp import power_db
from unbraid.errors import DataError

SETTINGS = DataSettings(excerpt_seconds=0.5, batch_size=4, seed=3)


def dataset_of(root, settings=SETTINGS, purpose="train", *, noise=None):
    tracks = assign_splits(list_speakers(root), n_sources=2)
    return make_dataset(tracks, settings, purpose, noises=() if noise is None else list_noises(noise))


def examples_of(dataset, n_items=12):
    return [dataset[Key(epoch, index)] for epoch in (0, 1) for index in range(n_items // 2)]


def speaker_of(path):
    return Path(path).parts[-2]


def same_audio(example, other):
    return all(
        np.array_equal(a, b) for a, b in zip(example.audio, other.audio, strict=True) if a is not None or b is not None
    )


@pytest.fixture
def noise_folder(tmp_path):
    for i in range(3):
        noise = 0.1 * np.random.default_rng(i).standard_normal((1, 12_000), dtype=np.float32)
        write_audio(tmp_path / "noise" / f"{i}.wav", noise, 8000)
    return tmp_path / "noise"


def test_an_example_does_not_depend_on_the_order_of_making(speaker_folder):
    root = speaker_folder()
    one = dataset_of(root)
    other = dataset_of(root)
    keys = [Key(epoch, index) for epoch in range(2) for index in range(4)]

    backwards = {key: other[key] for key in reversed(keys)}

    for key in keys:
        example = one[key]
        assert example.item == backwards[key].item
        assert same_audio(example, backwards[key])


@pytest.mark.parametrize("change", ["epoch", "index", "seed", "purpose"])
def test_another_epoch_or_index_is_another_example(speaker_folder, change):
    root = speaker_folder(n_speakers=20)
    here = dataset_of(root)[Key(0, 0)]
    seed, purpose = 4 if change == "seed" else 3, "test" if change == "purpose" else "train"
    dataset = dataset_of(root, replace(SETTINGS, seed=seed), purpose)

    there = dataset[Key(int(change == "epoch"), int(change == "index"))]

    assert not np.array_equal(here.audio.mixture, there.audio.mixture)


def test_every_recording_comes_first_once_per_epoch_in_a_new_order(speaker_folder):
    dataset = dataset_of(speaker_folder(n_files=3))

    firsts = [[dataset[Key(epoch, index)].item.files[0] for index in range(len(dataset))] for epoch in (0, 1)]

    everyone = sorted(str(track.path) for track in dataset.tracks)
    assert sorted(firsts[0]) == sorted(firsts[1]) == everyone
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("n_sources", [1, 2, 4])
def test_the_sources_of_a_mixture_are_of_different_speakers(speaker_folder, n_sources):
    dataset = dataset_of(speaker_folder(n_files=3), replace(SETTINGS, n_sources=n_sources))

    for example in examples_of(dataset, 24):
        assert len({speaker_of(path) for path in example.item.files}) == n_sources
        assert example.audio.sources.shape == (n_sources, 1, 4000)


def test_every_speaker_and_recording_is_drawn_as_second_source_too(speaker_folder):
    dataset = dataset_of(speaker_folder())

    seconds = {example.item.files[1] for example in examples_of(dataset, 80)}

    assert seconds == {str(track.path) for track in dataset.tracks}


def test_only_recordings_of_the_split_are_used(speaker_folder):
    root = speaker_folder(n_speakers=12)
    heard = {
        purpose: {speaker_of(path) for example in examples_of(dataset_of(root, purpose=purpose)) for path in
                  example.item.files}
        for purpose in ("train", "valid", "test")
    }  # fmt: skip

    assert not any(one & other for one, other in itertools.combinations(heard.values(), 2))


def test_the_mixture_is_the_sum_of_its_sources_and_the_noise(speaker_folder, noise_folder):
    for example in examples_of(dataset_of(speaker_folder(), noise=noise_folder)):
        made = example.audio
        assert np.array_equal(made.mixture, made.sources.sum(axis=0) + made.noise)


def test_levels_gains_and_snr_are_within_the_settings(speaker_folder, noise_folder):
    settings = replace(SETTINGS, level_db=-30.0, gains_db=(-6.0, -2.0), noise_snr_db=(3.0, 9.0))
    gains = []
    snrs = []
    for example in examples_of(dataset_of(speaker_folder(), settings, noise=noise_folder), 40):
        first, second = (power_db(source) for source in example.audio.sources)
        assert first == pytest.approx(-30, abs=1e-3)
        gains.append(second - first)
        snrs.append(power_db(example.audio.sources.sum(axis=0)) - power_db(example.audio.noise))

    for drawn, low, high in ((gains, -6, -2), (snrs, 3, 9)):
        assert low - 1e-3 <= min(drawn) < low + 1 < high - 1 < max(drawn) <= high + 1e-3


def test_each_source_after_the_first_has_its_own_gain(speaker_folder):
    example = dataset_of(speaker_folder(), replace(SETTINGS, n_sources=4))[Key(0, 0)]

    levels = sorted(power_db(source) for source in example.audio.sources)

    assert min(np.diff(levels)) > 0.01


def test_the_sources_are_excerpts_of_the_files_in_the_item(speaker_folder):
    for example in examples_of(dataset_of(speaker_folder())):
        for source, path in zip(example.audio.sources, example.item.files, strict=True):
            whole, _ = soundfile.read(path, dtype="float64")
            match = np.correlate(whole, source[0].astype(np.float64), "valid")
            lengths = np.sqrt(np.convolve(whole**2, np.ones(4000), "valid") * np.square(source, dtype=float).sum())
            assert (match / lengths).max() == pytest.approx(1, abs=1e-5)


BAD = {
    "nan at sample 100": "AUDIO_NONFINITE",
    "zero bytes": "AUDIO_UNREADABLE",
    "random bytes": "AUDIO_UNREADABLE",
    "cut in half": "AUDIO_UNREADABLE",
    "no samples": "AUDIO_UNREADABLE",
    "silent": "AUDIO_SILENT",
}


def damage(path, kind):
    audio, rate = soundfile.read(path, dtype="float32")
    if kind == "nan at sample 100":
        audio[100] = np.nan
        soundfile.write(path, audio, rate, subtype="FLOAT")
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "cut in half":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "no samples":
        soundfile.write(path, audio[:0], rate, subtype="FLOAT")
    elif kind == "silent":
        soundfile.write(path, 0 * audio, rate, subtype="FLOAT")
    elif kind == "another rate":
        soundfile.write(path, audio, 16000, subtype="FLOAT")
    elif kind == "gone":
        path.unlink()


def assert_skipped_like_excluded(bad, excluded, path, code):
    """Check that both runs draw the same examples, never the file, and that the file was drawn and rejected."""
    examples = list(zip(examples_of(bad, 24), examples_of(excluded, 24), strict=True))
    for one, other in examples:
        assert one.item == other.item
        assert same_audio(one, other)
        assert str(path) not in one.item.files
        assert np.isfinite(one.audio.mixture).all()
    faults = [fault for one, _ in examples for fault in one.faults]
    assert {(fault.code, fault.path, fault.in_excerpt_only) for fault in faults} == {(code, str(path), False)}
    expected = [fault for _, other in examples for fault in other.faults]
    assert {(fault.code, fault.path, fault.in_excerpt_only) for fault in expected} == {
        ("AUDIO_EXCLUDED", str(path), True)
    }


@pytest.mark.parametrize(("kind", "code"), BAD.items())
def test_a_bad_file_in_a_folder_is_skipped_like_an_excluded_one(speaker_folder, kind, code):
    root = speaker_folder()
    path = dataset_of(root).tracks[3].path
    excluded = dataset_of(root, replace(SETTINGS, exclude=(str(path),)))
    while_whole = examples_of(excluded, 24)
    damage(path, kind)

    assert_skipped_like_excluded(dataset_of(root), excluded, path, code)
    assert all(same_audio(a, b) for a, b in zip(while_whole, examples_of(excluded, 24), strict=True))


@pytest.mark.parametrize(
    ("kind", "code"), [*BAD.items(), ("another rate", "AUDIO_WRONG_RATE"), ("gone", "AUDIO_UNREADABLE")]
)
def test_a_file_that_contradicts_its_manifest_is_skipped_like_an_excluded_one(speaker_folder, kind, code):
    root = speaker_folder()
    write_manifest(root / "all.csv", assign_splits(list_speakers(root), n_sources=2))
    path = dataset_of(root / "all.csv").tracks[3].path
    damage(path, kind)

    code = "AUDIO_EMPTY" if kind == "no samples" else code  # noticed when it is drawn
    excluded = dataset_of(root / "all.csv", replace(SETTINGS, exclude=(str(path),)))
    assert_skipped_like_excluded(dataset_of(root / "all.csv"), excluded, path, code)


def test_a_flac_damaged_after_listing_is_skipped_like_an_excluded_one(speaker_folder):
    root = speaker_folder()
    wav = dataset_of(root).tracks[3].path
    path = wav.with_suffix(".flac")
    soundfile.write(path, soundfile.read(wav)[0], 8000)
    wav.unlink()
    bad = dataset_of(root)
    excluded = dataset_of(root, replace(SETTINGS, exclude=(str(path),)))
    rotten = bytearray(path.read_bytes())
    rotten[6000:6200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(rotten)

    assert_skipped_like_excluded(bad, excluded, path, "AUDIO_UNREADABLE")


def test_a_bad_noise_is_skipped_like_an_excluded_one(speaker_folder, noise_folder):
    root = speaker_folder()
    path = noise_folder / "1.wav"
    damage(path, "nan at sample 100")

    excluded = dataset_of(root, replace(SETTINGS, exclude=(str(path),)), noise=noise_folder)
    assert_skipped_like_excluded(dataset_of(root, noise=noise_folder), excluded, path, "AUDIO_NONFINITE")


def test_no_source_is_silent_unless_silence_is_kept(speaker_folder):
    root = speaker_folder()
    for path in root.rglob("*.wav"):
        audio, rate = soundfile.read(path, dtype="float32")
        audio[:8000] = 0
        soundfile.write(path, audio, rate, subtype="FLOAT")

    def n_silent(silent):
        examples = examples_of(dataset_of(root, replace(SETTINGS, silent=silent)), 40)
        return sum(power_db(source) < -80 for example in examples for source in example.audio.sources)

    assert n_silent("redraw") == 0
    assert n_silent("keep") > 0


def test_a_silent_excerpt_is_no_fault_of_the_file(speaker_folder):
    root = speaker_folder()
    for path in root.rglob("*.wav"):
        audio, rate = soundfile.read(path, dtype="float32")
        audio[:8000] = 0
        soundfile.write(path, audio, rate, subtype="FLOAT")

    faults = [fault for example in examples_of(dataset_of(root), 40) for fault in example.faults]

    assert {(fault.code, fault.in_excerpt_only) for fault in faults} == {("AUDIO_SILENT", True)}


def test_without_usable_audio_the_error_gives_the_last_fault(speaker_folder):
    root = speaker_folder()
    dataset = dataset_of(root)
    for path in root.rglob("*.wav"):
        damage(path, "nan at sample 100")

    with pytest.raises(DataError, match="not finite"):
        dataset[Key(0, 0)]


def test_other_rates_are_refused_unless_resample_is_set(speaker_folder):
    root = speaker_folder(sample_rate=16000)

    with pytest.raises(DataError, match=r"not at 8000 Hz but at 16000 Hz.*data\.resample"):
        dataset_of(root)
    assert dataset_of(root, replace(SETTINGS, resample=True))[Key(0, 0)].audio.mixture.shape == (1, 4000)


def test_recordings_shorter_than_an_excerpt_are_refused_with_the_longest(speaker_folder):
    with pytest.raises(DataError, match=r"longest: 1\.50 s"):
        dataset_of(speaker_folder(), replace(SETTINGS, excerpt_seconds=2.0))


def test_too_few_speakers_for_a_mixture_are_refused_with_their_number(speaker_folder):
    with pytest.raises(DataError, match="has 4 speakers"):
        dataset_of(speaker_folder(), replace(SETTINGS, n_sources=5))


def test_a_missing_split_is_refused_with_the_splits_found(speaker_folder, tmp_path):
    speaker_folder(root=tmp_path / "all" / "train")

    with pytest.raises(DataError, match=r"'valid'.*found: train"):
        dataset_of(tmp_path / "all", purpose="valid")


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
def test_ranks_and_micro_batches_together_have_the_batch_of_one_process(n_items, batch_size, n_ranks, accumulate, step):
    def keys_of_step(rank, world_size, accumulate):
        keys = StepSampler(
            n_items, batch_size, first_step=step, rank=rank, world_size=world_size, accumulate=accumulate
        )  # fmt: skip
        return list(itertools.islice(keys, accumulate))

    (whole,) = keys_of_step(0, 1, 1)
    shared = [share for rank in range(n_ranks) for share in keys_of_step(rank, n_ranks, accumulate)]

    assert [key for share in shared for key in share if key.weight] == whole
    assert all(share for share in shared)  # every rank runs every backward
    sizes = [sum(key.weight > 0 for key in share) for share in shared]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 50), st.integers(1, 3))
def test_resuming_at_a_step_gives_the_same_batches(n_items, batch_size, first_step, accumulate):
    whole = StepSampler(n_items, batch_size, accumulate=accumulate)
    resumed = StepSampler(n_items, batch_size, accumulate=accumulate, first_step=first_step)

    expected = list(itertools.islice(whole, first_step * accumulate, (first_step + 3) * accumulate))

    assert list(itertools.islice(resumed, 3 * accumulate)) == expected


@given(st.integers(1, 40), st.integers(1, 20))
def test_epochs_follow_each_other_and_each_has_every_index_once(n_items, batch_size):
    steps = itertools.islice(StepSampler(n_items, batch_size), 3 * n_items)

    keys = [key for step in steps for key in step][: 3 * n_items]

    assert [(key.epoch, key.index) for key in keys] == [(e, i) for e in range(3) for i in range(n_items)]


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 5))
def test_ranks_divide_the_validation_examples_without_repeats(n_items, batch_size, n_ranks):
    shares = [list(ValidationSampler(n_items, batch_size, rank=rank, world_size=n_ranks)) for rank in range(n_ranks)]

    keys = [key for share in shares for batch in share for key in batch]

    assert sorted((key.epoch, key.index) for key in keys) == [(0, index) for index in range(n_items)]
    assert all(key.weight == 1 for key in keys)
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)


def test_a_batch_keeps_the_order_of_its_examples(speaker_folder, noise_folder):
    dataset = dataset_of(speaker_folder(), noise=noise_folder)
    examples = [dataset[Key(0, 0)], dataset[Key(0, 1, weight=0.0)]]

    batch = collate(examples).batch

    assert batch.mixture.shape == batch.noise.shape == (2, 1, 4000)
    assert batch.weight.tolist() == [1, 0]
    for i, example in enumerate(examples):
        assert np.array_equal(batch.sources[i], example.audio.sources)
        assert np.array_equal(batch.mixture[i], example.audio.mixture)
        assert np.array_equal(batch.noise[i], example.audio.noise)
        assert batch.items[i] == example.item


def first_batches(dataset, n_batches, *, workers):
    loader = iter(batches(dataset, StepSampler(len(dataset), 4), workers=workers))
    return list(itertools.islice(loader, n_batches))


def test_the_number_of_workers_changes_nothing(speaker_folder):
    root = speaker_folder()
    damage(dataset_of(root).tracks[3].path, "nan at sample 100")
    dataset = dataset_of(root)

    alone, shared = (first_batches(dataset, 5, workers=workers) for workers in (0, 2))

    assert any(loaded.faults for loaded in alone)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.batch.mixture, other.batch.mixture)
        assert torch.equal(one.batch.sources, other.batch.sources)
        assert (one.batch.items, one.faults) == (other.batch.items, other.faults)


def test_loading_does_not_touch_the_global_generators(speaker_folder):
    dataset = dataset_of(speaker_folder())
    torch.manual_seed(0)
    expected = torch.rand(3)

    torch.manual_seed(0)
    first_batches(dataset, 2, workers=0)

    assert torch.equal(torch.rand(3), expected)
