"""What is looked at closely in some steps: blocks of the model, and single examples. All of it stays on the device."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unbraid.dsp import SILENCE
from unbraid.records import BlockRecord, ItemId, ItemRecord

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SAMPLE_EVERY_STEPS = 50
"""How often a step is looked at closely, so that the record stays small."""


def is_sampled_step(step: int) -> bool:
    """Whether a step is looked at closely."""
    return step % SAMPLE_EVERY_STEPS == 0


MAX_BLOCKS = 64
"""A model with more blocks is looked at in coarser ones, down to its outermost stacks."""


def parameters_by_block(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by the block they belong to, in the model's order.

    A block is one of several layers alike, as deep inside as there are any, and each layer of an `nn.LSTM` and the like
    (``lstm.l0``, ``lstm.l0_reverse``); what lies outside of all stacks goes by its first word.
    """
    modules = dict(model.named_modules())
    found = [(_blocks_around(name, modules), parameter) for name, parameter in model.named_parameters()]
    depth = max((len(names) for names, _ in found), default=1)
    while depth > 1 and len({names[:depth][-1] for names, _ in found}) > MAX_BLOCKS:
        depth -= 1
    blocks: dict[str, list[nn.Parameter]] = {}
    for names, parameter in found:
        blocks.setdefault(names[:depth][-1], []).append(parameter)
    return blocks


def _blocks_around(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The blocks that a parameter lies in, the outermost first."""
    *words, last = name.split(".")
    numbered = [place for place, word in enumerate(words) if word.isdigit()]
    names = [".".join(words[: place + 1]) for place in numbered[:1]] or [words[0] if words else last]
    inner = [place for place in numbered[1:] if _are_alike(modules[".".join(words[:place])])]
    names += [".".join(words[: place + 1]) for place in inner]
    layer = re.search(r"_(l\d+(_reverse)?)$", last)
    if layer and isinstance(modules[".".join(words)], nn.RNNBase):
        names.append(".".join([*words, layer[1]]))
    return names


def _are_alike(stack: nn.Module) -> bool:
    return len({type(child) for child in stack.children()}) == 1


class BlockStats:
    """The blocks of a model in a step that is looked at closely: made before the update, asked after it.

    Args:
        model: With its gradients.
        divisor: What they must be divided by to be averaged and unscaled, 0-d.
    """

    def __init__(self, model: nn.Module, divisor: Tensor) -> None:
        self.blocks = list(parameters_by_block(model).values())
        self.divisor = divisor
        self.gradients = self._norms([[p.grad for p in some] for some in self.blocks]) / divisor
        self.before = [[p.detach().clone() for p in some] for some in self.blocks]

    def after_update(self) -> dict[str, Tensor]:
        """Norm of each block's gradient, and of its update over that of its weights, ``(block,)``."""
        after = [[p.detach() for p in some] for some in self.blocks]
        moved = [torch._foreach_sub(new, old) for new, old in zip(after, self.before, strict=True)]
        ratios = self._norms(moved) / self._norms(self.before).clamp_min(1e-12)
        return {"block_norms": self.gradients, "update_ratios": ratios}

    def _norms(self, blocks: Iterable[Sequence[Tensor | None]]) -> Tensor:
        found = [[tensor for tensor in block if tensor is not None] for block in blocks]
        nothing = torch.zeros((), device=self.divisor.device)
        return torch.stack([nn.utils.get_total_norm(block) if block else nothing for block in found])


def block_records(names: Iterable[str], gradients: Sequence[float], ratios: Sequence[float]) -> dict[str, BlockRecord]:
    """Norms of gradients and ratios of updates, by block."""
    return {name: BlockRecord(*both) for name, *both in zip(names, gradients, ratios, strict=True)}


def output_stats(estimate: Tensor, mixture: Tensor) -> Tensor:
    """Level of each output in dB, similarity of outputs, and what is missing to the mixture in dB; no gradient.

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
    share = _share_beside(mixture, outputs.sum(1))
    columns = [_in_db(power), others.amax((1, 2))[:, None], _in_db(share)[:, None]]
    return torch.cat(columns, 1)


def source_stats(mixture: Tensor, sources: Tensor) -> Tensor:
    """Level of each source in dB, and what the mixture holds beside them over all of it, in dB.

    Args:
        mixture: ``(batch, channel, time)``.
        sources: ``(batch, source, channel, time)``.

    Returns:
        ``(batch, source + 1)``; see `ItemRecord`.
    """
    parts = sources.detach().float().flatten(2)
    return _in_db(torch.cat([parts.square().mean(-1), _share_beside(mixture, parts.sum(1))[:, None]], 1))


def _share_beside(mixture: Tensor, total: Tensor) -> Tensor:
    """Power of the mixture less a sum ``(batch, channel * time)`` over its own; NaN where that has other channels."""
    whole = mixture.float().flatten(1)
    if whole.shape != total.shape:
        return torch.full_like(total[:, 0], torch.nan)
    return (whole - total).square().mean(-1) / (whole.square().mean(-1) + SILENCE)


def _in_db(power: Tensor) -> Tensor:
    return 10 * (power + SILENCE).log10()


def item_record(
    item: ItemId, loss: float, weight: float, order: Sequence[float], details: Sequence[float], truth: Sequence[float]
) -> ItemRecord:
    """One example, with a row of `output_stats` and one of `source_stats`."""
    *levels, similarity, residual = details
    *of_sources, beside = truth
    outputs = tuple(map(int, order)), tuple(levels)
    return ItemRecord(item, loss, weight, *outputs, similarity, residual, tuple(of_sources), beside)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the accelerator, or by this process where there is none; 0 where nobody tells."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory()


def host_memory() -> int:
    """The most bytes held so far by this process; 0 where nobody tells.

    Linux tells it in ``/proc``, in some 20 microseconds: what `resource` says there begins with the peak of the process
    that started this one.
    """
    try:
        with Path("/proc/self/status").open("rb") as file:
            told = file.read()
        first = told.index(b"VmHWM:") + 6
        return 1024 * int(told[first : told.index(b"kB", first)])
    except (OSError, ValueError):
        pass
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
