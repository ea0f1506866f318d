import csv

import numpy as np
import pytest
import soundfile

from unbraid.data import synthetic
from unbraid.data.synthetic import SynthesisError, make_sentences, make_synthetic_speech, make_talkers

SMALL = {"n_speakers": 7, "n_utterances": 2}


def rows_of(table):
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    return make_synthetic_speech(tmp_path_factory.mktemp("speech"), **SMALL)


def test_every_talker_has_every_utterance_in_one_split(table):
    rows = rows_of(table)
    splits = {row["speaker"]: {r["split"] for r in rows if r["speaker"] == row["speaker"]} for row in rows}

    assert len(rows) == 14
    assert len(splits) == 7
    assert sorted("".join(split) for split in splits.values()) == ["test"] * 2 + ["train"] * 3 + ["valid"] * 2


def test_files_are_what_the_table_says(table):
    for row in rows_of(table):
        info = soundfile.info(table.parent / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (8000, 1, "PCM_16")
        assert info.frames / 8000 == pytest.approx(float(row["seconds"]), abs=1e-3)
        assert 1.5 < float(row["seconds"]) < 15


def test_level_is_common_and_the_ends_are_trimmed(table):
    for row in rows_of(table):
        audio, _ = soundfile.read(table.parent / row["path"])
        frames = np.square(audio[: len(audio) // 80 * 80].reshape(-1, 80)).mean(-1)
        assert 10 * np.log10(np.square(audio).mean()) == pytest.approx(synthetic.RMS_DB, abs=0.5)
        assert 10 * np.log10(frames[[0, -1]].min() / frames.max()) > -45


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_talkers(table, tmp_path):
    again = make_synthetic_speech(tmp_path / "again", **SMALL)
    other = make_synthetic_speech(tmp_path / "other", **SMALL, seed=1)

    assert again.read_bytes() == table.read_bytes()
    for row in rows_of(table):
        assert (again.parent / row["path"]).read_bytes() == (table.parent / row["path"]).read_bytes()
    assert not {row["speaker"] for row in rows_of(other)} & {row["speaker"] for row in rows_of(table)}


def test_complete_speech_is_not_made_again_and_incomplete_speech_is(tmp_path):
    pytest.importorskip("espeakng_loader")
    calls = []

    def make(**changes):
        calls.clear()
        make_synthetic_speech(
            tmp_path, **{"n_speakers": 6, "n_utterances": 1, **changes}, progress=lambda *now: calls.append(now)
        )
        return list(calls)

    assert make() == [(6, 6)]
    assert make() == []
    (tmp_path / "speech.json").unlink()  # killed before the end
    assert make() == [(6, 6)]
    (tmp_path / rows_of(tmp_path / "speech.csv")[0]["path"]).unlink()
    assert make() == [(6, 6)]
    assert make(seed=5) == [(6, 6)]


def test_nothing_is_printed(tmp_path, capfd):
    pytest.importorskip("espeakng_loader")
    make_synthetic_speech(tmp_path, n_speakers=6, n_utterances=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_speakers", [6, 40, 300])
def test_no_variant_is_shared_between_splits(seed, n_speakers):
    talkers = make_talkers(n_speakers, seed=seed)
    variants = {
        split: {t.voice.partition("+")[2] for t in talkers if t.split == split} for split in ("train", "valid", "test")
    }

    assert len({t.name for t in talkers}) == len(talkers) == n_speakers
    assert not variants["train"] & (variants["valid"] | variants["test"])
    assert not variants["valid"] & variants["test"]


def test_sentences_come_from_seed_and_index():
    assert make_sentences(5, seed=1, index=2) == make_sentences(5, seed=1, index=2)
    assert make_sentences(5, seed=1, index=2) != make_sentences(5, seed=1, index=3)
    assert all(7 <= len(sentence.split()) <= 26 for sentence in make_sentences(200))


def test_a_missing_library_is_refused_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SynthesisError, match=r"unbraid\[demo\]"):
        make_synthetic_speech(tmp_path)


def test_an_unknown_voice_is_named(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(synthetic, "ACCENTS", "nowhere")
    with pytest.raises(SynthesisError, match="no voice nowhere"):
        make_synthetic_speech(tmp_path, n_speakers=6, n_utterances=1)
    assert not (tmp_path / "speech.csv").exists()


def test_too_few_speakers_are_refused(tmp_path):
    with pytest.raises(SynthesisError, match="at least 6"):
        make_synthetic_speech(tmp_path, n_speakers=2)
