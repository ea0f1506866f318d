import math

import pytest
import torch

from unbraid.robust import CLIPPERS

every_clipper = pytest.mark.parametrize("name", sorted(CLIPPERS))
NORMS = [3.0, 0.5, 7.0, 0.5, 100.0, 2.0]


def limits_of(clipper, norms, *, finite=True):
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
def test_the_limit_is_0_d_and_where_and_what_the_norm_is(name, dtype):
    norm = torch.tensor(3.0, dtype=dtype)

    limit = CLIPPERS[name]()(norm, torch.tensor(True))

    assert (limit.shape, limit.dtype, limit.device) == (norm.shape, norm.dtype, norm.device)


@every_clipper
@pytest.mark.parametrize("norm", [*NORMS, 0.0, math.nan, math.inf])
def test_the_limit_is_a_positive_number_or_infinity_from_the_first_step_on(name, norm):
    assert limits_of(CLIPPERS[name](), [norm], finite=math.isfinite(norm))[0] > 0


@every_clipper
def test_the_norm_is_not_changed(name):
    norm = torch.tensor(3.0)
    CLIPPERS[name]()(norm, torch.tensor(True))

    assert norm.item() == 3.0


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 12.5, 0.0])
def test_a_step_that_is_left_out_teaches_nothing(name, norm):
    taught, untaught = CLIPPERS[name](), CLIPPERS[name]()
    limits_of(taught, NORMS)
    limits_of(untaught, NORMS)

    limits_of(taught, [norm], finite=False)

    assert limits_of(taught, NORMS) == limits_of(untaught, NORMS)


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_a_norm_that_means_nothing_is_not_learned_even_if_called_finite(name, norm):
    taught, untaught = CLIPPERS[name](), CLIPPERS[name]()
    limits_of(taught, [norm])

    assert limits_of(taught, NORMS) == limits_of(untaught, NORMS)


@every_clipper
@pytest.mark.parametrize("norm", [math.nan, math.inf, 12.5, 0.0])
def test_a_step_that_is_left_out_leaves_its_state_bit_for_bit(name, norm):
    clipper = CLIPPERS[name]()
    limits_of(clipper, NORMS)
    before = saved(clipper)

    limits_of(clipper, [norm], finite=False)

    assert saved(clipper) == before


@every_clipper
def test_what_it_saves_is_tensors_and_numbers(name):
    clipper = CLIPPERS[name]()
    limits_of(clipper, NORMS)

    assert all(isinstance(value, (torch.Tensor, int, float, str)) for value in saved(clipper, raw=True).values())


@every_clipper
@pytest.mark.parametrize("n_before", [0, 1, 4])
def test_one_that_remembers_goes_on_identically_from_its_state(name, n_before):
    going_on, resumed = CLIPPERS[name](), CLIPPERS[name]()
    limits_of(going_on, NORMS[:n_before])
    if hasattr(going_on, "state_dict"):
        resumed.load_state_dict(going_on.state_dict())

    assert limits_of(resumed, NORMS[n_before:]) == limits_of(going_on, NORMS[n_before:])
