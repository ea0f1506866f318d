"""A grid of training runs: arms times seeds, each an ordinary run in a folder of its own; what came of it from records.

All arms of a seed begin at the same weights, where their model is the same, and see the same mixtures in the same
order: ``data.seed`` is the seed of both. An arm that a stop rule ends is a result, and the grid goes on.
"""

import itertools
import json
import re
import statistics
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unbraid.build import build_corpus, build_model, build_state
from unbraid.config.recipe import Recipe, differences, load_recipe, recipe_table
from unbraid.config.schema import assignment
from unbraid.console import TrainingStatus
from unbraid.errors import CheckpointError, RecipeError, TrainingStopped, UserError
from unbraid.io import write_json
from unbraid.records import Event, StepRecord, read_rows, read_steps, read_validation
from unbraid.run import train
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import find_checkpoint

ENDED = "ended.json"
"""In a run's folder, once it has come to its end: how, and after how many steps."""

SHARE_AT_THE_END = 0.1
"""The final loss is the mean over this share of the steps."""

FAULTS = frozenset({"nonfinite_loss", "nonfinite_gradient", "over_limit", "fp16_overflow"})


@dataclass(frozen=True)
class Arm:
    """One of the things compared: a readable name, that of its folder too, and what it lays over the recipe."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class SweepRun:
    """An arm with one seed: a run."""

    arm: Arm
    seed: int
    recipe: Recipe
    directory: RunDirectory


@dataclass(frozen=True)
class RunEnd:
    """How a run came to its end.

    Attributes:
        how: ``finished``, ``diverged``, or ``stopped`` by another rule.
        step: After how many steps.
        reason: What the stop rule said.
    """

    how: str
    step: int
    reason: str = ""


@dataclass(frozen=True)
class RunSummary:
    """What the records say of a run.

    Attributes:
        arm: Name of the arm.
        seed: Its seed.
        ended: How it came to its end.
        loss: Mean training loss over the last tenth of its steps; None where none of them was trained.
        grad_norm: Median norm of the gradient before clipping, over the steps trained.
        si_sdri: Of the last validation, in dB; None where there was none.
        left_out: Steps left out.
        clipped: Share of the trained steps that were clipped.
        seconds: Wall time of the run.
    """

    arm: str
    seed: int
    ended: RunEnd
    loss: float | None
    grad_norm: float | None
    si_sdri: float | None
    left_out: int
    clipped: float
    seconds: float


class Interrupted(UserError):
    """A signal stopped the grid; the run under way has left a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by signal {number}.")
        self.number = number


