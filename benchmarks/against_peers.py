"""Compare the speed of unbraid with its peers: python benchmarks/against_peers.py, with the peers' packages installed.

SpeechBrain, Asteroid, fast_bss_eval and BS-RoFormer do the same work, on networks of the same sizes, each with its own
loss, clipping and optimizer. The contestants run in turns in one process (`race.race`). Printed is peer / ours, so that
more is better: the median over the rounds, the lowest and the highest. Ours runs in one precision at a time against all
precisions of the peer: graphs of several would share the compiler's memory of shapes. The first step and the peak of
memory happen only once in a process, and are measured in fresh ones (`fresh.measure_first_steps`).
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fresh import in_a_fresh_process
from machine import processor
from peers import LR, MAX_NORM, PEERS, Call, Work, build, inference, missing, offers, our_step, peer_step
from race import Contestant, Measured, figures, lines, on_cpu_time, race
from torch import nn

from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.models import MODELS
from unbraid.robust.clip import FixedClip
from unbraid.robust.guard import guarded_step
from unbraid.robust.precision import best_precision
from unbraid.train.optim import OPTIMIZERS

ROOT = Path(__file__).parents[1]
SMALL = {"n_blocks": 1, "n_layers": 2}

QUICK: dict[str, dict[str, Any]] = {
    "sepformer": {"n_filters": 16, "chunk_size": 10, "n_blocks": 1, "n_layers": 2, "n_heads": 2, "d_hidden": 32},
    "conv_tasnet": {"n_filters": 16, "bottleneck": 8, "hidden": 16, "skip": 8, "n_blocks": 2, "n_repeats": 1},
    "dprnn": {"n_filters": 16, "bottleneck": 8, "hidden": 8, "chunk_size": 10, "n_blocks": 1},
    "bs_roformer": {"d_model": 16, "n_blocks": 1, "n_heads": 2, "d_head": 8},
}
"""Sizes for which the figures mean nothing: they only show that the benchmark runs."""


class Setting(NamedTuple):
    """Device, number of rounds and sizes of all measurements."""

    device: torch.device
    repeats: int
    quick: bool
    batch_size: int | None = None

    @property
    def compiles(self) -> bool:
        """True if there is a compiler."""
        return self.device.type == "cuda" or shutil.which("g++") is not None

    def sized(self, work: Work) -> Work:
        """Return the work with the batch size of this setting, or a tiny version of it."""
        if self.quick:
            return work._replace(options=QUICK[work.model], batch_size=1, seconds=0.25)
        return work._replace(batch_size=self.batch_size or work.batch_size)


class Race(NamedTuple):
    """One comparison: its label, unique in its benchmark; the measurements; and facts to record with them."""

    label: str
    measured: Measured
    facts: dict[str, Any]


Races = Iterator[Race]


def precisions(device: torch.device) -> list[str]:
    """Return fp32, and bf16 where the hardware multiplies it natively: elsewhere nobody trains in it."""
    return list(dict.fromkeys(["fp32", best_precision(device)]))


def network_races(work: Work, setting: Setting, *, train: bool) -> Races:
    """Compare a training step, or inference: ours in each precision, compiled or not, with the peer in all of them."""
    work = setting.sized(work)
    device = setting.device
    batch = work.batch(device)
    peer = PEERS[work.model]
    for precision in precisions(device):
        torch._dynamo.reset()  # forget the graphs of the precision before
        torch.manual_seed(0)
        ours = [precision, *([f"{precision} compiled"] if setting.compiles else [])]
        contestants = [
            *(Contestant("ours", how) for how in ours),
            *(Contestant(peer.who, how) for how in precisions(device)),
        ]
        calls: dict[Contestant, Call] = {}
        parameters: dict[str, int] = {}
        for contestant in contestants:
            model = build(work, device, ours=contestant.is_ours, compiled="compiled" in contestant.how)
            parameters[contestant.who] = sum(weight.numel() for weight in model.parameters())
            number_format = contestant.how.split()[0]
            if not train:
                calls[contestant] = inference(model, number_format, batch)
            elif contestant.is_ours:
                calls[contestant] = our_step(model, number_format, batch)
            else:
                calls[contestant] = peer_step(model, peer.loss, number_format, batch)
        facts = {"work": work._asdict(), "parameters": parameters, "rounds": setting.repeats}
        yield Race("", race(calls, rounds=setting.repeats, device=device), facts)


def pit_races(n_sources: int, setting: Setting) -> Races:
    """Compare the permutation-invariant loss and its gradient with those of fast_bss_eval."""
    from fast_bss_eval.torch import si_sdr_pit_loss

    batch_size, seconds = (2, 0.25) if setting.quick else (8, 4.0)
    rng = torch.Generator().manual_seed(0)
    sources = torch.randn(batch_size, n_sources, round(8000 * seconds), generator=rng)
    estimate = sources.flip(1) + 0.3 * torch.randn(sources.shape, generator=rng)
    estimate = estimate.to(setting.device).requires_grad_()
    sources = sources.to(setting.device)
    loss = SeparationLoss(neg_si_sdr)
    losses: dict[Contestant, Callable[[], torch.Tensor]] = {
        Contestant("ours", "fp32"): lambda: loss(estimate[:, :, None], sources[:, :, None]).mean(),
        Contestant("fast_bss_eval", "fp32"): lambda: si_sdr_pit_loss(estimate, sources, zero_mean=True).mean(),
    }

    def with_gradient(compute_loss: Callable[[], torch.Tensor]) -> Call:
        def call() -> None:
            estimate.grad = None
            compute_loss().backward()

        return call

    # The values are recorded: they must agree, or the two would not do the same work.
    values = {str(contestant): float(compute_loss().detach()) for contestant, compute_loss in losses.items()}
    calls = {contestant: with_gradient(compute_loss) for contestant, compute_loss in losses.items()}
    facts = {"batch_size": batch_size, "seconds": seconds, "sources": n_sources, "loss_db": values}
    yield Race("", race(calls, rounds=setting.repeats, device=setting.device, calls=5, warm_up=3), facts)


def update_races(setting: Setting) -> Races:
    """Compare clipping and Adam on all tensors of a SepFormer with PyTorch's own two calls."""
    work = setting.sized(Work("sepformer", {}, 1, 4.0))
    variants = [Contestant("torch", how) for how in ("default", "foreach", "fused")]
    calls: dict[Contestant, Call] = {}
    for contestant in (Contestant("ours", "default"), *variants):
        parameters = list(build(work, setting.device, ours=True).parameters())
        for weight in parameters:
            weight.grad = 1e-2 * torch.randn_like(weight)
        if contestant.is_ours:
            calls[contestant] = our_update(parameters)
        else:
            calls[contestant] = torch_update(parameters, contestant.how)
    facts = {"tensors": len(parameters), "parameters": sum(weight.numel() for weight in parameters)}
    yield Race("", race(calls, rounds=setting.repeats, device=setting.device, calls=5, warm_up=3), facts)


