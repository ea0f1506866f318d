"""Build the objects of a recipe: the model, the data sets and the training state; load a trained model."""

import hashlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from unbraid import dist
from unbraid.config.recipe import Component, Recipe, recipe_from_table
from unbraid.config.registry import FROM_DATA, build_component, build_loss, find_component
from unbraid.data import DATASETS
from unbraid.data.dataset import MixtureDataset, make_dataset
from unbraid.data.folders import list_noises
from unbraid.data.splits import assign_splits
from unbraid.data.tracks import Track
from unbraid.errors import CheckpointError, DataError, RecipeError, UserError
from unbraid.losses import loss_inputs
from unbraid.losses.pit import SeparationLoss
from unbraid.models import MODELS
from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.robust.precision import Precision
from unbraid.seeding import seeded_torch
from unbraid.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from unbraid.train.ema import EMA
from unbraid.train.optim import OPTIMIZERS, SCHEDULES
from unbraid.train.state import TrainState


def choose_device() -> torch.device:
    """Return this process's GPU, or the CPU if there is none.

    Raises:
        UserError: If more processes run on this machine than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if dist.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs for more processes: lower --nproc-per-node, or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return torch.device("cuda", dist.local_rank())


def build_model(recipe: Recipe, *, trust: bool = True) -> nn.Module:
    """Return the recipe's model on the CPU, with random initial weights drawn from the recipe's seed.

    Args:
        recipe: Its ``[model]`` is built; ``model.init`` is ignored, see `load_initial_weights`.
        trust: Allow a model from a file of the user's own.

    Raises:
        RecipeError: If the model is unknown, not trusted, or refuses its keys.
    """
    folder = recipe.folder if trust else None
    options = {key: value for key, value in recipe.model.options.items() if key != "init"}
    # A model that needs the number of sources or the sample rate takes them from the data, unless [model] sets them.
    parameters = inspect.signature(find_component("model", recipe.model, MODELS, folder)).parameters
    for name in FROM_DATA:
        if name in parameters:
            options.setdefault(name, getattr(recipe.data, name))
    with seeded_torch(recipe.data.seed, "initial weights"):
        return build_component("model", Component(recipe.model.name, options), MODELS, folder)


def load_model(path: Path, *, trust: bool = False) -> tuple[nn.Module, Recipe]:
    """Load a trained model, and the recipe it was trained with, from a checkpoint or a run directory.

    Args:
        path: A run directory (its best checkpoint, else its last), or a checkpoint; see `find_checkpoint`.
        trust: Allow code that the checkpoint's recipe names to run.

    Returns:
        The model in evaluation mode on the device of `choose_device`, and its recipe.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
        RecipeError: If the model is not built in, and ``trust`` is False.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    recipe = recipe_from_table(checkpoint.recipe, Path.cwd())
    model = build_model(recipe, trust=trust)
    load_weights(model, checkpoint)
    return model.to(choose_device()).eval(), recipe


