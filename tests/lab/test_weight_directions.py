"""Directions in weight space: filters of equal norm, exact linear combinations, the plane of a path."""

import numpy as np
import pytest
import torch
from small_models import TINY, make_model

from unbraid.lab.weight_directions import (
    filter_layouts,
    filter_normalised_direction,
    linear_combination,
    principal_plane,
    random_walk_variance_ratios,
    weights_digest,
)


def norms(tensor, name, filters):
    if name in filters and filters[name].group_sizes:
        groups = tensor.double().split(filters[name].group_sizes)
        return torch.cat([torch.linalg.vector_norm(group, dim=0) for group in groups])
    if name in filters:
        return torch.linalg.vector_norm(tensor.double(), dim=3)
    dims = (0,) if name.endswith("taps") else tuple(range(1, tensor.dim()))
    return torch.linalg.vector_norm(tensor.double(), dim=dims)


@pytest.mark.parametrize("model_name", TINY)
def test_each_filter_of_a_direction_has_the_norm_of_the_models_own(model_name):
    model = make_model(model_name)
    weights = dict(model.named_parameters())
    filters = filter_layouts(model)
    direction = filter_normalised_direction(weights, seed=0, filters=filters)

    assert direction
    assert bool(filters) == (model_name == "bs_roformer")
    for name, moved in direction.items():
        expected = norms(weights[name], name, filters)
        torch.testing.assert_close(norms(moved, name, filters), expected, rtol=1e-5, atol=1e-7)
    assert all(weights[name].dim() >= 2 for name in direction)
    assert not any(name.endswith("bias") for name in direction)


def test_biases_norms_and_scalars_are_not_moved():
    weights = dict(make_model("bs_roformer").named_parameters()) | dict(make_model("conv_tasnet").named_parameters())
    not_moved = set(weights) - set(filter_normalised_direction(weights, seed=0))

    assert {"norm.weight", "norm.bias", "slope", "split.bias", "estimate.hidden.0.bias", "narrow.bias"} <= not_moved
    assert "split.weight" not in not_moved


def test_a_zero_filter_of_one_band_and_source_stays_and_its_neighbours_move():
    model = make_model("bs_roformer")
    weights = dict(model.named_parameters())
    filters = filter_layouts(model)
    (linear,) = [name for name, layout in filters.items() if not layout.group_sizes][:1]
    (split,) = [name for name, layout in filters.items() if layout.group_sizes]
    first, second = filters[split].group_sizes[:2]
    with torch.no_grad():
        weights[linear][1, 0, 2] = 0
        weights[split][first : first + second, 3] = 0
    direction = filter_normalised_direction(weights, seed=0, filters=filters)

    assert torch.equal(direction[linear] == 0, weights[linear] == 0)
    assert torch.equal(direction[split] == 0, weights[split] == 0)
    assert int((direction[split] == 0).sum()) == second


def relu_loss(weights):
    """The mean squared error of two layers with a ReLU between them, on fixed examples."""
    x = torch.linspace(-2, 2, 21).double().view(7, 3).sin()
    target = torch.linspace(0, 1, 14).double().view(7, 2)
    output = (x @ weights["one.weight"].T).relu() @ weights["two.weight"].T
    return float((output - target).square().mean())


def test_rescaling_the_layers_of_a_relu_network_does_not_change_the_loss_along_its_direction():
    torch.manual_seed(0)
    weights = {"one.weight": torch.randn(4, 3).double(), "two.weight": torch.randn(2, 4).double()}
    scaled = {"one.weight": weights["one.weight"] * 20, "two.weight": weights["two.weight"] / 20}

    def losses_along(network, direction):
        return [relu_loss(linear_combination([network, direction], (1.0, x))) for x in np.linspace(-1, 1, 9)]

    losses = losses_along(weights, filter_normalised_direction(weights, seed=3))
    assert np.ptp(losses) > 0.1
    assert losses_along(scaled, filter_normalised_direction(scaled, seed=3)) == pytest.approx(losses, rel=1e-12)
    assert losses_along(scaled, filter_normalised_direction(weights, seed=3)) != pytest.approx(losses, rel=0.1)


def test_complex_weights_get_directions_combinations_and_planes():
    weights = {"weight": torch.randn(3, 5, dtype=torch.complex64)}
    direction = filter_normalised_direction(weights, seed=0)["weight"]

    assert direction.dtype == torch.complex64
    torch.testing.assert_close(
        torch.linalg.vector_norm(direction, dim=1), torch.linalg.vector_norm(weights["weight"], dim=1)
    )
    points = [{"weight": torch.randn(3, 5, dtype=torch.complex64)} for _ in range(3)]
    plane = principal_plane(points, ["weight"])
    projection = linear_combination([points[-1], *plane.axes], (1.0, *plane.coordinates[0]))["weight"]
    torch.testing.assert_close(projection, points[0]["weight"])
    moved = linear_combination([weights, {"weight": direction}], (1.0, 0.5))["weight"]
    torch.testing.assert_close(moved, weights["weight"] + 0.5 * direction)


