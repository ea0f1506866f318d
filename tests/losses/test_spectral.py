import math

import pytest
import torch

from unbraid.losses.pit import SeparationLoss
from unbraid.losses.spectral import (
    deep_clustering,
    mask_inference,
    multi_resolution_l1,
    multi_resolution_stft,
    whitened_kmeans,
)

SIZES = {"n_fft": 16, "hop_length": 8}

every_resolution = pytest.mark.parametrize("loss", [multi_resolution_stft, multi_resolution_l1])
clustering = pytest.mark.parametrize("loss", [deep_clustering, whitened_kmeans])
both_weightings = pytest.mark.parametrize("weighting", ["magnitude", "active"])


def signals(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum(signal, n_fft, hop_length, window):
    """By torch, ``(batch, freq, frame)``."""
    return torch.stft(signal, n_fft, hop_length, len(window), window, return_complex=True)


# Multi-resolution


def test_magnitudes_at_three_resolutions_are_those_of_torch():
    estimate, target = signals(3, 5000).double(), signals(3, 5000, seed=1).double()
    expected = torch.zeros(3).double()
    for n_fft, hop, length in ((2048, 240, 1200), (1024, 120, 600), (512, 50, 240)):
        window = torch.hann_window(length).double()
        one, other = (spectrum(signal, n_fft, hop, window).abs().clamp_min(1e-4) for signal in (estimate, target))
        convergence = (one - other).square().sum((1, 2)).sqrt() / other.square().sum((1, 2)).sqrt()
        expected += (convergence + (one / other).log().abs().mean((1, 2))) / 3

    torch.testing.assert_close(multi_resolution_stft(estimate, target), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_wrong_gain_costs_its_deviation_and_its_logarithm(gain):
    target = signals(2, 8000)

    expected = torch.full((2,), abs(gain - 1) + abs(math.log(gain)))
    torch.testing.assert_close(multi_resolution_stft(gain * target, target), expected, atol=1e-3, rtol=0)


def test_polarity_changes_complex_spectra_and_not_magnitudes():
    target = signals(2, 1000)

    assert not multi_resolution_stft(-target, target).any()
    torch.testing.assert_close(multi_resolution_l1(-target, target), 2 * multi_resolution_l1(0 * target, target))


def test_complex_spectra_at_five_resolutions_are_those_of_torch():
    estimate, target = signals(2, 6000).double(), signals(2, 6000, seed=1).double()
    expected = (estimate - target).abs().mean(-1)
    for length in (4096, 2048, 1024, 512, 256):
        window = torch.hann_window(length).double()
        one, other = (spectrum(signal, max(2048, length), 147, window) for signal in (estimate, target))
        expected = expected + 0.5 * (one - other).abs().mean((1, 2))

    torch.testing.assert_close(multi_resolution_l1(estimate, target, spectral_weight=0.5), expected)


@every_resolution
@pytest.mark.parametrize("time", [1, 2, 100, 511])
def test_signals_shorter_than_a_window_have_a_loss(loss, time):
    assert (loss(signals(2, time), signals(2, time, seed=1)) > 0).all()


@every_resolution
@pytest.mark.parametrize("case", ["silent estimate", "silent target", "both silent", "perfect", "one click"])
def test_values_and_gradients_are_finite_where_a_magnitude_is_zero(loss, case):
    sound, silence, click = (
        signals(2, 900),
        torch.zeros(2, 900),
        torch.zeros(2, 900).index_fill(1, torch.tensor(450), 1),
    )
    estimate, target = {
        "silent estimate": (silence, sound),
        "silent target": (sound, silence),
        "both silent": (silence, silence),
        "perfect": (sound, sound),
        "one click": (click, silence),
    }[case]
    estimate = estimate.clone().requires_grad_()
    values = loss(estimate, target)
    values.sum().backward()

    assert values.isfinite().all()
    assert values.max() < 100
    assert estimate.grad.isfinite().all()


@every_resolution
def test_a_silent_target_pushes_its_output_down(loss):
    estimate = signals(1, 900).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(estimate, torch.zeros(1, 900)).sum(), estimate)

    assert (gradient * estimate).sum() > 0


def test_gradients_match_finite_differences():
    estimate, target = signals(2, 40).double().requires_grad_(), signals(2, 40, seed=1).double()
    small = {"n_ffts": (16, 8), "hop_lengths": (5, 3), "win_lengths": (12, 8)}

    assert torch.autograd.gradcheck(lambda e: multi_resolution_stft(e, target, **small), estimate)
    assert torch.autograd.gradcheck(
        lambda e: multi_resolution_l1(e, target, win_lengths=(16, 8), min_n_fft=8, hop_samples=4), estimate
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_ffts": (512,)}, "one number for each resolution"),
        ({"n_ffts": (511,), "hop_lengths": (50,), "win_lengths": (100,)}, "n_fft 511 must be even"),
        ({"n_ffts": (64,), "hop_lengths": (16,), "win_lengths": (65,)}, "window of 65 samples at most as long"),
    ],
)
def test_resolutions_that_do_not_fit_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        multi_resolution_stft(signals(2, 500), signals(2, 500), **wrong)