def our_update(parameters: list[nn.Parameter]) -> Call:
    """Return clipping and update in the way of our step."""
    optimizer = OPTIMIZERS["adam"](parameters, lr=LR)
    clipper = FixedClip(max_norm=MAX_NORM)
    return lambda: guarded_step(optimizer, clipper)


def torch_update(parameters: list[nn.Parameter], how: str) -> Call:
    """Return clipping and update by PyTorch: with its defaults, as in the peers' loops, or with a faster variant."""
    variant = {} if how == "default" else {how: True}
    optimizer = torch.optim.Adam(parameters, lr=LR, **variant)
    foreach = True if how == "foreach" else None

    def call() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=foreach)
        optimizer.step()

    return call


def memory_races(setting: Setting) -> Races:
    """Measure the peak memory of a SepFormer step beyond weights and optimizer state, each in a fresh process."""
    work = setting.sized(Work("sepformer", {}, 1, 4.0))
    both_sides = ("ours", PEERS[work.model].who)
    variants = [(Contestant(who, how), {}) for who in both_sides for how in precisions(setting.device)]
    if offers(work, "checkpoint"):
        hows = [f"{precision} checkpoint" for precision in precisions(setting.device)]
        variants += [(Contestant("ours", how), {"checkpoint": True}) for how in hows]
    measured: Measured = {}
    for contestant, options in variants:
        task = fresh_task(contestant, work, setting) | {"precision": contestant.how.split()[0], "options": options}
        measured[contestant] = [float(in_a_fresh_process(task)["extra_bytes"])]
    yield Race("", measured, {"work": work._asdict()})


def first_step_races(work: Work, setting: Setting) -> Races:
    """Measure the seconds of the first compiled step, once, in fresh processes with an empty and with a warm cache."""
    work = setting.sized(work)
    peer = PEERS[work.model].who
    without = {who: in_a_fresh_process(fresh_task(Contestant(who, ""), work, setting)) for who in ("ours", peer)}
    facts = {"work": work._asdict(), "not_compiled": without}
    contestants = [Contestant("ours", "regions"), Contestant("ours", "whole"), Contestant(peer, "whole")]
    with tempfile.TemporaryDirectory() as folder:
        for label in ("empty cache", "warm cache"):
            first: Measured = {}
            second: dict[str, float] = {}
            for contestant in contestants:
                task = fresh_task(contestant, work, setting) | {"compile": contestant.how}
                # The second pass over the labels finds what the first one left in this folder.
                cache = Path(folder) / str(contestant).replace(" ", "_")
                result = in_a_fresh_process(task, cache=cache)
                first[contestant] = [result["first"]]
                second[str(contestant)] = result["second"]
            yield Race(label, first, facts | {"after": second})


def fresh_task(contestant: Contestant, work: Work, setting: Setting) -> dict[str, Any]:
    """Return the task for a fresh process, in fp32 and not compiled."""
    size = {"work": work, "threads": torch.get_num_threads(), "device": str(setting.device)}
    return size | {"who": contestant.who, "precision": "fp32", "compile": ""}


