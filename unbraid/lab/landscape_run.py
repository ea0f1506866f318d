"""The landscape of a subject from start to end: points, losses, figures, and their numbers as JSON in a folder."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unbraid.build import choose_device
from unbraid.errors import CheckpointError, UserError
from unbraid.figures import FigureSpec, write_figure
from unbraid.io import write_atomically
from unbraid.lab.experiment import Experiment, mean_loss, model_of
from unbraid.lab.landscape import Chart, Measure, around, between, measured, of_path
from unbraid.lab.landscape_figure import plate_between, plates_around, plates_of_path
from unbraid.lab.landscape_points import Surveyed, kept_name, survey
from unbraid.lab.weight_directions import Floats, digest_of, filters_of
from unbraid.records import RunDirectory
from unbraid.robust.precision import Precision
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import complete_checkpoints, find_checkpoint, read_checkpoint


@dataclass(frozen=True)
class View:
    """What to take the loss at, and how to show it.

    Attributes:
        name: Which kind: ``around``, ``between`` or ``path``; also that of its JSON.
        chart: The points.
        plates: Makes the plates of its losses.
        arrays: What the axes are, for the JSON.
    """

    name: Literal["around", "between", "path"]
    chart: Chart
    plates: Callable[[Floats], list[FigureSpec]]
    arrays: dict[str, Any] = field(default_factory=dict)


def view_of(
    subject: Experiment,
    *,
    other: Path | None = None,
    run: Path | None = None,
    span: float | None = None,
    n_points: int = 21,
    seed: int = 0,
) -> View:
    """The line to another checkpoint, the plane of a run's path, or, where neither is given, what lies around.

    Args:
        subject: Whose model.
        other: A checkpoint of the same model.
        run: A run directory.
        span: How far to go, as each view takes it; its own default where nothing is said.
        n_points: Along each axis.
        seed: Of the directions.
    """
    if other is not None:
        return view_between(subject, other, beyond=0.25 if span is None else span, n_points=n_points)
    if run is not None:
        return view_path(subject, run, margin=0.25 if span is None else span, n_points=n_points)
    return view_around(subject, span=1.0 if span is None else span, n_points=n_points, seed=seed)


def tell(found: Surveyed, plates: list[FigureSpec], out: Path, n_items: int) -> Iterator[str]:
    """What to say of it, line by line."""
    if found.n_new:
        yield (
            f"{found.n_new} points in {found.seconds:.1f} s, {found.points_per_second:.2f} a second with {n_items} "
            "mixtures each."
        )
    if found.n_done > found.n_new:
        yield f"{found.n_done - found.n_new} points were there already, in {out}."
    if found.signal:
        yield f"Stopped after {found.n_done} of {len(found.losses)} points, kept in {out}. To go on: the same command."
        return
    captions = dict.fromkeys(plate.caption for plate in plates)
    yield from (told for told in captions if not any(other.startswith(told) for other in captions if other != told))
    yield f"Figures and numbers are in {out}: {', '.join(f'{plate.name}.png' for plate in plates)}."


def view_around(subject: Experiment, *, span: float = 1.0, n_points: int = 21, seed: int = 0) -> View:
    """Random directions around a subject; as `around`."""
    filters = filters_of(subject.model())
    found = around(subject.weights, parameters_of(subject), span=span, n_points=n_points, seed=seed, filters=filters)
    unit = unit_of(subject)
    arrays = {"offsets": found.offsets.tolist(), "order": "lines of each direction, then the grid row by row"}
    return View(
        "around", found.chart, lambda losses: plates_around(found, losses, name=subject.name, unit=unit), arrays
    )


def view_between(subject: Experiment, other: Path, *, beyond: float = 0.25, n_points: int = 21) -> View:
    """The line from a subject to another checkpoint of the same model; as `between`.

    Raises:
        CheckpointError: If the other is none, or another model's.
    """
    checkpoint = read_checkpoint(find_checkpoint(other))
    weights = model_of(checkpoint, subject.recipe, trust=subject.trusted).state_dict()
    if digest_of([weights]) == digest_of([subject.weights]):
        raise CheckpointError(f"{other} holds the same weights: --to needs those of another checkpoint.")
    found = between(subject.weights, weights, beyond=beyond, n_points=n_points)
    names = _two_names(subject, checkpoint.path)
    arrays = {"at": found.at.tolist(), "order": "along the line"}
    unit = unit_of(subject)
    return View("between", found.chart, lambda losses: [plate_between(found, losses, names=names, unit=unit)], arrays)


def _two_names(subject: Experiment, other: Path) -> tuple[str, str]:
    """Names that tell two checkpoints apart."""
    if other.name != subject.name:
        return subject.name, other.name
    return f"the first {subject.name}", f"the other {other.name}"


def folder_for(checkpoint: Path, subject: Experiment, out: Path | None) -> Path:
    """Where to write: what was said, or a folder that no other checkpoint's figures are in.

    Raises:
        UserError: If that is a run directory, which nothing shall be written into.
    """
    if out is None:
        run = find_checkpoint(checkpoint).resolve().parent.parent.name
        return Path("landscape") / f"{run}-{subject.name}"
    if RunDirectory(out).steps.exists():
        raise UserError(f"{out} is a run directory, and nothing of a run is touched: give another folder with -o.")
    return out


def view_path(subject: Experiment, run: Path, *, margin: float = 0.25, n_points: int = 21) -> View:
    """The plane of the checkpoints of a run directory; as `of_path`.

    Raises:
        CheckpointError: If it holds fewer than three checkpoints, or is no run directory.
    """
    paths = complete_checkpoints(RunDirectory(run))
    if len(paths) < 3:
        raise CheckpointError(
            f"{run} keeps {len(paths)} of the 3 or more checkpoints that a plane needs: give a run directory, trained "
            "with --set save.keep=20 (or another number), and save.every_steps small enough to write so many."
        )
    states = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        states[int(checkpoint.state["progress"]["step"])] = checkpoint.state["model"]
    found = of_path(states, parameters_of(subject), margin=margin, n_points=n_points)
    arrays = {
        "steps": list(found.steps),
        "path": found.plane.path.tolist(),
        "x": found.x.tolist(),
        "y": found.y.tolist(),
    }
    arrays |= {"shares": found.plane.shares.tolist(), "distances": found.plane.distances.tolist()}
    arrays["order"] = "the checkpoints themselves, then the grid row by row"
    name = run.resolve().name
    unit = unit_of(subject)
    return View("path", found.chart, lambda losses: plates_of_path(found, losses, name=name, unit=unit), arrays)


def parameters_of(subject: Experiment) -> list[str]:
    """Names of the model's parameters."""
    return [name for name, _ in subject.model().named_parameters()]


