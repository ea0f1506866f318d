"""Draw the loss landscape of an experiment: choose the points, compute the losses, write figures and JSON."""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unbraid.build import build_model, choose_device, load_weights
from unbraid.errors import CheckpointError, UserError
from unbraid.figures import FigureSpec, write_figure
from unbraid.io import finite_or_none, write_json
from unbraid.lab.experiment import Experiment, mean_loss
from unbraid.lab.landscape import (
    LossFunction,
    WeightPoints,
    interpolate,
    loss_of_weights,
    path_slice,
    random_slices,
)
from unbraid.lab.landscape_figure import interpolation_figure, path_figures, random_slice_figures
from unbraid.lab.landscape_points import PointLosses, evaluate_points, points_file_name
from unbraid.lab.weight_directions import filter_layouts, weights_digest
from unbraid.robust.precision import Precision
from unbraid.run_directory import RunDirectory
from unbraid.signals import StopRequest
from unbraid.train.checkpoint import checkpoint_folders, find_checkpoint, read_checkpoint
from unbraid.type_aliases import FloatArray


@dataclass(frozen=True)
class LandscapeView:
    """Points at which to compute the loss, and the figures of them.

    Attributes:
        name: Kind of view; also the stem of its JSON file.
        points: Points in weight space.
        figures: Returns the figures of the losses at the points.
        arrays: Description of the axes, for the JSON file.
    """

    name: Literal["around", "between", "path"]
    points: WeightPoints
    figures: Callable[[FloatArray], list[FigureSpec]]
    arrays: dict[str, Any] = field(default_factory=dict)


def choose_view(
    experiment: Experiment,
    *,
    other: Path | None = None,
    run: Path | None = None,
    span: float | None = None,
    n_points: int = 21,
    seed: int = 0,
) -> LandscapeView:
    """Return the line to another checkpoint, the plane of a run's path, or without either the surroundings.

    Args:
        experiment: Experiment with the model's weights.
        other: A checkpoint of the same model.
        run: A run directory.
        span: Distance to go, as each view takes it; None for the view's default.
        n_points: Number of points along each axis.
        seed: Seed of the random directions.
    """
    if other is not None:
        return interpolation_view(experiment, other, beyond=0.25 if span is None else span, n_points=n_points)
    if run is not None:
        return path_view(experiment, run, margin=0.25 if span is None else span, n_points=n_points)
    return random_view(experiment, span=1.0 if span is None else span, n_points=n_points, seed=seed)


def random_view(experiment: Experiment, *, span: float = 1.0, n_points: int = 21, seed: int = 0) -> LandscapeView:
    """Return the view along random directions around an experiment's model; see `random_slices`."""
    unit = loss_label(experiment)
    # Some layers have several filters side by side in one weight; only the model's modules tell which.
    slices = random_slices(
        experiment.weights,
        parameter_names(experiment),
        span=span,
        n_points=n_points,
        seed=seed,
        filters=filter_layouts(experiment.copy_model()),
    )

    def figures(losses: FloatArray) -> list[FigureSpec]:
        return random_slice_figures(slices, losses, name=experiment.name, unit=unit)

    arrays = {"offsets": slices.offsets.tolist(), "order": "lines of each direction, then the grid row by row"}
    return LandscapeView("around", slices.points, figures, arrays)


