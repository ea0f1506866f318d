import struct

import numpy as np
import pytest
import soundfile

from unbraid.audio import probe_audio, read_audio
from unbraid.audio_container import missing_bytes
from unbraid.errors import AudioError

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float wav": ("WAV", "FLOAT"),
    "extensible wav": ("WAVEX", "PCM_24"),
    "rf64": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def write(path, name, n_samples=30_000, n_channels=1):
    rng = np.random.default_rng(0)
    audio = 0.1 * rng.standard_normal((n_samples, n_channels))
    container, subtype = FORMATS[name]
    soundfile.write(path, audio, 8000, format=container, subtype=subtype)
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_channels", [1, 2])
def test_a_complete_file_lacks_nothing(tmp_path, name, n_channels):
    path = write(tmp_path / "a", name, n_channels=n_channels)

    assert missing_bytes(path) == 0
    assert probe_audio(path).n_channels == n_channels


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_anywhere_is_refused(tmp_path, name):
    content = write(tmp_path / "a", name).read_bytes()
    path = tmp_path / "cut"
    for share in np.linspace(0.02, 0.999, 40):
        path.write_bytes(content[: int(share * len(content))])

        with pytest.raises(AudioError):
            probe_audio(path)
        with pytest.raises(AudioError):
            read_audio(path, 0.0, 0.01)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_that_was_written_to_a_pipe_is_complete(tmp_path, size):
    path = write(tmp_path / "a.wav", "wav")
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)

    assert missing_bytes(path) == 0


def test_a_file_of_no_known_container_lacks_nothing(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(1000), 8000)

    assert missing_bytes(path) == 0
