"""The Cramer-Rao bound: against closed forms, and derivatives against finite differences."""

import math

import numpy as np
import pytest

from spectrafm_hf.synthesis.bounds import (
    OTHER_PRIOR,
    cramer_rao,
    emulate,
    expected_scatter,
    held_out_labels,
    label_bound,
    label_weights,
    observe,
    pixel_errors,
)
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars, load_emulator


@pytest.fixture(scope="module")
def hband():
    return load_emulator("emulator-hband")


def test_a_straight_line_has_the_bound_of_textbooks():
    x, sigma = np.array([-2.0, -1.0, 0.0, 1.0, 5.0]), np.array([0.1, 0.2, 0.1, 0.3, 0.2])
    weight = sigma**-2
    covariance = cramer_rao(np.stack([np.ones(5), x]), weight, [1e6, 1e6])
    s, sx, sxx = weight.sum(), (weight * x).sum(), (weight * x**2).sum()
    expected = np.array([[sxx, -sx], [-sx, s]]) / (s * sxx - sx**2)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9)


def test_no_estimate_of_a_linear_model_is_better_and_least_squares_reach_it():
    random = np.random.default_rng(0)
    jacobian, sigma = random.normal(size=(3, 40)) * np.array([[1e-4], [1.0], [0.1]]), random.uniform(0.5, 2, 40)
    bound = np.sqrt(np.diag(cramer_rao(jacobian, sigma**-2, [1e9, 1e5, 1e6])))
    noise = sigma * random.normal(size=(4000, 40))
    found = np.linalg.lstsq((jacobian / sigma).T, (noise / sigma).T, rcond=None)[0]
    np.testing.assert_allclose(found.std(axis=1), bound, rtol=0.05)


def test_without_information_in_the_pixels_the_bound_is_the_prior():
    covariance = cramer_rao(np.array([[1.0, 0.0], [0.0, 0.0]]), [4.0, 4.0], [0.5, 7.0])
    np.testing.assert_allclose(covariance, np.diag([1 / (4 + 4), 49.0]))


def test_masked_pixels_take_information_away():
    jacobian = np.ones((1, 100))
    ivar = np.full((3, 100), 25.0)
    ivar[1, :36] = ivar[2, :99] = 0
    bound = np.sqrt(cramer_rao(np.broadcast_to(jacobian, (3, 1, 100)), ivar, [1e6]))[:, 0, 0]
    np.testing.assert_allclose(bound, [0.02, 0.2 / 8, 0.2], rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ivar": [1.0, 1.0, 1.0]}, "ivar: expected 2 pixels as in jacobian, got shape (3,)"),
        ({"ivar": [1.0, -1.0]}, "ivar: expected finite numbers of at least 0"),
        ({"prior": [1.0]}, "prior: expected 2 positive numbers, got [1.0]"),
        ({"prior": [1.0, 0.0]}, "prior: expected 2 positive numbers, got [1.0, 0.0]"),
        ({"jacobian": [[1.0, np.nan], [0.0, 1.0]]}, "jacobian: expected finite numbers"),
    ],
)
def test_an_infinite_bound_is_refused(change, message):
    arguments = {"jacobian": np.eye(2), "ivar": [1.0, 1.0], "prior": [1.0, 1.0], **change}
    with pytest.raises(ValueError) as refused:
        cramer_rao(**arguments)
    assert message in str(refused.value)


def test_the_bound_of_alpha_m_is_that_of_a_mean():
    names = ("teff", "o_fe", "mg_fe", "si_fe", "ca_fe", "ti_fe")
    covariance = np.diag([100.0, 1.0, 4.0, 9.0, 16.0, 25.0])
    assert label_bound(covariance, names, "alpha_m") == pytest.approx(math.sqrt(55) / 5)
    assert label_bound(covariance, names, "teff") == pytest.approx(10.0)
    with pytest.raises(ValueError, match="label: expected one that follows from .* got 'alpha_m' without"):
        label_weights(["teff", "o_fe"], "alpha_m")


def test_the_scatter_at_the_bound_is_that_of_stars_of_different_bounds():
    random = np.random.default_rng(1)
    sigma = random.lognormal(0, 0.7, 200_000)
    residual = sigma * random.normal(size=sigma.size)
    assert expected_scatter(sigma) == pytest.approx(1.4826 * np.median(np.abs(residual)), rel=0.01)
    assert expected_scatter([3.0, 3.0]) == pytest.approx(3.0, rel=1e-4)
    assert math.isnan(expected_scatter([]))


