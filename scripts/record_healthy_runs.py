"""Train healthy runs of 2,000 steps on real speech, and save their records: no rule of the doctor may fire on them.

    OMP_NUM_THREADS=1 PYTHON scripts/record_healthy_runs.py SPEECH.csv tests/health/healthy [NAME ...]

SPEECH.csv has the columns path, speaker and split; speakers.csv next to it, with speaker and gender, is needed by
the run `stems`. Of the recordings, only the file names are saved.
"""

import argparse
import csv
import gzip
import json
import math
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import torch

from unbraid.audio import read_audio, write_audio
from unbraid.columns import NUMBER_FIELDS
from unbraid.config.recipe import load_recipe
from unbraid.data.folders import list_speakers
from unbraid.dsp import resample
from unbraid.health.rules import run_rules
from unbraid.health.series import read_series
from unbraid.records import read_rows
from unbraid.run import train
from unbraid.run_directory import RunDirectory

RECIPE = """
[data]
path = "{path}"
excerpt_seconds = {seconds}
batch_size = 4
workers = 0
[train]
max_steps = 2000
precision = "fp32"
compile = "off"
[validate]
every_steps = 200
n_items = 40
[save]
every_steps = 0
"""

CONV = """[model]
name = "conv_tasnet"
n_filters = 64
kernel_size = 32
bottleneck = 32
hidden = 64
skip = 32
n_blocks = 4
n_repeats = 1
"""
ADAM = '[optim]\nname = "adam"\nlr = 1e-3\n'
COSINE = '[schedule]\nname = "cosine"\nwarmup_steps = 100\n'

RUNS = {
    "conv_tasnet": CONV + ADAM + '[loss]\nname = "neg_si_sdr"\n[clip]\nname = "fixed"\nmax_norm = 10.0\n',
    "dprnn": ADAM
    + '[loss]\nname = "neg_snr"\n[clip]\nname = "autoclip"\n[model]\nname = "dprnn"\nn_filters = 64\nkernel_size = 32\n'
    + "bottleneck = 24\nhidden = 24\nchunk_size = 16\nn_blocks = 1\n",
    "sepformer": '[optim]\nname = "adamw"\nlr = 5e-4\n'
    + '[loss]\nname = "neg_thresholded_snr"\n[clip]\nname = "zclip"\n[model]\nname = "sepformer"\nn_filters = 64\n'
    + "kernel_size = 32\nchunk_size = 16\nn_blocks = 1\nn_layers = 1\nn_heads = 4\nd_hidden = 128\n",
    "re_sepformer": COSINE
    + ADAM
    + '[loss]\nname = "neg_sa_sdr"\n[clip]\nname = "fixed"\nmax_norm = 2.0\n[model]\nname = "re_sepformer"\n'
    + "n_filters = 64\nkernel_size = 32\nchunk_size = 16\nn_blocks = 2\nn_layers = 1\nn_heads = 4\nd_hidden = 128\n",
    "sepreformer": COSINE
    + '[optim]\nname = "adamw"\nlr = 1e-3\n[loss]\nname = "neg_si_sdr"\n[clip]\nname = "autoclip"\n[model]\n'
    + 'name = "sepreformer"\nn_filters = 32\nkernel_size = 32\nstride = 16\nd_model = 16\nn_stages = 1\nn_heads = 2\n'
    + "n_split_layers = 1\nn_rebuild_layers = 1\nlocal_kernel = 9\nlayer_scale = 0.5\n",
    "bs_roformer": ADAM
    + '[loss]\nname = "multi_resolution_l1"\n[clip]\nname = "autoclip"\n[model]\nname = "bs_roformer"\n'
    + 'n_sources = 2\nn_channels = 1\nsample_rate = 8000\nn_fft = 256\nhop_length = 128\nbands = "mel"\nn_bands = 8\n'
    + "n_blocks = 1\nd_model = 24\nn_heads = 2\nd_head = 12\nexpansion = 2\nmask_expansion = 2\n",
    "blstm": ADAM
    + '[loss]\nname = "l1"\n[clip]\nname = "autoclip"\n[model]\nname = "blstm"\nhidden = 48\nn_layers = 2\n',
    "chimera": ADAM
    + '[clip]\nname = "none"\n[model]\nname = "chimera"\nhidden = 48\nn_layers = 2\n[loss]\nname = "sum"\n'
    + '[[loss.terms]]\nname = "deep_clustering"\n[[loss.terms]]\nname = "neg_snr"\nweight = 0.1\n',
    "muon": COSINE
    + '[optim]\nname = "muon"\nlr = 1e-3\n[loss]\nname = "neg_snr"\n[clip]\nname = "autoclip"\n[model]\n'
    + 'name = "dprnn"\nn_filters = 64\nkernel_size = 32\nbottleneck = 32\nhidden = 32\nchunk_size = 16\nn_blocks = 1\n',
    "spectral": COSINE
    + '[optim]\nname = "adamw"\nlr = 1e-3\n[loss]\nname = "multi_resolution_stft"\n[clip]\nname = "zclip"\n'
    + '[model]\nname = "blstm"\nhidden = 48\nn_layers = 2\n',
    "stems": CONV
    + ADAM
    + '[loss]\nname = "neg_snr"\nassign = "fixed"\n[clip]\nname = "zclip"\n[[filter]]\nname = "threshold"\n',
}
OVERRIDES = {"stems": ["data.kinds=['f', 'm']", "train.ema=0.99"]}


