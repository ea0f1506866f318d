"""One subject's training under several clippers, from the same weights on the same batches; kept, and gone on with."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import unbraid
from unbraid.config.recipe import load_recipe, recipe_table
from unbraid.errors import UserError
from unbraid.io import atomic_replace, write_atomically
from unbraid.lab.experiment import Experiment, of_recipe
from unbraid.lab.trajectory import FRACTIONS, Column, Correlation, Reading, Trajectory, clipped_by, follow, with_clip
from unbraid.lab.weight_directions import digest_of
from unbraid.plots import check_matplotlib
from unbraid.records import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import find_checkpoint, read_checkpoint, save_checkpoint
from unbraid.train.state import TrainState

CLIPS = ("none", "autoclip")
KEEP_SECONDS = 120.0
"""How often an arm under way is kept, so that a process killed loses no more."""
PAIRS: dict[str, Column] = {
    "gradient norm with smoothness": "grad_norm",
    "step size with smoothness": "step_size",
    "loss with smoothness": "loss",
}
"""What is held against the smoothness, as `Trajectory.correlation` does: by logarithms, but the loss as it is."""


@dataclass(frozen=True)
class Course:
    """What came of all arms.

    Attributes:
        name: Of the recipe.
        recipe: As `recipe_table` gives it.
        n_steps: Asked for in each arm.
        every: Steps from one measurement of smoothness to the next.
        arms: A trajectory for each clipper that was begun.
    """

    name: str
    recipe: Mapping[str, Any]
    n_steps: int
    every: int
    arms: tuple[Trajectory, ...]

    def correlations(self, arm: Trajectory) -> dict[str, Correlation]:
        """Of what `PAIRS` names over the whole arm, and of the norm over the second half, without the first steps."""
        found = {name: arm.correlation(column) for name, column in PAIRS.items()}
        late = arm.correlation("grad_norm", first_step=self.n_steps // 2 + 1)
        return found | {"gradient norm with smoothness, second half": late}

    def sentences(self) -> list[str]:
        """A line for each arm, and what is not told by them."""
        lines = []
        for arm in self.arms:
            found = arm.correlation("grad_norm")
            late = arm.correlation("grad_norm", first_step=self.n_steps // 2 + 1)
            low, high = found.interval
            told = "cannot be told yet" if math.isnan(found.value) else f"is {found.value:.2f}"
            told += "" if math.isnan(low) else f", from {low:.2f} to {high:.2f} or wider (95 %)"
            told += "" if math.isnan(late.value) else f" ({late.value:.2f} in the second half)"
            lines.append(
                f"{arm.clip}: {len(arm.readings)} of {self.n_steps} steps, {arm.clipped} clipped, "
                f"{len(arm.readings) - arm.trained} left out; the correlation of log gradient norm with log smoothness "
                f"{told}, over {found.n_points} points." + (f" It ended there: {arm.ended}." if arm.ended else "")
            )
        return lines

    def table(self) -> dict[str, Any]:
        """All of it as plain JSON; numbers with six digits, null for what is not known or infinite."""
        about = {"unbraid": unbraid.__version__, "name": self.name, "steps": self.n_steps, "every": self.every}
        about |= {"fractions": [round(fraction, 6) for fraction in FRACTIONS], "recipe": dict(self.recipe)}
        return about | {"arms": [self._arm_table(arm) for arm in self.arms]}

    def _arm_table(self, arm: Trajectory) -> dict[str, Any]:
        told = {
            name: {"correlation": _plain(found.value), "points": found.n_points}
            for name, found in self.correlations(arm).items()
        }
        columns = {
            name: [_plain(value) for value in arm.column(name)]
            for name in ("loss", "grad_norm", "max_norm", "step_size")
        }
        measured = {r.step: _plain(r.smoothness) for r in arm.readings if r.smoothness is not None}
        left_out = {r.step: r.outcome for r in arm.readings if r.outcome != "trained"}
        counts = {"steps": len(arm.readings), "trained": arm.trained, "clipped": arm.clipped, "ended": arm.ended}
        return {"clip": arm.clip, **counts, "correlations": told, "left_out": left_out, **columns} | {
            "smoothness": measured
        }


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def prepare(path: Path, overrides: Sequence[str], *, clips: Sequence[str], n_steps: int, every: int) -> Experiment:
    """The subject of a recipe, after every check that can be made before any work.

    Raises:
        UserError: If recipe, data, a clipper or the interval cannot be used, or matplotlib is missing.
    """
    check_matplotlib()
    check(n_steps, every)
    recipe = load_recipe(path, overrides)
    for clip in clips:
        clipped_by(recipe, clip)
    return of_recipe(recipe, path.stem)


def check(n_steps: int, every: int) -> None:
    """Refuse an interval that no step falls on.

    Raises:
        UserError: If it is longer than all steps.
    """
    if every > n_steps:
        raise UserError(
            f"--every {every} is more than --steps {n_steps}: no smoothness would be measured; take 1 to {n_steps}."
        )


def run_arms(
    subject: Experiment,
    folder: Path,
    *,
    clips: Sequence[str] = CLIPS,
    n_steps: int = 500,
    every: int = 5,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda _done, _text: None,
) -> Course:
    """Follow a subject's training under each clipper; what the folder holds of the same experiment is not done again.

    Args:
        subject: Its weights and batches are the same in every arm.
        folder: Where numbers, and an arm that was stopped, are kept.
        clips: Names as `with_clip` takes them.
        n_steps: Of each arm.
        every: Steps from one measurement to the next.
        stop: Where a signal asks for it, the step at hand is the last.
        progress: Called with the share that is done, and what is under way.

    Raises:
        UserError: If a clipper is unknown, the interval too long, or the folder holds another experiment.
    """
    check(n_steps, every)
    arms = {clip: with_clip(subject, clip) for clip in dict.fromkeys(clips)}
    tracks = {
        clip: _Track(RunDirectory(folder / clip.replace(":", "-")), arm, n_steps, every) for clip, arm in arms.items()
    }
    for arm in arms.values():
        arm.fork()  # what a part refuses, it refuses before any work
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for place, clip in enumerate(arms):
        track = tracks.pop(clip)  # with its model and optimizer: one at a time
        if stop is not None and stop.signal:
            break
        readings, kept = track.take_up(), perf_counter()
        for reading in track.follow():
            readings.append(reading)
            if perf_counter() - kept > KEEP_SECONDS:
                track.keep(readings)
                kept = perf_counter()
            progress((place + reading.step / n_steps) / len(arms), f"{clip}: step {reading.step}, {_told(reading)}")
            if stop is not None and stop.signal:
                break
        track.keep(readings)
        found.append(Trajectory(clip, tuple(readings), track.state.faults.verdict()))
    return Course(subject.name, recipe_table(subject.recipe), n_steps, every, tuple(found))


def _told(reading: Reading) -> str:
    known = {"loss": reading.loss, "norm": reading.grad_norm}
    return ", ".join(f"{name} {value:.3g}" for name, value in known.items() if value is not None)


class _Track:
    """One arm, and the checkpoint that keeps its state together with what was read so far."""

    def __init__(self, run: RunDirectory, subject: Experiment, n_steps: int, every: int) -> None:
        self.run, self.subject, self.n_steps, self.every = run, subject, n_steps, every
        self.state: TrainState  # made when the arm begins
        self.recipe = recipe_table(subject.recipe)
        self.asked = {"steps": n_steps, "every": every, "start": digest_of([subject.weights])}
        self.saved_step = -1

    def take_up(self) -> list[Reading]:
        """Make the state, and go to where an earlier run of the same experiment was; nothing where there was none.

        Raises:
            UserError: If the folder holds another experiment.
        """
        if not self.run.checkpoints.is_dir():
            self.state = self.subject.fork()
            return []
        kept = read_checkpoint(find_checkpoint(self.run.path))
        if kept.recipe != json.loads(json.dumps(self.recipe)) or any(
            kept.choices.get(k) != v for k, v in self.asked.items()
        ):
            raise UserError(
                f"{self.run.path} is of another recipe, --steps or --every, or began at other weights: give another "
                "--out, or remove it."
            )
        self.state = self.subject.fork()
        self.state.load_state_dict(kept.state)
        self.saved_step = self.state.step
        return [Reading(**row) for row in kept.choices["readings"]]

    def follow(self) -> Iterator[Reading]:
        """The steps that are left."""
        return follow(self.subject, self.state, n_steps=self.n_steps, every=self.every)

    def keep(self, readings: Sequence[Reading]) -> None:
        """Write state and readings, whole or not at all."""
        if self.state.step == self.saved_step:
            return
        kept = self.asked | {"readings": [asdict(reading) for reading in readings]}
        save_checkpoint(self.run, self.state.state_dict(), recipe=self.recipe, choices=kept, best=False, keep=1)
        self.saved_step = self.state.step


def write_course(course: Course, folder: Path, numbers: Path | None = None) -> list[str]:
    """Write numbers and figure, and say where they are.

    Args:
        course: What to write; with no step nothing is.
        folder: For the figure.
        numbers: JSON file; ``trajectory.json`` in the folder where None.
    """
    if not any(arm.readings for arm in course.arms):
        return ["No step was made, so that there is nothing to draw."]
    from matplotlib.figure import Figure

    from unbraid.lab.trajectory_figure import draw, size_of

    file, picture = numbers or folder / "trajectory.json", folder / "trajectory.png"
    for path in (file, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(course.table(), allow_nan=False) + "\n")
    figure = Figure(figsize=size_of(course), layout="constrained")
    draw(figure, course)
    with atomic_replace(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return [f"The figure is {picture}, the numbers are in {file}."]
