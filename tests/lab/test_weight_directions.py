"""Points in the space of weights: filters of equal norm, sums that are exact, the plane of a path."""

import numpy as np
import pytest
import torch
from small_models import TINY, as_it_is

from unbraid.lab.weight_directions import (
    combined,
    digest_of,
    filter_normalised,
    filters_of,
    plane_of,
    random_walk_shares,
)


def norms(tensor, name, filters):
    if name in filters and filters[name].rows:
        return torch.cat([torch.linalg.vector_norm(part.double(), dim=0) for part in tensor.split(filters[name].rows)])
    if name in filters:
        return torch.linalg.vector_norm(tensor.double(), dim=3)
    dims = (0,) if name.endswith("taps") else tuple(range(1, tensor.dim()))
    return torch.linalg.vector_norm(tensor.double(), dim=dims)


@pytest.mark.parametrize("name", TINY)
def test_each_filter_of_a_direction_is_as_long_as_the_models_own(name):
    model = as_it_is(name)
    weights, filters = dict(model.named_parameters()), filters_of(model)
    direction = filter_normalised(weights, seed=0, filters=filters)

    assert direction
    assert bool(filters) == (name == "bs_roformer")
    for part, drawn in direction.items():
        torch.testing.assert_close(
            norms(drawn, part, filters), norms(weights[part], part, filters), rtol=1e-5, atol=1e-7
        )
    assert all(weight.dim() >= 2 for part, weight in weights.items() if part in direction)
    assert not any(part.endswith("bias") for part in direction)


def test_biases_norms_and_single_numbers_are_left_where_they_are():
    weights = dict(as_it_is("bs_roformer").named_parameters()) | dict(as_it_is("conv_tasnet").named_parameters())
    left = set(weights) - set(filter_normalised(weights, seed=0))

    assert {"norm.weight", "norm.bias", "slope", "split.bias", "estimate.hidden.0.bias", "narrow.bias"} <= left
    assert "split.weight" not in left


def test_a_filter_of_zeros_in_one_band_and_source_does_not_move_and_its_neighbours_do():
    model = as_it_is("bs_roformer")
    weights, filters = dict(model.named_parameters()), filters_of(model)
    (linear,) = [name for name, given in filters.items() if not given.rows][:1]
    (split,) = [name for name, given in filters.items() if given.rows]
    first, second = filters[split].rows[:2]
    with torch.no_grad():
        weights[linear][1, 0, 2] = 0
        weights[split][first : first + second, 3] = 0
    direction = filter_normalised(weights, seed=0, filters=filters)

    assert torch.equal(direction[linear] == 0, weights[linear] == 0)
    assert torch.equal(direction[split] == 0, weights[split] == 0)
    assert int((direction[split] == 0).sum()) == second


def relu_loss(weights):
    """Of two layers with a ReLU between, on fixed examples."""
    given, target = torch.linspace(-2, 2, 21).double().view(7, 3).sin(), torch.linspace(0, 1, 14).double().view(7, 2)
    made = (given @ weights["one.weight"].T).relu() @ weights["two.weight"].T
    return float((made - target).square().mean())


def test_a_network_with_layers_rescaled_has_the_same_loss_along_its_direction():
    torch.manual_seed(0)
    weights = {"one.weight": torch.randn(4, 3).double(), "two.weight": torch.randn(2, 4).double()}
    scaled = {"one.weight": weights["one.weight"] * 20, "two.weight": weights["two.weight"] / 20}

    def along(net, direction):
        return [relu_loss(combined([net, direction], (1.0, at))) for at in np.linspace(-1, 1, 9)]

    losses = along(weights, filter_normalised(weights, seed=3))
    assert np.ptp(losses) > 0.1
    assert along(scaled, filter_normalised(scaled, seed=3)) == pytest.approx(losses, rel=1e-12)
    assert along(scaled, filter_normalised(weights, seed=3)) != pytest.approx(losses, rel=0.1)


