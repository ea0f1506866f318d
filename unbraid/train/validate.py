"""The validation pass: mean loss and SI-SDR improvement over the same mixtures every time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.data.dataset import MixtureDataset
from unbraid.data.loader import ValidationSampler, collate
from unbraid.data.mixing import AudioFault
from unbraid.inference import infer
from unbraid.losses.pit import evaluation_loss, find_order, match_to_targets
from unbraid.metrics import mean_over_active, reorder, si_sdr
from unbraid.model_output import ModelOutput, get_sources
from unbraid.train.forward import example_losses
from unbraid.train.loop import Validate, ValidationScores
from unbraid.train.state import TrainState
from unbraid.train.validation_audio import AudioExample, AudioOptions, audio_examples


def make_validator(
    dataset: MixtureDataset,
    *,
    n_items: int,
    batch_size: int,
    assign: str = "permutation",
    audio_options: AudioOptions | None = None,
    save_audio: int = 0,
) -> Validate:
    """A function that scores a state's model on the first ``n_items`` mixtures, shared out over the ranks.

    Args:
        dataset: Mixtures of sources not trained on.
        n_items: How many.
        batch_size: How many go through the model together.
        assign: Whether SI-SDR is taken in the best order (``"permutation"``), in the model's own (``"fixed"``), or of
            the sums of outputs that make up each target (``"mixit"``).
        audio_options: How outputs become sound; None where nobody listens.
        save_audio: Of how many mixtures, the first ones, the sound is handed over.
    """

    @torch.no_grad()
    def validate(state: TrainState) -> ValidationScores:
        sums, faults, sounds = torch.zeros(4, dtype=torch.float64), list[AudioFault](), list[AudioExample]()
        of_items = torch.zeros(n_items, 1 + dataset.settings.n_sources, dtype=torch.float64)
        for keys in ValidationSampler(n_items, batch_size, rank=dist.rank(), world_size=dist.world_size()):
            loaded = collate([dataset[key] for key in keys])
            faults.extend(loaded.faults)
            batch = loaded.batch.to(state.device)
            output = _separate(state, batch)
            losses, _ = example_losses(state.loss, output, batch)
            estimate, order = _ordered(get_sources(output), batch.sources, assign)
            ratios = si_sdr(estimate, batch.sources)
            after = mean_over_active(ratios, batch.sources)
            unprocessed = batch.mixture[:, None].expand_as(batch.sources)
            before = mean_over_active(si_sdr(unprocessed, batch.sources), batch.sources)
            sums[:3] += torch.stack([losses.sum(), after.sum(), (after - before).sum()]).double().cpu()
            sums[3] += len(losses)
            places = [key.index for key in keys]
            of_items[places, 0], of_items[places, 1:] = (after - before).double().cpu(), order.double().cpu()
            if audio_options is not None:
                heard = [place for place, key in enumerate(keys) if key.index < save_audio]
                sounds += audio_examples(audio_options, batch, estimate, heard, scores=(ratios, after - before))
        loss, total, improvement, count = dist.sum_over_ranks(sums.to(state.device)).tolist()
        improvements, *orders = dist.sum_over_ranks(of_items.to(state.device)).T.tolist()
        searched = assign == "permutation"
        return ValidationScores(
            loss / count,
            total / count,
            improvement / count,
            round(count),
            faults=tuple(faults),
            audio=tuple(sounds),
            orders=tuple(tuple(map(int, order)) for order in zip(*orders, strict=True)) if searched else (),
            item_si_sdri=tuple(round(value, 3) if math.isfinite(value) else None for value in improvements),
        )

    return validate


def _ordered(estimate: Tensor, target: Tensor, assign: str) -> tuple[Tensor, Tensor]:
    """Estimates as they are held against the targets, and which each target was given, ``(batch, source)``."""
    if assign == "mixit":  # a target is given a sum of them
        summed = match_to_targets(estimate, target, evaluation_loss(assign), assign=assign)
        return summed, torch.zeros(target.shape[:2])
    order = find_order(estimate, target, evaluation_loss(assign), assign=assign)
    return reorder(estimate, order), order


def _separate(state: TrainState, batch: Batch) -> Tensor | ModelOutput:
    """The model's outputs, in as many pieces as memory asks for.

    Raises:
        torch.OutOfMemoryError: If it does not suffice for a single example.
    """
    n_pieces = state.n_pieces
    while True:
        try:
            with state.precision.autocast(state.device):
                return _joined([infer(state.unwrapped_model, piece.mixture) for piece in batch.split(n_pieces)])
        except torch.OutOfMemoryError:
            if n_pieces >= len(batch.mixture):
                raise
        n_pieces *= 2


def _joined(outputs: Sequence[Tensor | ModelOutput]) -> Tensor | ModelOutput:
    """Batches that went through the model one after the other, as if they had gone together."""
    first, sources = outputs[0], torch.cat([get_sources(output) for output in outputs])
    if not isinstance(first, ModelOutput):
        return sources
    embeddings = [o.embedding for o in outputs if isinstance(o, ModelOutput) and o.embedding is not None]
    return first._replace(sources=sources, embedding=torch.cat(embeddings) if embeddings else None)
