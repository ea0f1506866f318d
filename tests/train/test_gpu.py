"""What only an accelerator can show."""

import pytest
import torch
from toys import make_batch, make_state, with_nan

from unbraid.robust import CLIPPERS, FILTERS
from unbraid.robust.precision import Precision
from unbraid.train.ema import EMA
from unbraid.train.step import finish, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clipper", sorted(CLIPPERS))
def test_no_step_of_twenty_waits_for_the_host(clipper, precision):
    device = torch.device("cuda")
    state = make_state(
        device=device,
        clipper=CLIPPERS[clipper](),
        precision=Precision(precision),
        filters=[f() for f in FILTERS.values()],
    )
    state.ema = EMA(state.model, 0.99)
    batches = [make_batch(seed=seed).to(device) for seed in range(24)]
    with_nan(batches[9], 0)
    for batch in batches[:4]:
        finish(state, launch(state, [batch]))
    torch.cuda.synchronize()
    launched = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [launch(state, [batch]) for batch in batches[4:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outcomes = [finish(state, one)[0].outcome for one in launched]

    assert [index for index, outcome in enumerate(outcomes) if outcome == "nonfinite_loss"] == [5]
    assert outcomes.count("trained") >= 15
