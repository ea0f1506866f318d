"""How fast ours is beside the peers: python benchmarks/against_peers.py, with the peers' packages installed.

SpeechBrain, Asteroid, fast_bss_eval and BS-RoFormer do the same work as ours, on networks of the same sizes, each with
its own loss, clipping and optimizer. What is compared is run in turns in one process (`race.race`); what is printed is
peer / ours, so that more is better: the median over the rounds, the lowest and the highest. Ours is raced in one
precision at a time against all that the peer has: graphs of several would share the compiler's memory of shapes. What
comes only once in a process, the first step and the peak of memory, is measured in fresh ones (`fresh.told`).
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
"""Sizes with which a measurement says nothing, but shows that it runs."""


class Setting(NamedTuple):
    """How everything is measured."""

    device: torch.device
    repeats: int
    quick: bool
    batch_size: int | None = None

    @property
    def compiles(self) -> bool:
        """Whether there is a compiler."""
        return self.device.type == "cuda" or shutil.which("g++") is not None

    def sized(self, work: Work) -> Work:
        """The work in the batch asked for, or something like it that is done at once."""
        if self.quick:
            return work._replace(options=QUICK[work.model], batch_size=1, seconds=0.25)
        return work._replace(batch_size=self.batch_size or work.batch_size)


class Race(NamedTuple):
    """One comparison: what sets it apart from the others of its piece, what was measured, what is to be known of it."""

    label: str
    measured: Measured
    facts: dict[str, Any]


Races = Iterator[Race]


def precisions(device: torch.device) -> list[str]:
    """fp32, and bf16 where it is multiplied natively: elsewhere nobody trains in it."""
    return list(dict.fromkeys(["fp32", best_precision(device)]))


def network_races(work: Work, setting: Setting, *, train: bool) -> Races:
    """A training step, or a forward without gradients: ours in each precision, compiled or not, against all peers."""
    work, device = setting.sized(work), setting.device
    batch, peer = work.batch(device), PEERS[work.model]
    for precision in precisions(device):
        torch._dynamo.reset()
        torch.manual_seed(0)
        ours = [precision, *([f"{precision} compiled"] if setting.compiles else [])]
        contestants = [
            *(Contestant("ours", how) for how in ours),
            *(Contestant(peer.who, how) for how in precisions(device)),
        ]
        calls, parameters = dict[Contestant, Call](), dict[str, int]()
        for one in contestants:
            model = build(work, device, ours=one.is_ours, compiled="compiled" in one.how)
            parameters[one.who] = sum(weight.numel() for weight in model.parameters())
            number_format = one.how.split()[0]
            if not train:
                calls[one] = inference(model, number_format, batch)
            elif one.is_ours:
                calls[one] = our_step(model, number_format, batch)
            else:
                calls[one] = peer_step(model, peer.loss, number_format, batch)
        facts = {"work": work._asdict(), "parameters": parameters, "rounds": setting.repeats}
        yield Race("", race(calls, rounds=setting.repeats, device=device), facts)


def pit_races(n_sources: int, setting: Setting) -> Races:
    """The loss and its gradient, at the best of all orders, against fast_bss_eval's."""
    from fast_bss_eval.torch import si_sdr_pit_loss

    batch_size, seconds = (2, 0.25) if setting.quick else (8, 4.0)
    rng = torch.Generator().manual_seed(0)
    sources = torch.randn(batch_size, n_sources, round(8000 * seconds), generator=rng)
    estimate = sources.flip(1) + 0.3 * torch.randn(sources.shape, generator=rng)
    estimate, sources = estimate.to(setting.device).requires_grad_(), sources.to(setting.device)
    loss = SeparationLoss(neg_si_sdr)
    losses: dict[Contestant, Callable[[], torch.Tensor]] = {
        Contestant("ours", "fp32"): lambda: loss(estimate[:, :, None], sources[:, :, None]).mean(),
        Contestant("fast_bss_eval", "fp32"): lambda: si_sdr_pit_loss(estimate, sources, zero_mean=True).mean(),
    }

    def with_gradient(taken: Callable[[], torch.Tensor]) -> Call:
        def call() -> None:
            estimate.grad = None
            taken().backward()

        return call

    values = {str(one): float(taken().detach()) for one, taken in losses.items()}
    calls = {one: with_gradient(taken) for one, taken in losses.items()}
    facts = {"batch_size": batch_size, "seconds": seconds, "sources": n_sources, "loss_db": values}
    yield Race("", race(calls, rounds=setting.repeats, device=setting.device, calls=5, warm_up=3), facts)


