"""Experiment: the weights, loss and mixtures that an instrument works on, from a recipe or a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.build import (
    Corpus,
    build_corpus,
    build_model,
    build_state,
    choose_device,
    load_initial_weights,
    load_weights,
)
from unbraid.compilation import compile_model
from unbraid.config.recipe import Recipe, recipe_with_overrides
from unbraid.config.registry import build_loss
from unbraid.data.batch import Batch
from unbraid.data.dataset import Key
from unbraid.data.loader import StepSampler, batches, collate
from unbraid.errors import DataError, RecipeError
from unbraid.losses.pit import SeparationLoss
from unbraid.robust.precision import Precision, best_precision
from unbraid.train.checkpoint import find_checkpoint, read_checkpoint
from unbraid.train.forward import ExampleLoss, compute_losses
from unbraid.train.loop import ValidationScores
from unbraid.train.state import TrainState
from unbraid.train.validate import make_validator


@dataclass(frozen=True)
class Experiment:
    """Weights of a model, and the recipe and mixtures to study them with.

    An experiment never writes to a run directory. Each method that returns a model or a training state returns a new
    one, so instruments cannot disturb each other.

    Attributes:
        name: Name of the recipe or checkpoint, for titles.
        recipe: Recipe that builds the model, the loss and the optimizer.
        corpus: Training and validation mixtures.
        weights: State dict of the model, on the CPU.
        trusted: Whether custom code named by the recipe may run.
        step: Number of training steps behind the weights.
    """

    name: str
    recipe: Recipe
    corpus: Corpus
    weights: Mapping[str, Tensor]
    trusted: bool = True
    step: int = 0

    @property
    def precision(self) -> str:
        """Precision of training steps; for ``auto``, the best one that the hardware supports natively."""
        precision = self.recipe.train.precision
        return best_precision(choose_device()) if precision == "auto" else precision

    def copy_model(self) -> nn.Module:
        """Return a copy of the model in eval mode, on the device."""
        model = build_model(self.recipe, trust=self.trusted)
        model.load_state_dict(dict(self.weights))
        return model.to(choose_device()).eval()

    def build_loss(self) -> SeparationLoss:
        """Return the recipe's loss."""
        return build_loss(self.recipe, trust=self.trusted)

    def new_state(self) -> TrainState:
        """Return a training state at step 0 with these weights and a fresh optimizer and clipper.

        The model is compiled only if the recipe says ``train.compile = "on"``: an experiment is too short for
        compilation to pay off.

        Raises:
            RecipeError: If a component is refused, or is custom code and not trusted.
        """
        recipe = self.recipe
        components = {"optim": recipe.optim, "clip": recipe.clip, "schedule": recipe.schedule}
        components |= {f"filter.{index}": component for index, component in enumerate(recipe.filters)}
        components |= {f"transform.{index}": component for index, component in enumerate(recipe.transforms)}
        for table, component in components.items():
            # "file:Name" refers to a Python file; importing it would run the file.
            if ":" in component.name and not self.trusted:
                raise RecipeError(
                    f"[{table}] name = {component.name!r} is custom code from the checkpoint; pass --trust to run it."
                )
        # copy_model returns eval mode; training needs dropout and batch statistics.
        model = self.copy_model().train()
        if recipe.train.compile == "on":
            compile_model(model, choose_device())
        return build_state(recipe, model, precision=self.precision)

    def training_batches(self, *, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each training step, without end; the same ones on every call.

        Args:
            first_step: Number of steps to skip.
        """
        data = self.recipe.data
        accumulate = self.recipe.train.accumulate
        keys = StepSampler(len(self.corpus.train), data.batch_size, first_step=first_step, accumulate=accumulate)
        loaded = batches(self.corpus.train, keys, workers=data.workers)
        while True:
            yield [next(loaded).batch.to(choose_device()) for _ in range(accumulate)]

    def fixed_batches(
        self, n_items: int, *, split: Literal["train", "valid"] = "train", batch_size: int | None = None
    ) -> list[Batch]:
        """Return the first mixtures of a split in batches on the device; the same ones on every call.

        Args:
            n_items: Number of mixtures.
            split: Split whose talkers are mixed.
            batch_size: Mixtures per batch; None for the recipe's batch size.
        """
        dataset = getattr(self.corpus, split)
        batch_size = batch_size or self.recipe.data.batch_size
        fixed = []
        for first in range(0, n_items, batch_size):
            indices = range(first, min(first + batch_size, n_items))
            # Epoch 0: the key decides the mixture, so the same index always gives the same one.
            items = [dataset[Key(0, index)] for index in indices]
            fixed.append(collate(items).batch.to(choose_device()))
        return fixed

    def validate(self, state: TrainState) -> ValidationScores:
        """Return the validation scores of a state's model, as the recipe's own training would compute them."""
        recipe = self.recipe
        n_items = recipe.validate.n_items
        validate = make_validator(
            self.corpus.valid, n_items=n_items, batch_size=recipe.data.batch_size, assign=recipe.assign
        )
        return validate(state)


def experiment_from_recipe(recipe: Recipe, name: str) -> Experiment:
    """Return an experiment with the weights a run of the recipe starts from: drawn from its seed, or ``model.init``.

    Raises:
        UserError: If the recipe or the data cannot be used.
    """
    corpus = build_corpus(recipe)
    model = build_model(recipe)
    load_initial_weights(model, recipe)
    return Experiment(name, recipe, corpus, _copy_to_cpu(model))


def experiment_from_checkpoint(path: Path, *, overrides: Sequence[str] = (), trust: bool = False) -> Experiment:
    """Return an experiment with the weights of a checkpoint and the mixtures it was trained on.

    Args:
        path: Checkpoint or run directory, as `find_checkpoint` takes it.
        overrides: ``--set`` options over the checkpoint's recipe, such as ``data.path=`` if the recordings have moved.
        trust: Whether custom code named by the checkpoint's recipe may run.

    Raises:
        UserError: If the checkpoint, the recipe or the data cannot be used.
    """
    # Overrides apply to the recipe saved in the checkpoint, not to a file that may have changed since.
    checkpoint = read_checkpoint(find_checkpoint(path))
    recipe = recipe_with_overrides(checkpoint.recipe, overrides, Path.cwd(), source=str(checkpoint.path))
    model = build_model(recipe, trust=trust)
    load_weights(model, checkpoint)
    step = int(checkpoint.state["progress"]["step"])
    try:
        corpus = build_corpus(recipe, trust=trust)
    except DataError as error:
        raise DataError(f"{error} If the recordings have moved, pass --set data.path=FOLDER.") from error
    return Experiment(checkpoint.path.name, recipe, corpus, _copy_to_cpu(model), trusted=trust, step=step)


def _copy_to_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def mean_loss(model: nn.Module, loss: ExampleLoss, precision: Precision, fixed: Sequence[Batch]) -> Tensor:
    """Return the mean loss over all examples of several batches, 0-d, with a graph if gradients are enabled."""
    # The mean over examples, not over batches: the last batch may be smaller.
    losses = [compute_losses(model, loss, precision, batch)[1] for batch in fixed]
    return torch.cat(losses).mean()