def arms_from_options(over: Sequence[str]) -> list[Arm]:
    """The product of all ``--over KEY=VALUE,VALUE``, the last key changing fastest.

    Raises:
        RecipeError: If one is not of that form, or a key or a value is given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in over:
        key, values = _axis(text)
        if key in axes:
            raise RecipeError(f"--over {key} is given twice; name all of its values in one: --over {key}=A,B.")
        axes[key] = values
    if not axes:
        raise RecipeError("A race needs something to compare, such as --over optim.name=sgd,adam.")
    rows = itertools.product(*([f"{key}={value}" for value in values] for key, values in axes.items()))
    return [Arm(",".join(row), row) for row in rows]


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, listed = text.partition("=")
    key = key.strip()
    values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", listed)]  # not those within brackets
    if not equals or "." not in key or not all(values):
        raise RecipeError(f"--over {text!r} must look like optim.name=sgd,adam.")
    if key == "data.seed":
        raise RecipeError("--over data.seed: the seeds are counted from 0; say how many by --seeds.")
    parsed = [repr(assignment(f"{key}={value}")[1]) for value in values]
    for place, value in enumerate(parsed):
        if value in parsed[:place]:
            raise RecipeError(f"--over {text!r} has the value {values[place]} twice; leave one out.")
    return key, values


def plan_runs(
    recipe: Path, arms: Sequence[Arm], *, seeds: int, out: Path, overrides: Sequence[str] = ()
) -> list[SweepRun]:
    """The runs of a grid, all arms of one seed before the next seed, each checked before any of them begins.

    Args:
        recipe: What all arms share.
        arms: What they differ in.
        seeds: How many; ``data.seed`` counts them from 0.
        out: Folder for all runs.
        overrides: As ``--set``, below those of the arms.

    Raises:
        RecipeError: If an arm's recipe cannot be used.
        CheckpointError: If a folder holds the run of another recipe.
    """
    if seeds < 1:
        raise RecipeError(f"--seeds {seeds} must be 1 or more.")
    if any(assignment(text)[0] == "data.seed" for text in overrides):
        raise RecipeError("--set data.seed: the seeds are counted from 0; say how many by --seeds.")
    folders = [re.sub(r"[^\w.,=+-]+", "_", arm.name) for arm in arms]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"Two arms would share a folder: {', '.join(folders)}.")
    found = []
    for seed in range(seeds):
        for arm, folder in zip(arms, folders, strict=True):
            made = _fixed_start(load_recipe(recipe, [*overrides, *arm.overrides, f"data.seed={seed}"]))
            found.append(SweepRun(arm, seed, made, RunDirectory(out / folder / f"seed-{seed}")))
    for cell in found[: len(arms)]:
        _try(cell)
    build_corpus(found[0].recipe)
    for cell in found:
        _refuse_another(cell)
    return found


def _fixed_start(recipe: Recipe) -> Recipe:
    """With ``model.init`` as the checkpoint that it leads to now: that another run goes on must move nobody's start."""
    if "init" not in recipe.model.options:
        return recipe
    init = str(find_checkpoint(Path(recipe.model.options["init"])).resolve())
    return replace(recipe, model=replace(recipe.model, options={**recipe.model.options, "init": init}))


def _try(cell: SweepRun) -> None:
    """Put an arm's parts together once: what one of them refuses, it shall refuse before the first run."""
    try:
        build_state(cell.recipe, build_model(cell.recipe), precision="fp32")
    except UserError as error:
        raise RecipeError(f"{cell.arm.name}: {error}") from error


def _refuse_another(cell: SweepRun) -> None:
    """Nothing of a run that is there is mixed with one by another recipe."""
    if not cell.directory.recipe.exists():
        return
    before = tomllib.loads(cell.directory.recipe.read_text(encoding="utf-8"))
    changed = differences(before, recipe_table(cell.recipe))
    told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
    if told:
        raise CheckpointError(
            f"{cell.directory.path} was begun by another recipe: {told}. Take that back, or name another -o."
        )


def run_sweep(
    cells: Sequence[SweepRun], *, stop: StopRequest, progress: Callable[[float, str], None] | None = None
) -> Iterator[tuple[SweepRun, RunEnd]]:
    """Train what is not trained yet, in order; a run under way is gone on with.

    Args:
        cells: The runs.
        stop: Ends the grid early, with a checkpoint.
        progress: Is told the share of all steps that is done, and what is going on.

    Yields:
        Each run and how it ended, once it has.

    Raises:
        Interrupted: If a signal came.
        UserError: As `train` does, but for a stop rule: that is an outcome.
    """
    progress = progress or (lambda done, text: None)
    for place, cell in enumerate(cells):
        ended = read_end(cell.directory)
        if ended is None:
            if stop.signal:
                raise Interrupted(stop.signal)

            def advance(share: float, text: str, *, place: int = place, cell: SweepRun = cell) -> None:
                progress((place + share) / len(cells), f"{cell.arm.name} seed {cell.seed}  {text}")

            ended = train_to_end(cell, stop=stop, progress=advance)
        progress((place + 1) / len(cells), f"{cell.arm.name} seed {cell.seed}")
        yield cell, ended


