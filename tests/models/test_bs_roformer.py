import pytest
import torch
import torch.nn.functional as F

from unbraid.models.attention import apply_rotary, rotary_angles
from unbraid.models.bs_roformer import (
    PUBLISHED_WIDTHS,
    BandMasks,
    BandSplit,
    BSRoFormer,
    RoPELayer,
    mel_bands,
    uniform_bands,
)

MEL_WIDTHS = [
    *(7, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 9, 9, 9, 10, 10, 11, 13, 13, 13, 15, 16, 17),
    *(19, 20, 20, 22, 24, 26, 28, 29, 31, 33, 36, 39, 41, 44, 47, 50, 54, 57, 61, 66, 71, 76, 80, 86, 93, 99),
    *(105, 113, 122, 130),
]
"""Bins above zero in librosa 0.11's 60 filters for n_fft 2048 at 44.1 kHz, with bin 0 and the last one added."""


def tiny(**sizes):
    sizes = {"n_fft": 32, "hop_length": 8, "bands": [1, 1, 2, 2, 4, 7], "d_model": 16, "n_blocks": 2} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BSRoFormer(**{"n_heads": 2, "d_head": 8, "expansion": 2, "mask_expansion": 2} | sizes)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_masks(model, *values):
    """The model with these real numbers as masks, one for each band, or one for all."""
    parts = []
    for i, width in enumerate(width for n_bands, width in model.estimate.width_groups for _ in range(n_bands)):
        value, gate = torch.zeros(width), torch.full((width,), 50.0)
        value[::2] = values[i % len(values)]
        parts += [value, gate] * model.n_sources
    with torch.no_grad():
        model.estimate.weight.zero_()
        model.estimate.bias.copy_(torch.cat(parts))
    return model


def n_weights(**sizes):
    with torch.device("meta"):
        return sum(weight.numel() for weight in BSRoFormer(**sizes).parameters())


def test_the_defaults_have_the_published_size_and_those_with_mel_bands_that_of_msst():
    """72.2 million; both exactly as many as MSST's BSRoformer and MelBandRoformer have in these sizes.

    With dim 384, depth 6, 8 heads of 48, one layer in a transformer, one stem from stereo, and `mask_estimator_depth` 2
    for the first and 1 for the second, which leaves the last layer out of its count.
    """
    assert n_weights() == 72_173_292
    assert n_weights(bands="mel", norm="paths") == 84_193_572


def test_bands_of_the_paper_at_its_size_and_rate():
    bands = uniform_bands(2048, 44_100)

    assert tuple(len(band) for band in bands) == PUBLISHED_WIDTHS
    assert [index for band in bands for index in band] == list(range(1025))


