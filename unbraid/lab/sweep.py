"""Sweeps: arms times seeds, each an ordinary training run in its own directory, and summaries of their records.

All arms of a seed start from the same weights, if their models are equal, and see the same mixtures in the same order:
``data.seed`` seeds both. An arm that a stop rule ends is a result, and the sweep continues with the next.
"""

import itertools
import json
import re
import shlex
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from unbraid.build import build_corpus, build_model, build_state
from unbraid.config.recipe import Recipe, differences, load_recipe, recipe_table
from unbraid.config.schema import parse_override
from unbraid.console import TrainingStatus, command_name
from unbraid.errors import CheckpointError, RecipeError, TrainingStopped, UserError
from unbraid.io import write_json
from unbraid.records import FAULT_OUTCOMES, Event, StepRecord, read_rows, read_steps, read_validation
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import find_checkpoint
from unbraid.type_aliases import ProgressCallback

END_FILE = "ended.json"
"""File in a run directory once the run has ended: how, and after how many steps."""

FINAL_SHARE = 0.1
"""The final loss is the mean over this share of the steps, at the end of the run."""

# Running out of memory is a fault but no divergence. Single fp16 overflows are normal, but a stop rule ends a run on
# them only if they do not stop.
DIVERGED_OUTCOMES = {*FAULT_OUTCOMES, "fp16_overflow"} - {"out_of_memory"}


@dataclass(frozen=True)
class Arm:
    """One of the settings compared: a readable name, also that of its folder, and overrides of the recipe."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: an arm with a seed."""

    arm: Arm
    seed: int
    recipe: Recipe
    directory: RunDirectory


@dataclass(frozen=True)
class RunEnd:
    """The end of a run.

    Attributes:
        how: ``finished``, ``diverged``, or ``stopped`` by another stop rule.
        step: Number of steps made.
        reason: Message of the stop rule.
    """

    how: str
    step: int
    reason: str = ""


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run's records.

    Attributes:
        arm: Name of the arm.
        seed: Seed of weights and data.
        ended: The end of the run.
        loss: Mean training loss over the last tenth of the steps; None if none of them was trained.
        grad_norm: Median gradient norm before clipping, over the trained steps.
        si_sdri: SI-SDR improvement of the last validation, in dB; None without one.
        n_skipped: Number of skipped steps.
        clipped: Share of the trained steps that were clipped.
        seconds: Wall time of the run.
    """

    arm: str
    seed: int
    ended: RunEnd
    loss: float | None
    grad_norm: float | None
    si_sdri: float | None
    n_skipped: int
    clipped: float
    seconds: float


class Interrupted(UserError):
    """A signal stopped the sweep; the current run has saved a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by signal {number}.")
        self.number = number


def arms_from_options(options: Sequence[str]) -> list[Arm]:
    """Return the product of all ``--over KEY=VALUE,VALUE`` options, the last key varying fastest.

    Raises:
        RecipeError: If an option does not have this form, or a key or a value is given twice.
    """
    axes: dict[str, list[str]] = {}
    for option in options:
        key, values = _parse_axis(option)
        if key in axes:
            raise RecipeError(f"--over {key} is given twice; list all of its values in one: --over {key}=A,B.")
        axes[key] = values
    if not axes:
        raise RecipeError("A race needs something to compare, such as --over optim.name=sgd,adam.")
    combinations = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes.items()))
    return [Arm(",".join(overrides), overrides) for overrides in combinations]


def _parse_axis(option: str) -> tuple[str, list[str]]:
    key, equals, listed = option.partition("=")
    key = key.strip()
    # Split at commas, except those within brackets or braces.
    values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", listed)]
    if not equals or "." not in key or not all(values):
        raise RecipeError(f"--over {option!r} must look like optim.name=sgd,adam.")
    if key == "data.seed":
        raise RecipeError("--over data.seed cannot be used: seeds count from 0; set their number with --seeds.")
    # Compare parsed values: 1e-3 and 0.001 are the same arm.
    parsed = [repr(parse_override(f"{key}={value}")[1]) for value in values]
    for index, value in enumerate(parsed):
        if value in parsed[:index]:
            raise RecipeError(f"--over {option!r} has the value {values[index]} twice; remove one.")
    return key, values


