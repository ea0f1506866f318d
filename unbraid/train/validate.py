"""The validation pass: mean loss and SI-SDR improvement over the same mixtures every time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid import dist
from unbraid.data.batch import Batch
from unbraid.data.dataset import MixtureDataset
from unbraid.data.excerpt import AudioFault
from unbraid.data.loader import ValidationSampler, collate
from unbraid.dsp import SILENCE
from unbraid.inference import infer
from unbraid.losses.pit import evaluation_loss, find_order, match_to_targets
from unbraid.metrics import can_improve, mean_over_defined, mean_square, reorder, si_sdr
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
    """Return a function that evaluates a state's model on the first ``n_items`` mixtures, shared among the ranks.

    Args:
        dataset: Mixtures of sources that are not trained on.
        n_items: Number of mixtures.
        batch_size: How many of them go through the model together.
        assign: How outputs are compared with targets for SI-SDR: in the best order (``"permutation"``), in the model's
            own (``"fixed"``), or as the sums of outputs that approximate each target (``"mixit"``).
        audio_options: How outputs become audio; None for no audio.
        save_audio: How many of the first mixtures to return as audio.
    """

    @torch.no_grad()
    def validate(state: TrainState) -> ValidationScores:
        sums = torch.zeros(6, dtype=torch.float64)  # loss, SI-SDR, SI-SDRi, and the number of examples with each
        item_rows = torch.zeros(n_items, 1 + dataset.settings.n_sources, dtype=torch.float64)  # SI-SDRi, order
        faults: list[AudioFault] = []
        audio: list[AudioExample] = []
        for keys in ValidationSampler(n_items, batch_size, rank=dist.rank(), world_size=dist.world_size()):
            # 1. Losses, as in training.
            loaded = collate([dataset[key] for key in keys])
            faults.extend(loaded.faults)
            batch = loaded.batch.to(state.device)
            output = _separate(state, batch)
            losses, _ = example_losses(state.loss, output, batch)

            # 2. SI-SDR of the estimates, and of the mixture taken as the estimate of every source.
            estimate, order = _ordered(get_sources(output), batch.sources, assign)
            source_si_sdr = si_sdr(estimate, batch.sources)
            mixture_si_sdr = si_sdr(batch.mixture[:, None].expand_as(batch.sources), batch.sources)
            # Means are over sources for which the ratios mean something.
            audible = mean_square(batch.sources) > SILENCE
            improvable = audible & can_improve(mixture_si_sdr)
            estimate_si_sdr = mean_over_defined(source_si_sdr, audible)
            si_sdri = mean_over_defined(source_si_sdr - mixture_si_sdr, improvable)

            # 3. Sums, rows by item, and audio.
            scores = torch.stack([losses.double(), estimate_si_sdr.double(), si_sdri.double()]).cpu()
            counted = torch.stack([torch.ones_like(losses) > 0, audible.any((1, 2)), improvable.any((1, 2))]).cpu()
            sums[:3] += torch.where(counted, scores, 0.0).sum(1)
            sums[3:] += counted.sum(1)
            indices = [key.index for key in keys]
            item_rows[indices, 0] = si_sdri.double().cpu()
            item_rows[indices, 1:] = order.double().cpu()
            if audio_options is not None:
                to_save = [row for row, key in enumerate(keys) if key.index < save_audio]
                audio += audio_examples(audio_options, batch, estimate, to_save, scores=(source_si_sdr, si_sdri))

        # Each item belongs to one rank, so summing over the ranks puts the rows together.
        loss, total_si_sdr, total_si_sdri, count, *n_scores = dist.sum_over_ranks(sums.to(state.device)).tolist()
        item_si_sdri, *order_columns = dist.sum_over_ranks(item_rows.to(state.device)).T.tolist()
        orders: tuple[tuple[int, ...], ...] = ()
        if assign == "permutation":
            orders = tuple(tuple(map(int, order)) for order in zip(*order_columns, strict=True))
        return ValidationScores(
            loss=loss / count,
            si_sdr=total_si_sdr / n_scores[0] if n_scores[0] else math.nan,
            si_sdri=total_si_sdri / n_scores[1] if n_scores[1] else math.nan,
            n_items=round(count),
            n_undefined=round(count - n_scores[1]),
            faults=tuple(faults),
            audio=tuple(audio),
            orders=orders,
            item_si_sdri=tuple(round(value, 3) if math.isfinite(value) else None for value in item_si_sdri),
        )

    return validate


def _ordered(estimate: Tensor, target: Tensor, assign: str) -> tuple[Tensor, Tensor]:
    """Return the estimates in the order of the targets, and the output given to each target, ``(batch, source)``."""
    if assign == "mixit":  # a target is given a sum of outputs, not one of them
        summed = match_to_targets(estimate, target, evaluation_loss(assign), assign=assign)
        return summed, torch.zeros(target.shape[:2])
    order = find_order(estimate, target, evaluation_loss(assign), assign=assign)
    return reorder(estimate, order), order


def _separate(state: TrainState, batch: Batch) -> Tensor | ModelOutput:
    """Run the model, in as many pieces as memory requires.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice for a single example.
    """
    n_pieces = state.n_pieces
    while True:
        try:
            with state.precision.autocast(state.device):
                return _concatenate([infer(state.unwrapped_model, piece.mixture) for piece in batch.split(n_pieces)])
        except torch.OutOfMemoryError:
            if n_pieces >= len(batch.mixture):
                raise
        n_pieces *= 2


def _concatenate(outputs: Sequence[Tensor | ModelOutput]) -> Tensor | ModelOutput:
    """Join the outputs of several batches as if they had gone through the model together."""
    first = outputs[0]
    sources = torch.cat([get_sources(output) for output in outputs])
    if not isinstance(first, ModelOutput):
        return sources
    embeddings = [o.embedding for o in outputs if isinstance(o, ModelOutput) and o.embedding is not None]
    return first._replace(sources=sources, embedding=torch.cat(embeddings) if embeddings else None)