def train_to_end(cell: SweepRun, *, stop: StopRequest, progress: Callable[[float, str], None]) -> RunEnd:
    """Train one run to its end, from its newest checkpoint where there is one.

    Raises:
        Interrupted: If a signal came.
        UserError: As `train` does, but for a stop rule.
    """
    budget, ticker, threads = cell.recipe.train, TrainingStatus(), torch.get_num_threads()
    reason = ""
    try:
        for record in train(cell.recipe, cell.directory, resume=cell.directory.recipe.exists(), stop=stop):
            if isinstance(record, Event):
                continue
            ticker.add(record)
            by_time = record.elapsed_seconds / (60 * budget.max_minutes) if budget.max_minutes else 0.0
            by_steps = record.step / budget.max_steps if budget.max_steps else 0.0
            progress(min(1.0, max(by_time, by_steps)), ticker.text())
    except TrainingStopped as stopped:
        if not _saved_to_the_end(cell.directory):  # a full disk is no outcome
            raise
        reason = str(stopped)
    finally:
        torch.set_num_threads(threads)
    if stop.agreed:
        raise Interrupted(stop.agreed)
    steps = read_steps(cell.directory.steps)
    last = steps[-1].step if steps else 0
    how = "finished" if not reason else "diverged" if steps and steps[-1].outcome in FAULTS else "stopped"
    ended = RunEnd(how, last, reason)
    write_json(cell.directory.path / ENDED, asdict(ended))
    return ended


def _saved_to_the_end(run: RunDirectory) -> bool:
    last, steps = run.checkpoints / "last", read_rows(run.steps, last=1)[0]
    return bool(steps) and last.exists() and last.read_text(encoding="utf-8").strip() == f"step-{steps[-1]['step']:06d}"


def unfinished_lines(ended: Sequence[tuple[SweepRun, RunEnd]]) -> list[str]:
    """A line for each run that did not finish: why, and how it is run again."""
    return [
        f"{cell.arm.name} seed {cell.seed} {how.how} at step {how.step}: {how.reason} It counts as a result; to run it "
        f"again, remove {cell.directory.path}."
        for cell, how in ended
        if how.how != "finished"
    ]


def read_end(run: RunDirectory) -> RunEnd | None:
    """How a run came to its end; None where it has not."""
    path = run.path / ENDED
    if not path.exists():
        return None
    try:
        return RunEnd(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it, and the run is looked at again.") from error


def summarise_run(cell: SweepRun, ended: RunEnd) -> RunSummary:
    """What a run's records say of it."""
    steps, validations = read_steps(cell.directory.steps), read_validation(cell.directory.validation)
    trained = [record for record in steps if record.trained]
    norms = [record.grad_norm for record in trained if record.grad_norm is not None]
    return RunSummary(
        arm=cell.arm.name,
        seed=cell.seed,
        ended=ended,
        loss=final_loss(steps),
        grad_norm=statistics.median(norms) if norms else None,
        si_sdri=validations[-1].si_sdri if validations and ended.how == "finished" else None,
        left_out=len(steps) - len(trained),
        clipped=sum(record.clipped for record in trained) / max(1, len(trained)),
        seconds=max([0.0, *(r.elapsed_seconds for r in steps[-1:]), *(v.elapsed_seconds for v in validations[-1:])]),
    )


def final_loss(steps: Sequence[StepRecord]) -> float | None:
    """Mean loss over those of the last tenth of the steps that were trained; None where none was."""
    tail = steps[-max(1, round(SHARE_AT_THE_END * len(steps))) :]
    losses = [record.loss for record in tail if record.trained and record.loss is not None]
    return statistics.fmean(losses) if losses else None


def step_overrides(n_steps: int | None) -> list[str]:
    """What ``--steps`` lays over a recipe: so many, and no other end."""
    return [] if n_steps is None else [f"train.max_steps={n_steps}", "train.max_minutes=0"]


def set_words(options: dict[str, Any]) -> list[str]:
    """Keys and values as ``--set`` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in options.items()]
