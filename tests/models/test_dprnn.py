import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from unbraid.models.chunking import merge_chunks, published_padding, split_into_chunks
from unbraid.models.dprnn import DPRNN


def tiny(**sizes):
    sizes = {"n_filters": 12, "bottleneck": 8, "hidden": 6, "chunk_size": 10, "n_blocks": 2} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DPRNN(**sizes)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SPEECHBRAIN = {"n_filters": 256, "bottleneck": 256, "hidden": 256, "chunk_size": 250}


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({"bottleneck": 64}, 2.6e6),  # the paper's table; 64 filters of 16 samples
        ({}, 3_652_865),  # Asteroid's DPRNNTasNet(n_src=2)
        (SPEECHBRAIN, 14_617_089 + 256),  # its recipe; the bias before the chunks is ours
    ],
)
def test_the_sizes_have_the_published_numbers_of_parameters(sizes, published):
    with torch.device("meta"):
        model = DPRNN(**sizes)

    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(published, rel=0.02 * (sizes != {}))


def as_published(model, mixture):
    """The published network, channels first and in its order, from torch's own layers: ``(batch, 1, time)`` in."""
    batch, _, time = mixture.shape
    kernel = model.encoder.kernel_size
    encoded = F.conv1d(mixture, model.encoder.filters.weight[:, None], stride=model.encoder.stride)
    features = global_norm(model.norm, encoded)
    features = F.conv1d(features, model.enter.weight[..., None], model.enter.bias)
    size, n_frames = model.chunk_size, features.shape[-1]
    geometry = {"kernel_size": (size, 1), "padding": (size, 0), "stride": (size // 2, 1)}
    chunks = F.unfold(features[..., None], **geometry)
    n_chunks, width = chunks.shape[-1], features.shape[1]
    chunks = chunks.reshape(batch, width, size, n_chunks)
    for i, path in enumerate(model.paths):
        axes = (0, 2, 3, 1) if i % 2 else (0, 3, 2, 1)  # across chunks, and within them
        rows = chunks.permute(axes)
        found = path.merge.narrow(lstm(path.lstm, rows.flatten(0, 1))).reshape(rows.shape)
        back = [axes.index(axis) for axis in range(4)]
        chunks = chunks + global_norm(path.merge.norm, found.permute(back))
    split = F.conv2d(model.activation(chunks), model.split.weight[..., None, None], model.split.bias)
    split = split.reshape(batch * model.n_sources, width * size, n_chunks)
    joined = F.fold(split, (n_frames, 1), **geometry)[..., 0].transpose(1, 2)
    masks = model.leave(model.output(joined).tanh() * model.gate(joined).sigmoid()).transpose(1, 2).sigmoid()
    masked = masks.unflatten(0, (batch, -1)) * encoded[:, None]
    sources = F.conv_transpose1d(
        masked.flatten(0, 1), model.decoder.filters.weight.T[:, None], stride=model.encoder.stride
    )
    assert sources.shape[-1] == time == (n_frames - 1) * model.encoder.stride + kernel
    return sources.reshape(batch, model.n_sources, 1, time)


def global_norm(norm, features):
    return F.group_norm(features, 1, norm.weight, norm.bias, norm.eps)


def lstm(layer, rows):
    """Both directions for themselves, one frame after the other: ``(batch, frame, channel)`` in."""
    found = []
    for way in ("", "_reverse"):
        weights = [getattr(layer, f"{name}_l0{way}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        state, outputs = (rows.new_zeros(2, len(rows), layer.hidden_size)).unbind(), []
        for frame in rows.flip(1).unbind(1) if way else rows.unbind(1):
            state = torch.lstm_cell(frame, state, *weights)
            outputs.append(state[0])
        found.append(torch.stack(outputs[::-1] if way else outputs, 1))
    return torch.cat(found, -1)


@pytest.mark.parametrize("n_frames", [1, 10, 19, 20, 33])
def test_dprnn_equals_the_published_network(n_frames):
    """Lengths that fill whole frames: elsewhere the published front end leaves the last samples out."""
    model = tiny()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * noise(*weight.shape)  # norms and slopes of their own
        mixture = noise(2, 1, 16 + 8 * (n_frames - 1))

        torch.testing.assert_close(model(mixture), as_published(model, mixture), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 60), st.sampled_from([2, 6, 10]))
def test_chunk_padding_gives_the_chunks_of_unfold(n_frames, chunk_size):
    frames = noise(2, n_frames, 3)
    before, after = published_padding(n_frames, chunk_size, "chunk")

    chunks = split_into_chunks(F.pad(frames, (0, 0, before, after)), chunk_size)

    columns = frames.transpose(1, 2)[..., None]
    unfolded = F.unfold(columns, (chunk_size, 1), padding=(chunk_size, 0), stride=(chunk_size // 2, 1))
    assert torch.equal(chunks, unfolded.unflatten(1, (3, chunk_size)).permute(0, 3, 2, 1))
    assert torch.equal(merge_chunks(chunks, before + n_frames)[:, before:], 2 * frames)


@given(st.integers(1, 60), st.sampled_from([2, 6, 10]))
def test_pairs_padding_gives_an_even_number_of_chunks(n_frames, chunk_size):
    before, after = published_padding(n_frames, chunk_size, "pairs")
    chunks = split_into_chunks(F.pad(noise(1, n_frames, 1), (0, 0, before, after)), chunk_size)

    assert before == 0
    assert 1 <= after <= chunk_size
    assert chunks.shape[1] % 2 == 0


def test_padding_and_activations_change_the_output():
    mixture, plain = noise(1, 1, 400), tiny()

    for other in (tiny(ends="pairs"), tiny(rectify=True), tiny(mask="relu")):
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(plain(mixture), other(mixture), rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"mask": "tanh"}, "sigmoid"), ({"ends": "half"}, "pairs"), ({"chunk_size": 9}, "must be even")],
)
def test_invalid_options_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)
