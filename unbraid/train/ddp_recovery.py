"""The exchange of gradients between processes, also by one whose memory ran out in the middle of it."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbraid.model_output import iter_tensors


class GradientExchange:
    """Knows which gradients have been handed over in a backward, and hands over the others where it broke off.

    Every process has to bring a gradient for each parameter, or the others wait for ever. One that ran out of memory
    brings what it has, and nothing for the rest: the step is left out or done again anyway.

    Args:
        model: As it is wrapped for several processes.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.brought: set[nn.Parameter] = set()
        self.under_way = False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.brought.add)

    def begin(self) -> None:
        """Before the backward that exchanges."""
        self.brought.clear()
        self.under_way = True

    def complete(self) -> None:
        """After that backward broke off: bring nothing for every parameter that is still missing."""
        missing = [parameter for parameter in self.parameters if parameter not in self.brought]
        if missing:
            torch.stack([parameter.flatten()[0] * 0.0 for parameter in missing]).sum().backward()

    def take_part(self, mixture: torch.Tensor) -> bool:
        """Bring nothing at all, by a forward on as little as it takes; False where memory does not suffice for that."""
        for shorter in (1, 4, 16):
            excerpt = mixture[:1, :, : -(-mixture.shape[-1] // shorter)]
            try:
                nothing = sum(part.float().sum() for part in iter_tensors(self.model(excerpt))) * 0.0
            except torch.OutOfMemoryError:
                continue
            torch.as_tensor(nothing).backward()
            return True
        return False
