import pytest
import torch
import torch.nn.functional as F

from unbraid.models.sepreformer import (
    ChannelsLastBatchNorm,
    GlobalAttention,
    Layer,
    SepReformer,
    SourceAttention,
    Upsample,
    normalize_rms,
    relative_to_absolute,
)

TINY = {
    "n_filters": 8,
    "d_model": 8,
    "n_stages": 3,
    "n_heads": 2,
    "n_split_layers": 1,
    "n_rebuild_layers": 1,
    "local_kernel": 7,
    "max_distance": 6,
    "layer_scale": 1.0,
}


def tiny(**changes):
    return seeded(SepReformer, **(TINY | changes))


def seeded(make, *args, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **sizes)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "count"), [("T", 3_711_488), ("S", 4_527_616), ("B", 14_147_840), ("M", 17_307_904)])
def test_the_published_sizes_have_the_parameters_of_the_published_code(size, count):
    """Counted in the authors' code (github.com/dmlguq456/SepReformer, 43cbad8) without `out_layer_bn` and `decoder_bn`.

    Those heads are for a further loss in training. Table 2 of the paper leaves them out too: 3.7, 4.5, 14.2 and 17.3 M.
    """
    with torch.device("meta"):
        model = SepReformer(size=size)

    assert sum(weight.numel() for weight in model.parameters()) == count


def test_arguments_override_the_published_size():
    with torch.device("meta"):
        model = SepReformer(size="T", n_stages=2, stride=8)

    assert (model.n_stages, model.encoder.kernel_size, model.encoder.stride) == (2, 16, 8)
    assert model.enter.out_features == 64


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 20, 44, 45, 77, 301])
def test_every_length_comes_back_whatever_the_number_of_stages(time):
    """Three halvings want a multiple of 8 frames; 44 samples have exactly 8 of them."""
    sources = tiny()(noise(1, 1, time))

    assert sources.shape == (1, 2, 1, time)
    assert sources.isfinite().all()


@pytest.mark.parametrize("gain", [1e-6, 0.01, 1000.0])
def test_the_output_follows_the_gain(gain):
    model, mixture = tiny(), noise(2, 1, 200)

    torch.testing.assert_close(model(gain * mixture), gain * model(mixture), rtol=1e-4, atol=1e-5 * gain)


