"""Train the separator of docs/learn/gradient-descent.md, about a minute on one core, and write what it sounds like.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/learn_separator.py [FOLDER]

The talkers are synthetic (needs the extra `demo`). Writes ``separator.json``, ``separator.png`` and three audio files.
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
from unbraid.train.step import train_step
from unbraid.train.validate import make_validator
from unbraid.type_aliases import Row

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "learn" / "figures"
N_STEPS = 400
VALIDATE_EVERY = 25
N_ITEMS = 32
EXAMPLE = 0
"""Index of the validation mixture that is shown and heard."""
SHOWN_STEPS = (0, 50, 400)
N_COLORS = 96
SMALLER = ("data.excerpt_seconds=2.0", "data.workers=0", "model.n_filters=128", "model.hidden=128")
PLAIN = ("train.precision=fp32", "train.compile=off", "schedule.name=constant", "validate.n_items=32")


def train(experiment: Experiment) -> dict[int, ValidationScores]:
    """Train an experiment's model, and return the scores of each validation by step."""
    state = experiment.new_state()
    batches = experiment.training_batches()
    validate = make_validator(
        experiment.corpus.valid,
        n_items=N_ITEMS,
        batch_size=experiment.recipe.data.batch_size,
        audio_options=experiment.recipe.audio_options,
        save_audio=EXAMPLE + 1,
    )
    scores = {}
    for step in range(N_STEPS + 1):
        # Step 0 is the untrained model.
        if step > 0:
            train_step(state, next(batches))
        if step % VALIDATE_EVERY == 0:
            state.model.eval()
            scores[step] = validate(state)
            state.model.train()
            print(f"step {step}: SI-SDRi {scores[step].si_sdri:.2f} dB", flush=True)
    return scores


def draw(scores: dict[int, ValidationScores]) -> Figure:
    """Draw the validation curve, and spectrograms of one example as training proceeds."""
    figure = Figure(figsize=(11.0, 5.6), layout="constrained")
    axes = figure.add_subplot(2, 3, 1)
    axes.plot(list(scores), [score.si_sdri for score in scores.values()], ".-", color="black")
    shown_scores = [scores[step].si_sdri for step in SHOWN_STEPS]
    axes.plot(SHOWN_STEPS, shown_scores, "o", color="black", fillstyle="none", markersize=9)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(title=f"mean of {N_ITEMS} unseen mixtures", xlabel="step", ylabel="SI-SDR improvement in dB")

    examples = {step: scores[step].audio[EXAMPLE] for step in SHOWN_STEPS}
    last = examples[SHOWN_STEPS[-1]]
    signals = {"mixture": last.mixture[0], "what talker 1 said": last.references[0, 0]}
    signals |= {
        f"estimate of talker 1 after {step} steps": example.estimates[0, 0] for step, example in examples.items()
    }
    for position, (title, signal) in enumerate(signals.items(), start=2):
        axes = figure.add_subplot(2, 3, position)
        level_db = spectrogram_db(np.asarray(signal))
        extent = (0, len(signal) / last.sample_rate, 0, last.sample_rate / 2000)
        # 60 dB below the loudest point is black in every panel.
        axes.imshow(level_db, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=level_db.max() - 60)
        axes.set(title=title, xlabel="s", ylabel="kHz")
        axes.label_outer()
    return figure


def write_audio(scores: dict[int, ValidationScores], folder: Path) -> None:
    """Write the mixture, and the estimate of the first talker early and at the end, all with the same peak."""
    examples = {step: scores[step].audio[EXAMPLE] for step in SHOWN_STEPS[1:]}
    last = examples[SHOWN_STEPS[-1]]
    signals = {"mixture": last.mixture[0]}
    signals |= {f"after-{step}": example.estimates[0, 0] for step, example in examples.items()}
    for name, signal in signals.items():
        with atomic_replace(folder / f"separator-{name}.ogg") as temporary:
            soundfile.write(temporary, 0.5 * signal / np.abs(signal).max(), last.sample_rate, format="OGG")


def results_table(scores: dict[int, ValidationScores], cpu_seconds: float) -> Row:
    """Return settings, every validation, and the scores of the shown example."""
    examples = {step: scores[step].audio[EXAMPLE] for step in SHOWN_STEPS}
    return {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(cpu_seconds, 1),
        "n_steps": N_STEPS,
        "n_items": N_ITEMS,
        "settings": [*SMALLER, *PLAIN],
        "si_sdri": {str(step): round(score.si_sdri, 3) for step, score in scores.items()},
        "example_si_sdr": {str(step): round(example.si_sdr[0], 3) for step, example in examples.items()},
        "example_si_sdri": {str(step): round(example.si_sdri, 3) for step, example in examples.items()},
    }


def main() -> None:
    """Train, and write curve, spectrograms and audio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FIGURES)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as speech:
        manifest = make_synthetic_speech(Path(speech), n_speakers=60, n_utterances=6)
        recipe = load_recipe(ROOT / "recipes" / "demo.toml", [f"data.path={manifest}", *SMALLER, *PLAIN])
        start = time.process_time()
        scores = train(experiment_from_recipe(recipe, "demo"))
        cpu_seconds = time.process_time() - start

    with io.BytesIO() as buffer, atomic_replace(folder / "separator.png") as temporary:
        draw(scores).savefig(buffer, dpi=90, format="png")
        picture = Image.open(buffer).convert("RGB").quantize(N_COLORS, dither=Image.Dither.NONE)
        picture.save(temporary, format="png", optimize=True)
    write_audio(scores, folder)
    results = results_table(scores, cpu_seconds)
    write_json(folder / "separator.json", results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