def interpolation_view(
    experiment: Experiment, other: Path, *, beyond: float = 0.25, n_points: int = 21
) -> LandscapeView:
    """Return the view on the line to another checkpoint of the same model; see `interpolate`.

    Raises:
        CheckpointError: If the other checkpoint cannot be read, belongs to another model, or has the same weights.
    """
    checkpoint = read_checkpoint(find_checkpoint(other))
    model = build_model(experiment.recipe, trust=experiment.trusted)
    load_weights(model, checkpoint)
    # Digests and not paths: last and step-000100 may be the same checkpoint.
    weights = model.state_dict()
    if weights_digest([weights]) == weights_digest([experiment.weights]):
        raise CheckpointError(f"{other} holds the same weights; give --to a checkpoint with other weights.")
    # Checkpoints of two runs are often both called step-000100: then the titles must tell them apart.
    names = experiment.name, checkpoint.path.name
    if names[0] == names[1]:
        names = f"the first {names[0]}", f"the other {names[1]}"
    unit = loss_label(experiment)
    interpolation = interpolate(experiment.weights, weights, beyond=beyond, n_points=n_points)

    def figures(losses: FloatArray) -> list[FigureSpec]:
        return [interpolation_figure(interpolation, losses, names=names, unit=unit)]

    arrays = {"at": interpolation.positions.tolist(), "order": "along the line"}
    return LandscapeView("between", interpolation.points, figures, arrays)


def path_view(experiment: Experiment, run: Path, *, margin: float = 0.25, n_points: int = 21) -> LandscapeView:
    """Return the view in the plane of a run's checkpoints; see `path_slice`.

    Raises:
        CheckpointError: If the path is no run directory, or holds fewer than three checkpoints.
    """
    paths = checkpoint_folders(RunDirectory(run))
    if len(paths) < 3:
        raise CheckpointError(
            f"{run} holds {len(paths)} checkpoints, and a plane needs 3 or more: give a run directory of a training "
            "with --set save.keep=20 (or another number) and a small enough save.every_steps."
        )
    states = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        states[int(checkpoint.state["progress"]["step"])] = checkpoint.state["model"]
    path_points = path_slice(states, parameter_names(experiment), margin=margin, n_points=n_points)
    name = run.resolve().name
    unit = loss_label(experiment)

    def figures(losses: FloatArray) -> list[FigureSpec]:
        return path_figures(path_points, losses, name=name, unit=unit)

    arrays = {
        "steps": list(path_points.steps),
        "path": path_points.plane.coordinates.tolist(),
        "x": path_points.x.tolist(),
        "y": path_points.y.tolist(),
        "shares": path_points.plane.variance_ratios.tolist(),
        "distances": path_points.plane.distances.tolist(),
        "order": "the checkpoints themselves, then the grid row by row",
    }
    return LandscapeView("path", path_points.points, figures, arrays)


def parameter_names(experiment: Experiment) -> list[str]:
    """Return the names of the model's parameters, without its buffers."""
    return [name for name, _ in experiment.copy_model().named_parameters()]


def loss_label(experiment: Experiment) -> str:
    """Return the label of an axis of losses."""
    return "loss (dB)" if experiment.build_loss().in_db else "loss"


def output_folder(checkpoint: Path, experiment: Experiment, out: Path | None) -> Path:
    """Return the folder to write to: ``out``, or by default one of the checkpoint's own.

    Raises:
        UserError: If ``out`` is a run directory; nothing is written into those.
    """
    if out is None:
        run = find_checkpoint(checkpoint).resolve().parent.parent.name
        return Path("landscape") / f"{run}-{experiment.name}"
    if RunDirectory(out).steps.exists():
        raise UserError(f"{out} is a run directory, and run directories are left unchanged; choose another with -o.")
    return out


def fixed_loss(
    experiment: Experiment, n_items: int, split: Literal["train", "valid"] = "train"
) -> tuple[LossFunction, str]:
    """Return the mean loss over the first mixtures of a split, in float32, and a digest of the mixtures."""
    fixed = experiment.fixed_batches(n_items, split=split)
    loss = experiment.build_loss()
    precision = Precision("fp32")
    digest = weights_digest([{"mixture": batch.mixture, "sources": batch.sources} for batch in fixed])
    return loss_of_weights(experiment.copy_model(), lambda model: mean_loss(model, loss, precision, fixed)), digest


