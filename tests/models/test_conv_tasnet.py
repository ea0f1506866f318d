import pytest
import torch
import torch.nn.functional as F

from unbraid.models.conv_tasnet import ConvBlock, ConvTasNet, prelu
from unbraid.models.layers import GlobalLayerNorm, LearnedDecoder, LearnedEncoder, fourier_filters

TINY = {"n_filters": 16, "bottleneck": 8, "hidden": 12, "skip": 8, "n_blocks": 2, "n_repeats": 2}


def tiny(**changes):
    torch.manual_seed(0)
    return ConvTasNet(**{**TINY, **changes})


def test_the_published_size_has_5_1_million_parameters():
    assert sum(p.numel() for p in ConvTasNet().parameters()) == pytest.approx(5.1e6, rel=0.02)


@pytest.mark.parametrize("time", [1, 2, 7, 8, 15, 16, 17, 100, 1001])
@pytest.mark.parametrize("sizes", [{}, {"kernel_size": 20, "stride": 5}, {"n_sources": 3, "skip": 0, "norm": "cln"}])
def test_every_length_comes_back_exactly(time, sizes):
    model = tiny(**sizes)
    assert model(torch.randn(2, 1, time)).shape == (2, model.n_sources, 1, time)


@pytest.mark.parametrize("mask", ["sigmoid", "relu", "softmax"])
def test_channels_are_separated_independently(mask):
    model = tiny(mask=mask)
    stereo = torch.randn(2, 2, 200)
    alone = torch.cat([model(stereo[:, :1]), model(stereo[:, 1:])], dim=2)
    torch.testing.assert_close(model(stereo), alone)


def test_examples_are_independent():
    model, batch = tiny(), torch.randn(3, 1, 300)
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]))


def test_silence_stays_silent_with_finite_gradients():
    model = tiny()
    silence = torch.zeros(1, 1, 100, requires_grad=True)
    estimate = model(silence)
    estimate.sum().backward()

    assert torch.equal(estimate, torch.zeros_like(estimate))
    assert all(p.grad is None or p.grad.isfinite().all() for p in [silence, *model.parameters()])


def test_every_weight_gets_a_gradient():
    model = tiny()
    model(torch.randn(1, 1, 400)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_is_close_to_float32():
    model, mixture = tiny(), torch.randn(2, 1, 800)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(mixture)
    exact = model(mixture)

    assert rough.dtype == torch.float32
    assert (rough - exact).square().mean() < 1e-3 * exact.square().mean()


def test_encoder_and_decoder_are_strided_convolutions():
    encoder = LearnedEncoder(n_filters=6, kernel_size=8, stride=4)
    decoder = LearnedDecoder(n_filters=6, kernel_size=8, stride=4)
    waveform = torch.randn(2, 8 + 4 * 9)
    features = F.conv1d(waveform[:, None], encoder.filters.weight[:, None], stride=4)
    back = F.conv_transpose1d(features, decoder.filters.weight.T[:, None], stride=4)

    torch.testing.assert_close(encoder(waveform), features.transpose(1, 2))
    torch.testing.assert_close(decoder(encoder(waveform), 44), back[:, 0])


@pytest.fixture(params=["plain", "compiled"])
def _mode(request, monkeypatch):
    """What runs as it is, and what a compiler would be given, run as it is."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "compiled")


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("n_frames", [1, 7, 20])
@pytest.mark.parametrize("dilation", [1, 4, 8])
@pytest.mark.parametrize("kernel_size", [3, 4, 5])
def test_the_depthwise_convolution_equals_torch_eager_and_compiled(kernel_size, dilation, n_frames):
    block = ConvBlock(bottleneck=4, hidden=6, skip=4, kernel_size=kernel_size, dilation=dilation, norm="gln")
    hidden = torch.randn(2, n_frames, 6)
    expected = F.conv1d(
        F.pad(hidden.transpose(1, 2), (dilation * (kernel_size - 1) // 2, dilation * kernel_size // 2)),
        block.taps.T[:, None],
        block.taps_bias,
        dilation=dilation,
        groups=6,
    )
    torch.testing.assert_close(block.depthwise(hidden, dilation), expected.transpose(1, 2)[:, :n_frames])


@pytest.mark.usefixtures("_mode")
def test_prelu_equals_its_definition_eager_and_compiled():
    slope, features = torch.tensor(0.3, requires_grad=True), torch.randn(2, 9, 4)

    outputs = prelu(features, slope)

    torch.testing.assert_close(outputs, features.clamp(min=0) + 0.3 * features.clamp(max=0))
    [gradient] = torch.autograd.grad(outputs.sum(), slope)
    torch.testing.assert_close(gradient, features.clamp(max=0).sum())


@pytest.mark.usefixtures("_mode")
def test_global_layer_norm_equals_group_norm_with_one_group():
    norm, features = GlobalLayerNorm(5), 3 + 2 * torch.randn(2, 30, 5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.group_norm(features.transpose(1, 2), 1, norm.weight, norm.bias, eps=1e-8)
    torch.testing.assert_close(norm(features), expected.transpose(1, 2))


def test_global_layer_norm_is_precise_in_bfloat16():
    features = (10 + torch.randn(1, 4000, 16)).bfloat16()
    normalised = GlobalLayerNorm(16)(features)

    assert normalised.dtype == torch.bfloat16
    assert normalised.float().std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("n_filters", "kernel_size"), [(256, 64), (64, 16), (128, 32)])
def test_fourier_filters_reconstruct_the_waveform_after_a_relu(n_filters, kernel_size):
    sizes = {"n_filters": n_filters, "kernel_size": kernel_size, "stride": kernel_size // 2}
    encoder, decoder = LearnedEncoder(**sizes), LearnedDecoder(**sizes)
    filters = fourier_filters(n_filters, kernel_size)
    with torch.no_grad():
        encoder.filters.weight.copy_(filters)
        decoder.filters.weight.copy_(filters.T)
    waveform = torch.randn(1, 1000)
    inside = slice(kernel_size, -kernel_size)
    back = decoder(encoder(waveform).relu(), 1000)[:, inside]
    gain = (back * waveform[:, inside]).sum() / waveform[:, inside].square().sum()

    torch.testing.assert_close(back, gain * waveform[:, inside], rtol=1e-4, atol=1e-4)


def test_invalid_options_raise_an_error():
    with pytest.raises(ValueError, match="gln"):
        ConvTasNet(norm="batch")
    with pytest.raises(ValueError, match="multiple of stride"):
        ConvTasNet(kernel_size=16, stride=5)
