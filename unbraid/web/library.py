"""The runs that are shown: which there are, what their lists say, and those that are followed while they grow."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unbraid.web.charts import chart, scores
from unbraid.web.facts import about, events, judged, of_last_steps, overview, run_id
from unbraid.web.follow import Followed, runs_in
from unbraid.web.sounds import examples, worst_of_evaluation

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
        self.look_for_runs()

    def look_for_runs(self) -> None:
        """See which runs there are, and what their lists say."""
        runs = {run_id(path): path for path in runs_in(self.paths)}
        overviews = {name: self._overview(name, path) for name, path in runs.items()}
        with self.lock:
            if overviews != self.overviews:
                self.list_version += 1
            self.runs, self.overviews = runs, overviews

    def _overview(self, name: str, path: Path) -> dict[str, Any]:
        """What a list says of a run, asked again where its files have changed or time has passed since they did."""
        seen = _signature(path)
        known = self._listed.get(name)
        if known is None or known[0] != seen or known[1]["state"] == "running":
            self._listed[name] = known = seen, overview(path)
        return known[1]

    def watch(self) -> None:
        """Follow what is asked for, and look for new runs now and then, until `closing` is set."""
        listed = time.monotonic()
        while not self.closing.is_set():
            unread = False
            for name, run in list(self.followed.items()):
                with self.lock:
                    if _quietly(run.advance):
                        self.versions[name] = self.versions.get(name, 0) + 1
                unread = unread or run.unread_bytes > 0
            if time.monotonic() - listed > LIST_SECONDS:
                _quietly(self.look_for_runs)
                listed = time.monotonic()
            self.closing.wait(0.001 if unread else TICK_SECONDS)

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
            return drawn | self.progress(name) | {"scores": scores(run.validations)}

    def progress(self, name: str) -> dict[str, Any]:
        """How far a followed run is, and how much of it is still to be read."""
        run = self.followed[name] if name in self.followed else self.follow(name)
        counts = {"n_validations": len(run.validations), "n_events": run.n_events, "n_torn": run.n_torn}
        return {"id": name, "last_step": run.last_step, "unread_bytes": run.unread_bytes} | counts

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


def _quietly(look: Callable[[], Any]) -> Any:
    """A run that is just being moved or deleted must not end the watching; it is looked at again."""
    try:
        return look()
    except OSError:
        return None