def test_normalize_rms_returns_the_rms_and_0_for_silence():
    waveform = torch.tensor([[3.0, -3.0, 3.0, -3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 2e-5, 0.0, 0.0]], requires_grad=True)

    plain, levels = normalize_rms(waveform)
    (plain * levels).sum().backward()

    torch.testing.assert_close(levels, torch.tensor([[3.0], [0.0], [1e-5]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(plain[[0, 2]], torch.tensor([[1.0, -1, 1, -1], [0, 2, 0, 0]]), rtol=1e-5, atol=0)
    assert waveform.grad.isfinite().all()


@pytest.mark.parametrize("n_frames", [1, 2, 7])
def test_relative_scores_become_absolute_scores(n_frames):
    distances = torch.arange(n_frames - 1, -n_frames - 1, -1).float().expand(2, n_frames, -1)
    frames = torch.arange(float(n_frames))

    assert torch.equal(relative_to_absolute(distances), (frames[:, None] - frames).expand(2, -1, -1))


def test_global_attention_equals_attention_with_relative_positions():
    model = tiny().double()
    attention, features, n_frames = model.separating[0].layers[0].globally, noise(1, 9, 8).double(), 9
    query, key, value = (
        part.unflatten(-1, (2, 4)) for part in attention.query_key_value(attention.norm(features)).chunk(3, -1)
    )
    scores = torch.zeros(2, n_frames, n_frames, dtype=torch.double)
    for i in range(n_frames):
        for j in range(n_frames):
            at_distance = model.positions.weight[min(max(i - j, -6), 5) + 6]  # beyond 6 frames all are the same
            scores[:, i, j] = (query[0, i] * (key[0, j] + at_distance)).sum(-1) / 2
    expected = torch.einsum("hij,jhc->ihc", scores.softmax(-1), value[0]).flatten(1)

    attended = attention.attend(features, model.relative_positions(n_frames, features.device))

    torch.testing.assert_close(attended[0], attention.merge(expected))


def test_global_attention_averages_frames_and_gates_its_output():
    attention = seeded(GlobalAttention, d_model=8, n_heads=2, layer_scale=1.0, dropout=0.0)
    positions, low = noise(2, 5, 4), noise(1, 5, 8)
    swing = noise(1, 5, 4, 8, seed=1)
    high = (low[:, :, None] + swing - swing.mean(2, keepdim=True)).flatten(1, 2)

    added = attention(high, positions) - high

    expected = attention.gate(attention.gate_norm(high)).sigmoid() * attention.attend(low, positions).repeat_interleave(
        4, 1
    )
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_sources", [1, 2, 3])
def test_attention_over_sources_equals_torch_at_each_frame(n_sources):
    attention = seeded(SourceAttention, d_model=8, n_sources=n_sources, n_heads=2, layer_scale=0.5, dropout=0.0)
    features = noise(2 * n_sources, 11, 8)
    split = attention.query_key_value(attention.norm(features)).unflatten(0, (2, n_sources))
    heads = F.scaled_dot_product_attention(
        *(part.unflatten(-1, (2, 4)).permute(0, 2, 3, 1, 4) for part in split.chunk(3, -1))
    )
    merged = attention.merge(heads.permute(0, 3, 1, 2, 4).flatten(-2)).flatten(0, 1)

    torch.testing.assert_close(attention(features), features + 0.5 * merged)


def test_a_layer_is_equivariant_to_the_order_of_sources():
    """Swapped in, swapped out: which source is the first only the split decides."""
    sizes = {"d_model": 8, "n_heads": 2, "local_kernel": 5, "norm": "gln", "layer_scale": 1.0, "dropout": 0.0}
    layer, features, positions = seeded(Layer, n_sources=2, **sizes), noise(2, 12, 8), noise(2, 3, 4)

    swapped = layer(features.flip(0), positions)

    torch.testing.assert_close(swapped, layer(features, positions).flip(0))
    alone = layer(features[:1].repeat(2, 1, 1), positions)
    assert not torch.allclose(alone[0], layer(features, positions)[0], atol=1e-3)


def test_upsampling_equals_a_projection_of_both_rates_concatenated():
    double, low, high = seeded(Upsample, d_model=4), noise(2, 3, 4), noise(2, 6, 4, seed=1)
    both = torch.cat([low.repeat_interleave(2, 1), high], -1)
    expected = F.linear(both, torch.cat([double.low.weight, double.high.weight], 1), double.low.bias)

    torch.testing.assert_close(double(low, high), expected)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_torch(training):
    ours, theirs = ChannelsLastBatchNorm(5).train(training), torch.nn.BatchNorm1d(5).train(training)
    features = 3 + noise(2, 30, 5)

    torch.testing.assert_close(ours(features), theirs(features.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize(("norm", "dependent"), [("gln", False), ("cln", False), ("batch", True)])
def test_only_batch_norm_makes_examples_depend_on_each_other(norm, dependent):
    model, mixture = tiny(norm=norm), noise(2, 1, 120)

    with torch.no_grad():
        together, alone = model(mixture)[:1], model(mixture[:1])

    assert torch.allclose(together, alone, atol=1e-4) != dependent


def test_dropout_is_only_active_in_training():
    model, mixture = tiny(dropout=0.5), noise(1, 1, 200)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": "L"}, "'L' is not one of T, S, B, M"),
        ({"norm": "layer"}, "'layer' is not one of gln, cln, batch"),
        ({"n_heads": 3}, "d_model 8 must be a multiple of n_heads 3"),
        ({"stride": 5}, "must be a multiple of stride"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**sizes)
