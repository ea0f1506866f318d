import pytest
import torch

from unbraid.errors import RecipeError
from unbraid.robust.precision import PRECISIONS, Precision, best_precision

CPU = torch.device("cpu")


def update(precision, *, overflowed):
    precision.update(torch.tensor(overflowed), torch.tensor(not overflowed))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_without_fp16_the_loss_is_never_scaled(name):
    precision = Precision(name, scale=1024, growth_interval=1)
    for overflowed in (True, False, False):
        update(precision, overflowed=overflowed)

    assert not precision.uses_loss_scale
    assert precision.scale == 1


def test_an_overflow_halves_the_scale():
    precision = Precision("fp16", scale=1024)
    update(precision, overflowed=True)
    update(precision, overflowed=True)

    assert precision.scale == 256


def test_the_scale_doubles_after_growth_interval_good_steps():
    precision = Precision("fp16", scale=1024, growth_interval=3)
    scales = []
    for overflowed in (False, False, True, False, False, False, False, False, False):
        update(precision, overflowed=overflowed)
        scales.append(precision.scale)

    assert scales == [1024, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]


def test_a_restored_scale_continues_identically():
    original, resumed = (Precision("fp16", scale=2.0**10, growth_interval=5) for _ in range(2))
    for overflowed in (True, False, False, False):
        update(original, overflowed=overflowed)
    resumed.load_state_dict(original.state_dict())

    for _ in range(12):
        update(original, overflowed=False)
        update(resumed, overflowed=False)
        assert resumed.state_dict() == original.state_dict()


@pytest.mark.parametrize("name", sorted(PRECISIONS))
def test_the_model_computes_in_that_format_and_its_weights_stay_float32(name):
    model = torch.nn.Linear(4, 4)

    with Precision(name).autocast(CPU):
        output = model(torch.ones(1, 4))

    assert output.dtype == PRECISIONS[name]
    assert model.weight.dtype == torch.float32


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"fp8.*auto, fp32, bf16, fp16"):
        Precision("fp8")


def test_the_best_precision_of_this_machine_can_be_used():
    assert best_precision(CPU) in ("fp32", "bf16")


def test_apple_gpus_use_fp32():
    assert best_precision(torch.device("mps")) == "fp32"


def test_a_step_skipped_for_another_reason_does_not_change_the_scale():
    precision = Precision("fp16", scale=1024, growth_interval=1)
    precision.update(torch.tensor(False), torch.tensor(False))

    assert precision.state_dict() == Precision("fp16", scale=1024).state_dict()