def test_the_seed_decides_the_direction_and_a_zero_filter_does_not_move():
    weights = {"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
    first = filter_normalised_direction(weights, 1, 0)["weight"]
    again = filter_normalised_direction(weights, 1, 0)["weight"]
    second = filter_normalised_direction(weights, 1, 1)["weight"]

    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first[1], torch.zeros(2))


def test_linear_combinations_are_exact_at_the_anchors_and_skip_zero_coefficients():
    a = {"weight": torch.randn(5), "n": torch.tensor(7)}
    b = {"weight": torch.randn(5) * 1e-20, "n": torch.tensor(9)}
    b["weight"][0] = torch.inf

    assert torch.equal(linear_combination([a, b], (1.0, 0.0))["weight"], a["weight"])
    assert torch.equal(linear_combination([a, b], (0.0, 1.0))["weight"], b["weight"])
    assert linear_combination([a, {"other": torch.ones(1)}], (1.0, 0.5)).keys() == a.keys()
    assert linear_combination([a, b], (0.5, 0.5))["n"] == 7


def random_points(n, seed=0):
    torch.manual_seed(seed)
    return [{"a": torch.randn(4, 3), "b": torch.randn(()), "buffer": torch.randn(9)} for _ in range(n)]


def test_three_points_lie_in_their_plane():
    points = random_points(3)
    plane = principal_plane(points, ["a", "b"])

    assert plane.variance_ratios.sum() == pytest.approx(1)
    assert plane.distances == pytest.approx(np.zeros(3), abs=1e-6)
    for point, (x, y) in zip(points, plane.coordinates, strict=True):
        projection = linear_combination([points[-1], *plane.axes], (1.0, x, y))
        torch.testing.assert_close(projection["a"], point["a"])
        torch.testing.assert_close(projection["b"], point["b"])


def test_axes_and_variance_ratios_agree_with_the_singular_values():
    points = random_points(6, seed=1)
    plane = principal_plane(points, ["a", "b"])
    table = np.stack([torch.cat([p["a"].flatten(), p["b"][None]]).double().numpy() for p in points])
    _, singular, right = np.linalg.svd(table - table.mean(0), full_matrices=False)
    axes = [torch.cat([axis["a"].flatten(), axis["b"][None]]).numpy() for axis in plane.axes]

    assert plane.variance_ratios == pytest.approx(singular[:5] ** 2 / (singular**2).sum())
    assert abs(np.array(axes) @ right[:2].T) == pytest.approx(np.eye(2), abs=1e-9)
    moved = table - table[-1]
    assert plane.coordinates == pytest.approx(moved @ np.array(axes).T)
    assert plane.distances**2 + (plane.coordinates**2).sum(1) == pytest.approx((moved**2).sum(1))


def test_points_that_span_no_plane_are_refused():
    point = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="three points, not 2"):
        principal_plane([point, point], ["a"])
    with pytest.raises(ValueError, match="span no plane"):
        principal_plane([point, point, point], ["a"])
    with pytest.raises(ValueError, match="on a line"):
        principal_plane([{"a": torch.ones(3) * k} for k in range(4)], ["a"])


def test_a_random_walk_has_the_variance_ratios_of_theory():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((30, 20000)), axis=0)
    points = [{"a": torch.from_numpy(point)} for point in walk]

    assert principal_plane(points, ["a"]).variance_ratios[:3] == pytest.approx(
        random_walk_variance_ratios(30)[:3], rel=0.03
    )
    assert random_walk_variance_ratios(10000)[:2] == pytest.approx([6 / np.pi**2, 6 / np.pi**2 / 4], abs=1e-3)


def test_a_digest_changes_with_a_single_bit():
    state = {"a": torch.ones(3), "b": torch.zeros((), dtype=torch.bfloat16)}
    reordered = {name: state[name].clone() for name in ("b", "a")}
    one_bit_off = {"a": torch.tensor([1.0, 1.0, 1.0 + 2**-23]), "b": state["b"]}

    assert weights_digest([state]) == weights_digest([reordered])
    assert len({weights_digest([state]), weights_digest([one_bit_off]), weights_digest([state, state])}) == 3