def unit_of(subject: Experiment) -> str:
    """What to write at an axis of losses."""
    return "loss (dB)" if subject.loss().in_db else "loss"


def loss_of(subject: Experiment, n_items: int, split: Literal["train", "valid"] = "train") -> tuple[Measure, str]:
    """The mean loss over the first mixtures of a split, in float32, and a digest of the mixtures."""
    some, loss, precision = subject.fixed(n_items, split=split), subject.loss(), Precision("fp32")
    digest = digest_of([{"mixture": batch.mixture, "sources": batch.sources} for batch in some])
    return measured(subject.model(), lambda model: mean_loss(model, loss, precision, some)), digest


def look(
    subject: Experiment,
    view: View,
    out: Path,
    *,
    n_items: int = 16,
    split: Literal["train", "valid"] = "train",
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> tuple[Surveyed, list[FigureSpec]]:
    """Take the losses of a view, draw them into a folder, and write their numbers beside; no plates if it is stopped.

    Args:
        subject: Whose model, loss and mixtures.
        view: What to look at.
        out: A folder, made where it is missing; the losses so far are kept there.
        n_items: How many mixtures.
        split: Of which talkers.
        stop: Ends it after the point at hand; the same call goes on.
        progress: Is told how many points are done, and how fast it goes.

    Raises:
        UserError: If what is kept in the folder cannot be gone on with, or is the same view of other weights, or no
            loss at all is finite.
        OSError: If the folder cannot be written to.
    """
    numbers, weights = out / f"{view.name}.json", view.chart.made_from[view.name]
    _check_same(numbers, weights)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # before the work, not after it
    measure, mixtures = loss_of(subject, n_items, split)
    made_by = {"model": asdict(subject.recipe.model), "loss": asdict(subject.recipe.loss), "torch": torch.__version__}
    made_by["device"] = choose_device().type
    key = json.loads(json.dumps({"mixtures": mixtures, **view.chart.made_from, **made_by}, default=str))
    kept = out / kept_name(key)
    found = survey(view.chart, measure, kept, key, stop=stop, progress=progress)
    if found.signal:
        return found, []
    if not np.isfinite(found.losses).any():
        raise UserError(f"At none of the {len(found.losses)} points is the loss finite: there is nothing to draw.")
    plates = view.plates(found.losses)
    for plate in plates:
        write_figure(plate, out)
    told = {
        "subject": subject.name,
        "step": subject.step,
        "weights": weights,
        "items": n_items,
        "split": split,
        **view.arrays,
    }
    told["losses"] = _as_json(found.losses)
    told["plates"] = [
        {
            "name": p.name,
            "title": p.title,
            "caption": p.caption,
            "numbers": dict(zip(p.numbers, _as_json(p.numbers.values()), strict=True)),
        }
        for p in plates
    ]
    write_atomically(numbers, json.dumps(told, indent=1, allow_nan=False) + "\n")
    return found, plates


def _check_same(numbers: Path, weights: str) -> None:
    """Nothing of other weights is overwritten.

    Raises:
        UserError: If there is something of theirs, or something that cannot be read.
    """
    try:
        held = json.loads(numbers.read_text(encoding="utf-8"))
        same = held["weights"] == weights
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{numbers} was not made from these weights; give another folder by --out, or remove it.")


def _as_json(values: Iterable[float]) -> list[float | None]:
    """JSON knows no infinity and no NaN: those are null."""
    return [float(value) if math.isfinite(value) else None for value in values]
