"""What an experiment works on: a recipe's model from fixed weights, on the recipe's own batches; no run is touched."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unbraid.assemble import Corpus, build_corpus, build_model, build_state, choose_device, load_model
from unbraid.data.batch import Batch
from unbraid.data.loader import StepKeys, batches
from unbraid.errors import CheckpointError, RecipeError
from unbraid.recipe import Part, Recipe
from unbraid.robust.precision import best_precision
from unbraid.train.checkpoint import find_checkpoint, read_checkpoint
from unbraid.train.loop import Validate
from unbraid.train.state import TrainState
from unbraid.train.validate import validation


@dataclass(frozen=True)
class Subject:
    """A model and the data it is trained on, to be tried out on copies.

    Attributes:
        recipe: What it is trained by.
        corpus: Its training and validation mixtures.
        weights: To begin each trial with; never written to.
        device: Where trials run.
    """

    recipe: Recipe
    corpus: Corpus
    weights: dict[str, Tensor]
    device: torch.device

    def model(self) -> nn.Module:
        """A copy of the model with the weights to begin with, on the device."""
        model = build_model(self.recipe).to(self.device)
        model.load_state_dict(self.weights)
        return model

    def state(self, recipe: Recipe | None = None) -> TrainState:
        """A training state at step 0 around a copy of the model.

        Args:
            recipe: With another optimizer, clipper, filter, schedule or loss than the subject's own; None for its own.
        """
        recipe = recipe or self.recipe
        asked = recipe.train.precision
        return build_state(recipe, self.model(), precision=best_precision(self.device) if asked == "auto" else asked)

    def batches(self, first_step: int = 0) -> Iterator[list[Batch]]:
        """The recipe's training batches from a step on, counted from 0: as many micro-batches a step as it says.

        The same each time, as every draw follows from the recipe's seed and the step. Close it when done, or data
        workers live on.
        """
        data, accumulate = self.recipe.data, self.recipe.train.accumulate
        keys = StepKeys(len(self.corpus.train), data.batch_size, first_step=first_step, accumulate=accumulate)
        source = batches(self.corpus.train, keys, workers=data.workers)
        try:
            while True:
                yield [next(source).batch.to(self.device) for _ in range(accumulate)]
        finally:
            source.close()  # type: ignore[attr-defined]

    def fixed_batches(self, n_batches: int, *, first_step: int = 0) -> list[Batch]:
        """So many training batches, held in memory, to take one loss on at many places."""
        drawn = self.batches(first_step)
        try:
            return [part for _ in range(n_batches) for part in next(drawn)]
        finally:
            drawn.close()  # type: ignore[attr-defined]

    def validation(self) -> Validate:
        """Scores a state on the recipe's validation mixtures, as training does."""
        recipe = self.recipe
        size = max(1, recipe.data.batch_size // recipe.train.accumulate)
        return validation(self.corpus.valid, n_items=recipe.validate.n_items, batch_size=size, assign=recipe.assign)


def of_recipe(recipe: Recipe) -> Subject:
    """A recipe's model with the weights that training would begin with.

    Raises:
        RecipeError: If the recipe cannot be used.
        DataError: If its data cannot.
    """
    device = choose_device()
    init = recipe.model.options.get("init")
    options = {key: value for key, value in recipe.model.options.items() if key != "init"}
    bare = replace(recipe, model=Part(recipe.model.name, options))
    weights = dict(build_model(bare).state_dict())
    if init is not None:
        weights = _fitting(read_checkpoint(find_checkpoint(Path(init))).state["model"], weights, Path(init))
    return Subject(bare, build_corpus(bare), weights, device)


def of_checkpoint(path: Path, *, trust: bool = False) -> Subject:
    """A trained model and its data; the checkpoint and its run are only read.

    Raises:
        CheckpointError: If there is none, or it is damaged.
        RecipeError: If it names code of somebody's own, and that is not trusted.
    """
    model, recipe = load_model(path, trust=trust)
    if recipe.has_own_code and not trust:
        raise RecipeError(f"{path} names code of its own; --trust lets it run.")
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return Subject(recipe, build_corpus(recipe), weights, choose_device())


def weights_of(path: Path, like: Subject) -> dict[str, Tensor]:
    """Weights of another checkpoint of the same model.

    Raises:
        CheckpointError: If there is none, it is damaged, or its model is another.
    """
    return _fitting(read_checkpoint(find_checkpoint(path)).state["model"], like.weights, path)


def _fitting(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name in [*wanted, *found]:
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            raise CheckpointError(
                f"{path} holds weights of another model (first in {name}); take one of the same model and sizes."
            )
    return found
