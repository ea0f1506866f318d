import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.data.mixing import mix
from unbraid.dsp import power_db


def make_noise(n_samples=2000, *, seed=0, n_channels=1, level=0.1):
    return level * np.random.default_rng(seed).standard_normal((n_channels, n_samples), dtype=np.float32)


LEVELS = st.lists(st.floats(-60, 0), min_size=1, max_size=4)
SNR = st.one_of(st.none(), st.floats(-20, 40))


@given(LEVELS, SNR, st.integers(0, 99))
def test_the_mixture_is_exactly_the_sum_of_its_parts(levels, snr_db, seed):
    noise = None if snr_db is None else make_noise(seed=seed + 50)
    made = mix([make_noise(seed=seed + i) for i in range(len(levels))], levels, noise, snr_db or 0.0)

    total = made.sources.sum(axis=0) if noise is None else made.sources.sum(axis=0) + made.noise

    assert made.mixture.dtype == made.sources.dtype == np.float32
    assert np.array_equal(made.mixture, total)


@given(LEVELS, SNR, st.integers(0, 99))
def test_nothing_is_louder_than_full_scale(levels, snr_db, seed):
    noise = None if snr_db is None else make_noise(seed=seed + 50)

    made = mix([make_noise(seed=seed + i) for i in range(len(levels))], levels, noise, snr_db or 0.0)

    assert np.abs(made.mixture).max() <= 0.99 + 1e-6


@given(LEVELS, st.floats(-20, 40))
def test_levels_and_snr_are_exact_up_to_one_common_gain(levels, snr_db):
    made = mix([make_noise(seed=i) for i in range(len(levels))], levels, make_noise(seed=9), snr_db)

    turned_down = [level - power_db(source) for level, source in zip(levels, made.sources, strict=True)]
    speech, loudest = power_db(made.sources.sum(axis=0)), np.abs(made.mixture).max()
    assert max(turned_down) - min(turned_down) < 1e-3
    assert speech - power_db(made.noise) == pytest.approx(snr_db, abs=1e-3)
    assert abs(turned_down[0]) < 1e-3 or (turned_down[0] > 0 and loudest == pytest.approx(0.99, abs=1e-5))


@given(st.floats(-40, 40))
def test_the_level_of_a_recording_does_not_matter(gain_db):
    gain = np.float32(10 ** (gain_db / 20))
    one = mix([make_noise(seed=0), make_noise(seed=1)], [-25, -28], make_noise(seed=2), 5)

    other = mix([gain * make_noise(seed=0), make_noise(seed=1)], [-25, -28], gain * make_noise(seed=2), 5)

    np.testing.assert_allclose(other.mixture, one.mixture, atol=1e-6)


def test_the_order_of_the_sources_is_kept():
    made = mix([make_noise(seed=0), make_noise(seed=1)], [-20, -20])

    assert np.corrcoef(made.sources[1, 0], make_noise(seed=1)[0])[0, 1] == pytest.approx(1)


def test_a_silent_source_stays_silent():
    made = mix([np.zeros((1, 2000), np.float32), make_noise()], [-20, -20], make_noise(seed=1), 10)

    assert not made.sources[0].any()
    assert power_db(made.sources[1]) == pytest.approx(-20, abs=1e-3)


def test_a_mixture_of_silence_is_finite():
    silence = np.zeros((1, 2000), np.float32)

    made = mix([silence, silence], [-20, -20], make_noise(), 10)

    assert np.isfinite(made.mixture).all()


def test_the_recordings_are_not_changed():
    source = make_noise()
    mix([source, make_noise(seed=1)], [-60, 0], source, 0)

    assert np.array_equal(source, make_noise())