def main():
    """Record the named runs, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "healthy-runs", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.4, help="length of an excerpt (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = resample_recordings(args.table, args.work / "speech")
    for name in args.names or RUNS:
        # Train from an empty folder.
        folder = args.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(path=table.as_posix(), seconds=args.seconds) + RUNS[name])
        overrides = [f"train.max_steps={args.steps}", *OVERRIDES.get(name, [])]
        run = RunDirectory(folder / "run")
        start = time.perf_counter()
        for _ in train(load_recipe(recipe, overrides), run):
            pass
        seconds = (time.perf_counter() - start) / args.steps

        # Write the records, and print what the doctor finds: it should be nothing.
        path = write_compact(run, args.out / f"{name}.jsonl.gz", folder_to_remove=f"{table.parent.as_posix()}/")
        si_sdri = [round(row["si_sdri"], 2) for row in read_rows(run.validation)[0]]
        size = path.stat().st_size / 1000
        print(f"{name}: {seconds:.3f} s per step, {size:.0f} kB, SI-SDRi {si_sdri}")
        for finding in run_rules(read_series(run.path)):
            print(f"  {finding.severity} {finding.code}: {finding.problem} {finding.evidence}")
        sys.stdout.flush()


def resample_recordings(table, folder):
    """Write the recordings at 8 kHz, so that training does not wait for resampling; return their table."""
    new_table = folder / "table.csv"
    if new_table.exists():
        return new_table
    speaker_table = table.parent / "speakers.csv"
    rows = csv.DictReader(speaker_table.open(encoding="utf-8")) if speaker_table.exists() else []
    kinds = {row["speaker"]: row["gender"] for row in rows}
    lines = ["path,speaker,seconds,sample_rate,split,kind"]
    for index, track in enumerate(list_speakers(table)):
        audio, sample_rate = read_audio(track.path)
        audio = resample(audio, sample_rate, 8000)
        path = folder / track.group / f"{index:04d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio, 8000)
        row = (path.relative_to(folder).as_posix(), track.group, audio.shape[-1] / 8000, 8000, track.split)
        lines.append(",".join(map(str, (*row, kinds.get(track.group, "")))))
    new_table.write_text("\n".join(lines) + "\n")
    return new_table


STEP_FIELDS = {*NUMBER_FIELDS, *(f"{name}_text" for name in NUMBER_FIELDS), "outcome", "si_sdr", "blocks", "items"}
"""The fields of a step that the doctor reads."""


def write_compact(run, path, *, folder_to_remove):
    """Write a run's records as one compressed file of ``[kind, row]`` lines, with five digits and without folders."""
    environment = json.loads(run.environment.read_text())
    lines = [
        ["recipe", tomllib.loads(run.recipe.read_text())],
        ["environment", {"loss_in_db": environment["loss_in_db"]}],
        ["data", json.loads(run.data.read_text())],
    ]
    lines += [
        ["step", {name: value for name, value in row.items() if name in STEP_FIELDS}] for row in read_rows(run.steps)[0]
    ]
    lines += [["validation", row] for row in read_rows(run.validation)[0]]
    lines += [["event", row] for row in read_rows(run.events)[0]]
    text = "".join(json.dumps(round_numbers(line), separators=(",", ":")) + "\n" for line in lines)
    text = text.replace(folder_to_remove, "").replace(folder_to_remove.rstrip("/"), "speech")
    # Without a time stamp the same records give the same bytes.
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return path


def round_numbers(value):
    """Return a JSON value with floats rounded to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {name: round_numbers(element) for name, element in value.items()}
    return [round_numbers(element) for element in value] if isinstance(value, list) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
