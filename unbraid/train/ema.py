"""The moving average of a model's weights, moved by the steps that were taken and by no other."""

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of parameters: often better than the weights of any single step.

    In the first steps it forgets faster, by (1 + n) / (10 + n) after n steps, so that the first weights are soon gone.

    Args:
        model: Whose parameters; the average begins with what they are.
        decay: Share that stays in each step, such as 0.999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().clone() for p in model.parameters()]
        self.n_steps = torch.zeros((), dtype=torch.int64, device=self.weights[0].device)

    def update(self, model: nn.Module, taken: Tensor) -> None:
        """Move towards the model where the step was taken (0-d, on the model's device); no host is asked."""
        n = self.n_steps + taken
        decay = torch.clamp_max((1 + n) / (10 + n), self.decay)
        share = torch.where(taken, 1 - decay, 0.0)
        moved = [torch.where(taken, p.detach() - a, 0.0) for p, a in zip(model.parameters(), self.weights, strict=True)]
        torch._foreach_add_(self.weights, torch._foreach_mul(moved, share))
        self.n_steps = n

    def state_dict(self) -> dict[str, Any]:
        """Steps averaged over; the average itself is what the checkpoint holds as the model."""
        return {"n_steps": int(self.n_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where another run stood."""
        self.n_steps.fill_(state["n_steps"])