def update_races(setting: Setting) -> Races:
    """Clipping and Adam on all tensors of a SepFormer, against torch's own two calls."""
    work = setting.sized(Work("sepformer", {}, 1, 4.0))
    calls, n_tensors = dict[Contestant, Call](), 0
    for one in (Contestant("ours", "default"), *(Contestant("torch", how) for how in ("default", "foreach", "fused"))):
        parameters = list(build(work, setting.device, ours=True).parameters())
        n_tensors = len(parameters)
        for weight in parameters:
            weight.grad = 1e-2 * torch.randn_like(weight)
        calls[one] = our_update(parameters) if one.is_ours else torch_update(parameters, one.how)
    facts = {"tensors": n_tensors, "parameters": sum(weight.numel() for weight in parameters)}
    yield Race("", race(calls, rounds=setting.repeats, device=setting.device, calls=5, warm_up=3), facts)


def our_update(parameters: list[nn.Parameter]) -> Call:
    """As a step of ours does it."""
    optimizer, clipper = OPTIMIZERS["adam"](parameters, lr=LR), FixedClip(max_norm=MAX_NORM)
    return lambda: guarded_step(optimizer, clipper)


def torch_update(parameters: list[nn.Parameter], how: str) -> Call:
    """As the peers' loops do it, and as torch could."""
    asked = {} if how == "default" else {how: True}
    optimizer = torch.optim.Adam(parameters, lr=LR, **asked)
    foreach = True if how == "foreach" else None

    def call() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=foreach)
        optimizer.step()

    return call


def memory_races(setting: Setting) -> Races:
    """The most that a SepFormer step needs beyond weights and optimizer state, each in a fresh process."""
    work = setting.sized(Work("sepformer", {}, 1, 4.0))
    asked = [
        (Contestant(who, how), {}) for who in ("ours", PEERS[work.model].who) for how in precisions(setting.device)
    ]
    if offers(work, "checkpoint"):
        asked += [(Contestant("ours", f"{how} checkpoint"), {"checkpoint": True}) for how in precisions(setting.device)]
    measured: Measured = {}
    for one, options in asked:
        task = fresh_task(one, work, setting) | {"precision": one.how.split()[0], "options": options}
        measured[one] = [float(in_a_fresh_process(task)["extra_bytes"])]
    yield Race("", measured, {"work": work._asdict()})


def first_step_races(work: Work, setting: Setting) -> Races:
    """Seconds until the first step is done, compiled; once, in fresh processes, with nothing kept and with all kept."""
    work = setting.sized(work)
    peer = PEERS[work.model].who
    without = {who: in_a_fresh_process(fresh_task(Contestant(who, ""), work, setting)) for who in ("ours", peer)}
    facts = {"work": work._asdict(), "not_compiled": without}
    asked = [Contestant("ours", "regions"), Contestant("ours", "whole"), Contestant(peer, "whole")]
    with tempfile.TemporaryDirectory() as folder:
        for label in ("empty cache", "warm cache"):
            told = {}
            for one in asked:
                task = fresh_task(one, work, setting) | {"compile": one.how}
                told[one] = in_a_fresh_process(task, cache=Path(folder) / str(one).replace(" ", "_"))
            more = {"after": {str(one): child["second"] for one, child in told.items()}}
            yield Race(label, {one: [child["first"]] for one, child in told.items()}, facts | more)


def fresh_task(one: Contestant, work: Work, setting: Setting) -> dict[str, Any]:
    """What a fresh process is asked for; not compiled, in fp32."""
    size = {"work": work, "threads": torch.get_num_threads(), "device": str(setting.device)}
    return size | {"who": one.who, "precision": "fp32", "compile": ""}


class Piece(NamedTuple):
    """A piece of work."""

    races: Callable[[Setting], Races]
    needs: tuple[str, ...] = ()
    """Packages."""
    model: str = ""
    """Of ours, without which there is nothing to measure."""
    unit: str = "seconds"


