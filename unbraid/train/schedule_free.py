"""Schedule-free AdamW whose two sets of weights are exchanged without rounding; imports the extra."""

import torch
from schedulefree import AdamWScheduleFree


class ScheduleFree(AdamWScheduleFree):  # type: ignore[misc]  # the package has no types
    """AdamW that keeps an average of its weights, which is what is good, beside those that it takes gradients at.

    After ``eval()`` the parameters are the average: validate and save these. After ``train()`` they are those that it
    steps from. The package computes each from the other, with a rounding; here the second are put aside in
    ``eval()``, as state, and taken back by ``train()``. So a run is the same however often it is validated or saved,
    and a checkpoint written between the two, loaded and followed by ``train()``, goes on bit by bit.
    """

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged weights in the parameters."""
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        self.state[p]["trained"] = p.clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        """Put the weights to train in the parameters."""
        super().train()
        for group in self.param_groups:
            for p in group["params"]:
                if "trained" in self.state[p]:
                    p.copy_(self.state[p].pop("trained"))
