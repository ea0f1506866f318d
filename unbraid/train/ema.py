"""EMA: exponential moving average of a model's weights, moved only by steps that were taken."""

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of parameters: often better than the weights of any single step.

    In the first steps it forgets faster, with a decay of (1 + n) / (10 + n) after n steps, so that the random initial
    weights soon have no share in it.

    Args:
        model: The average starts from its present parameters.
        decay: Share of the average that stays in each step, such as 0.999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = [p.detach().clone() for p in model.parameters()]
        self.n_steps = torch.zeros((), dtype=torch.int64, device=self.weights[0].device)

    def update(self, model: nn.Module, step_taken: Tensor) -> None:
        """Move towards the model's weights if the step was taken (0-d boolean, never read by the host)."""
        n = self.n_steps + step_taken
        decay = torch.clamp_max((1 + n) / (10 + n), self.decay)
        share = torch.where(step_taken, 1 - decay, 0.0)
        # torch.where, not a product with 0: the weights of a skipped step may be NaN, and 0 * NaN is NaN
        differences = [
            torch.where(step_taken, p.detach() - average, 0.0)
            for p, average in zip(model.parameters(), self.weights, strict=True)
        ]
        torch._foreach_add_(self.weights, torch._foreach_mul(differences, share))
        self.n_steps = n

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps averaged. The average itself is in the checkpoint as the model."""
        return {"n_steps": int(self.n_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of another average."""
        self.n_steps.fill_(state["n_steps"])