@pytest.mark.parametrize(("n_fft", "rate"), [(4096, 44_100), (2048, 48_000), (512, 16_000), (256, 8000), (32, 8000)])
def test_bands_that_touch_cover_every_bin_once_at_about_the_same_frequencies(n_fft, rate):
    bands, width_hz = uniform_bands(n_fft, rate), rate / n_fft
    published_hz = torch.tensor([band.start for band in uniform_bands(2048, 44_100)]) * 44_100 / 2048

    assert [index for band in bands for index in band] == list(range(n_fft // 2 + 1))
    for band in bands:
        assert (published_hz - band.start * width_hz).abs().min() <= width_hz / 2


def test_mel_bands_are_the_filters_of_librosa():
    bands = mel_bands(60, 2048, 44_100)

    assert [len(band) for band in bands] == MEL_WIDTHS
    assert bands[:3] == [range(7), range(4, 10), range(7, 13)]
    assert bands[-1] == range(895, 1025)


@pytest.mark.parametrize(
    ("n_bands", "n_fft", "rate"), [(1, 64, 8000), (8, 256, 8000), (40, 1024, 16_000), (5, 64, 900)]
)
def test_mel_bands_cover_every_bin(n_bands, n_fft, rate):
    bands = mel_bands(n_bands, n_fft, rate)

    assert len(bands) == n_bands
    assert {index for band in bands for index in band} == set(range(n_fft // 2 + 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_fft": 33}, "must be even"),
        ({"d_head": 7}, "must be even"),
        ({"hop_length": 17}, "must be from 1 to half"),
        ({"bands": "bark"}, "uniform, mel"),
        ({"bands": [3, 4]}, "add up to the 17 bins"),
        ({"bands": [0, 17]}, "must be positive"),
        ({"bands": []}, "must be positive"),
        ({"bands": "mel"}, "fewer n_bands"),
        ({"norm": "first"}, "last, paths"),
        ({"n_mask_layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_of_one_line(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**sizes)

    assert "\n" not in str(error.value)


def test_the_band_split_equals_one_linear_layer_per_band():
    widths, numbers = [2, 2, 4, 4, 4, 2, 6], noise(2, 5, 24)
    split = BandSplit(widths=widths, d_model=8)
    torch.nn.init.normal_(split.scale)

    rows = [part.split(widths, dim) for part, dim in ((numbers, -1), (split.scale, 0), (split.weight, 0))]
    expected = [
        F.linear(F.normalize(part, dim=-1) * width**0.5 * scale, weight.T, bias)
        for width, part, scale, weight, bias in zip(widths, *rows, split.bias, strict=True)
    ]

    torch.testing.assert_close(split(numbers), torch.stack(expected))


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("n_sources", [1, 2])
def test_masks_equal_one_network_per_band_and_source(n_layers, n_sources):
    widths, features = [2, 2, 4, 4, 4, 2, 6], noise(7, 2, 5, 8)
    network = BandMasks(widths=widths, n_sources=n_sources, d_model=8, d_hidden=16, n_layers=n_layers)

    rows = [2 * width for width in widths for _ in range(n_sources)]
    weights, biases = network.weight.split(rows), network.bias.split(rows)
    expected = []
    for s in range(n_sources):
        for k, hidden in enumerate(features):
            for layer in network.hidden:
                hidden = F.linear(hidden, layer.weight[k, s], layer.bias[k, s]).tanh()
            last = k * n_sources + s
            expected.append(F.glu(F.linear(hidden, weights[last], biases[last])))
    of_sources = [torch.cat(expected[7 * s : 7 * s + 7], -1) for s in range(n_sources)]

    torch.testing.assert_close(network(features), torch.stack(of_sources, 1))


def test_a_layer_is_gated_attention_and_a_feed_forward_network():
    layer = RoPELayer(d_model=8, n_heads=2, d_head=4, d_hidden=12, dropout=0.0)
    features, angles = noise(3, 10, 8), rotary_angles(10, 4, torch.device("cpu"))

    def normal(part, scale):
        return F.normalize(part, dim=-1) * 8**0.5 * scale

    normed = normal(features, layer.attention_norm.weight)
    query, key, value = layer.query_key_value(normed).split(8, -1)
    gates, heads = layer.gates(normed).sigmoid(), []
    for h, part in enumerate((slice(4), slice(4, 8))):
        scores = apply_rotary(query[..., part], angles) @ apply_rotary(key[..., part], angles).transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ value[..., part] * gates[..., [h]])
    expected = features + layer.merge(torch.cat(heads, -1))
    expected = expected + layer.narrow(F.gelu(layer.widen(normal(expected, layer.hidden_norm.weight))))

    torch.testing.assert_close(layer(features, angles), expected)


@pytest.mark.parametrize("bands", ["uniform", "mel", [3, 6, 24]])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_masks_of_one_give_the_mixture_and_masks_of_a_half_give_half(bands, n_channels):
    sizes = {"n_fft": 64, "hop_length": 20, "sample_rate": 8000, "n_bands": 5, "bands": bands}
    model, mixture = with_masks(tiny(n_channels=n_channels, n_sources=2, **sizes), 1.0), noise(2, 2, 333)

    torch.testing.assert_close(model(mixture), mixture[:, None].expand(-1, 2, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(with_masks(model, 0.5)(mixture)[:, 1], mixture / 2, atol=1e-5, rtol=0)


def test_masks_are_averaged_where_bands_overlap():
    model = with_masks(tiny(n_fft=64, sample_rate=8000, bands="mel", n_bands=2, n_channels=1), 1.0, 3.0)
    first, last = mel_bands(2, 64, 8000)

    masks = model.masks(torch.randn(1, 4, 33, 1, dtype=torch.complex64))[0, 0, 0, :, 0].real

    expected = [1.0 if i not in last else 3.0 if i not in first else 2.0 for i in range(33)]
    torch.testing.assert_close(masks, torch.tensor(expected))
    assert set(expected) == {1.0, 2.0, 3.0}


def test_zero_dc_leaves_a_third_of_a_constant():
    """Hann's window puts half of it in bin 0 and a quarter on either side; weighed by the window that is 1/8 of 3/8."""
    mixture = torch.ones(1, 1, 400)
    model, without = (with_masks(tiny(n_channels=1, zero_dc=zero_dc), 1.0) for zero_dc in (False, True))

    torch.testing.assert_close(model(mixture)[0], mixture)
    torch.testing.assert_close(without(mixture)[0, ..., 50:-50], mixture[..., 50:-50] / 3)


def test_a_stereo_model_separates_channels_jointly_and_rejects_mono():
    model, mixture = tiny().eval(), noise(1, 2, 300)
    other = mixture.clone()
    other[:, 1] = noise(1, 300, seed=1)

    with torch.no_grad():
        assert not torch.allclose(model(mixture)[:, :, 0], model(other)[:, :, 0])
    with pytest.raises(ValueError, match="separates 2 channels together"):
        model(mixture[:, :1])


def test_every_frame_and_band_affects_all_others():
    """One frame of noise in one band, elsewhere silence: attention along time, then across bands, spreads it."""
    model = tiny(n_channels=1, n_blocks=1).eval()
    silent = torch.zeros(1, 20, 17, 1, dtype=torch.complex64)
    heard = silent.clone()
    heard[0, 7, 12] = 1

    with torch.no_grad():
        assert ((model.masks(heard) - model.masks(silent)).abs().amax((0, 1, 4)) > 0).all()


def test_silence_gives_the_mixture_a_finite_gradient():
    mixture = torch.zeros(1, 2, 300).requires_grad_()
    tiny()(mixture).sum().backward()

    assert mixture.grad.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_does_not_change_the_gradients(dropout):
    gradients = []
    for checkpoint in (False, True):
        model = tiny(dropout=dropout, checkpoint=checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            (model(noise(1, 2, 300)) - noise(1, 1, 2, 300, seed=1)).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])

    torch.testing.assert_close(*gradients)


def test_checkpointing_stores_fewer_activations():
    stored = {}
    for checkpoint in (False, True):
        model, sizes = tiny(checkpoint=checkpoint, n_blocks=4), []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved, to=sizes: to.append(saved.numel()), lambda x: x):
            model(noise(1, 2, 300))
        stored[checkpoint] = sum(sizes)

    assert stored[True] < 0.6 * stored[False]


def test_dropout_is_only_active_in_training():
    model, mixture = tiny(dropout=0.5), noise(1, 2, 200)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))