def pieces() -> dict[str, Piece]:
    """All that is measured, by name."""
    sepformer, small = Work("sepformer", {}, 1, 4.0), Work("sepformer", SMALL, 1, 4.0)
    conv_tasnet, dprnn = Work("conv_tasnet", {}, 2, 3.0), Work("dprnn", {}, 2, 3.0)
    music = Work("bs_roformer", {"n_blocks": 1}, 1, 30.0, sample_rate=44100, n_channels=2, n_sources=1)
    steps = {"sepformer_small": small, "sepformer": sepformer, "conv_tasnet": conv_tasnet, "dprnn": dprnn}
    files = {name: work._replace(batch_size=1, seconds=30.0) for name, work in steps.items()}

    def of(work: Work, races: Callable[..., Races], unit: str = "seconds", **options: Any) -> Piece:
        return Piece(partial(races, work, **options), (PEERS[work.model].who,), work.model, unit)

    found = {f"{name}_step": of(work, network_races, train=True) for name, work in steps.items()}
    found |= {f"{name}_30s": of(work, network_races, train=False) for name, work in files.items()}
    found["bs_roformer_30s"] = of(music, network_races, train=False)
    found |= {f"pit_{n}": Piece(partial(pit_races, n), ("fast_bss_eval",)) for n in (2, 3, 5, 8, 16)}
    found["clip_and_adam"] = Piece(update_races)
    found["sepformer_memory"] = Piece(memory_races, ("speechbrain",), "sepformer", "bytes")
    found |= {f"{name}_first_step": of(steps[name], first_step_races) for name in ("sepformer_small", "sepformer")}
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    args = arguments().parse_args(words)
    chosen = {name: piece for name, piece in pieces().items() if not args.only or name in args.only}
    absent = missing({package for piece in chosen.values() for package in piece.needs})
    if absent:
        print(
            f"{', '.join(absent)} cannot be imported here: run this with the Python of an environment that has them, "
            "and PYTHONPATH set to this checkout.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(args.threads)
    setting = Setting(torch.device(args.device), args.repeats, args.quick, args.batch_size)
    out = args.out or usual_file(setting)
    if args.quick and args.out is None:
        print("--quick measures nothing that could be kept; name another --out.", file=sys.stderr)
        return 2
    for name, piece in chosen.items():
        result = measure(name, piece, setting)
        write(out, name, about(setting, piece) | result)
    print(out)
    return 0


def usual_file(setting: Setting) -> Path:
    """Where results are kept: figures of a card, or of several threads, never among those of one thread of a CPU."""
    words = ["against_peers"]
    if setting.device.type == "cuda":
        words += torch.cuda.get_device_name(setting.device).lower().split()
    elif torch.get_num_threads() > 1:
        words += [str(torch.get_num_threads()), "threads"]
    return ROOT / "benchmarks" / "results" / f"{'_'.join(words)}.json"


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(pieces()), metavar="NAME", help=", ".join(pieces()))
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of each race (%(default)s)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="wall time is compared if more than 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--batch-size", type=at_least_one, help="of the networks; such that it fills a card")
    parser.add_argument("--out", type=Path, help="JSON (a file for each card); what it holds of other pieces stays")
    return parser


def at_least_one(text: str) -> int:
    """A count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def measure(name: str, piece: Piece, setting: Setting) -> dict[str, Any]:
    """All races of a piece, each printed as soon as it is run."""
    if piece.model and not Work(piece.model, {}, 1, 1.0).is_there:
        print(f"{name}: there is no model {piece.model} of ours")
        return {"not_there": piece.model}
    found = []
    for run in piece.races(setting):
        result = {"label": run.label} | figures(run.measured) | run.facts
        found.append(result)
        print("\n".join(lines(f"{name} {run.label}".rstrip(), result, piece.unit)), flush=True)
        gc.collect()
    return {"unit": piece.unit, "races": found}


def about(setting: Setting, piece: Piece) -> dict[str, Any]:
    """Where, when and how."""
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
        "peers": {name: version(name) for name in piece.needs},
    }


def version(package: str) -> str:
    """Of an installed package, or of its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def write(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put one piece's result in its place among the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {name: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
