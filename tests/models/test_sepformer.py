import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.models.sepformer import SepFormer, sinusoids


def tiny(**sizes):
    sizes = {"n_filters": 8, "chunk_size": 6, "n_blocks": 1, "n_layers": 1, "n_heads": 2, "d_hidden": 8} | sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SepFormer(**sizes)


def test_the_defaults_have_the_published_size():
    with torch.device("meta"):
        model = SepFormer()

    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(25.68e6, abs=0.005e6)


@given(st.integers(1, 60), st.sampled_from([2, 6, 10]))
def test_chunks_that_are_cut_and_joined_are_twice_what_they_were(n_frames, chunk_size):
    """Chunks overlap by half: every frame is in exactly two of them."""
    model, frames = tiny(chunk_size=chunk_size), torch.arange(1.0, 2 * n_frames * 3 + 1).reshape(2, n_frames, 3)

    chunks = model.cut(frames)

    assert chunks.shape[2] == chunk_size
    assert torch.equal(model.join(chunks, n_frames), 2 * frames)


@given(st.integers(1, 40))
def test_a_chunk_holds_frames_that_follow_each_other(n_frames):
    chunks = tiny(chunk_size=6).cut(torch.arange(1.0, n_frames + 1).reshape(1, n_frames, 1))[0, :, :, 0]

    for start, chunk in enumerate(chunks):
        expected = torch.arange(6.0) + 3 * (start - 1) + 1
        assert torch.equal(chunk, expected.where((expected >= 1) & (expected <= n_frames), 0))


def test_positions_are_sines_and_cosines_of_falling_rates():
    positions = sinusoids(50, 8, torch.device("cpu"))

    place, rate = 7, 10_000 ** (-4 / 8)  # channels 4 and 5 have the third of four rates
    assert positions[place, 4].item() == pytest.approx(torch.sin(torch.tensor(place * rate)).item(), abs=1e-5)
    assert positions[place, 5].item() == pytest.approx(torch.cos(torch.tensor(place * rate)).item(), abs=1e-5)
    assert positions[0].tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    "sizes", [{"n_heads": 3}, {"n_filters": 9, "n_heads": 3}, {"chunk_size": 5}, {"kernel_size": 15}]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="must be even"):
        tiny(**sizes)


def test_the_explicit_attention_is_the_fused_one():
    """The CPU in bfloat16 takes another way than everything else."""
    layer = tiny(d_hidden=16).within[0].layers[0].eval()
    features = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))

    fused = layer.attend(features)
    explicit = layer.bfloat16().attend(features.bfloat16())

    torch.testing.assert_close(explicit.float(), fused, atol=0.02, rtol=0.05)


def test_dropout_drops_in_training_and_not_elsewhere():
    model, mixture = tiny(dropout=0.5), torch.ones(1, 1, 200)

    assert not torch.equal(model(mixture), model(mixture))
    model.eval()
    assert torch.equal(model(mixture), model(mixture))
