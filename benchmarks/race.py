"""Pieces of work timed in turns in one process, and how many times as fast ours was."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peers import Call


class Contestant(NamedTuple):
    """Who does the work, and how: ``("ours", "bf16 compiled")``."""

    who: str
    how: str

    @property
    def is_ours(self) -> bool:
        """Whether it is ours."""
        return self.who == "ours"

    def __str__(self) -> str:
        return f"{self.who} {self.how}".rstrip()


Measured = dict[Contestant, list[float]]
"""What each took, round by round: in any unit, as long as less is better."""


def race(
    contestants: Mapping[Contestant, Call], *, rounds: int, device: torch.device, calls: int = 1, warm_up: int = 1
) -> Measured:
    """Seconds a call of each, in turns and every second round the other way round: a busy machine strikes all alike.

    On the CPU with one thread it is the process's CPU time, which other processes do not lengthen; else wall time.

    Args:
        contestants: What each does.
        rounds: How often each is measured.
        device: Where; it is waited for before and after.
        calls: Calls that make one measurement.
        warm_up: Calls of each before.
    """
    for call in contestants.values():
        for _ in range(warm_up):
            call()
    clock = time.process_time if on_cpu_time(device) else time.perf_counter
    spent: Measured = {one: [] for one in contestants}
    for turn in range(rounds):
        for one in list(contestants) if turn % 2 == 0 else reversed(list(contestants)):
            wait(device)
            began = clock()
            for _ in range(calls):
                contestants[one]()
            wait(device)
            spent[one].append((clock() - began) / calls)
    return spent


def on_cpu_time(device: torch.device) -> bool:
    """Whether the process's CPU time says what the wall time of an idle machine would."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def wait(device: torch.device) -> None:
    """For all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(measured: Measured) -> dict[str, Any]:
    """What is written down: medians, extremes and every value; for each of ours its ratios to the peers."""
    spent = {str(one): spread(values) | {"values": rounded(values)} for one, values in measured.items()}
    ours = [one for one in measured if one.is_ours]
    return {"measured": spent, "ratios": {str(one): ratios(one, measured) for one in ours}}


def ratios(ours: Contestant, measured: Measured) -> dict[str, Any]:
    """Peer / ours, round by round: above 1 ours is better.

    Returns:
        Under ``like`` against the peer that does it in the same way (the fastest of several; none where no peer does),
        under ``best`` against the fastest of all that the peers do.
    """
    peers = [one for one in measured if not one.is_ours]
    like = [one for one in peers if one.how == ours.how] or [one for one in peers if one.how == ours.how.split()[0]]
    found = {}
    for name, rivals in (("like", like), ("best", peers)):
        if rivals:
            rival = min(rivals, key=lambda one: statistics.median(measured[one]))
            pairs = zip(measured[rival], measured[ours], strict=True)
            found[name] = {"against": str(rival)} | spread([theirs / own for theirs, own in pairs])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    median, lowest, highest = rounded([statistics.median(values), min(values), max(values)])
    return {"median": median, "min": lowest, "max": highest}


def rounded(values: Sequence[float]) -> list[float]:
    """To what means something."""
    return [float(f"{value:.5g}") for value in values]


def lines(piece: str, found: Mapping[str, Any], unit: str) -> list[str]:
    """What is printed of one race: a line for each of ours, and one for each peer."""
    told = []
    for name, values in found["measured"].items():
        text = f"{piece:26} {name:28} {in_unit(values['median'], unit):>10}"
        for kind, word in (("like", ""), ("best", "best: ")):
            ratio = found["ratios"].get(name, {}).get(kind)
            if ratio:
                against = f"{word}{ratio['against']}"
                text += f"  {ratio['median']:6.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f}) {against}"
        told.append(text)
    return told


def in_unit(value: float, unit: str) -> str:
    """A measured value as one reads it."""
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