def plan_runs(
    recipe: Path, arms: Sequence[Arm], *, seeds: int, out: Path, overrides: Sequence[str] = ()
) -> list[SweepRun]:
    """Return the runs of a sweep, all arms of one seed before the next seed, checked before any of them starts.

    Args:
        recipe: Recipe that all arms share.
        arms: Settings to compare.
        seeds: Number of seeds; ``data.seed`` counts them from 0.
        out: Folder for all runs.
        overrides: ``--set`` options; an arm's own take precedence.

    Raises:
        RecipeError: If the recipe of an arm cannot be used.
        CheckpointError: If a folder holds a run of another recipe.
    """
    if seeds < 1:
        raise RecipeError(f"--seeds {seeds} must be 1 or more.")
    if any(parse_override(text)[0] == "data.seed" for text in overrides):
        raise RecipeError("--set data.seed cannot be used: seeds count from 0; set their number with --seeds.")
    folders = [re.sub(r"[^\w.,=+-]+", "_", arm.name) for arm in arms]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"Two arms would share a folder: {', '.join(folders)}.")
    runs = []
    for seed in range(seeds):
        for arm, folder in zip(arms, folders, strict=True):
            arm_recipe = load_recipe(recipe, [*overrides, *arm.overrides, f"data.seed={seed}"])
            directory = RunDirectory(out / folder / f"seed-{seed}")
            runs.append(SweepRun(arm, seed, _resolve_init(arm_recipe), directory))

    # Build each arm once, so that a bad option is refused now and not after hours of other arms.
    for run in runs[: len(arms)]:
        try:
            build_state(run.recipe, build_model(run.recipe), precision="fp32")
        except UserError as error:
            raise RecipeError(f"{run.arm.name}: {error}") from error
    build_corpus(runs[0].recipe)
    for run in runs:
        _check_same_recipe(run)
    return runs


def _resolve_init(recipe: Recipe) -> Recipe:
    """Replace a run directory in ``model.init`` by its current checkpoint: that run may continue during the sweep."""
    if "init" not in recipe.model.options:
        return recipe
    init = str(find_checkpoint(Path(recipe.model.options["init"])).resolve())
    return replace(recipe, model=replace(recipe.model, options={**recipe.model.options, "init": init}))


def _check_same_recipe(run: SweepRun) -> None:
    """Raise CheckpointError if the directory holds a run of another recipe."""
    if not run.directory.recipe.exists():
        return
    before = tomllib.loads(run.directory.recipe.read_text(encoding="utf-8"))
    changed = differences(before, recipe_table(run.recipe))
    if changed:
        changes = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise CheckpointError(
            f"{run.directory.path} holds a run of another recipe: {changes}. Undo the change, or choose another -o."
        )


def run_sweep(
    runs: Sequence[SweepRun], *, stop: StopRequest, progress: ProgressCallback | None = None
) -> Iterator[tuple[SweepRun, RunEnd]]:
    """Train the runs in order; ended runs are skipped, and an interrupted one resumes.

    Args:
        runs: Runs of a sweep, as `plan_runs` returns them.
        stop: Ends the sweep early, with a checkpoint.
        progress: Receives the share of all steps that is done, and a line of text.

    Yields:
        Each run and its end, as soon as it has ended.

    Raises:
        Interrupted: If a signal arrived.
        UserError: As `train` does, except for stop rules; those are results.
    """
    for index, run in enumerate(runs):
        label = f"{run.arm.name} seed {run.seed}"
        end = read_end(run.directory)
        if end is None:
            if stop.signal:
                raise Interrupted(stop.signal)

            def advance(share: float, text: str, *, index: int = index, label: str = label) -> None:
                if progress is not None:
                    progress((index + share) / len(runs), f"{label}  {text}")

            end = train_to_end(run, stop=stop, progress=advance)
        if progress is not None:
            progress((index + 1) / len(runs), label)
        yield run, end