def draw_landscape(
    experiment: Experiment,
    view: LandscapeView,
    out: Path,
    *,
    n_items: int = 16,
    split: Literal["train", "valid"] = "train",
    stop: StopRequest | None = None,
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> tuple[PointLosses, list[FigureSpec]]:
    """Compute the losses of a view and write figures and numbers to a folder.

    Args:
        experiment: Experiment with the model, the loss and the mixtures.
        view: Points and figures.
        out: Folder; it is created, and also keeps the losses computed so far.
        n_items: Number of mixtures that the loss is averaged over.
        split: Split whose talkers are mixed.
        stop: Ends the computation after the current point; the same call resumes it.
        progress: Receives the number of points done and the speed.

    Returns:
        The losses and the figures; no figures if the computation was stopped.

    Raises:
        UserError: If the folder holds points that cannot be read, or a view of other weights, or no loss is finite.
        OSError: If the folder cannot be written to.
    """
    # 1. Check the folder before the work, not after it.
    json_file = out / f"{view.name}.json"
    digest = view.points.cache_key[view.name]
    _check_same_weights(json_file, digest)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()

    # 2. Compute the losses. The key holds everything that may change a loss, the device and torch's version included.
    loss, mixtures_digest = fixed_loss(experiment, n_items, split)
    key = {
        "mixtures": mixtures_digest,
        **view.points.cache_key,
        "model": asdict(experiment.recipe.model),
        "loss": asdict(experiment.recipe.loss),
        "torch": torch.__version__,
        "device": choose_device().type,
    }
    key = json.loads(json.dumps(key, default=str))  # tuples become lists, as they will be when the file is read
    result = evaluate_points(view.points, loss, out / points_file_name(key), key, stop=stop, progress=progress)
    if result.signal:
        return result, []
    if not np.isfinite(result.losses).any():
        raise UserError(f"The loss is not finite at any of the {len(result.losses)} points: nothing can be drawn.")

    # 3. Write figures and numbers.
    figures = view.figures(result.losses)
    for figure in figures:
        write_figure(figure, out)
    table = {
        "checkpoint": experiment.name,
        "step": experiment.step,
        "weights": digest,
        "items": n_items,
        "split": split,
        **view.arrays,
        "losses": _finite_or_null(result.losses),
        "figures": [
            {
                "name": figure.name,
                "title": figure.title,
                "caption": figure.caption,
                "numbers": dict(zip(figure.numbers, _finite_or_null(figure.numbers.values()), strict=True)),
            }
            for figure in figures
        ],
    }
    write_json(json_file, table)
    return result, figures


def summary_lines(result: PointLosses, figures: list[FigureSpec], out: Path, n_items: int) -> list[str]:
    """Return what to print about a landscape, line by line."""
    lines = []
    if result.n_new:
        lines.append(
            f"{result.n_new} points in {result.seconds:.1f} s, {result.points_per_second:.2f} per second with "
            f"{n_items} mixtures each."
        )
    if result.n_done > result.n_new:
        lines.append(f"{result.n_done - result.n_new} points were read from {out}.")
    if result.signal:
        lines.append(
            f"Stopped after {result.n_done} of {len(result.losses)} points, saved in {out}. To resume, run the same "
            "command."
        )
        return lines
    # Figures of the same points share a caption, and the surface's may only be longer: print each text once.
    captions = list(dict.fromkeys(figure.caption for figure in figures))
    lines += [text for text in captions if not any(longer != text and longer.startswith(text) for longer in captions)]
    lines.append(f"Figures and numbers are in {out}: {', '.join(f'{figure.name}.png' for figure in figures)}.")
    return lines


def _check_same_weights(json_file: Path, digest: str) -> None:
    """Raise UserError if a file comes from other weights, or cannot be read: it must not be overwritten."""
    try:
        same_weights = json.loads(json_file.read_text(encoding="utf-8"))["weights"] == digest
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError):
        same_weights = False
    if not same_weights:
        raise UserError(f"{json_file} was made from other weights; choose another folder with --out, or remove it.")


def _finite_or_null(values: Iterable[float]) -> list[float | None]:
    return [finite_or_none(float(value)) for value in values]
