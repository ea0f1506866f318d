"""Synthetic run directories for the page and the report to show."""

import json

import numpy as np
import soundfile
import tomli_w
from made_up import Run

RATE = 8000


def write_run(path, *, n_steps=400, seed=0, max_steps=None, change=None):
    """Write a healthy run directory; ``change`` may alter the synthetic run before."""
    run = Run(n_steps, seed=seed, every=100)
    run.recipe["train"]["max_steps"] = n_steps if max_steps is None else max_steps
    if change is not None:
        change(run)
    path.mkdir(parents=True)
    for name, rows in (("steps", run.steps), ("validation", run.validations), ("events", run.events)):
        (path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (path / "recipe.toml").write_text(tomli_w.dumps(run.recipe))
    (path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "chosen": {"precision": "fp32"}}))
    return path


def add_steps(path, first, n):
    """Append steps to a run, one line each."""
    template = json.loads((path / "steps.jsonl").read_text().splitlines()[0])
    with (path / "steps.jsonl").open("a") as file:
        for step in range(first, first + n):
            file.write(json.dumps(template | {"step": step}) + "\n")


def tone(hz, seconds=1.0):
    return (0.2 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def add_audio(path, *, steps=(100, 400), n_items=2, seconds=1.0, files=("a/one.wav", "b/two.wav")):
    """Write validation examples of some steps: two tones each, and estimates that get better."""
    folder = path / "audio"
    for step in steps:
        (folder / f"step-{step:06d}").mkdir(parents=True)
    for index in range(n_items):
        sources = [tone(300 + 50 * index, seconds), tone(900 + 50 * index, seconds)]
        _write(folder / f"{index:03d}-mixture.wav", sources[0] + sources[1])
        for n, source in enumerate(sources, 1):
            _write(folder / f"{index:03d}-reference-{n}.wav", source)
            for order, step in enumerate(steps, 1):
                _write(folder / f"step-{step:06d}" / f"{index:03d}-estimate-{n}.wav", source + 0.1 / order)
    for order, step in enumerate(steps):
        items = [
            {"index": i, "si_sdri": 3.0 + order, "si_sdr": [4.0, 5.0], "files": list(files)} for i in range(n_items)
        ]
        scores = {"step": step, "sample_rate": RATE, "items": items}
        (folder / f"step-{step:06d}" / "scores.json").write_text(json.dumps(scores))


def _write(path, audio):
    soundfile.write(path, audio, RATE, subtype="FLOAT")
