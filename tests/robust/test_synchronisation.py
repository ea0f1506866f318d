"""Nothing in robust/ waits for an accelerator: reading a tensor, or branching on it, would stop the host every step."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import counted_waits

from unbraid.robust import CLIPPERS, FILTERS, TRANSFORMS
from unbraid.robust.clip import AutoClip, clip_
from unbraid.robust.guard import guarded_step
from unbraid.robust.quantile import DeviceQuantile


@pytest.fixture
def waits(monkeypatch):
    """Counts of the reads and branches so far."""
    with counted_waits(monkeypatch) as counts:
        yield counts


def test_the_counter_counts():
    with pytest.MonkeyPatch.context() as monkeypatch, counted_waits(monkeypatch) as counts:
        value = torch.tensor([1.0, 2.0])
        value[0].item()
        bool(value[0] > 0)
        float(value[1])
        value[value > 1]
        value.tolist()

    assert counts == {"_local_scalar_dense": 3, "index": 1, "tolist": 1}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        bool,
        float,
        lambda x: torch.arange(3)[x.long()],
        lambda x: torch.arange(3)[torch.ones(3) > x],
        lambda x: x.nonzero(),
        lambda x: 1 if x > 0 else 0,
    ],
)
def test_the_counter_sees_every_way_to_read_a_tensor(waits, read):
    read(torch.tensor(1.0))

    assert waits


@pytest.mark.parametrize("window", [None, 5])
def test_percentiles_on_a_device_never_wait(waits, window):
    quantile = DeviceQuantile(window)
    for i in range(1100):  # past its first capacity
        quantile.add(torch.tensor(float(i)), torch.tensor(i % 3 > 0))
        quantile.percentile(10.0, at_least=4)

    assert not waits


@pytest.mark.parametrize("window", [None, 5])
def test_statistics_of_several_values_a_step_never_wait(waits, window):
    quantile = DeviceQuantile(window)
    for _ in range(3):
        quantile.add(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, True, False]))
        quantile.percentile(10.0)
        quantile.median()
        quantile.mad()

    assert not waits


@pytest.mark.parametrize("window", [0, 5])
def test_autoclip_never_waits_for_a_norm_on_a_device(waits, monkeypatch, window):
    monkeypatch.setattr("unbraid.robust.clip.quantile_for", lambda _device, window: DeviceQuantile(window))
    clipper = AutoClip(window=window, warmup_steps=3)
    for norm in (1.0, torch.nan, 3.0, 0.0, 5.0):
        clipper(torch.tensor(norm), torch.tensor(True))

    assert not waits


@pytest.mark.parametrize("name", sorted(set(CLIPPERS) - {"autoclip"}))
def test_other_clippers_never_wait(waits, name):
    clipper = CLIPPERS[name]()
    for _ in range(30):
        clipper(torch.tensor(1.0), torch.tensor(True))

    assert not waits


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_filters_never_wait(waits, name):
    loss_filter = FILTERS[name]()
    losses = torch.linspace(-40, 10, 60)
    for _ in range(3):
        loss_filter(losses)
        if hasattr(loss_filter, "observe"):
            loss_filter.observe(losses, losses > -35)

    assert not waits


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_transforms_never_wait(waits, name):
    for shape in ((), (3,), (3, 2, 5)):
        TRANSFORMS[name]()(torch.ones(shape), torch.ones(shape))

    assert not waits


def test_clip_never_waits(waits):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)

    clip_(parameter, CLIPPERS["fixed"](max_norm=0.1))

    assert not waits


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o)]
)
def test_a_guarded_step_of_a_fused_optimizer_never_waits(waits, kind):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.1, fused=True)
    for gradient in (1.0, torch.nan, 2.0):
        parameter.grad = torch.full((3,), gradient)
        guarded_step(optimizer, CLIPPERS["zclip"](), loss=parameter.grad.sum())

    assert not waits


class Copies(TorchDispatchMode):
    """Records operations on tensors of two devices: each may be a copy that waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.seen.append(func.overloadpacket.__name__)
        return output


@pytest.mark.parametrize("copy", [lambda x: x.cpu(), lambda x: torch.ones(3).to(x.device)])
def test_the_recorder_sees_a_copy(copy):
    with FakeTensorMode(), Copies() as copies:
        copy(torch.ones(3, device="cuda"))

    assert copies.seen


def test_on_a_fake_gpu_nothing_waits():
    # A fake tensor has a device but no values: reading one fails.
    with FakeTensorMode():
        losses = torch.ones(4, device="cuda")
        parameter = nn.Parameter(torch.ones(4, device="cuda"))
        optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
        parameter.grad = torch.ones(4, device="cuda")
        clippers = [*(make() for make in CLIPPERS.values()), AutoClip(window=5, warmup_steps=3)]
        filters = [make() for make in FILTERS.values()]

        def train():
            for clipper in clippers:
                assert guarded_step(optimizer, clipper, loss=losses).taken.device.type == "cuda"
                assert clip_(parameter, clipper).device.type == "cuda"
            for loss_filter in filters:
                assert loss_filter(losses).device.type == "cuda"
                if hasattr(loss_filter, "observe"):
                    loss_filter.observe(losses, losses.isfinite())

        train()  # the first step moves state that was created on the host
        with Copies() as copies:
            train()

    assert not copies.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits():
    model = nn.Linear(8, 8, device="cuda")
    clippers = [*(make() for make in CLIPPERS.values()), AutoClip(window=5)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    filters = [make() for make in FILTERS.values()]
    batches = [torch.full((4, 8), value, device="cuda") for value in (1.0, torch.nan, 2.0)]

    def train():
        for batch in batches:
            losses = model(batch).square().mean(-1)
            losses.mean().backward()
            for clipper in clippers:
                guarded_step(optimizer, clipper, loss=losses)
            for loss_filter in filters:
                loss_filter(losses.detach())
                if hasattr(loss_filter, "observe"):
                    loss_filter.observe(losses, losses.isfinite())
            optimizer.zero_grad()

    train()  # the first step moves state that was created on the host
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in model.parameters())