class Benchmark(NamedTuple):
    """A benchmark: its races, and what they need."""

    races: Callable[[Setting], Races]
    needs: tuple[str, ...] = ()
    """Packages of the peers."""
    model: str = ""
    """Our model, without which there is nothing to measure."""
    unit: str = "seconds"


def all_benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks, by name."""
    sepformer, small = Work("sepformer", {}, 1, 4.0), Work("sepformer", SMALL, 1, 4.0)
    conv_tasnet, dprnn = Work("conv_tasnet", {}, 2, 3.0), Work("dprnn", {}, 2, 3.0)
    music = Work("bs_roformer", {"n_blocks": 1}, 1, 30.0, sample_rate=44100, n_channels=2, n_sources=1)
    steps = {"sepformer_small": small, "sepformer": sepformer, "conv_tasnet": conv_tasnet, "dprnn": dprnn}
    files = {name: work._replace(batch_size=1, seconds=30.0) for name, work in steps.items()}

    def of_network(work: Work, races: Callable[..., Races], unit: str = "seconds", **options: Any) -> Benchmark:
        return Benchmark(partial(races, work, **options), (PEERS[work.model].who,), work.model, unit)

    found = {f"{name}_step": of_network(work, network_races, train=True) for name, work in steps.items()}
    found |= {f"{name}_30s": of_network(work, network_races, train=False) for name, work in files.items()}
    found["bs_roformer_30s"] = of_network(music, network_races, train=False)
    found |= {f"pit_{n}": Benchmark(partial(pit_races, n), ("fast_bss_eval",)) for n in (2, 3, 5, 8, 16)}
    found["clip_and_adam"] = Benchmark(update_races)
    found["sepformer_memory"] = Benchmark(memory_races, ("speechbrain",), "sepformer", "bytes")
    found |= {
        f"{name}_first_step": of_network(steps[name], first_step_races) for name in ("sepformer_small", "sepformer")
    }
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    args = arguments().parse_args(words)
    chosen = {name: benchmark for name, benchmark in all_benchmarks().items() if not args.only or name in args.only}
    absent = missing({package for benchmark in chosen.values() for package in benchmark.needs})
    if absent:
        print(
            f"{', '.join(absent)} cannot be imported here: run this with the Python of an environment that has them, "
            "and PYTHONPATH set to this checkout.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(args.threads)
    setting = Setting(torch.device(args.device), args.repeats, args.quick, args.batch_size)
    out = args.out or default_file(setting)
    if args.quick and args.out is None:
        print("--quick gives no figures worth keeping; choose another --out.", file=sys.stderr)
        return 2
    for name, benchmark in chosen.items():
        result = measure(name, benchmark, setting)
        write(out, name, environment(setting, benchmark) | result)
    print(out)
    return 0


def default_file(setting: Setting) -> Path:
    """Return the file of the results: another one for each GPU, and for several threads of a CPU."""
    words = ["against_peers"]
    if setting.device.type == "cuda":
        words += torch.cuda.get_device_name(setting.device).lower().split()
    elif torch.get_num_threads() > 1:
        words += [str(torch.get_num_threads()), "threads"]
    return ROOT / "benchmarks" / "results" / f"{'_'.join(words)}.json"


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(all_benchmarks()), metavar="NAME", help=", ".join(all_benchmarks())
    )
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of each race (%(default)s)")
    parser.add_argument(
        "--threads", type=at_least_one, default=1, help="with more than 1, wall time is compared (%(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument(
        "--batch-size", type=at_least_one, help="batch size of the networks, large enough to fill a GPU"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file (by default one for each GPU); results of other benchmarks in it are kept"
    )
    return parser


def at_least_one(text: str) -> int:
    """Parse a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def measure(name: str, benchmark: Benchmark, setting: Setting) -> dict[str, Any]:
    """Run all races of a benchmark, and print each as soon as it is done."""
    if benchmark.model and benchmark.model not in MODELS:
        print(f"{name}: unbraid has no model {benchmark.model}")
        return {"not_there": benchmark.model}
    found = []
    for comparison in benchmark.races(setting):
        result = {"label": comparison.label} | figures(comparison.measured) | comparison.facts
        found.append(result)
        print("\n".join(lines(f"{name} {comparison.label}".rstrip(), result, benchmark.unit)), flush=True)
        gc.collect()  # the networks of this race would take memory from the next
    return {"unit": benchmark.unit, "races": found}


def environment(setting: Setting, benchmark: Benchmark) -> dict[str, Any]:
    """Return date, machine, clock and versions."""
    cuda = setting.device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/against_peers.py", *sys.argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the process" if on_cpu_time(setting.device) else "wall time",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "quick": setting.quick,
        "peers": {name: version(name) for name in benchmark.needs},
    }


def version(package: str) -> str:
    """Return the version of an installed package, or of its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def write(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write the result of one benchmark; results of others in the file are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {name: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