def load_initial_weights(model: nn.Module, recipe: Recipe) -> None:
    """Load the weights of the checkpoint that ``model.init`` names; do nothing if the recipe names none.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, or belongs to another model.
    """
    if "init" in recipe.model.options:
        load_weights(model, read_checkpoint(find_checkpoint(Path(recipe.model.options["init"]))))


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        CheckpointError: If the weights belong to another model.
    """
    try:
        model.load_state_dict(checkpoint.state["model"])
    except RuntimeError as error:
        # torch lists every key that differs, a line each below a heading; the first one is enough to see the cause.
        reasons = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{checkpoint.path} holds the weights of another model: {reasons[0].strip()}") from error


@dataclass(frozen=True)
class Corpus:
    """The mixtures to train on, and those to validate on."""

    train: MixtureDataset
    valid: MixtureDataset


def list_tracks(recipe: Recipe, *, trust: bool = True, all_in: str = "") -> tuple[list[Track], list[Track]]:
    """Return the recordings of the recipe's data set with their splits, and its noise recordings.

    Args:
        recipe: Names the data.
        trust: Whether the user's own code that the recipe names may run.
        all_in: A split for all recordings of a data set that has no splits; empty divides the speakers among three.

    Raises:
        DataError: If they cannot be listed, or the processes of a distributed run see different files.
        RecipeError: If ``data.path`` is missing, or the data set is the user's own code and is not trusted.
    """
    data = recipe.data
    if data.path is None:
        raise RecipeError("[data] needs a path to a speaker folder or a CSV manifest: --set data.path=FOLDER.")
    list_recordings = find_component("data", Component(data.name), DATASETS, recipe.folder if trust else None)
    tracks = list_recordings(data.path)
    if all_in and not any(track.split for track in tracks):
        tracks = [replace(track, split=all_in) for track in tracks]
    tracks = assign_splits(tracks, n_sources=data.n_sources)
    noise_tracks = list_noises(data.noise) if data.noise else []

    # Ranks draw examples by index, so different lists would silently train on different data.
    digest = hashlib.sha256(repr((tracks, noise_tracks)).encode()).hexdigest()
    if dist.any_rank(digest != dist.from_main_process(digest), choose_device()):
        raise DataError(f"The processes see different files in {data.path}; every machine needs the same data.")
    return tracks, noise_tracks


def build_corpus(recipe: Recipe, *, trust: bool = True) -> Corpus:
    """Return the mixtures to train and to validate on, after every check that needs no audio.

    Raises:
        DataError, RecipeError: As `list_tracks`.
    """
    tracks, noise_tracks = list_tracks(recipe, trust=trust)
    return Corpus(
        train=make_dataset(tracks, recipe.data, "train", noises=noise_tracks),
        valid=make_dataset(tracks, recipe.data, "valid", noises=noise_tracks),
    )


def build_state(recipe: Recipe, model: nn.Module, *, precision: str) -> TrainState:
    """Return the training state at step 0.

    Args:
        recipe: Names the loss, optimizer, schedule, clipper, filters and transforms.
        model: The model, already on its device; the optimizer's state is created there.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        RecipeError: If a component refuses its keys, or two parts of the recipe do not fit together.
    """
    loss = build_loss(recipe)
    _check_model(recipe, model, loss)
    _check_schedule_free(recipe)
    filters = [build_component("filter", component, FILTERS, recipe.folder) for component in recipe.filters]
    for component, loss_filter in zip(recipe.filters, filters, strict=True):
        if hasattr(loss_filter, "observe") and not hasattr(loss_filter, "load_state_dict"):
            raise RecipeError(
                f"[[filter]] {component.name} has observe, and so needs state_dict and load_state_dict too."
            )
        if getattr(loss_filter, "needs_db", False) and not loss.in_db:
            if loss.inactive_weight:
                raise RecipeError(
                    f"[[filter]] {component.name} needs a loss in dB, and loss.inactive_weight adds a part that is not "
                    "in dB. Remove one of them, or use the filter percentile."
                )
            raise RecipeError(f"[[filter]] {component.name} needs a loss in dB, and {recipe.loss.name} is not in dB.")
    transforms = [build_component("transform", each, TRANSFORMS, recipe.folder) for each in recipe.transforms]
    optimizer = build_component("optim", recipe.optim, OPTIMIZERS, recipe.folder, parameters=model.parameters())
    # An upper bound: each micro-batch may hold one example more than an even share of the batch.
    examples_per_rank = -(-recipe.data.batch_size // dist.world_size()) + recipe.train.accumulate
    return TrainState(
        model=dist.wrap(model),
        loss=loss,
        optimizer=optimizer,
        clipper=build_component("clip", recipe.clip, CLIPPERS, recipe.folder),
        filters=filters,
        transforms=transforms,
        ema=EMA(model, recipe.train.ema) if recipe.train.ema else None,
        on_bad_example=recipe.train.on_bad_example,
        precision=Precision(precision),
        schedule=build_component("schedule", recipe.schedule, SCHEDULES, recipe.folder),
        loss_upper_limit=recipe.train.loss_upper_limit,
        seed=recipe.data.seed,
        examples_per_rank=examples_per_rank,
    )


def _check_model(recipe: Recipe, model: nn.Module, loss: SeparationLoss) -> None:
    """Raise RecipeError if the model does not fit the mixtures, or cannot be trained on several processes."""
    if (n_channels := getattr(model, "n_channels", 1)) != 1:
        raise RecipeError(
            f"[model] {recipe.model.name} takes {n_channels} channels at once, and mixtures of {recipe.data.name} have "
            "one: set model.n_channels = 1."
        )
    if dist.world_size() == 1:
        return
    for name, module in model.named_modules():
        # SyncBatchNorm too: its statistics would tie together the examples of all processes.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RecipeError(
                f"[model] {name} is a {type(module).__name__}: its statistics would either differ between processes or "
                "mix their examples, so that a bad example could not be removed. Use a norm without batch statistics, "
                "such as nn.GroupNorm, or train on one process."
            )
    # DDP waits for the gradients of all parameters, so both outputs must reach the loss.
    inputs = {name for term in loss.terms for name in loss_inputs(term.loss)}
    if hasattr(model, "embedding") and not inputs >= {"estimate", "embedding"}:
        raise RecipeError(
            f"[model] {recipe.model.name} returns sources and an embedding: on several processes the loss must "
            "use both, for example as a sum of two terms. Or train on one process."
        )


def _check_schedule_free(recipe: Recipe) -> None:
    """Raise RecipeError if the schedule-free optimizer is combined with what it replaces."""
    if recipe.optim.name != "schedule_free":
        return
    if recipe.train.ema:
        raise RecipeError("train.ema and optim.name = 'schedule_free' both average the weights; remove one of them.")
    if recipe.schedule.name != "constant":
        raise RecipeError(
            f"optim.name = 'schedule_free' needs schedule.name = 'constant', not {recipe.schedule.name!r}."
        )
