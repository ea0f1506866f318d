"""The validation pass: mean loss and SI-SDR improvement over the same mixtures every time."""

import torch

from unbraid import dist
from unbraid.data.loader import FixedKeys, Mixtures, collate
from unbraid.infer import separate
from unbraid.losses.pit import assign_sources
from unbraid.losses.waveform import neg_si_sdr
from unbraid.metrics import reorder, si_sdr
from unbraid.train.loop import Scores, Validate
from unbraid.train.state import TrainState


def validation(dataset: Mixtures, *, n_items: int, batch_size: int) -> Validate:
    """A function that scores a state's model on the first ``n_items`` mixtures, shared out over the ranks."""

    @torch.no_grad()
    def validate(state: TrainState) -> Scores:
        sums = torch.zeros(4, dtype=torch.float64)
        keys = FixedKeys(n_items, batch_size, rank=dist.rank(), world_size=dist.world_size())
        for batch in (collate([dataset[key] for key in some]).batch.to(state.device) for some in keys):
            with state.precision.autocast(state.device):
                estimate = separate(state.bare_model, batch.mixture)
            losses = state.loss(estimate, batch.sources)
            ordered = reorder(estimate, assign_sources(neg_si_sdr, estimate, batch.sources))
            ratio = si_sdr(ordered, batch.sources).mean((1, 2))
            before = si_sdr(batch.mixture[:, None].expand_as(batch.sources), batch.sources).mean((1, 2))
            sums[:3] += torch.stack([losses.sum(), ratio.sum(), (ratio - before).sum()]).double().cpu()
            sums[3] += len(losses)
        loss, total, improvement, count = dist.sum_over_ranks(sums.to(state.device)).tolist()
        return Scores(loss / count, total / count, improvement / count, round(count))

    return validate