def test_derivatives_of_the_emulator_agree_with_differences_of_two_sizes(hband):
    table = held_out_labels(hband, 2, 5, {"teff": (4500, 5500)})
    flux, slopes = emulate(hband, table, derivatives=True)
    assert slopes.shape == (2, 14, 8575) and slopes.dtype == np.float32
    np.testing.assert_array_equal(flux, emulate(hband, table)[0])
    for i, name in enumerate(hband.config.label_names):
        size = float(np.abs(slopes[:, i]).max())
        for factor in (1.0, 2.0):  # the error of a central difference grows as the square of the step
            step = np.zeros(14)
            step[i] = factor * {"teff": 10.0}.get(name, 0.02)
            above, below = (emulate(hband, table + sign * step)[0].astype(np.float64) for sign in (1, -1))
            difference = (above - below) / (2 * step[i])
            assert np.abs(difference - slopes[:, i]).max() < 0.004 * factor**2 * size, name


def test_derivatives_go_through_the_instrument_as_spectra_do():
    """Extinction, tilt and level included: against differences of the observed spectra."""
    instrument, emulator = Instrument.load("gaia-xp"), load_emulator("emulator-optical")
    table = held_out_labels(emulator, 3, 1, {"teff": (4500, 5500)})

    def seen(labels):
        return observe(instrument, emulator, labels, np.random.default_rng(7))

    observed = seen(table)
    n = len(emulator.config.label_names)
    assert observed.names[n:] == ("a_v", "tilt_1", "tilt_2", "tilt_3", "level")
    assert observed.jacobian.shape == (3, n + 5, 343) and observed.prior.shape == (n + 5,)
    for i, step in ((0, 5.0), (2, 0.01)):
        change = step * (np.arange(n) == i)
        above, below = (seen(table + sign * change).flux.astype(np.float64) for sign in (1, -1))
        slope = observed.jacobian[:, i]
        assert np.abs((above - below) / (2 * step) - slope).max() < 0.01 * np.abs(slope).max()
    np.testing.assert_array_equal(observed.jacobian[:, -1], observed.flux)
    # Extinction dims blue light more.
    dimming = observed.jacobian[:, n] / observed.flux
    assert np.all(dimming < 0) and np.all(dimming[:, 20] < 2 * dimming[:, 300])


def test_apogee_at_a_ratio_of_100_has_the_bound_that_is_known_of_it(hband):
    """Measured with another program on other stars: 10.2 K, 0.0173, 0.0059."""
    instrument = Instrument.load("apogee")
    table = held_out_labels(hband, 60, 3, {"teff": (4000, 6000), "fe_h": (-1, 1)})
    observed = observe(instrument, hband, table, np.random.default_rng(0))
    assert observed.names == tuple(hband.config.label_names)
    assert observed.prior.tolist() == [10_000.0, 5.0] + 12 * [OTHER_PRIOR]
    errors = pixel_errors(instrument, observed.flux, 100, white=True)
    np.testing.assert_allclose(np.median(observed.flux / errors, axis=1), 100, rtol=1e-5)
    covariance = cramer_rao(observed.jacobian, errors.astype(np.float64) ** -2, observed.prior)
    for name, known in {"teff": 10.2, "logg": 0.0173, "fe_h": 0.0059}.items():
        assert np.median(label_bound(covariance, observed.names, name)) == pytest.approx(known, rel=0.25)
    shaped = pixel_errors(instrument, observed.flux, 100)
    np.testing.assert_allclose(np.median(observed.flux / shaped, axis=1), 100, rtol=1e-5)
    assert np.ptp(shaped / observed.flux) > 0.5 * np.median(shaped / observed.flux)


def test_held_out_stars_are_others_than_those_of_training_and_of_another_part(hband):
    ranges = {"teff": (4000, 6000)}
    first, again, other = (held_out_labels(hband, 40, 0, ranges, part) for part in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    trained = SyntheticStars("apogee", seed=0).draw(40, np.random.default_rng(0))["teff"]
    assert not np.isin(other[:, 0], first[:, 0]).any() and not np.isin(first[:, 0].astype("f4"), trained).any()
    assert np.all((first[:, 0] >= 4000) & (first[:, 0] <= 6000)) and hband.covers(first).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"n": 0}, "stars: expected at least 1, got 0"),
        ({"ranges": {"age": (0, 1)}}, "ranges: expected labels out of"),
        ({"ranges": {"teff": (6000, 4000)}}, "ranges: expected the lower limit of teff first, got 6000 to 4000"),
        ({"ranges": {"teff": (9000, 9500)}}, "ranges: expected some that hold stars of the emulator"),
    ],
)
def test_held_out_stars_that_cannot_be_are_refused(hband, change, message):
    with pytest.raises(ValueError) as refused:
        held_out_labels(hband, **{"n": 5, "seed": 0, **change})
    assert message in str(refused.value)


def test_priors_and_ratios_that_cannot_be_are_refused(hband):
    instrument = Instrument.load("apogee")
    with pytest.raises(ValueError, match="prior: expected labels out of .* got 'age'"):
        observe(instrument, hband, np.zeros((1, 14)), np.random.default_rng(0), priors={"age": 1.0})
    with pytest.raises(ValueError, match="snr: expected positive numbers, got 0.0"):
        pixel_errors(instrument, np.ones((2, 7514)), 0)
