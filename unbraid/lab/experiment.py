"""What an experiment works on: model, loss and mixtures of a recipe or checkpoint; nothing of a run is touched."""

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
from unbraid.config.recipe import Recipe, recipe_with
from unbraid.config.registry import build_loss
from unbraid.data.batch import Batch
from unbraid.data.dataset import Key
from unbraid.data.loader import StepSampler, batches, collate
from unbraid.errors import DataError, RecipeError
from unbraid.losses.pit import SeparationLoss
from unbraid.robust.precision import Precision, best_precision
from unbraid.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from unbraid.train.forward import ExampleLoss, compute_losses
from unbraid.train.loop import ValidationScores
from unbraid.train.state import TrainState
from unbraid.train.validate import make_validator


@dataclass(frozen=True)
class Experiment:
    """A point in the space of weights, and the mixtures to look at it with.

    Attributes:
        name: Of the recipe or checkpoint, for titles.
        recipe: What it is made by.
        corpus: Its mixtures.
        weights: The model's, on the CPU; every experiment works on a copy.
        trusted: Whether code that the recipe names may run.
        step: How many training steps made the weights.
    """

    name: str
    recipe: Recipe
    corpus: Corpus
    weights: Mapping[str, Tensor]
    trusted: bool = True
    step: int = 0

    @property
    def precision(self) -> str:
        """What steps are taken in; where the recipe says ``auto``, what the hardware multiplies natively."""
        asked = self.recipe.train.precision
        return best_precision(choose_device()) if asked == "auto" else asked

    def model(self) -> nn.Module:
        """A copy of its own, on the device, as it is evaluated with."""
        model = build_model(self.recipe, trust=self.trusted)
        model.load_state_dict(dict(self.weights))
        return model.to(choose_device()).eval()

    def loss(self) -> SeparationLoss:
        """The recipe's loss."""
        return build_loss(self.recipe, trust=self.trusted)

    def fork(self) -> TrainState:
        """A training state of its own at step 0: these weights, and the recipe's optimizer and clipper as new.

        It is compiled only where the recipe says ``train.compile = "on"``: an experiment is short.

        Raises:
            RecipeError: If a part is refused, or is somebody's own code and not trusted.
        """
        recipe = self.recipe
        parts = {"optim": recipe.optim, "clip": recipe.clip, "schedule": recipe.schedule}
        parts |= {f"filter.{place}": part for place, part in enumerate(recipe.filters)}
        parts |= {f"transform.{place}": part for place, part in enumerate(recipe.transforms)}
        for where, part in parts.items():
            if ":" in part.name and not self.trusted:
                raise RecipeError(
                    f"[{where}] name = {part.name!r} is code that came with the checkpoint; --trust lets it run."
                )
        model = self.model().train()
        if recipe.train.compile == "on":
            compile_model(model, choose_device())
        return build_state(recipe, model, precision=self.precision)

    def steps(self, *, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each training step from one on, without end; the same ones for every experiment."""
        data, accumulate = self.recipe.data, self.recipe.train.accumulate
        keys = StepSampler(len(self.corpus.train), data.batch_size, first_step=first_step, accumulate=accumulate)
        loaded = batches(self.corpus.train, keys, workers=data.workers)
        while True:
            yield [next(loaded).batch.to(choose_device()) for _ in range(accumulate)]

    def fixed(
        self, n_items: int, *, split: Literal["train", "valid"] = "train", batch_size: int | None = None
    ) -> list[Batch]:
        """The first mixtures of a split, in batches on the device: the same whenever it is asked.

        Args:
            n_items: How many.
            split: Of which talkers.
            batch_size: Together; as many as in a training step where nothing is said.
        """
        size, mixtures = batch_size or self.recipe.data.batch_size, getattr(self.corpus, split)
        places = [range(first, min(first + size, n_items)) for first in range(0, n_items, size)]
        return [collate([mixtures[Key(0, i)] for i in some]).batch.to(choose_device()) for some in places]

    def validate(self, state: TrainState) -> ValidationScores:
        """Score a state's model as the recipe's training would."""
        recipe = self.recipe
        n_items, size = recipe.validate.n_items, recipe.data.batch_size
        return make_validator(self.corpus.valid, n_items=n_items, batch_size=size, assign=recipe.assign)(state)


def of_recipe(recipe: Recipe, name: str) -> Experiment:
    """The model of a recipe as a run by it would begin: weights from its seed, or from ``model.init``.

    Raises:
        UserError: If recipe or data cannot be used.
    """
    corpus, model = build_corpus(recipe), build_model(recipe)
    load_initial_weights(model, recipe)
    return Experiment(name, recipe, corpus, _copied(model))


def of_checkpoint(path: Path, *, overrides: Sequence[str] = (), trust: bool = False) -> Experiment:
    """The model of a checkpoint, with the mixtures that it was trained on.

    Args:
        path: As `find_checkpoint` takes it.
        overrides: ``--set`` over the checkpoint's recipe, such as ``data.path=`` where the recordings lie elsewhere.
        trust: Whether code named by the checkpoint's recipe may run.

    Raises:
        UserError: If checkpoint, recipe or data cannot be used.
    """
    checkpoint = read_checkpoint(find_checkpoint(path))
    recipe = recipe_with(checkpoint.recipe, overrides, Path.cwd(), source=str(checkpoint.path))
    model = model_of(checkpoint, recipe, trust=trust)
    step = int(checkpoint.state["progress"]["step"])
    try:
        corpus = build_corpus(recipe, trust=trust)
    except DataError as error:
        raise DataError(f"{error} Where the recordings lie elsewhere now: --set data.path=THERE.") from error
    return Experiment(checkpoint.path.name, recipe, corpus, _copied(model), trusted=trust, step=step)


def model_of(checkpoint: Checkpoint, recipe: Recipe, *, trust: bool) -> nn.Module:
    """A recipe's model with the weights of a checkpoint.

    Raises:
        CheckpointError: If they are another model's.
    """
    model = build_model(recipe, trust=trust)
    load_weights(model, checkpoint)
    return model


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def mean_loss(model: nn.Module, loss: ExampleLoss, precision: Precision, some: Sequence[Batch]) -> Tensor:
    """The mean loss over all examples of some batches, 0-d; with a graph where gradients are taken."""
    losses = [compute_losses(model, loss, precision, batch)[1] for batch in some]
    return torch.cat(losses).mean()
