import torch
from small_models import TINY

from unbraid.models import MODELS
from unbraid.train.ddp_recovery import GradientExchange


def test_a_model_that_returns_more_than_sources_takes_part_with_all_of_its_weights():
    torch.manual_seed(0)
    model = MODELS["chimera"](**TINY["chimera"])

    assert GradientExchange(model).take_part(torch.randn(2, 1, 400))

    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
