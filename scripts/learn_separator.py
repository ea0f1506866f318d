"""The separator of docs/learn/gradient-descent.md: trained for a minute of one core's time, and listened to.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/learn_separator.py [FOLDER]

Talkers are made on the spot (the extra `demo`). Leaves ``separator.json``, ``separator.png`` and three sounds.
"""

import argparse
import io
import json
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from PIL import Image

from unbraid.config.recipe import load_recipe
from unbraid.data.synthetic import make_synthetic_speech
from unbraid.io import atomic_replace, write_json
from unbraid.lab.experiment import Experiment, experiment_from_recipe
from unbraid.spectrogram import spectrogram_db
from unbraid.train.loop import ValidationScores
from unbraid.train.state import TrainState
from unbraid.train.step import train_step
from unbraid.train.validate import validation

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "learn" / "figures"
N_STEPS, EVERY, HEARD, N_COLORS, N_ITEMS, EXAMPLE = 400, 25, (0, 50, 400), 96, 32, 0
SMALLER = ("data.excerpt_seconds=2.0", "data.workers=0", "model.n_filters=128", "model.hidden=128")
PLAIN = ("train.precision=fp32", "train.compile=off", "schedule.name=constant", "validate.n_items=32")


def trained(subject: Experiment) -> dict[int, ValidationScores]:
    """Train a fork of a subject; what each validation came to, with the sound of its mixtures, by step."""
    state, steps, recipe = subject.new_state(), subject.training_batches(), subject.recipe
    judge = validation(
        subject.corpus.valid,
        n_items=N_ITEMS,
        batch_size=recipe.data.batch_size,
        audio_options=recipe.audio_options,
        save_audio=EXAMPLE + 1,
    )
    found = {0: _judged(judge, state)}
    for step in range(1, N_STEPS + 1):
        train_step(state, next(steps))
        if step % EVERY == 0:
            found[step] = _judged(judge, state)
            print(f"step {step}: SI-SDRi {found[step].si_sdri:.2f} dB", flush=True)
    return found


def _judged(judge, state: TrainState) -> ValidationScores:
    state.model.eval()
    scores = judge(state)
    state.model.train()
    return scores


def draw(found: dict[int, ValidationScores]) -> Figure:
    """The curve of the validations, and one example's spectrograms as training goes on."""
    figure = Figure(figsize=(11.0, 5.6), layout="constrained")
    axes = figure.add_subplot(2, 3, 1)
    axes.plot(list(found), [scores.si_sdri for scores in found.values()], ".-", color="black")
    axes.plot(HEARD, [found[step].si_sdri for step in HEARD], "o", color="black", fillstyle="none", markersize=9)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(title=f"mean of {N_ITEMS} unseen mixtures", xlabel="step", ylabel="SI-SDR improvement in dB")
    example = {step: found[step].sounds[EXAMPLE] for step in HEARD}
    last = example[HEARD[-1]]
    pictures = {"mixture": last.mixture[0], "what talker 1 said": last.references[0, 0]}
    pictures |= {f"estimate of talker 1 after {step} steps": example[step].estimates[0, 0] for step in HEARD}
    for place, (title, signal) in zip((2, 3, 4, 5, 6), pictures.items(), strict=True):
        axes = figure.add_subplot(2, 3, place)
        level = spectrogram_db(np.asarray(signal))
        extent = (0, len(signal) / last.sample_rate, 0, last.sample_rate / 2000)
        axes.imshow(level, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=level.max() - 60)
        axes.set(title=title, xlabel="s", ylabel="kHz")
        axes.label_outer()
    return figure


def write_sounds(found: dict[int, ValidationScores], folder: Path) -> None:
    """The mixture, and the first talker as estimated early and at the end; at one peak, so that they compare."""
    early, last = (found[step].sounds[EXAMPLE] for step in HEARD[1:])
    signals = {"mixture": last.mixture[0]}
    signals |= {f"after-{step}": one.estimates[0, 0] for step, one in zip(HEARD[1:], (early, last), strict=True)}
    for name, signal in signals.items():
        with atomic_replace(folder / f"separator-{name}.ogg") as path:
            soundfile.write(path, 0.5 * signal / np.abs(signal).max(), last.sample_rate, format="OGG")


def told(found: dict[int, ValidationScores], seconds: float) -> dict:
    """What is kept of it: each validation, and the example that is heard."""
    return {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(seconds, 1),
        "n_steps": N_STEPS,
        "n_items": N_ITEMS,
        "settings": [*SMALLER, *PLAIN],
        "si_sdri": {str(step): round(scores.si_sdri, 3) for step, scores in found.items()},
        "example_si_sdr": {str(step): round(found[step].sounds[EXAMPLE].si_sdr[0], 3) for step in HEARD},
        "example_si_sdri": {str(step): round(found[step].sounds[EXAMPLE].si_sdri, 3) for step in HEARD},
    }


def main() -> None:
    """Train, and write curve, spectrograms and sounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FIGURES)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as voices:
        table = make_synthetic_speech(Path(voices), n_speakers=60, n_utterances=6)
        recipe = load_recipe(ROOT / "recipes" / "demo.toml", [f"data.path={table}", *SMALLER, *PLAIN])
        began = time.process_time()
        found = trained(experiment_from_recipe(recipe, "demo"))
        seconds = time.process_time() - began
    with io.BytesIO() as held, atomic_replace(folder / "separator.png") as path:
        draw(found).savefig(held, dpi=90, format="png")
        picture = Image.open(held).convert("RGB").quantize(N_COLORS, dither=Image.Dither.NONE)
        picture.save(path, format="png", optimize=True)
    write_sounds(found, folder)
    write_json(folder / "separator.json", told(found, seconds))
    print(json.dumps(told(found, seconds)))


if __name__ == "__main__":
    main()
