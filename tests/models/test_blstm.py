import math

import pytest
import torch
from small_models import make_model

from unbraid.dsp import stft
from unbraid.losses.spectral import deep_clustering
from unbraid.model_output import get_sources
from unbraid.models.blstm import BLSTM, Chimera, log_magnitude

SIZES = {"hidden": 12, "n_layers": 2, "n_fft": 16, "hop_length": 8}

both = pytest.mark.parametrize("name", ["blstm", "chimera"])


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tones(time=500):
    """A low and a high tone, ``(1, 2, 1, time)``."""
    at = torch.arange(time)
    return torch.stack([(0.1 * at).sin(), (2.0 * at).sin()])[None, :, None]


def n_parameters(model):
    """Of the default sizes; on the meta device, as no weight has to be drawn for that."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in model().parameters())


def test_chimera_has_the_published_32_9_million_parameters():
    """As the table of Luo and Mesgarani, "Conv-TasNet", arXiv:1809.07454, counts Chimera++."""
    assert n_parameters(Chimera) == pytest.approx(32.9e6, rel=0.002)


def test_mask_inference_has_the_parameters_of_four_layers_of_600_units():
    """Counted from the sizes of the AutoClip paper: the gates of four layers, the masks, a scale and a shift."""
    lstm = 2 * 4 * 600 * ((129 + 600 + 2) + 3 * (1200 + 600 + 2))

    assert n_parameters(BLSTM) == lstm + (1200 + 1) * 2 * 129 + 2 * 129
    assert n_parameters(BLSTM) == pytest.approx(29.8e6, rel=0.002)


@pytest.mark.parametrize("sizes", [{}, {"n_fft": 20, "hop_length": 6, "n_layers": 1}, {"n_fft": 64, "hop_length": 16}])
@pytest.mark.parametrize("time", [1, 7, 8, 9, 33, 500, 1001])
@both
def test_every_length_comes_back_exactly(name, time, sizes):
    output = make_model(name, n_sources=3, **sizes)(noise(2, 2, time))

    assert get_sources(output).shape == (2, 3, 2, time)
    assert get_sources(output).isfinite().all()


def test_softmax_masks_sum_to_the_mixture():
    mixture = noise(2, 1, 700)

    torch.testing.assert_close(make_model("blstm", mask="softmax")(mixture).sum(1), mixture, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("bias", "share"), [(-100.0, 0.0), (0.0, 0.5), (100.0, 1.0)])
def test_a_constant_mask_is_a_gain(bias, share):
    model, mixture = make_model("blstm"), noise(1, 2, 300)
    with torch.no_grad():
        model.masks.weight.zero_()
        model.masks.bias.fill_(bias)

        torch.testing.assert_close(model(mixture), share * mixture[:, None].expand(-1, 2, -1, -1), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gain", [1e-6, 1e-4, 300.0])
@both
def test_masks_and_embedding_do_not_depend_on_the_level(name, gain):
    model, mixture = make_model(name).eval(), noise(2, 1, 600)
    plain, changed = model(mixture), model(gain * mixture)

    torch.testing.assert_close(get_sources(changed) / gain, get_sources(plain), atol=1e-6, rtol=1e-3)
    if name == "chimera":
        torch.testing.assert_close(changed.embedding, plain.embedding, atol=1e-5, rtol=1e-4)


def test_a_flat_spectrum_has_the_logarithm_of_the_inverse_floor():
    flat = torch.full((1, 4, 9), 3 + 4j, dtype=torch.complex64)

    torch.testing.assert_close(log_magnitude(flat), torch.full((1, 4, 9), math.log(1e8)))


def test_silence_has_features_of_zero_and_a_finite_gradient():
    silence = torch.zeros(1, 4, 9, dtype=torch.complex64, requires_grad=True)
    features = log_magnitude(silence)
    features.sum().backward()

    assert not features.any()
    assert silence.grad.isfinite().all()


def test_the_embedding_has_a_unit_vector_for_each_bin():
    mixture = noise(2, 3, 205)
    output = Chimera(**SIZES, embedding_dim=5)(mixture)
    spectrum = stft(mixture, n_fft=output.n_fft, hop_length=output.hop_length, window=torch.ones(16))

    assert (output.n_fft, output.hop_length) == (16, 8)
    assert output.embedding.shape == (*spectrum.mT.shape, 5)
    torch.testing.assert_close(output.embedding.norm(dim=-1), torch.ones(spectrum.mT.shape))


def test_the_sources_of_chimera_depend_on_the_masks_alone():
    model, mixture = Chimera(**SIZES), noise(2, 1, 300)
    alone = BLSTM(**SIZES)
    alone.load_state_dict(model.masker.state_dict())

    assert torch.equal(model(mixture).sources, alone(mixture))


def test_both_heads_of_chimera_and_the_lstm_get_a_gradient():
    model, sources = make_model("chimera"), noise(2, 2, 1, 400)
    output = model(sources.sum(1))
    clustering = deep_clustering(output.embedding, sources, sources.sum(1), n_fft=16, hop_length=8)
    (clustering.sum() + (output.sources - sources).square().mean()).backward()

    assert [key for key, weight in model.named_parameters() if not weight.grad.any()] == []


@both
def test_silence_gives_finite_gradients(name):
    model, silence = make_model(name), torch.zeros(2, 1, 300, requires_grad=True)
    output = model(silence)
    (get_sources(output).sum() + (output.embedding[..., 0].sum() if name == "chimera" else 0)).backward()

    assert not get_sources(output).any()
    assert all(tensor.grad.isfinite().all() for tensor in (silence, *model.parameters()) if tensor.grad is not None)


def test_deep_clustering_separates_two_tones_in_a_few_steps():
    model, sources = make_model("chimera"), tones()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(15):
        output = model(sources.sum(1))
        loss = deep_clustering(output.embedding, sources, sources.sum(1), n_fft=16, hop_length=8).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[0] > 0.3
    assert losses[-1] < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_under_autocast_equals_that_of_float32(dtype):
    gradients = []
    for enabled in (False, True):
        model, mixture = make_model("chimera", hidden=32), noise(2, 1, 500)
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = model(mixture)
        (output.sources.square().mean() / 1e-3 + output.embedding[..., 0].mean()).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))

    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_dropout_is_only_active_in_training(n_layers):
    model, mixture = make_model("blstm", dropout=0.3, n_layers=n_layers), noise(1, 1, 300)
    torch.manual_seed(0)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))


@pytest.mark.parametrize("model", [BLSTM, Chimera])
@pytest.mark.parametrize("wrong", [{"n_fft": 255}, {"hop_length": 129}, {"hop_length": 0}, {"mask": "tanh"}])
def test_sizes_that_do_not_fit_raise_an_error_with_their_value(model, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        model(hidden=4, n_layers=1, **wrong)
