"""Rules on time and memory."""

import numpy as np

from unbraid.health.finding import Finding
from unbraid.health.rolling_median import middle
from unbraid.health.series import Series


def loader_bound(series: Series) -> Finding | None:
    """Steps that wait for data."""
    wait, work = (series.of_step[name][-300:] for name in ("data_seconds", "seconds"))
    if len(series) < 350 or not np.nansum(work) > 0:
        return None
    share = float(np.nansum(wait) / (np.nansum(wait) + np.nansum(work)))
    if share < 0.3:
        return None
    steps = series.of_step["step"][-300:]
    return Finding(
        code="LOADER_BOUND",
        severity="warning",
        what="Training waits for data.",
        why=(
            f"{share:.0%} of the last {len(steps)} steps was waiting for the batch ({middle(wait):.3f} of "
            f"{middle(wait + work):.3f} s)."
        ),
        advice="Take more workers, or put the recordings on a faster disk, in their training rate.",
        key="data.workers",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.95,
    )


def slow_rank(series: Series) -> Finding | None:
    """A process that the others wait for."""
    found = [event for event in series.events if event.get("code") == "SLOW_RANK"]
    if not found:
        return None
    event = found[-1]
    return Finding(
        code="SLOW_RANK",
        severity="warning",
        what=f"The other processes waited for process {event.get('rank', '?')}.",
        why=str(event.get("message", "")),
        advice="See what else runs on its machine, and where its data lie.",
        key="",
        steps=(int(found[0].get("step", 0)), int(event.get("step", 0))),
        confidence=0.9,
    )


def slowing_down(series: Series) -> Finding | None:
    """Steps that take ever longer."""
    course = series.course
    seconds = (course.of_step["seconds"] + course.of_step["data_seconds"])[course.trained]
    if len(seconds) < 1000 or not series.whole:
        return None
    half = int(np.searchsorted(course.of_step["step"][course.trained], series.last_step / 2))
    early, halfway, late = middle(seconds[50:250]), middle(seconds[half:][:200]), middle(seconds[-200:])
    if not (late > 1.5 * early and late > 1.1 * halfway and halfway > 1.1 * early):
        return None
    return Finding(
        code="SLOWING_DOWN",
        severity="warning",
        what="Steps take ever longer.",
        why=f"A step took {early:.3f} s at first, {halfway:.3f} halfway and {late:.3f} now (medians of 200).",
        advice="See what else runs on the machine, and whether it gets hot or swaps.",
        key="",
        steps=(int(course.of_step["step"][0]), series.last_step),
        confidence=0.7,
    )


def memory_creeps(series: Series) -> Finding | None:
    """Memory that grows in every part of the run, on the accelerator or the host: something is kept."""
    if series.last_step < 1000 or not series.whole:
        return None
    places = {"peak_memory_bytes": "Memory", "host_memory_bytes": "The host's memory"}
    return next((found for name in places if (found := _creeps(series, name, places[name])) is not None), None)


def _creeps(series: Series, column: str, called: str) -> Finding | None:
    memory, steps = series.course.of_step[column], series.course.of_step["step"]
    quarter = steps[-1] / 4
    marks = memory[np.searchsorted(steps, np.linspace(quarter, steps[-1], 7))] / 2**20
    grown = np.diff(marks)
    if not (grown > 0).all() or marks[-1] - marks[0] < max(200.0, 0.1 * marks[0]) or grown.max() > 0.6 * grown.sum():
        return None
    rate = (marks[-1] - marks[0]) / (steps[-1] - quarter)
    return Finding(
        code="MEMORY_CREEPS",
        severity="warning",
        what=f"{called} grows all the time.",
        why=(
            f"Its peak rose from {marks[0]:.0f} to {marks[-1]:.0f} MiB over the last three quarters, "
            f"{1024 * rate:.0f} KiB a step."
        ),
        advice=(
            "See whether a model, loss or data set of your own keeps tensors from step to step (use .detach() "
            "or .item())."
        ),
        key="",
        steps=(int(quarter), int(steps[-1])),
        confidence=0.8,
    )
