"""Complete DDP's exchange of gradients on a process that ran out of memory in the middle of it."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbraid.model_output import iter_tensors


class GradientExchange:
    """Track which gradients a backward has exchanged, and exchange zeros for the others if it broke off.

    DDP waits for a gradient of every parameter from every process. A process that ran out of memory contributes the
    gradients it has, and zeros for the rest: the step is skipped or repeated anyway.

    Args:
        model: Wrapped for several processes.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.exchanged: set[nn.Parameter] = set()
        self.under_way = False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.exchanged.add)

    def reset(self) -> None:
        """Note that no exchange is under way: a new step begins."""
        self.under_way = False

    def begin(self) -> None:
        """Note that the backward with the exchange begins."""
        self.exchanged.clear()
        self.under_way = True

    def complete(self) -> None:
        """Exchange zeros for every parameter that the broken-off backward did not reach."""
        missing = [parameter for parameter in self.parameters if parameter not in self.exchanged]
        if missing:
            # a product with zero, not a constant: the hooks of DDP need a graph that reaches each parameter
            torch.stack([parameter.flatten()[0] * 0.0 for parameter in missing]).sum().backward()

    def take_part(self, mixture: torch.Tensor) -> bool:
        """Exchange zeros for all parameters, by a forward and backward on one example as short as it takes.

        Args:
            mixture: ``(batch, channel, time)``.

        Returns:
            False if there is not enough memory even for that.
        """
        for n_parts in (1, 4, 16):
            excerpt = mixture[:1, :, : -(-mixture.shape[-1] // n_parts)]
            try:
                zero = sum(tensor.float().sum() for tensor in iter_tensors(self.model(excerpt))) * 0.0
            except torch.OutOfMemoryError:
                continue
            torch.as_tensor(zero).backward()
            return True
        return False
