"""The runs that the dashboard shows: find them, list them, and follow those that are open in a page."""

import contextlib
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unbraid.run_directory import RunDirectory
from unbraid.web.audio import evaluation_examples, validation_examples
from unbraid.web.followed_run import FollowedRun
from unbraid.web.jsonl_tail import JsonlTail
from unbraid.web.payloads import (
    NO_IMPROVEMENT,
    chart,
    diagnosis,
    events,
    last_steps,
    make_run_id,
    overview,
    run_details,
    update_improvement,
    validation_chart,
)

MAX_FOLLOWED = 8
"""Most runs read step by step at a time. The one requested longest ago is dropped, and read again on request."""

POLL_SECONDS = 0.2
LIST_SECONDS = 2.0
DIAGNOSIS_SECONDS = 5.0
"""A running run is diagnosed no more often than this."""

FileStamps = tuple[tuple[int, int], ...]


class RunStore:
    """Run directories below some folders, polled by one thread and read by the server's others.

    Args:
        paths: Run directories, or folders that contain some.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.closing = threading.Event()
        self.lock = threading.RLock()  # guards the two dicts of runs and the followed runs

        # The list of runs, by id.
        self.runs: dict[str, Path] = {}
        self.overviews: dict[str, dict[str, Any]] = {}
        self.list_version = 0

        # Runs that are open in a page, by id; a version goes up with each change.
        self.followed: OrderedDict[str, FollowedRun] = OrderedDict()
        self.versions: dict[str, int] = {}
        self.read_errors: dict[str, str] = {}

        # Caches, by id, valid while a run's files do not change.
        self._cached_overviews: dict[str, tuple[FileStamps, dict[str, Any]]] = {}
        self._validation_tails: dict[str, JsonlTail] = {}
        self._improvements: dict[str, Mapping[str, float | None]] = {}
        self._diagnoses: dict[str, tuple[FileStamps, float, dict[str, Any]]] = {}
        self._diagnosis_lock = threading.Lock()

    # ---- The list of runs

    def update_list(self) -> None:
        """Find the runs that exist now, and update their entries in the list, unless `closing` is set meanwhile."""
        runs = {make_run_id(path): path for path in find_runs(self.paths)}
        overviews = {}
        for run_id, path in runs.items():
            if self.closing.is_set():  # with many runs the list takes a while, and Ctrl-C should not
                return
            overviews[run_id] = self._overview(run_id, path)

        # Drop what is cached about runs that are gone.
        for cache in (
            self._cached_overviews,
            self._validation_tails,
            self._improvements,
            self._diagnoses,
            self.read_errors,
        ):
            for run_id in cache.keys() - runs.keys():
                cache.pop(run_id, None)

        # Runs of the same name are listed with their folder's name.
        n_by_name = Counter(entry["name"] for entry in overviews.values())
        for run_id, entry in overviews.items():
            if n_by_name[entry["name"]] > 1:
                overviews[run_id] = entry | {"name": "/".join(runs[run_id].parts[-2:])}

        with self.lock:
            if overviews != self.overviews:
                self.list_version += 1
            self.runs = runs
            self.overviews = overviews

    def _overview(self, run_id: str, path: Path) -> dict[str, Any]:
        """Return a run's entry in the list, read again if its files changed or time may have made it idle."""
        stamps = _file_stamps(path)
        cached = self._cached_overviews.get(run_id)
        if cached is not None and cached[0] == stamps and cached[1]["state"] != "running":
            entry = cached[1]
        else:
            try:
                entry = {**overview(path), **self._improvement(run_id, path)}
            except Exception as error:  # noqa: BLE001  # one unreadable run must not hide the others
                entry = {
                    "id": run_id,
                    "name": path.name,
                    "folder": str(path.parent),
                    "state": "broken",
                    "step": 0,
                    "problem": f"This run cannot be read ({type(error).__name__}: {error}).",
                    "si_sdri": None,
                    "best_si_sdri": None,
                }
            self._cached_overviews[run_id] = (stamps, entry)
        if run_id in self.read_errors:
            return entry | {"problem": self.read_errors[run_id]}
        return entry

    def _improvement(self, run_id: str, path: Path) -> Mapping[str, float | None]:
        """Return the last and the best SI-SDR improvement of a run, reading each of its validations once."""
        tail = self._validation_tails.setdefault(run_id, JsonlTail(RunDirectory(path).validation))
        if tail.reset_if_rewritten():
            self._improvements.pop(run_id, None)
        improvement = self._improvements.get(run_id, NO_IMPROVEMENT)
        while tail.unread_bytes:
            improvement = update_improvement(improvement, tail.read_rows()[0])
        self._improvements[run_id] = improvement
        return improvement

    # ---- Polling

    def watch(self) -> None:
        """Poll the followed runs, and from time to time the list of runs, until `closing` is set."""
        last_listed = time.monotonic()
        while not self.closing.is_set():
            has_backlog = False
            for run_id, run in list(self.followed.items()):
                has_changed = self._read_more(run_id, run)
                has_backlog = has_backlog or (has_changed and run.unread_bytes > 0)
            if time.monotonic() - last_listed > LIST_SECONDS:
                with contextlib.suppress(OSError):  # a folder is being moved; the next round sees it again
                    self.update_list()
                last_listed = time.monotonic()
            # With a backlog, pause only as long as a waiting request needs to get the lock.
            self.closing.wait(0.001 if has_backlog else POLL_SECONDS)

    def _read_more(self, run_id: str, run: FollowedRun) -> bool:
        """Read the next part of a run; return whether it changed. Errors never stop the polling of other runs."""
        try:
            with self.lock:
                has_changed = run.read_more()
        except OSError:  # it is being moved or deleted
            return False
        except Exception as error:  # noqa: BLE001
            self.read_errors[run_id] = f"The records of this run cannot be read ({type(error).__name__}: {error})."
            return False
        if has_changed:
            self.versions[run_id] = self.versions.get(run_id, 0) + 1
        return has_changed

    # ---- Answers to requests; each raises KeyError if there is no such run

    def follow(self, run_id: str) -> FollowedRun:
        """Return a run, which is polled from now on."""
        with self.lock:
            path = self.runs[run_id]
            if run_id not in self.followed:
                self.followed[run_id] = FollowedRun(path)
                self.followed[run_id].read_more()
            self.followed.move_to_end(run_id)
            while len(self.followed) > MAX_FOLLOWED:
                self.followed.popitem(last=False)
            return self.followed[run_id]

    def series(self, run_id: str, first: int, last: int, max_buckets: int) -> dict[str, Any]:
        """Return the curves of a run from step ``first`` to ``last`` in at most ``max_buckets`` buckets."""
        run = self.follow(run_id)
        with self.lock:
            return series_payload(run_id, run, first, last, max_buckets=max_buckets)

    def details(self, run_id: str) -> dict[str, Any]:
        """Return what the page shows of a run besides its curves and findings."""
        run = self.follow(run_id)
        path = run.directory.path
        with self.lock:
            from_records = last_steps(run.last_row, run.last_sampled) | {"events": events(run.events, run.n_events)}
        # Read the other files without the lock: listing sounds may take a while.
        examples = {"validation_examples": validation_examples(path), "evaluation_examples": evaluation_examples(path)}
        return {"id": run_id} | from_records | run_details(path) | examples

    def diagnosis(self, run_id: str) -> dict[str, Any]:
        """Return the findings on a run; the previous ones if nothing changed since, or only just now."""
        path = self.runs[run_id]
        with self._diagnosis_lock:
            stamps = _file_stamps(path)
            now = time.monotonic()
            cached = self._diagnoses.get(run_id)
            if cached is not None and (cached[0] == stamps or now - cached[1] <= DIAGNOSIS_SECONDS):
                return cached[2]
            result = diagnosis(path)
            self._diagnoses[run_id] = (stamps, now, result)
            return result