def train_to_end(run: SweepRun, *, stop: StopRequest, progress: ProgressCallback) -> RunEnd:
    """Train one run to its end, from its newest checkpoint if there is one.

    Raises:
        Interrupted: If a signal arrived.
        UserError: As `train` does, except for stop rules.
    """
    budget = run.recipe.train
    status = TrainingStatus()
    n_threads = torch.get_num_threads()
    reason = ""
    try:
        for record in train(run.recipe, run.directory, resume=run.directory.recipe.exists(), stop=stop):
            if isinstance(record, Event):
                continue
            status.add(record)
            time_share = record.elapsed_seconds / (60 * budget.max_minutes) if budget.max_minutes else 0.0
            step_share = record.step / budget.max_steps if budget.max_steps else 0.0
            progress(min(1.0, max(time_share, step_share)), status.text())
    except TrainingStopped as stopped:
        # A stop rule saves a last checkpoint. Without one the cause is outside of the arm, such as a full disk.
        if not _last_step_is_saved(run.directory):
            raise
        reason = str(stopped)
    finally:
        # The run chose its own number of threads; the next one must choose from the same start.
        torch.set_num_threads(n_threads)
    if stop.agreed:
        raise Interrupted(stop.agreed)
    steps = read_steps(run.directory.steps)
    if not reason:
        how = "finished"
    elif steps and steps[-1].outcome in DIVERGED_OUTCOMES:
        how = "diverged"
    else:
        how = "stopped"
    end = RunEnd(how, steps[-1].step if steps else 0, reason)
    write_json(run.directory.path / END_FILE, asdict(end))
    return end


def _last_step_is_saved(directory: RunDirectory) -> bool:
    last = directory.checkpoints / "last"
    rows = read_rows(directory.steps, last=1)[0]
    if not rows or not last.exists():
        return False
    return last.read_text(encoding="utf-8").strip() == f"step-{rows[-1]['step']:06d}"


def read_end(directory: RunDirectory) -> RunEnd | None:
    """Return the end of a run; None if it has not ended.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    path = directory.path / END_FILE
    if not path.exists():
        return None
    try:
        return RunEnd(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove it, and the run is completed and recorded again."
        ) from error


def summarise_run(run: SweepRun, end: RunEnd) -> RunSummary:
    """Return the summary of a run's records."""
    steps = read_steps(run.directory.steps)
    validations = read_validation(run.directory.validation)
    trained = [record for record in steps if record.trained]
    norms = [record.grad_norm for record in trained if record.grad_norm is not None]
    # Validation after the last step takes time too: the latest clock is the run's.
    clocks = [record.elapsed_seconds for record in steps[-1:]]
    clocks += [record.elapsed_seconds for record in validations[-1:]]
    return RunSummary(
        arm=run.arm.name,
        seed=run.seed,
        ended=end,
        loss=final_loss(steps),
        grad_norm=statistics.median(norms) if norms else None,
        si_sdri=validations[-1].si_sdri if validations and end.how == "finished" else None,
        n_skipped=len(steps) - len(trained),
        clipped=sum(record.clipped for record in trained) / max(1, len(trained)),
        seconds=max(clocks, default=0.0),
    )


def final_loss(steps: Sequence[StepRecord]) -> float | None:
    """Return the mean loss of the trained steps among the last tenth; None if there are none."""
    tail = steps[-max(1, round(FINAL_SHARE * len(steps))) :]
    losses = [record.loss for record in tail if record.trained and record.loss is not None]
    return statistics.fmean(losses) if losses else None


def unfinished_lines(ended: Sequence[tuple[SweepRun, RunEnd]]) -> list[str]:
    """Return a line for each run that did not finish: the reason, and how to train it again."""
    return [
        f"{run.arm.name} seed {run.seed} {end.how} at step {end.step}: {end.reason} This counts as a result; to train "
        f"it again, remove {run.directory.path}."
        for run, end in ended
        if end.how != "finished"
    ]


def dashboard_line(out: Path) -> str:
    """Return a line with the command that shows all runs of a sweep in the dashboard."""
    return f"All runs side by side: {command_name()} dashboard {shlex.quote(str(out))}"


def step_overrides(n_steps: int | None) -> list[str]:
    """Return the overrides that make a run end after a number of steps and by no other budget; none for None."""
    return [] if n_steps is None else [f"train.max_steps={n_steps}", "train.max_minutes=0"]
