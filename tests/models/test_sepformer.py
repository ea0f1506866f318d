import pytest
import torch
import torch.nn.functional as F

from unbraid.models.chunking import merge_chunks, published_padding, split_into_chunks
from unbraid.models.sepformer import RESepFormer, SepFormer, sinusoidal_positions

both = pytest.mark.parametrize("model_class", [SepFormer, RESepFormer])


def tiny(model_class=SepFormer, **sizes):
    sizes = {"n_filters": 8, "chunk_size": 6, "n_blocks": 1, "n_layers": 1, "n_heads": 2, "d_hidden": 8} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(**sizes)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model_class", "published"),
    [
        (SepFormer, 25.68e6),
        (RESepFormer, 7.955e6),  # SpeechBrain's recipe; 8.0 million in the paper
    ],
)
def test_the_defaults_have_the_published_size(model_class, published):
    with torch.device("meta"):
        model = model_class()

    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(published, abs=0.005e6)


@pytest.mark.parametrize("n_frames", [1, 3, 6, 20])
def test_merging_chunks_before_splitting_sources_gives_the_published_masks(n_frames):
    model, encoded = tiny(n_blocks=0), noise(2, n_frames, 8)
    features = model.enter(model.norm(encoded))
    chunks = split_into_chunks(F.pad(features, (0, 0, *published_padding(n_frames, 6, "pairs"))), 6)

    sources = merge_chunks(model.split(model.activation(chunks)), n_frames).unflatten(-1, (2, 8))

    expected = model.leave(model.output(sources).tanh() * model.gate(sources).sigmoid()).relu()
    torch.testing.assert_close(model.masks(encoded), expected, rtol=1e-5, atol=1e-6)


def test_re_sepformer_chunks_interact_only_across_chunks():
    """Six frames a chunk: with nothing across, what comes later cannot be heard; with it, it can."""
    encoded, later = noise(2, 24, 8).split(1)
    later = torch.cat([encoded[:, :18], later[:, 18:]], 1)

    def first_frames(model):
        with torch.no_grad():
            return [model.masks(each)[:, :18] for each in (encoded, later)]

    alone, together = first_frames(tiny(RESepFormer, n_blocks=1)), first_frames(tiny(RESepFormer, n_blocks=2))

    torch.testing.assert_close(*alone)
    assert not torch.allclose(*together, atol=1e-3)


def test_re_sepformer_adds_the_output_across_chunks_to_every_frame():
    model, encoded, seen = tiny(RESepFormer, n_blocks=2), noise(2, 20, 8), []
    model.within[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.within[0].register_forward_hook(lambda *args: seen.append(args[2]))
    model.across[0].register_forward_hook(lambda *args: seen.append(args[2]))

    model.masks(encoded)

    within, across, entered = seen
    added = (entered - within).unflatten(0, (2, -1))[:, :, 0]
    torch.testing.assert_close(added, across[:, 0, :, None].expand_as(added), rtol=1e-4, atol=1e-5)


def gradients(model, mixture):
    torch.manual_seed(1)  # for dropout
    model(mixture).square().sum().backward()
    return [weight.grad for weight in model.parameters()]


@both
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients(model_class, dropout, precision):
    sizes = {"n_blocks": 2, "n_layers": 2, "dropout": dropout}
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        stored = gradients(tiny(model_class, **sizes), noise(2, 1, 300))
        again = gradients(tiny(model_class, **sizes, checkpoint=True), noise(2, 1, 300))

    assert all(torch.equal(one, other) for one, other in zip(stored, again, strict=True))


@both
def test_checkpointing_stores_fewer_activations(model_class):
    def bytes_stored(model):
        stored = {}  # by address, as several operations keep the same tensor
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(t.data_ptr(), t), lambda t: t):
            model(noise(1, 1, 2000))
        return sum(tensor.nbytes for tensor in stored.values())

    sizes = {"n_blocks": 2, "n_layers": 4, "d_hidden": 32}
    once, again = (bytes_stored(tiny(model_class, **sizes, checkpoint=checkpoint)) for checkpoint in (False, True))

    assert again < 0.5 * once


def test_positions_are_sines_and_cosines_of_decreasing_rates():
    positions = sinusoidal_positions(50, 8, torch.device("cpu"))

    index, rate = 7, 10_000 ** (-4 / 8)  # channels 4 and 5 have the third of four rates
    assert positions[index, 4].item() == pytest.approx(torch.sin(torch.tensor(index * rate)).item(), abs=1e-5)
    assert positions[index, 5].item() == pytest.approx(torch.cos(torch.tensor(index * rate)).item(), abs=1e-5)
    assert positions[0].tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    "sizes", [{"n_heads": 3}, {"n_filters": 9, "n_heads": 3}, {"chunk_size": 5}, {"kernel_size": 15}]
)
@both
def test_sizes_that_do_not_fit_raise_an_error(model_class, sizes):
    with pytest.raises(ValueError, match="must be even"):
        tiny(model_class, **sizes)


def test_dropout_is_only_active_in_training():
    model, mixture = tiny(dropout=0.5), torch.ones(1, 1, 200)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))