def series_payload(
    run_id: str, run: FollowedRun, first: int, last: int, *, max_buckets: int, max_validations: int = 2000
) -> dict[str, Any]:
    """Return a run's curves, its validations, and how much of it has been read."""
    curves = chart(run.downsample(first, last, max_buckets))
    validations = validation_chart(run.validations, max_rows=max_validations)
    return curves | read_progress(run_id, run) | {"validation": validations}


def read_progress(run_id: str, run: FollowedRun) -> dict[str, Any]:
    """Return how far a run has come, and how much of its records is still to be read."""
    return {
        "id": run_id,
        "first_step": run.first_step,
        "last_step": run.last_step,
        "n_validations": run.n_validations,
        "n_events": run.n_events,
        "n_torn": run.n_torn,
        "unread_bytes": run.unread_bytes,
    }


def find_runs(paths: Sequence[Path], *, depth: int = 3) -> list[Path]:
    """Return the run directories among and below some folders, each once; links are not followed."""
    runs = [run for path in paths for run in _runs_below(path, depth)]
    return list(dict.fromkeys(runs))  # unlike a set, a dict keeps the order


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    run = RunDirectory(path)
    if run.steps.exists() or run.recipe.exists():
        yield path
        return
    if depth == 0 or not path.is_dir():
        return
    try:
        folders = sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for folder in folders:
        yield from _runs_below(Path(folder), depth - 1)


def _file_stamps(path: Path) -> FileStamps:
    """Return size and modification time of a run's logs and recipe; -1 for files that do not exist."""
    run = RunDirectory(path)
    stamps = []
    for file in (*run.logs, run.recipe):
        try:
            status = file.stat()
            stamps.append((status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append((-1, -1))
    return tuple(stamps)