# Mask inference


def test_mask_inference_compares_with_the_truncated_phase_sensitive_magnitude():
    sources = signals(2, 2, 1, 600).double()
    estimate, mixture = signals(2, 2, 1, 600, seed=1).double(), sources.sum(1)
    window = torch.hann_window(64).double().sqrt()
    one, wanted, mixed = (spectrum(signal.flatten(0, -2), 64, 16, window) for signal in (estimate, sources, mixture))
    mixed = mixed.repeat_interleave(2, 0)
    part = (wanted.abs() * (mixed.angle() - wanted.angle()).cos()).clamp(torch.zeros(()).double(), mixed.abs())
    expected = (one.abs() - part).abs().mean((1, 2)).view(2, 2, 1)

    values = mask_inference(estimate, sources, mixture, n_fft=64, hop_length=16)

    torch.testing.assert_close(values, expected, atol=1e-7, rtol=1e-5)


def test_a_single_source_and_silence_have_a_loss_of_zero():
    sources = torch.stack([signals(1, 1, 800)[0], torch.zeros(1, 800)])[None]

    assert mask_inference(sources, sources, sources.sum(1)).abs().max() < 1e-6


def test_the_loss_of_masks_finds_the_order_of_the_sources():
    sources = signals(3, 3, 1, 800)
    loss = SeparationLoss(mask_inference)
    turned = loss.with_order(sources[:, [2, 0, 1]], sources, mixture=sources.sum(1))

    assert turned.order.tolist() == [[1, 2, 0]] * 3
    torch.testing.assert_close(turned.losses, loss(sources, sources, mixture=sources.sum(1)))


@pytest.mark.parametrize("case", ["silent estimate", "silent target", "all silent"])
def test_masks_of_silence_have_finite_values_and_gradients(case):
    sources = signals(1, 2, 1, 300) * (case == "silent estimate")
    estimate = (signals(1, 2, 1, 300, seed=1) * (case == "silent target")).requires_grad_()
    values = mask_inference(estimate, sources, sources.sum(1))
    values.sum().backward()

    assert values.isfinite().all()
    assert estimate.grad.isfinite().all()


def test_a_mixture_of_another_shape_raises_an_error():
    with pytest.raises(ValueError, match="must be the \\(batch, channel, time\\)"):
        mask_inference(signals(2, 2, 1, 300), signals(2, 2, 1, 300), signals(2, 2, 1, 300))


# Deep clustering and whitened k-means


def clustered(n_sources=3, *, n_dims=5, seed=0, time=90, batch=2, channels=2):
    """Random unit vectors for the bins of random sources, in float64."""
    sources = signals(batch, n_sources, channels, time, seed=seed).double()
    rng = torch.Generator().manual_seed(seed)
    embedding = torch.randn(batch, channels, time // 8 + 1, 9, n_dims, generator=rng, dtype=torch.float64)
    return torch.nn.functional.normalize(embedding, dim=-1), sources, sources.sum(1)


def bins(sources, mixture, weighting, range_db=40):
    """One-hot sources and weights that sum to 1, for each channel: ``(b c) (l f) s`` and ``(b c) (l f)``."""
    window = torch.hann_window(16).double().sqrt()
    loudness, magnitude = (
        spectrum(signal.flatten(0, -2), 16, 8, window).abs().mT.reshape(*signal.shape[:-1], -1)
        for signal in (sources, mixture)
    )
    one_hot = torch.nn.functional.one_hot(loudness.argmax(1), sources.shape[1]).double().flatten(0, 1)
    weight = magnitude.flatten(0, 1)
    if weighting == "active":
        weight = (weight > weight.amax(1, keepdim=True) * 10 ** (-range_db / 20)).double()
    return one_hot, weight / weight.sum(1, keepdim=True)


def random_rotation(n_dims):
    """A random rotation or reflection."""
    rng = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(n_dims, n_dims, generator=rng, dtype=torch.float64))[0]


def perfect(sources, mixture, *, n_dims=5):
    """The vector of each bin is that of its loudest source; those of two sources are at right angles."""
    one_hot = bins(sources, mixture, "magnitude")[0]
    directions = random_rotation(n_dims)[: one_hot.shape[-1]]
    return (one_hot @ directions).view(*mixture.shape[:2], -1, 9, n_dims)


@both_weightings
def test_deep_clustering_is_the_distance_of_all_pairs_of_bins(weighting):
    embedding, sources, mixture = clustered()
    one_hot, weight = bins(sources, mixture, weighting, range_db=10)
    vectors = embedding.reshape(4, -1, 5)
    difference = vectors @ vectors.mT - one_hot @ one_hot.mT
    expected = torch.einsum("bi,bij,bj->b", weight, difference.square(), weight).view(2, 2).mean(1)

    values = deep_clustering(embedding, sources, mixture, **SIZES, weighting=weighting, range_db=10)

    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)


