"""Time several implementations in turns in one process, and compute how many times as fast ours is."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peers import Call


class Contestant(NamedTuple):
    """An implementation and its variant, such as ``("ours", "bf16 compiled")``."""

    who: str
    how: str

    @property
    def is_ours(self) -> bool:
        """True for an implementation of unbraid."""
        return self.who == "ours"

    def __str__(self) -> str:
        return f"{self.who} {self.how}".rstrip()


Measured = dict[Contestant, list[float]]
"""The cost of each contestant in each round, in any unit in which less is better."""


def race(
    contestants: Mapping[Contestant, Call], *, rounds: int, device: torch.device, calls: int = 1, warm_up: int = 1
) -> Measured:
    """Return the seconds per call of each contestant, measured in turns.

    Every second round runs in reverse order, so that a busy machine slows all of them alike. On the CPU with one thread
    the clock is the CPU time of the process, which other processes do not lengthen; otherwise it is wall time.

    Args:
        contestants: The function that each of them calls.
        rounds: Number of measurements of each.
        device: Device that does the work; it is synchronised before and after each measurement.
        calls: Calls per measurement.
        warm_up: Calls of each before the first measurement.
    """
    for call in contestants.values():
        for _ in range(warm_up):
            call()
    clock = time.process_time if on_cpu_time(device) else time.perf_counter
    measured: Measured = {contestant: [] for contestant in contestants}
    for turn in range(rounds):
        order = list(contestants)
        if turn % 2 == 1:
            order.reverse()
        for contestant in order:
            synchronize(device)
            started = clock()
            for _ in range(calls):
                contestants[contestant]()
            synchronize(device)
            measured[contestant].append((clock() - started) / calls)
    return measured


def on_cpu_time(device: torch.device) -> bool:
    """Return True where the CPU time of the process equals the wall time on an idle machine."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(measured: Measured) -> dict[str, Any]:
    """Return medians, extremes and all values of a race as a table, and the ratios of each of ours to the peers."""
    table = {}
    for contestant, values in measured.items():
        table[str(contestant)] = spread(values) | {"values": rounded(values)}
    ours = [contestant for contestant in measured if contestant.is_ours]
    return {"measured": table, "ratios": {str(contestant): ratios(contestant, measured) for contestant in ours}}


def ratios(ours: Contestant, measured: Measured) -> dict[str, Any]:
    """Return the ratios peer / ours over the rounds; above 1 ours is better.

    Returns:
        Under ``like`` the ratio to the peer in the same variant, or else in the same precision; the fastest of several,
        and no entry where no peer has it. Under ``best`` the ratio to the fastest of all peers and variants.
    """
    peers = [contestant for contestant in measured if not contestant.is_ours]
    like = [peer for peer in peers if peer.how == ours.how]
    if not like:  # no peer compiles: compare with the same precision, which is the first word of the variant
        like = [peer for peer in peers if peer.how == ours.how.split()[0]]
    found = {}
    for name, rivals in (("like", like), ("best", peers)):
        if rivals:
            rival = min(rivals, key=lambda peer: statistics.median(measured[peer]))
            pairs = zip(measured[rival], measured[ours], strict=True)
            found[name] = {"against": str(rival)} | spread([theirs / own for theirs, own in pairs])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    median, lowest, highest = rounded([statistics.median(values), min(values), max(values)])
    return {"median": median, "min": lowest, "max": highest}


def rounded(values: Sequence[float]) -> list[float]:
    """Round to five significant digits: more are noise."""
    return [float(f"{value:.5g}") for value in values]


def lines(piece: str, found: Mapping[str, Any], unit: str) -> list[str]:
    """Return the printed lines of a race, one for each contestant."""
    printed = []
    for name, values in found["measured"].items():
        text = f"{piece:26} {name:28} {in_unit(values['median'], unit):>10}"
        for kind, word in (("like", ""), ("best", "best: ")):
            ratio = found["ratios"].get(name, {}).get(kind)
            if ratio:
                against = f"{word}{ratio['against']}"
                text += f"  {ratio['median']:6.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f}) {against}"
        printed.append(text)
    return printed


def in_unit(value: float, unit: str) -> str:
    """Return a measured value with its unit, as text."""
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
