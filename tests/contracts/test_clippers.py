import math

import pytest
import torch

from unbraid.robust import CLIPPERS

every_clipper = pytest.mark.parametrize("name", sorted(CLIPPERS))
NORMS = [3.0, 0.5, 7.0, 0.5, 100.0, 2.0]


def max_norms(clipper, norms, *, finite=True):
    return [clipper(torch.tensor(norm), torch.tensor(finite)).item() for norm in norms]


def saved(clipper, *, raw=False):
    """Its state, in bytes unless raw, so that it can be compared."""
    state = clipper.state_dict() if hasattr(clipper, "state_dict") else {}
    if raw:
        return state
    return {
        name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }


@every_clipper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_max_norm_is_a_0_d_tensor_with_the_dtype_and_device_of_the_norm(name, dtype):
    norm = torch.tensor(3.0, dtype=dtype)

    max_norm = CLIPPERS[name]()(norm, torch.tensor(True))

    assert (max_norm.shape, max_norm.dtype, max_norm.device) == (norm.shape, norm.dtype, norm.device)


@every_clipper
@pytest.mark.parametrize("norm", [*NORMS, 0.0, math.nan, math.inf])
def test_max_norm_is_always_positive(name, norm):
    assert max_norms(CLIPPERS[name](), [norm], finite=math.isfinite(norm))[0] > 0


@every_clipper
def test_the_norm_is_not_changed(name):
    norm = torch.tensor(3.0)
    CLIPPERS[name]()(norm, torch.tensor(True))

    assert norm.item() == 3.0


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 12.5, 0.0])
def test_a_skipped_step_does_not_change_later_thresholds(name, norm):
    trained, untouched = CLIPPERS[name](), CLIPPERS[name]()
    max_norms(trained, NORMS)
    max_norms(untouched, NORMS)

    max_norms(trained, [norm], finite=False)

    assert max_norms(trained, NORMS) == max_norms(untouched, NORMS)


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_a_nonfinite_or_zero_norm_is_never_learned(name, norm):
    trained, untouched = CLIPPERS[name](), CLIPPERS[name]()
    max_norms(trained, [norm])

    assert max_norms(trained, NORMS) == max_norms(untouched, NORMS)


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 12.5, 0.0])
def test_a_skipped_step_does_not_change_the_state(name, norm):
    clipper = CLIPPERS[name]()
    max_norms(clipper, NORMS)
    before = saved(clipper)

    max_norms(clipper, [norm], finite=False)

    assert saved(clipper) == before


@every_clipper
def test_the_state_dict_holds_tensors_numbers_and_strings(name):
    clipper = CLIPPERS[name]()
    max_norms(clipper, NORMS)

    assert all(isinstance(value, (torch.Tensor, int, float, str)) for value in saved(clipper, raw=True).values())


@every_clipper
@pytest.mark.parametrize("n_before", [0, 1, 4])
def test_a_stateful_component_resumes_identically_from_its_state_dict(name, n_before):
    original, resumed = CLIPPERS[name](), CLIPPERS[name]()
    max_norms(original, NORMS[:n_before])
    if hasattr(original, "state_dict"):
        resumed.load_state_dict(original.state_dict())

    assert max_norms(resumed, NORMS[n_before:]) == max_norms(original, NORMS[n_before:])
