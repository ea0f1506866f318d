"""`make demo`, from a checkout to separated audio, as a user runs it."""

import csv
import os
import re
import subprocess
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_make_demo_separates_unseen_speakers(tmp_path):
    out = tmp_path / "demo"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.run(
        ["make", "demo", f"DEMO_OUT={out}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]

    with (out / "run" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    improvement = sum(float(row["si_sdri"]) for row in rows) / len(rows)
    assert len(rows) == 100
    assert improvement >= 5.0
    with (out / "voices" / "speech.csv").open() as file:
        split_of = {row["speaker"]: row["split"] for row in csv.DictReader(file)}
    evaluated = {Path(file).parent.name for row in rows for file in row["files"].split(" + ")}
    assert {split_of[speaker] for speaker in evaluated} == {"test"}
    assert len(list((out / "run" / "evaluation-audio").glob("*.wav"))) >= 5 * 5
    assert soundfile.info(out / "run" / "evaluation-audio" / "000-estimate-1.wav").samplerate == 8000
    assert (out / "demo.png").stat().st_size > 50_000
    report = (out / "report.html").read_text()
    assert len(report) < 2_000_000
    assert report.count("data:audio/mpeg") >= 2 * 5
    assert re.search(r"training\s+\d+ %", process.stdout)
    assert len(re.findall(r"^  \S.*  \S*unbraid \w", process.stdout, flags=re.MULTILINE)) == 3
