"""The runs that are shown: which there are, what their lists say, and those that are followed while they grow."""

import contextlib
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from unbraid.records import RunDirectory
from unbraid.web.audio import examples, worst_of_evaluation
from unbraid.web.chart_payloads import chart, scores
from unbraid.web.jsonl_tail import Followed, Lines, runs_in
from unbraid.web.run_payloads import about, events, gains, judged, of_last_steps, overview, run_id

MOST_FOLLOWED = 8
"""Runs read step by step at a time: the one not asked for longest is let go, and read again if it is asked for."""

TICK_SECONDS = 0.2
LIST_SECONDS = 2.0
JUDGED_SECONDS = 5.0
"""A running run is judged no more often than that."""


class Library:
    """Run directories below some folders, looked at again and again by one thread.

    Args:
        paths: Run directories, or folders that hold some.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.lock = threading.RLock()
        self.runs: dict[str, Path] = {}
        self.overviews: dict[str, dict[str, Any]] = {}
        self.followed: OrderedDict[str, Followed] = OrderedDict()
        self.versions: dict[str, int] = {}  # of each followed run, one more with each change
        self.list_version = 0
        self.closing = threading.Event()
        self._judged: dict[str, tuple[Any, float, dict[str, Any]]] = {}
        self._judging = threading.Lock()
        self._listed: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._scored: dict[str, Lines] = {}
        self._gains: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, str] = {}  # what went wrong with looking at a run

    def look_for_runs(self) -> None:
        """See which runs there are, and what their lists say."""
        runs = {run_id(path): path for path in runs_in(self.paths)}
        overviews = {name: self._overview(name, path) for name, path in runs.items()}
        for forgotten in (self._listed, self._scored, self._gains, self._judged, self.faults):
            for name in forgotten.keys() - runs.keys():
                forgotten.pop(name, None)
        named = Counter(found["name"] for found in overviews.values())
        for name, found in overviews.items():
            if named[found["name"]] > 1:
                overviews[name] = found | {"name": "/".join(runs[name].parts[-2:])}
        with self.lock:
            if overviews != self.overviews:
                self.list_version += 1
            self.runs, self.overviews = runs, overviews

    def _overview(self, name: str, path: Path) -> dict[str, Any]:
        """What a list says of a run, asked again where its files have changed or time has passed since they did."""
        seen = _signature(path)
        known = self._listed.get(name)
        if known is None or known[0] != seen or known[1]["state"] == "running":
            try:
                found = overview(path) | self._gained(name, path)
            except Exception as error:  # noqa: BLE001  # one run that cannot be listed must not hide the others
                problem = f"It cannot be looked at ({type(error).__name__}: {error})."
                found = {"id": name, "name": path.name, "folder": str(path.parent), "state": "broken", "step": 0}
                found |= {"problem": problem, "si_sdri": None, "best_si_sdri": None}
            self._listed[name] = known = seen, found
        return known[1] | ({"problem": self.faults[name]} if name in self.faults else {})

    def _gained(self, name: str, path: Path) -> dict[str, Any]:
        """The last and the best improvement of a run, of validations read once each."""
        lines = self._scored.setdefault(name, Lines(RunDirectory(path).validation))
        if lines.was_cut():
            self._gains.pop(name, None)
        before = self._gains.get(name, {})
        while lines.unread:
            new = gains(lines.next()[0])
            best = [gain for gain in (new["best_si_sdri"], before.get("best_si_sdri")) if gain is not None]
            before = {"si_sdri": new["si_sdri"], "best_si_sdri": max(best)} if new["si_sdri"] is not None else before
        self._gains[name] = before
        return {"si_sdri": before.get("si_sdri"), "best_si_sdri": before.get("best_si_sdri")}

    def watch(self) -> None:
        """Follow what is asked for, and look for new runs now and then, until `closing` is set."""
        listed = time.monotonic()
        while not self.closing.is_set():
            more = False
            for name, run in list(self.followed.items()):
                grown = self._advance(name, run)
                more = more or (grown and run.unread_bytes > 0)
            if time.monotonic() - listed > LIST_SECONDS:
                with contextlib.suppress(OSError):  # a folder that is just being moved is looked at again
                    self.look_for_runs()
                listed = time.monotonic()
            self.closing.wait(0.001 if more else TICK_SECONDS)

    def _advance(self, name: str, run: Followed) -> bool:
        """Read some more of a run; whether there was any. Whatever is in its files, the others are read on."""
        try:
            with self.lock:
                grown = run.advance()
        except OSError:  # it is just being moved or deleted
            return False
        except Exception as error:  # noqa: BLE001
            self.faults[name] = f"Its records cannot be read on ({type(error).__name__}: {error})."
            return False
        if grown:
            self.versions[name] = self.versions.get(name, 0) + 1
        return grown

    def follow(self, name: str) -> Followed:
        """The run of that name, followed from now on.

        Raises:
            KeyError: If there is none.
        """
        with self.lock:
            path = self.runs[name]
            if name not in self.followed:
                self.followed[name] = Followed(path)
                self.followed[name].advance()
            self.followed.move_to_end(name)
            while len(self.followed) > MOST_FOLLOWED:
                self.followed.popitem(last=False)
            return self.followed[name]

    def series(self, name: str, first: int, last: int, n_most: int) -> dict[str, Any]:
        """Curves of a run from one step to another, in at most so many buckets.

        Raises:
            KeyError: If there is no run of that name.
        """
        run = self.follow(name)
        with self.lock:
            drawn = chart(run.thinned(first, last, n_most))
            return drawn | progress(name, run) | {"scores": scores(run.validations)}

    def details(self, name: str) -> dict[str, Any]:
        """What stands beside the curves of a run.

        Raises:
            KeyError: If there is no run of that name.
        """
        run = self.follow(name)
        path = run.run.path
        with self.lock:
            told = events(run.events, run.n_events)
            last = of_last_steps(run.last_row, run.last_sampled)
        heard = {"examples": examples(path), "worst": worst_of_evaluation(path)}
        return {"id": name, "events": told} | last | about(path) | heard

    def judged(self, name: str) -> dict[str, Any]:
        """What the doctor says of a run; the same as before where nothing has changed, or only just.

        Raises:
            KeyError: If there is no run of that name.
        """
        path = self.runs[name]
        with self._judging:
            seen, now = _signature(path), time.monotonic()
            known = self._judged.get(name)
            if known is None or (known[0] != seen and now - known[1] > JUDGED_SECONDS):
                self._judged[name] = known = seen, now, judged(path)
            return known[2]


def _signature(path: Path) -> tuple[tuple[int, int], ...]:
    """Size and time of a run's logs."""
    found = []
    for name in ("steps.jsonl", "validation.jsonl", "events.jsonl", "recipe.toml"):
        try:
            about_file = (path / name).stat()
            found.append((about_file.st_size, about_file.st_mtime_ns))
        except OSError:
            found.append((-1, -1))
    return tuple(found)


def progress(name: str, run: Followed) -> dict[str, Any]:
    """How far a followed run is, and how much of it is still to be read."""
    counts = {"n_validations": run.n_validations, "n_events": run.n_events, "n_torn": run.n_torn}
    steps = {"first_step": run.first_step, "last_step": run.last_step}
    return {"id": name, "unread_bytes": run.unread_bytes} | steps | counts
