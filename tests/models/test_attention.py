import pytest
import torch
import torch.nn.functional as F

from unbraid.models.attention import apply_rotary, attend, rotary_angles


def heads(dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 17, 8, generator=rng).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_torch(dtype):
    exact = F.scaled_dot_product_attention(*heads())

    torch.testing.assert_close(
        attend(*heads(dtype)).float(), exact, rtol=0, atol=0.03 if dtype != exact.dtype else 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_preserves_the_mean(dtype):
    query, key, _ = heads(dtype)
    ones = torch.ones(2, 3, 17, 4000, dtype=dtype)
    dropped = attend(query, key, ones, dropout=0.5).float()

    assert dropped.std() > 0.01
    assert dropped.mean().item() == pytest.approx(1, abs=0.2)


def test_dot_products_of_rotated_vectors_depend_on_their_distance_alone():
    angles = rotary_angles(50, 8, torch.device("cpu"))
    query, key = (part[0, 0, 0].expand(50, 8) for part in heads()[:2])
    products = apply_rotary(query, angles) @ apply_rotary(key, angles).T

    for distance in (0, 1, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert (products.diagonal(0)[0] - products.diagonal(7)[0]).abs() > 1e-3


def test_rotation_preserves_lengths_and_the_first_frame():
    features = heads()[0]
    turned = apply_rotary(features, rotary_angles(17, 8, torch.device("cpu")))

    torch.testing.assert_close(turned.norm(dim=-1), features.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0, :], features[..., 0, :])