@clustering
def test_autocast_does_not_change_the_clustering_losses(loss):
    embedding, sources, mixture = (part.float() for part in clustered())

    plain = loss(embedding, sources, mixture, **SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss(embedding, sources, mixture, **SIZES)

    assert torch.equal(plain, under_autocast)


@both_weightings
def test_whitened_kmeans_is_the_distance_of_whitened_vectors_from_their_sources_means(weighting):
    embedding, sources, mixture = clustered()
    one_hot, weight = bins(sources, mixture, weighting)
    vectors, one_hot = (part * weight.sqrt()[..., None] for part in (embedding.reshape(4, -1, 5), one_hot))
    values, directions = torch.linalg.eigh(vectors.mT @ vectors)
    white = vectors @ directions @ torch.diag_embed(values.rsqrt()) @ directions.mT
    means = one_hot @ torch.linalg.pinv(one_hot) @ white
    expected = (white - means).square().sum((1, 2)).view(2, 2).mean(1)

    result = whitened_kmeans(embedding, sources, mixture, **SIZES, weighting=weighting, ridge=1e-12)

    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@both_weightings
@clustering
def test_vectors_that_separate_the_sources_reach_the_minimum(loss, weighting):
    _, sources, mixture = clustered()
    lowest = {deep_clustering: 0.0, whitened_kmeans: 5.0 - 3.0}[loss]
    best = loss(perfect(sources, mixture), sources, mixture, **SIZES, weighting=weighting)

    torch.testing.assert_close(best, torch.full((2,), lowest).double(), atol=2e-3, rtol=0)
    assert (loss(clustered()[0], sources, mixture, **SIZES, weighting=weighting) > best + 0.1).all()


@both_weightings
@clustering
def test_the_loss_is_invariant_to_source_order_and_rotation(loss, weighting):
    embedding, sources, mixture = clustered()

    turned = loss(embedding @ random_rotation(5), sources[:, [2, 0, 1]], mixture, **SIZES, weighting=weighting)

    torch.testing.assert_close(turned, loss(embedding, sources, mixture, **SIZES, weighting=weighting))


@clustering
@pytest.mark.parametrize("gain", [1e-6, 1e4])
def test_the_loss_is_invariant_to_level(loss, gain):
    embedding, sources, mixture = clustered()

    torch.testing.assert_close(
        loss(embedding, gain * sources, gain * mixture, **SIZES), loss(embedding, sources, mixture, **SIZES)
    )


@clustering
def test_half_of_a_recording_has_about_the_same_value(loss):
    embedding, sources, mixture = clustered(batch=1, channels=1, time=8000)
    whole = loss(embedding, sources, mixture, **SIZES)
    half = loss(embedding[:, :, :501], sources[..., :4000], mixture[..., :4000], **SIZES)

    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)


@both_weightings
@clustering
def test_the_clustering_gradient_matches_finite_differences(loss, weighting):
    embedding, sources, mixture = clustered(time=24, batch=1, channels=1, n_dims=3)
    embedding.requires_grad_()

    assert torch.autograd.gradcheck(lambda e: loss(e, sources, mixture, **SIZES, weighting=weighting), embedding)


@both_weightings
@clustering
@pytest.mark.parametrize("case", ["silence", "one click", "one source never the loudest", "all vectors alike"])
def test_clustering_stays_finite_in_degenerate_cases(loss, weighting, case):
    embedding, sources = (part.float() for part in clustered()[:2])
    if case == "silence":
        sources = 0 * sources
    elif case == "one click":
        sources = torch.zeros_like(sources).index_fill(-1, torch.tensor(40), 1.0)
    elif case == "one source never the loudest":
        sources[:, 1] = 0
    else:
        embedding = embedding[:, :, :1, :1].expand_as(embedding)
    embedding = embedding.clone().requires_grad_()
    values = loss(embedding, sources, sources.sum(1), **SIZES, weighting=weighting)
    values.sum().backward()

    assert values.isfinite().all()
    assert embedding.grad.isfinite().all()
    assert embedding.grad.abs().max() < 10


@clustering
def test_float32_agrees_with_float64(loss):
    embedding, sources, mixture = clustered(time=4000, n_dims=20)
    narrow = [part.float() for part in (embedding, sources, mixture)]

    torch.testing.assert_close(
        loss(*narrow, **SIZES).double(), loss(embedding, sources, mixture, **SIZES), atol=1e-4, rtol=0
    )


@both_weightings
@clustering
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_stays_in_its_example(loss, weighting, part):
    given = [*clustered()]
    clean = loss(*given, **SIZES, weighting=weighting)
    given[part] = given[part].clone()
    given[part][0].view(-1)[3] = torch.nan
    values = loss(*given, **SIZES, weighting=weighting)

    assert values[0].isnan()
    assert values[1] == clean[1]


@clustering
def test_shapes_that_do_not_fit_raise_an_error(loss):
    embedding, sources, mixture = clustered()

    with pytest.raises(ValueError, match="With n_fft 16 and hop_length 4 the embedding must be"):
        loss(embedding, sources, mixture, n_fft=16, hop_length=4)
    with pytest.raises(ValueError, match="must be \\(batch, channel, frame, freq, dim\\)"):
        loss(embedding[0], sources, mixture, **SIZES)
    with pytest.raises(ValueError, match="magnitude, active"):
        loss(embedding, sources, mixture, **SIZES, weighting="loud")
