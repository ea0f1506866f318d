"""Every optimizer of the registry trains, can be skipped and resumed; Muon and schedule-free against references."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from unbraid.errors import RecipeError
from unbraid.losses.pit import SeparationLoss
from unbraid.losses.waveform import neg_si_sdr
from unbraid.models import MODELS
from unbraid.robust.guard import apply_update, initialise_optimizer_state
from unbraid.train import muon
from unbraid.train.muon import Muon, as_matrix, orthogonalise
from unbraid.train.optim import OPTIMIZERS
from unbraid.train.state import TrainState, evaluation_weights

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


class Weights(nn.Module):
    """One weight of every kind that optimizers tell apart, and a valley to walk down to zero."""

    def __init__(self, *, seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(32, 48, generator=rng))
        self.like_it = nn.Parameter(torch.randn(32, 48, generator=rng))
        self.pointwise = nn.Parameter(torch.randn(40, 32, 1, generator=rng))
        self.depthwise = nn.Parameter(torch.randn(32, 1, 3, generator=rng))
        self.bias = nn.Parameter(torch.randn(32, generator=rng))
        self.slope = nn.Parameter(torch.tensor(0.25))

    def forward(self) -> Tensor:
        return sum((weight.square() * (1 + i)).sum() / 2 for i, weight in enumerate(self.parameters()))


def gradients_at(model, *, seed, unused=()):
    """The slope of the valley, and noise."""
    rng = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = 0.1 * torch.randn(weight.shape, generator=rng)
        weight.grad = None if name in unused else weight.detach() + noise
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def step(model, optimizer, *, seed, divisor=1.0, fine=True, unused=()):
    gradients = gradients_at(model, seed=seed, unused=unused)
    apply_update(optimizer, gradients, torch.tensor(divisor), torch.tensor(fine))


def make(name, **options):
    model = Weights()
    optimizer = OPTIMIZERS[name](model.parameters(), **options)
    initialise_optimizer_state(optimizer)
    return model, optimizer


def assert_equal(one, other):
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@every_optimizer
def test_a_quadratic_is_lowered(name):
    model, optimizer = make(name, lr=0.05, weight_decay=0.0)
    before = model().item()
    for _ in range(150):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    if name == "schedule_free":
        optimizer.eval()

    assert model().item() < 0.05 * before


@every_optimizer
def test_saving_and_resuming_changes_no_bit_of_a_run(name):
    model, optimizer = make(name)
    for seed in range(8):
        step(model, optimizer, seed=seed)

    stopped, its_optimizer = make(name)
    for seed in range(4):
        step(stopped, its_optimizer, seed=seed)
    saved = copy.deepcopy((its_optimizer.state_dict(), stopped.state_dict()))
    resumed, its_optimizer = make(name)
    its_optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for seed in range(4, 8):
        step(resumed, its_optimizer, seed=seed)

    assert_equal(model.state_dict(), resumed.state_dict())


@every_optimizer
@pytest.mark.parametrize("n_before", [0, 1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_state(name, n_before, bad):
    skipped, without = make(name), make(name)
    for model, optimizer in (skipped, without):
        for seed in range(n_before):
            step(model, optimizer, seed=seed)

    step(*skipped, seed=99, divisor=bad, fine=False)

    assert_equal(without[0].state_dict(), skipped[0].state_dict())
    states = [optimizer.state_dict()["state"] for _, optimizer in (without, skipped)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert_equal(state, states[1][key])
    for model, optimizer in (skipped, without):
        step(model, optimizer, seed=100)
    assert_equal(without[0].state_dict(), skipped[0].state_dict())


@every_optimizer
def test_dividing_in_the_update_equals_dividing_before_it(name):
    inside, before = make(name), make(name)
    for seed in range(3):
        step(*inside, seed=seed, divisor=8.0)
        gradients = gradients_at(before[0], seed=seed)
        torch._foreach_div_(gradients, 8.0)
        apply_update(before[1], gradients, torch.tensor(1.0), torch.tensor(True))

    assert_equal(before[0].state_dict(), inside[0].state_dict())


@every_optimizer
def test_a_learning_rate_of_0_moves_nothing_and_each_step_has_its_own(name):
    model, optimizer = make(name, weight_decay=0.1)
    step(model, optimizer, seed=0)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, seed=1)

    still = {key: torch.allclose(weight, before[key], atol=1e-6) for key, weight in model.state_dict().items()}
    if name != "schedule_free":  # it continues towards the average
        assert all(still.values()), still
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    step(model, optimizer, seed=2)
    assert not any(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@every_optimizer
def test_a_weight_without_a_gradient_stays_unchanged(name):
    model, optimizer = make(name)
    before = copy.deepcopy(model.state_dict())

    step(model, optimizer, seed=0, unused=("like_it", "bias"))

    moved = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert moved == {"matrix", "pointwise", "depthwise", "slope"}


def quintic(value, n_iterations=5):
    for _ in range(n_iterations):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", [(48, 48), (24, 60), (60, 24), (1, 7)])
def test_orthogonalising_applies_the_published_quintic_to_the_singular_values_and_keeps_the_vectors(shape):
    rng = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=rng, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = values.clamp_min(0.02 * values.amax(-1, keepdim=True))
    matrices = 1e-6 * u @ torch.diag_embed(values) @ vh

    result = orthogonalise(matrices)

    expected = quintic(values / values.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(result, u @ torch.diag_embed(expected) @ vh, atol=1e-9, rtol=0)
    assert ((expected > 0.68) & (expected < 1.21)).all()


def test_orthogonalising_zero_gives_zero():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def published_muon(weight, gradients, *, lr, momentum, weight_decay):
    """Written out for one matrix, by its singular values."""
    memory = torch.zeros_like(weight)
    for gradient in gradients:
        memory = momentum * memory + (1 - momentum) * gradient
        u, values, vh = torch.linalg.svd((1 - momentum) * gradient + momentum * memory, full_matrices=False)
        direction = u @ torch.diag_embed(quintic(values / values.norm())) @ vh
        weight = (1 - lr * weight_decay) * weight - lr * 0.2 * max(weight.shape) ** 0.5 * direction
    return weight


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 40)])
def test_a_matrix_is_updated_by_the_published_formula(shape, monkeypatch):
    monkeypatch.setattr(muon, "best_precision", lambda device: "fp32")
    rng = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=rng) for _ in range(5))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()

    expected = published_muon(start.double(), [g.double() for g in gradients], lr=0.02, momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-5, rtol=0)


def test_a_matrix_is_updated_as_by_torchs_muon_except_for_bfloat16(monkeypatch):
    monkeypatch.setattr(muon, "best_precision", lambda device: "bf16")
    rng = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(32, 48, generator=rng) for _ in range(4))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()

    assert ((ours - theirs).norm() / (theirs - start).norm()).item() < 0.01


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_a_float64_matrix_is_updated_as_published_to_the_last_digits(monkeypatch, native):
    monkeypatch.setattr(muon, "best_precision", lambda device: native)
    rng = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(32, 48, generator=rng, dtype=torch.float64) for _ in range(4))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()

    expected = published_muon(start, gradients, lr=0.02, momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-12, rtol=0)


def test_a_pointwise_convolution_is_updated_as_a_linear_layer():
    rng = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(40, 32, generator=rng), torch.randn(40, 32, generator=rng)
    linear, pointwise = nn.Parameter(start.clone()), nn.Parameter(start[..., None].clone())
    for weight in (linear, pointwise):
        optimizer = Muon([weight], lr=0.1)
        weight.grad = gradient.reshape(weight.shape)
        optimizer.step()

    assert not torch.equal(linear, start)
    assert torch.equal(pointwise[..., 0], linear)


def test_parameters_that_are_no_matrix_are_updated_as_by_adamw():
    model, reference = Weights(), Weights()
    optimizer = Muon(model.parameters(), lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for seed in range(4):
        for weights, each in ((model, optimizer), (reference, adamw)):
            rng = torch.Generator().manual_seed(seed)
            for weight in weights.parameters():
                weight.grad = torch.randn(weight.shape, generator=rng)
            each.step()

    for name in ("depthwise", "bias", "slope"):
        torch.testing.assert_close(getattr(model, name), getattr(reference, name), atol=1e-6, rtol=0)
    for name in ("matrix", "pointwise"):
        assert not torch.allclose(getattr(model, name), getattr(reference, name), atol=1e-3)


def test_matrices_of_the_published_conv_tasnet_are_its_linear_layers_between_encoder_and_decoder():
    with torch.device("meta"):
        model = MODELS["conv_tasnet"]()
    first, second = Muon(model.parameters()).param_groups
    matrices = {name for name, p in model.named_parameters() if any(p is q for q in first["params"])}

    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert matrices == linear - {"encoder.filters.weight", "decoder.filters.weight"}
    assert len(first["params"]) + len(second["params"]) == len(list(model.parameters()))
    assert all(as_matrix(p).shape[0] >= 32 for p in first["params"])


def test_muon_of_one_kind_of_parameter_has_one_group_and_of_none_is_refused():
    assert [group["matrices"] for group in Muon([nn.Parameter(torch.zeros(3))]).param_groups] == [False]
    assert [group["matrices"] for group in Muon([nn.Parameter(torch.zeros(32, 32))]).param_groups] == [True]
    with pytest.raises(ValueError, match="empty"):
        Muon([])


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"min_side": 0}])
def test_muon_refuses_numbers_that_mean_nothing(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Muon([nn.Parameter(torch.zeros(3))], **options)


def test_muon_accepts_a_closure():
    model = Weights()
    optimizer = Muon(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def schedule_free_state():
    model, optimizer = make("schedule_free", lr=0.01)
    return TrainState(model, loss=SeparationLoss(neg_si_sdr), optimizer=optimizer)


def test_schedule_free_is_validated_with_the_packages_average():
    from schedulefree import AdamWScheduleFree

    state, reference = schedule_free_state(), Weights()
    theirs = AdamWScheduleFree(reference.parameters(), lr=0.01)
    theirs.train()
    for seed in range(5):
        step(state.model, state.optimizer, seed=seed)
        step(reference, theirs, seed=seed)
    assert_equal(reference.state_dict(), state.model.state_dict())

    theirs.eval()

    with evaluation_weights(state):
        assert_equal(reference.state_dict(), state.model.state_dict())
    assert_equal(reference.state_dict(), state.state_dict()["model"])
    assert not torch.equal(reference.matrix, state.model.matrix)


def test_schedule_free_does_not_depend_on_validating_saving_or_resuming():
    never, often = schedule_free_state(), schedule_free_state()
    for seed in range(5):
        with evaluation_weights(often):
            pass
        saved = copy.deepcopy(often.state_dict())
        often = schedule_free_state()
        often.load_state_dict(saved)
        for state in (never, often):
            step(state.model, state.optimizer, seed=seed)

    assert_equal(never.model.state_dict(), often.model.state_dict())


def test_schedule_free_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)

    with pytest.raises(RecipeError, match=r"unbraid\[schedule_free\]"):
        make("schedule_free")


def test_the_package_is_imported_only_when_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)

    made = {name: make(name) for name in OPTIMIZERS if name != "schedule_free"}

    assert len(made) == len(OPTIMIZERS) - 1
