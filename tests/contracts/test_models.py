import inspect
from functools import partialmethod

import pytest
import torch
from small_models import tiny
from torch import nn

from unbraid.models import MODELS

COMPILED = sorted(name for name, model in MODELS.items() if hasattr(model, "compile_regions"))

every_model = pytest.mark.parametrize("name", sorted(MODELS))


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_model
@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_the_output_has_the_sources_channels_and_time_asked_for(name, n_sources, n_channels):
    sources = tiny(name, n_sources=n_sources)(noise(2, n_channels, 300))

    assert sources.shape == (2, n_sources, n_channels, 300)


@every_model
def test_any_length_from_one_sample_up_comes_back_at_exactly_that_length(name):
    model = tiny(name).eval()
    lengths = [*range(1, 36), 79, 80, 81, 159, 160, 161, 1000, 1001]

    with torch.no_grad():
        outputs = {time: model(noise(1, 1, time)) for time in lengths}

    assert [output.shape[-1] for output in outputs.values()] == lengths
    assert all(output.isfinite().all() for output in outputs.values())


@every_model
def test_every_length_up_to_4000_sampled_comes_back_finite(name):
    model, rng = tiny(name).eval(), torch.Generator().manual_seed(0)
    lengths = torch.randint(36, 4001, (25,), generator=rng).tolist()

    with torch.no_grad():
        outputs = [model(noise(1, 1, time)) for time in lengths]

    assert [output.shape[-1] for output in outputs] == lengths
    assert all(output.isfinite().all() for output in outputs)


@every_model
@pytest.mark.parametrize("gain", [0.1, 100.0])
def test_scale_equivariant_says_whether_the_output_follows_the_gain(name, gain):
    model, mixture = tiny(name).eval(), noise(2, 1, 1500)
    assert isinstance(model.scale_equivariant, bool)

    with torch.no_grad():
        plain, other = model(mixture), model(gain * mixture)

    follows_gain = torch.allclose(other / gain, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())
    assert follows_gain == model.scale_equivariant


@every_model
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(300), "must be \\(batch, channel, time\\)"),
        (torch.zeros(2, 300), "must be \\(batch, channel, time\\)"),
        (torch.zeros(1, 1, 0), "at least one sample"),
        (torch.zeros(0, 1, 300), "at least one sample"),
        (torch.zeros(1, 1, 300, dtype=torch.int16), "floating-point audio"),
        (torch.zeros(1, 1, 300, dtype=torch.float64), "float64 cannot be separated by a model in torch.float32"),
        (torch.zeros(1, 1, 300, dtype=torch.bfloat16), "bfloat16 cannot be separated by a model in torch.float32"),
    ],
)
def test_an_invalid_mixture_raises_an_error_of_one_line(name, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(name)(wrong)

    assert "\n" not in str(error.value)


@every_model
def test_a_batch_gives_what_its_examples_give_one_by_one(name):
    model, mixture = tiny(name).eval(), noise(3, 2, 500)
    mixture[1] *= 100

    with torch.no_grad():
        together = model(mixture)
        one_by_one = torch.cat([model(example[None]) for example in mixture])

    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)


@every_model
def test_each_channel_is_separated_as_if_it_were_alone(name):
    model, mixture = tiny(name).eval(), noise(1, 2, 500)

    with torch.no_grad():
        channels = torch.cat([model(mixture[:, [channel]]) for channel in (0, 1)], 2)
        torch.testing.assert_close(model(mixture), channels, atol=1e-5, rtol=1e-4)


@every_model
def test_silence_gives_finite_sources_and_finite_gradients(name):
    model = tiny(name, all_outputs=True)
    returned = model(torch.zeros(2, 1, 300))
    returned.square().sum().backward()

    assert returned.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@every_model
def test_the_gradient_reaches_every_parameter(name):
    model = tiny(name, all_outputs=True)
    returned = model(noise(2, 1, 500))
    (returned - noise(len(returned), seed=1)).square().mean().backward()

    missed = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert missed == []


@every_model
def test_the_gradient_reaches_every_sample_of_the_mixture(name):
    mixture = noise(1, 1, 501).requires_grad_()
    tiny(name)(mixture).square().sum().backward()

    assert (mixture.grad != 0).all()


