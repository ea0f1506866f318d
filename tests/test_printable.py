import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from unbraid.printable import printable, say


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Żółć, 語, a\u200db and a tab-less line", "Żółć, 語, a\u200db and a tab-less line"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("\x9b31m", "\\x9b31m"),
        (os.fsdecode(b"caf\xe9.wav"), "caf\\xe9.wav"),
        ("\u202egpj.exe\u2028", "\\u202egpj.exe\\u2028"),
    ],
)
def test_only_what_a_terminal_would_not_show_is_escaped(text, expected):
    assert printable(text) == expected


def test_each_line_stays_one_line(capsys):
    say("first\nof one", "second")

    assert capsys.readouterr().out == "first\\x0aof one\nsecond\n"


HOSTILE = [b"clear\x1b[2J\x1b]0;owned\x07.wav", b"two\nlines.wav", b"caf\xe9.wav", "right\u202eleft.wav".encode()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such file names")
def test_no_file_name_reaches_the_terminal_raw(recipe_file, speaker_folder, tmp_path):
    # Every speaker has a file with a hostile name and a NaN sample: each of them is reported.
    folder = speaker_folder()
    audio = 0.1 * np.random.default_rng(0).standard_normal(12_000).astype(np.float32)
    audio[500] = np.nan
    for number, speaker in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        path = os.fsencode(speaker) + b"/" + HOSTILE[number % len(HOSTILE)]
        soundfile.write(path, audio, 8000, subtype="FLOAT", format="WAV")
    file = recipe_file(path=folder)
    run = tmp_path / "run"

    seen = b""
    for arguments, allowed in (
        (["train", file, "--run", run, "--set", "train.max_steps=12"], (0, 2)),
        (["doctor", run, "--all"], (0, 1, 2)),
        (["evaluate", run, "--n-items", "9"], (0,)),
        (["report", run], (0,)),
        (["separate", *folder.rglob("*.wav"), "-m", run, "-o", tmp_path / "out"], (0, 2)),
        (["doctor", tmp_path / os.fsdecode(HOSTILE[0])], (2,)),
    ):
        words = [sys.executable, "-m", "unbraid", *map(str, arguments)]
        ended = subprocess.run([os.fsencode(word) for word in words], capture_output=True, timeout=300, check=False)
        assert ended.returncode in allowed, ended.stderr
        assert b"Traceback" not in ended.stderr
        seen += ended.stdout + ended.stderr

    assert b"\\x1b[2J" in seen
    assert b"caf\\xe9.wav" in seen
    assert b"two\\x0alines.wav" in seen
    text = seen.decode()  # valid UTF-8
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
