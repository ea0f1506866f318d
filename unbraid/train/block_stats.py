"""Gradient norm and relative update of each block of the model, recorded in sampled steps, without host waits."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from unbraid.records import BlockRecord

SAMPLE_EVERY_STEPS = 50
"""How often a step is recorded in detail, so that the record stays small."""

MAX_BLOCKS = 64
"""A model with more blocks is recorded in coarser ones."""


def is_sampled_step(step: int) -> bool:
    """Return whether a step is recorded in detail."""
    return step % SAMPLE_EVERY_STEPS == 0


def parameters_by_block(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters grouped by block, in the model's order.

    A block is one layer of a stack of layers of the same class; of nested stacks the innermost counts. Each layer of an
    `nn.LSTM` and the like is a block as well (``lstm.l0``, ``lstm.l0_reverse``). Parameters outside of all stacks are
    grouped by the first part of their name.
    """
    modules = dict(model.named_modules())
    parents = [(_enclosing_blocks(name, modules), parameter) for name, parameter in model.named_parameters()]
    # go to coarser blocks, towards the outermost stacks, until there are few enough
    depth = max((len(names) for names, _ in parents), default=1)
    while depth > 1 and len({names[:depth][-1] for names, _ in parents}) > MAX_BLOCKS:
        depth -= 1
    blocks: dict[str, list[nn.Parameter]] = {}
    for names, parameter in parents:
        blocks.setdefault(names[:depth][-1], []).append(parameter)
    return blocks


def _enclosing_blocks(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the blocks around a parameter, the outermost first."""
    *words, last = name.split(".")
    # nn.ModuleList and nn.Sequential name their layers by number
    numbered = [index for index, word in enumerate(words) if word.isdigit()]
    outermost = ".".join(words[: numbered[0] + 1]) if numbered else [*words, last][0]
    names = [outermost]
    for index in numbered[1:]:
        stack = modules[".".join(words[:index])]
        layers_are_alike = len({type(layer) for layer in stack.children()}) == 1
        if layers_are_alike:
            names.append(".".join(words[: index + 1]))
    rnn_layer = re.search(r"_(l\d+(_reverse)?)$", last)  # weight_ih_l0, bias_hh_l1_reverse
    if rnn_layer and isinstance(modules[".".join(words)], nn.RNNBase):
        names.append(".".join([*words, rnn_layer[1]]))
    return names


class BlockStats:
    """Statistics of each block in one step: construct it before the update, call `after_update` after it.

    Args:
        model: With its gradients.
        divisor: Dividing the gradients by it averages and unscales them, 0-d.
    """

    def __init__(self, model: nn.Module, divisor: Tensor) -> None:
        self.blocks = list(parameters_by_block(model).values())
        self.device = divisor.device
        self.grad_norms = self._norms([[p.grad for p in block] for block in self.blocks]) / divisor
        self.before = [[p.detach().clone() for p in block] for block in self.blocks]

    def after_update(self) -> dict[str, Tensor]:
        """Return the gradient norm of each block, and the norm of its update over that of its weights, ``(block,)``."""
        updates = []
        for block, before in zip(self.blocks, self.before, strict=True):
            updates.append(torch._foreach_sub([p.detach() for p in block], before))
        ratios = self._norms(updates) / self._norms(self.before).clamp_min(1e-12)
        return {"block_norms": self.grad_norms, "update_ratios": ratios}

    def _norms(self, blocks: Iterable[Sequence[Tensor | None]]) -> Tensor:
        zero = torch.zeros((), device=self.device)
        norms = []
        for block in blocks:
            tensors = [tensor for tensor in block if tensor is not None]
            norms.append(nn.utils.get_total_norm(tensors) if tensors else zero)
        return torch.stack(norms)


def block_records(
    names: Iterable[str], grad_norms: Sequence[float], update_ratios: Sequence[float]
) -> dict[str, BlockRecord]:
    """Return the record of each block, by name."""
    rows = zip(names, grad_norms, update_ratios, strict=True)
    return {name: BlockRecord(grad_norm, update_ratio) for name, grad_norm, update_ratio in rows}
