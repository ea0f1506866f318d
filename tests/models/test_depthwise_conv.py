import pytest
import torch
import torch.nn.functional as F

from unbraid.models.depthwise_conv import LongConv, ShortConv


def seeded(make, *args, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **sizes)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel_size", [1, 6, 64, 65, 67])
@pytest.mark.parametrize("n_frames", [1, 5, 64, 129])
def test_long_conv_equals_a_depthwise_convolution(kernel_size, n_frames):
    convolution = seeded(LongConv, 3, kernel_size=kernel_size).double()
    features = noise(2, n_frames, 3).double()
    reach = kernel_size - 1
    padded = F.pad(features.transpose(1, 2), (reach // 2, reach - reach // 2))
    expected = F.conv1d(padded, convolution.taps.T[:, None], convolution.bias, groups=3)

    torch.testing.assert_close(convolution(features), expected.transpose(1, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler of torch sets off warnings of torch
def test_long_conv_compiled_for_two_threads_has_the_same_gradient(two_threads):
    plain, compiled = (seeded(LongConv, 8, kernel_size=5) for _ in range(2))
    compiled.compile()
    features = [noise(2, 300, 8).requires_grad_() for _ in range(2)]
    for convolution, inputs in zip((plain, compiled), features, strict=True):
        convolution(inputs).square().sum().backward()

    torch.testing.assert_close(features[1].grad, features[0].grad)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_short_conv_equals_a_depthwise_convolution(kernel_size, stride):
    convolution = seeded(ShortConv, 4, kernel_size=kernel_size, stride=stride)
    features = noise(2, 12, 4)
    expected = F.conv1d(
        features.transpose(1, 2),
        convolution.taps.T[:, None],
        convolution.bias,
        stride=stride,
        padding=kernel_size // 2,
        groups=4,
    )

    torch.testing.assert_close(convolution(features), expected.transpose(1, 2))