@every_model
@pytest.mark.parametrize("gain", [1e-4, 1.0, 300.0])
def test_forward_and_backward_are_finite_at_any_gain(name, gain):
    model = tiny(name, all_outputs=True)
    returned = model(gain * noise(2, 1, 500))
    returned.square().mean().sqrt().backward()

    assert returned.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@every_model
@pytest.mark.parametrize("gain", [0.0, 1e-4, 1.0, 300.0])
def test_bf16_is_finite_and_within_a_few_percent_of_fp32(name, gain):
    model, mixture = tiny(name).eval(), gain * noise(2, 1, 500)

    exact = model(mixture)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(mixture)
        with torch.no_grad():  # another way through recurrent models
            separated = model(mixture)
    rounded.float().square().sum().backward()

    assert rounded.isfinite().all()
    assert separated.isfinite().all()
    assert (rounded.float() - exact).norm() <= 0.05 * exact.norm()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@every_model
def test_weights_that_are_saved_and_loaded_give_the_same_output(name, tmp_path):
    one, other, mixture = tiny(name, seed=0).eval(), tiny(name, seed=1).eval(), noise(1, 1, 300)
    assert not torch.equal(one(mixture), other(mixture))

    torch.save(one.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))

    assert torch.equal(one(mixture), other(mixture))


@every_model
def test_the_mixture_is_not_changed(name):
    mixture = noise(1, 1, 300)
    tiny(name)(mixture)

    assert torch.equal(mixture, noise(1, 1, 300))


@every_model
def test_a_few_training_steps_separate_a_low_and_a_high_tone(name):
    model, time = tiny(name), torch.arange(500)
    tones = torch.stack([(0.1 * time).sin(), (2.0 * time).sin()])[None, :, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = (model(tones.sum(1)) - tones).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert loss.item() < 0.1 * tones.square().mean().item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler of torch sets off warnings of torch
@pytest.mark.parametrize("name", COMPILED)
def test_compiling_changes_neither_names_nor_output_nor_gradient(name, two_threads):
    torch._dynamo.reset()
    plain, compiled = tiny(name, all_outputs=True), tiny(name, all_outputs=True)
    names = list(plain.state_dict())

    compiled.compile_regions()

    check_same(plain, compiled, noise(2, 1, 300))
    assert list(compiled.state_dict()) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler of torch sets off warnings of torch
@pytest.mark.parametrize("name", ["conv_tasnet", "sepformer"])
def test_compiled_bf16_is_as_close_to_fp32_as_uncompiled_bf16(name):
    torch._dynamo.reset()
    exact, plain, compiled = (tiny(name, all_outputs=True) for _ in range(3))
    compiled.compile_regions()
    mixture = noise(2, 1, 3000)

    output, gradient = with_gradient(exact, mixture)
    with torch.autocast("cpu", torch.bfloat16):
        near, got = (with_gradient(model, mixture) for model in (plain, compiled))

    for wanted, uncompiled, found in zip((output, gradient), near, got, strict=True):
        assert (found - wanted).norm() < 1.5 * (uncompiled - wanted).norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler of torch sets off warnings of torch
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_graphs_work_for_every_length_and_with_checkpointing(name, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))  # no code is made
    has_checkpoint = "checkpoint" in inspect.signature(MODELS[name]).parameters
    plain, compiled = (
        tiny(name, all_outputs=True),
        tiny(name, all_outputs=True, **({"checkpoint": True} if has_checkpoint else {})),
    )

    compiled.compile_regions()

    check_same(plain, compiled, noise(2, 1, 300))
    check_same(plain, compiled, noise(1, 1, 420))
    with torch.no_grad():
        output, got = (model(noise(1, 1, 250)) for model in (plain, compiled))
    torch.testing.assert_close(got, output, rtol=1e-3, atol=1e-4 * output.abs().max().item())


def check_same(plain, compiled, mixture):
    (output, gradient), (got, got_gradient) = (with_gradient(model, mixture) for model in (plain, compiled))
    torch.testing.assert_close(got, output, rtol=1e-3, atol=1e-4 * output.abs().max().item())
    assert (got_gradient - gradient).norm() < 1e-3 * gradient.norm()


def with_gradient(model, mixture):
    model.zero_grad()
    output = model(mixture)
    output.square().sum().backward()
    return output.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])
