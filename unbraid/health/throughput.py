"""Rules about time and memory."""

import numpy as np

from unbraid.health.finding import Finding
from unbraid.health.rolling_median import finite_median
from unbraid.health.series import Series


def loader_bound(series: Series) -> Finding | None:
    """Find training that waits for data for 30 % of the time or more."""
    wait_seconds = series.steps["data_seconds"][-300:]
    step_seconds = series.steps["seconds"][-300:]
    # The first batches always wait, while the workers start.
    if len(series) < 350 or not np.nansum(step_seconds) > 0:
        return None
    share = float(np.nansum(wait_seconds) / (np.nansum(wait_seconds) + np.nansum(step_seconds)))
    if share < 0.3:
        return None
    steps = series.steps["step"][-300:]
    return Finding(
        code="LOADER_BOUND",
        severity="warning",
        problem="Training waits for data.",
        evidence=(
            f"{share:.0%} of the time of the last {len(steps)} steps was spent waiting for the batch "
            f"({finite_median(wait_seconds):.3f} of {finite_median(wait_seconds + step_seconds):.3f} s per step)."
        ),
        advice="Use more workers, or store the recordings on a faster disk and at the training sample rate.",
        key="data.workers",
        steps=(int(steps[0]), int(steps[-1])),
        confidence=0.95,
    )


def slow_rank(series: Series) -> Finding | None:
    """Report a process that the others wait for."""
    events = [event for event in series.events if event.get("code") == "SLOW_RANK"]
    if not events:
        return None
    return Finding(
        code="SLOW_RANK",
        severity="warning",
        problem=f"The other processes waited for process {events[-1].get('rank', '?')}.",
        evidence=str(events[-1].get("message", "")),
        advice="Check what else runs on its machine, and where its data is stored.",
        key="",
        steps=(int(events[0].get("step", 0)), int(events[-1].get("step", 0))),
        confidence=0.9,
    )


def slowing_down(series: Series) -> Finding | None:
    """Find steps that take longer and longer."""
    overview = series.overview
    seconds = (overview.steps["seconds"] + overview.steps["data_seconds"])[overview.trained]
    if len(seconds) < 1000 or not series.covers_start:
        return None
    half = int(np.searchsorted(overview.steps["step"][overview.trained], series.last_step / 2))
    early = finite_median(seconds[50:250])
    halfway = finite_median(seconds[half:][:200])
    late = finite_median(seconds[-200:])
    # Three points that rise: a machine that became slower once, and then stayed so, is another matter.
    if not (late > 1.5 * early and late > 1.1 * halfway and halfway > 1.1 * early):
        return None
    return Finding(
        code="SLOWING_DOWN",
        severity="warning",
        problem="Steps take longer and longer.",
        evidence=f"A step took {early:.3f} s at first, {halfway:.3f} s halfway and {late:.3f} s now (medians of 200).",
        advice="Check what else runs on the machine, and whether it overheats or swaps.",
        key="",
        steps=(int(overview.steps["step"][0]), series.last_step),
        confidence=0.7,
    )


def memory_grows(series: Series) -> Finding | None:
    """Find memory that grows throughout the run, on the accelerator or the host: something holds on to tensors."""
    if series.last_step < 1000 or not series.covers_start:
        return None
    for field, name in (("peak_memory_bytes", "Memory use"), ("host_memory_bytes", "Host memory use")):
        finding = _growth(series, field, name)
        if finding is not None:
            return finding
    return None


def _growth(series: Series, field: str, name: str) -> Finding | None:
    memory = series.overview.steps[field]
    steps = series.overview.steps["step"]
    # The first quarter fills caches and meets the longest batch, so only the rest counts, in six equal parts.
    quarter = steps[-1] / 4
    mebibytes = memory[np.searchsorted(steps, np.linspace(quarter, steps[-1], 7))] / 2**20
    growth = np.diff(mebibytes)
    total = mebibytes[-1] - mebibytes[0]
    # A single large jump is one long batch; a leak adds something in every part.
    if not (growth > 0).all() or total < max(200.0, 0.1 * mebibytes[0]) or growth.max() > 0.6 * growth.sum():
        return None
    per_step = total / (steps[-1] - quarter)
    return Finding(
        code="MEMORY_GROWS",
        severity="warning",
        problem=f"{name} grows without end.",
        evidence=(
            f"Its peak rose from {mebibytes[0]:.0f} to {mebibytes[-1]:.0f} MiB over the last three quarters of the "
            f"run, {1024 * per_step:.0f} KiB per step."
        ),
        advice=(
            "Check whether a custom model, loss or data set keeps tensors from step to step (use .detach() or .item())."
        ),
        key="",
        steps=(int(quarter), int(steps[-1])),
        confidence=0.8,
    )