def test_complex_weights_are_moved_and_summed_too():
    weights = {"weight": torch.randn(3, 5, dtype=torch.complex64)}
    direction = filter_normalised(weights, seed=0)["weight"]

    assert direction.dtype == torch.complex64
    torch.testing.assert_close(
        torch.linalg.vector_norm(direction, dim=1), torch.linalg.vector_norm(weights["weight"], dim=1)
    )
    points = [{"weight": torch.randn(3, 5, dtype=torch.complex64)} for _ in range(3)]
    plane = plane_of(points, ["weight"])
    shadow = combined([points[-1], *plane.axes], (1.0, *plane.path[0]))["weight"]
    torch.testing.assert_close(shadow, points[0]["weight"])
    moved = combined([weights, {"weight": direction}], (1.0, 0.5))["weight"]
    torch.testing.assert_close(moved, weights["weight"] + 0.5 * direction)


def test_a_direction_is_its_seeds_and_a_filter_of_zeros_does_not_move():
    weights = {"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
    one, again, other = (filter_normalised(weights, seed, index)["weight"] for seed, index in ((1, 0), (1, 0), (1, 1)))

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[1], torch.zeros(2))


def test_sums_are_exact_at_the_anchors_and_leave_out_what_counts_nothing():
    a = {"weight": torch.randn(5), "n": torch.tensor(7)}
    b = {"weight": torch.randn(5) * 1e-20, "n": torch.tensor(9)}
    b["weight"][0] = torch.inf

    assert torch.equal(combined([a, b], (1.0, 0.0))["weight"], a["weight"])
    assert torch.equal(combined([a, b], (0.0, 1.0))["weight"], b["weight"])
    assert combined([a, {"other": torch.ones(1)}], (1.0, 0.5)).keys() == a.keys()
    assert combined([a, b], (0.5, 0.5))["n"] == 7


def random_points(n, seed=0):
    torch.manual_seed(seed)
    return [{"a": torch.randn(4, 3), "b": torch.randn(()), "buffer": torch.randn(9)} for _ in range(n)]


def test_the_plane_of_three_points_holds_them_all():
    points = random_points(3)
    plane = plane_of(points, ["a", "b"])

    assert plane.shares.sum() == pytest.approx(1)
    assert plane.distances == pytest.approx(np.zeros(3), abs=1e-6)
    for point, (x, y) in zip(points, plane.path, strict=True):
        shadow = combined([points[-1], *plane.axes], (1.0, x, y))
        torch.testing.assert_close(shadow["a"], point["a"])
        torch.testing.assert_close(shadow["b"], point["b"])


def test_a_paths_axes_and_shares_are_those_of_the_singular_values():
    points = random_points(6, seed=1)
    plane = plane_of(points, ["a", "b"])
    table = np.stack([torch.cat([p["a"].flatten(), p["b"][None]]).double().numpy() for p in points])
    _, singular, right = np.linalg.svd(table - table.mean(0), full_matrices=False)
    axes = [torch.cat([axis["a"].flatten(), axis["b"][None]]).numpy() for axis in plane.axes]

    assert plane.shares == pytest.approx(singular[:5] ** 2 / (singular**2).sum())
    assert abs(np.array(axes) @ right[:2].T) == pytest.approx(np.eye(2), abs=1e-9)
    moved = table - table[-1]
    assert plane.path == pytest.approx(moved @ np.array(axes).T)
    assert plane.distances**2 + (plane.path**2).sum(1) == pytest.approx((moved**2).sum(1))


def test_points_without_a_plane_are_refused():
    one = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="three points, not 2"):
        plane_of([one, one], ["a"])
    with pytest.raises(ValueError, match="span no plane"):
        plane_of([one, one, one], ["a"])
    with pytest.raises(ValueError, match="on a line"):
        plane_of([{"a": torch.ones(3) * k} for k in range(4)], ["a"])


def test_a_random_walk_has_the_shares_that_theory_says():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((30, 20000)), axis=0)
    points = [{"a": torch.from_numpy(point)} for point in walk]

    assert plane_of(points, ["a"]).shares[:3] == pytest.approx(random_walk_shares(30)[:3], rel=0.03)
    assert random_walk_shares(10000)[:2] == pytest.approx([6 / np.pi**2, 6 / np.pi**2 / 4], abs=1e-3)


def test_a_digest_tells_a_single_bit():
    one = {"a": torch.ones(3), "b": torch.zeros((), dtype=torch.bfloat16)}
    moved = {"a": torch.tensor([1.0, 1.0, 1.0 + 2**-23]), "b": one["b"]}

    assert digest_of([one]) == digest_of([{name: one[name].clone() for name in ("b", "a")}])
    assert len({digest_of([one]), digest_of([moved]), digest_of([one, one])}) == 3
