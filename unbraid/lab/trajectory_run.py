"""Train one experiment under several clippers from the same weights on the same batches; can be stopped and resumed."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

from unbraid.config.recipe import load_recipe, recipe_table
from unbraid.errors import UserError
from unbraid.figures import write_figure
from unbraid.io import write_json
from unbraid.lab.experiment import Experiment, experiment_from_recipe
from unbraid.lab.trajectory import (
    StepMeasurement,
    Trajectory,
    TrajectoryComparison,
    measure_steps,
    recipe_with_clipper,
)
from unbraid.lab.weight_directions import weights_digest
from unbraid.plots import check_matplotlib
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import find_checkpoint, read_checkpoint, save_checkpoint
from unbraid.train.state import TrainState

CLIPS = ("none", "autoclip")
SAVE_EVERY_SECONDS = 120.0
"""How often an unfinished arm is saved, so that a killed process loses no more than this."""


def load_experiment(
    path: Path, overrides: Sequence[str], *, clips: Sequence[str], n_steps: int, every: int
) -> Experiment:
    """Return the experiment of a recipe, after every check that can be made before any work.

    Raises:
        UserError: If recipe, data, a clipper or the interval cannot be used, or matplotlib is missing.
    """
    check_matplotlib()
    check_interval(n_steps, every)
    recipe = load_recipe(path, overrides)
    for clip in clips:
        recipe_with_clipper(recipe, clip)
    return experiment_from_recipe(recipe, path.stem)


def check_interval(n_steps: int, every: int) -> None:
    """Raise a UserError if no step would be measured."""
    if every > n_steps:
        raise UserError(
            f"--every {every} is more than --steps {n_steps}: no smoothness would be measured. Choose 1 to {n_steps}."
        )


def run_arms(
    experiment: Experiment,
    folder: Path,
    *,
    clips: Sequence[str] = CLIPS,
    n_steps: int = 500,
    every: int = 5,
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda _done, _text: None,
) -> TrajectoryComparison:
    """Train an experiment under each clipper, and resume what the folder holds of the same experiment.

    Args:
        experiment: Its weights and batches are the same in every arm.
        folder: Where the arms are saved.
        clips: Names as `recipe_with_clipper` takes them.
        n_steps: Number of steps of each arm.
        every: Number of steps from one measurement of smoothness to the next.
        stop: After a signal, the current step is the last.
        progress: Called with the fraction done and what is running.

    Raises:
        UserError: If a clipper is unknown, the interval too long, or the folder holds another experiment.
    """
    check_interval(n_steps, every)
    experiments = {
        clip: replace(experiment, recipe=recipe_with_clipper(experiment.recipe, clip)) for clip in dict.fromkeys(clips)
    }
    # Build every arm once, so that a recipe that cannot be used is refused before any work.
    for arm_experiment in experiments.values():
        arm_experiment.new_state()
    folder.mkdir(parents=True, exist_ok=True)

    trajectories = []
    for index, (clip, arm_experiment) in enumerate(experiments.items()):
        if stop is not None and stop.signal:
            break
        # One arm at a time holds a model and an optimizer.
        arm = _ArmRun(RunDirectory(folder / clip.replace(":", "-")), arm_experiment, n_steps, every)
        measurements = arm.load()
        saved_at = perf_counter()
        for measurement in arm.train():
            measurements.append(measurement)
            if perf_counter() - saved_at > SAVE_EVERY_SECONDS:
                arm.save(measurements)
                saved_at = perf_counter()
            fraction_done = (index + measurement.step / n_steps) / len(experiments)
            progress(fraction_done, f"{clip}: {_progress_text(measurement)}")
            if stop is not None and stop.signal:
                break
        arm.save(measurements)
        trajectories.append(Trajectory(clip, tuple(measurements), arm.state.faults.reason_to_stop()))
    return TrajectoryComparison(experiment.name, recipe_table(experiment.recipe), n_steps, every, tuple(trajectories))


def _progress_text(measurement: StepMeasurement) -> str:
    text = f"step {measurement.step}"
    if measurement.loss is not None:
        text += f", loss {measurement.loss:.3g}"
    if measurement.grad_norm is not None:
        text += f", norm {measurement.grad_norm:.3g}"
    return text


class _ArmRun:
    """Training state of one arm, saved in a checkpoint together with its measurements."""

    def __init__(self, run: RunDirectory, experiment: Experiment, n_steps: int, every: int) -> None:
        self.run = run
        self.experiment = experiment
        self.n_steps = n_steps
        self.every = every
        self.recipe = recipe_table(experiment.recipe)
        # A checkpoint of other settings must not be resumed.
        self.settings = {"steps": n_steps, "every": every, "start": weights_digest([experiment.weights])}
        self.state: TrainState = experiment.new_state()
        self.saved_step = -1

    def load(self) -> list[StepMeasurement]:
        """Load the state of an earlier run of the same experiment, and return its measurements, if there is one.

        Raises:
            UserError: If the folder holds another experiment.
        """
        if not self.run.checkpoints.is_dir():
            return []
        checkpoint = read_checkpoint(find_checkpoint(self.run.path))
        # Through JSON and back, as the checkpoint's recipe was: tuples are lists there.
        same_recipe = checkpoint.recipe == json.loads(json.dumps(self.recipe))
        if not same_recipe or any(checkpoint.choices.get(key) != value for key, value in self.settings.items()):
            raise UserError(
                f"{self.run.path} holds a run with another recipe, --steps, --every or other starting weights. "
                "Choose another --out or delete the folder."
            )
        self.state.load_state_dict(checkpoint.state)
        self.saved_step = self.state.step
        return [StepMeasurement(**row) for row in checkpoint.choices["readings"]]

    def train(self) -> Iterator[StepMeasurement]:
        """Yield a measurement for each step that is left."""
        return measure_steps(self.experiment, self.state, n_steps=self.n_steps, every=self.every)

    def save(self, measurements: Sequence[StepMeasurement]) -> None:
        """Save state and measurements, all of it or nothing."""
        if self.state.step == self.saved_step:
            return
        choices = self.settings | {"readings": [asdict(measurement) for measurement in measurements]}
        save_checkpoint(self.run, self.state.state_dict(), recipe=self.recipe, choices=choices, best=False, keep=1)
        self.saved_step = self.state.step


def write_comparison(comparison: TrajectoryComparison, folder: Path, numbers: Path | None = None) -> list[str]:
    """Write the numbers and the figure, and return a line of text that says where they are.

    Args:
        comparison: What to write; nothing is written if it has no steps.
        folder: Folder of the figure.
        numbers: JSON file; by default ``trajectory.json`` in the folder.
    """
    if not any(arm.steps for arm in comparison.arms):
        return ["No step was made, so there is nothing to draw."]
    from unbraid.lab.trajectory_figure import trajectory_figure

    file = numbers or folder / "trajectory.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, comparison.as_json(), indent=None)
    folder.mkdir(parents=True, exist_ok=True)
    picture = write_figure(trajectory_figure(comparison), folder)
    return [f"The figure is {picture}, and the numbers are in {file}."]
