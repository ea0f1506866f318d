import pytest
import torch
import torch.nn.functional as F

from unbraid.models.tf_locoformer import ConvSwiGLU, RMSGroupNorm, RotaryAttention, TFLocoformer, std_over_time

MEDIUM = {"n_layers": 6, "d_model": 128, "d_hidden": 384, "kernel_size": 4}


def tiny(**sizes):
    sizes = {"n_fft": 16, "hop_length": 8, "n_layers": 2, "d_model": 8, "d_hidden": 8, "kernel_size": 3} | sizes
    return seeded(TFLocoformer, **{"d_attention": 8, "n_heads": 2, "n_groups": 2} | sizes)


def seeded(make, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**sizes)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, mixture):
    model(mixture).square().mean().backward()
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({}, 5_125_220),
        ({"d_attention": 96}, 5.0e6),
        (MEDIUM, 14_975_620),
        (MEDIUM, 15.0e6),
        (MEDIUM | {"d_hidden": 192, "kernel_size": 8}, 14_966_404),
        (MEDIUM | {"n_layers": 9}, 22_459_780),
        (MEDIUM | {"n_layers": 9}, 22.5e6),
    ],
)
def test_the_sizes_have_the_published_numbers_of_parameters(sizes, published):
    with torch.device("meta"):
        n_weights = sum(weight.numel() for weight in TFLocoformer(**sizes).parameters())

    assert n_weights == published if isinstance(published, int) else abs(n_weights - published) < 0.05e6


def test_rms_group_norm_of_known_values():
    norm = RMSGroupNorm(4, n_groups=2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 10.0]))
        normed = norm(torch.tensor([[3.0, -3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))

    torch.testing.assert_close(normed, torch.tensor([[1.0, -1.0, 0.0, 10 * 2**0.5], [0.0] * 4]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_conv_swiglu_equals_a_convolution_and_a_transposed_convolution(kernel_size):
    network = seeded(ConvSwiGLU, d_model=6, d_hidden=5, kernel_size=kernel_size, n_groups=2).double()
    features = noise(2, 9, 6).double()
    reach = kernel_size - 1

    padded = F.pad(network.norm(features).double().transpose(1, 2), (reach, reach))
    hidden, gate = F.conv1d(padded, network.widen.weight[:, :, 0], network.widen.bias).chunk(2, 1)
    transposed = network.narrow.weight[:, :, 0].flip(-1).transpose(0, 1)
    added = F.conv_transpose1d(hidden * F.silu(gate), transposed, network.narrow.bias)

    expected = features + added[..., reach : reach + 9].transpose(1, 2)
    torch.testing.assert_close(network(features), expected)


def test_attention_depends_on_the_distance_of_frames_alone():
    attention = seeded(RotaryAttention, d_model=8, d_attention=8, n_heads=2, n_groups=2)
    features, angles = noise(1, 5, 8), torch.arange(5)[:, None] * torch.tensor([1.0, 0.1])

    with torch.no_grad():
        plain, later = attention(features, angles), attention(features, angles + 7.0)
        closer = attention(features, 0.5 * angles)

    torch.testing.assert_close(later, plain, rtol=1e-4, atol=1e-5)
    assert (closer - plain).abs().max() > 1e-3


def test_each_layer_mixes_only_its_own_axis():
    model = tiny(n_layers=1)
    features = noise(1, 6, 9, 8)
    changed = features.clone()
    changed[0, 2, 4] += 1

    def differing(layers):
        with torch.no_grad():
            along = torch.stack([layers(features), layers(changed)])
        return (along[0] != along[1]).any(-1)[0]

    for stored, other, dim in (("along_freq", "along_time", 1), ("along_time", "along_freq", 0)):
        model = tiny(n_layers=1)
        for weight in getattr(model, other).parameters():
            torch.nn.init.zeros_(weight)
        touched = differing(model.layers).any(dim).nonzero().flatten().tolist()
        assert touched == [2 if stored == "along_freq" else 4]


def test_std_over_time_equals_torch_with_a_gradient_of_0_for_silence():
    waveform, silence = noise(3, 50) + 1, torch.full((1, 50), 0.0, requires_grad=True)
    std_over_time(silence).sum().backward()

    torch.testing.assert_close(std_over_time(waveform), waveform.std(1, keepdim=True))
    assert std_over_time(silence).item() == 0
    assert not silence.grad.any()
    assert std_over_time(torch.ones(1, 1)).item() == 0


@pytest.mark.parametrize("time", range(160, 168))
def test_the_last_samples_of_an_untrained_network_are_not_louder_than_the_rest(time):
    with torch.no_grad():
        powers = tiny()(noise(50, 1, time)).square().mean((0, 1, 2))

    assert powers[-2:].mean() < 2 * powers[:-2].mean()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_from_less_memory(precision):
    def bytes_stored(model):
        stored = {}  # by address, as several operations keep the same tensor
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(t.data_ptr(), t), lambda t: t):
            model(noise(1, 1, 800))
        return sum(tensor.nbytes for tensor in stored.values())

    once, again = tiny(), tiny(checkpoint=True)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        assert bytes_stored(again) < 0.3 * bytes_stored(once)
        pairs = zip(gradients(once, noise(2, 1, 300)), gradients(again, noise(2, 1, 300)), strict=True)

    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_fft": 15}, "n_fft 15 must be even"),
        ({"hop_length": 9}, "hop_length 9 must be from 1 to half of it"),
        ({"hop_length": 0}, "hop_length 0"),
        ({"d_attention": 6}, "d_attention 6 must be a multiple of twice n_heads 2"),
        ({"d_model": 9}, "d_model 9 must be a multiple of n_groups 2"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**sizes)
