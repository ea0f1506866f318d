import torch
from hypothesis import given
from hypothesis import strategies as st

from unbraid.models.chunking import merge_chunks, split_into_chunks


@given(st.integers(1, 60), st.sampled_from([2, 6, 10]))
def test_splitting_and_merging_chunks_doubles_the_frames(n_frames, chunk_size):
    """Chunks overlap by half: every frame is in exactly two of them."""
    frames = torch.arange(1.0, 2 * n_frames * 3 + 1).reshape(2, n_frames, 3)

    chunks = split_into_chunks(frames, chunk_size)

    assert chunks.shape[2] == chunk_size
    assert torch.equal(merge_chunks(chunks, n_frames), 2 * frames)


@given(st.integers(1, 40))
def test_chunks_contain_consecutive_frames(n_frames):
    chunks = split_into_chunks(torch.arange(1.0, n_frames + 1).reshape(1, n_frames, 1), 6)[0, :, :, 0]

    for start, chunk in enumerate(chunks):
        expected = torch.arange(6.0) + 3 * (start - 1) + 1
        assert torch.equal(chunk, expected.where((expected >= 1) & (expected <= n_frames), 0))
