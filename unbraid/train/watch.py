"""What is looked at closely in some steps: blocks of the model, and single examples. All of it stays on the device."""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from unbraid.dsp import SILENCE
from unbraid.records import BlockRecord, ItemId, ItemRecord

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

EVERY_STEPS = 50
"""How often a step is looked at closely, so that the record stays small."""


def is_sampled(step: int) -> bool:
    """Whether a step is looked at closely."""
    return step % EVERY_STEPS == 0


def blocks_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by the block they belong to: a name up to its first number, else its first word."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        numbered = next((place for place, word in enumerate(words[:-1]) if word.isdigit()), 0)
        blocks.setdefault(".".join(words[: numbered + 1]), []).append(parameter)
    return blocks


def block_norms(blocks: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """The L2 norm of each block, ``(block,)``; 0 for one that holds nothing."""
    found = [[tensor for tensor in block if tensor is not None] for block in blocks]
    device = next((block[0].device for block in found if block), torch.device("cpu"))
    return torch.stack([nn.utils.get_total_norm(b) if b else torch.zeros((), device=device) for b in found])


def block_records(names: Iterable[str], gradients: Sequence[float], ratios: Sequence[float]) -> dict[str, BlockRecord]:
    """Norms of gradients and ratios of updates, by block."""
    return {name: BlockRecord(*both) for name, *both in zip(names, gradients, ratios, strict=True)}


def item_details(estimate: Tensor, mixture: Tensor) -> Tensor:
    """Level of each output in dB, likeness of outputs, and what is missing to the mixture in dB; no gradient.

    Args:
        estimate: ``(batch, source, channel, time)``.
        mixture: ``(batch, channel, time)``.

    Returns:
        ``(batch, source + 2)``; see `ItemRecord`.
    """
    outputs = estimate.detach().float().flatten(2)
    power = outputs.square().mean(-1)
    unit = outputs / (power.sqrt()[..., None] * outputs.shape[-1] ** 0.5 + SILENCE)
    others = (unit @ unit.mT).abs() * (1 - torch.eye(outputs.shape[1], device=outputs.device))
    missing = mixture.float().flatten(1) - outputs.sum(1)
    share = missing.square().mean(-1) / (mixture.float().square().mean((1, 2)) + SILENCE)
    columns = [_in_db(power), others.amax((1, 2))[:, None], _in_db(share)[:, None]]
    return torch.cat(columns, 1)


def _in_db(power: Tensor) -> Tensor:
    return 10 * (power + SILENCE).log10()


def item_record(
    item: ItemId, loss: float, weight: float, order: Sequence[float], details: Sequence[float]
) -> ItemRecord:
    """One example, with a row of `item_details`."""
    *levels, likeness, residual = details
    return ItemRecord(item, loss, weight, tuple(map(int, order)), tuple(levels), likeness, residual)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the accelerator, or by this process where there is none; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
