"""Synthetic stars of the optical: their grid, their coefficients, and tokens that are drawn without pixels."""

import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.synthesis.bases import make_rung
from spectrafm_hf.synthesis.survey_stars import (
    Faults,
    Mismatch,
    SurveyGrid,
    SurveyStars,
    as_seen,
    coefficients_of,
    fit_matrices,
    likely_labels,
    strange_spectra,
)


POWER, SEEN = 5_000.0, 1_800.0
EDGE, INTERVALS = np.log(5_100.0), 3


@pytest.fixture(scope="module")
def grid():
    return SurveyGrid("emulator-survey", 3, POWER)


@pytest.fixture(scope="module")
def labels(grid):
    return grid.labels(60, np.random.default_rng(0))


@pytest.fixture(scope="module")
def basis(grid, labels):
    rung = make_rung(
        grid.spectra(labels).astype(float),
        [],
        first_interval=0,
        edge=float(EDGE),
        width=0.03,
        n_intervals=INTERVALS,
        start=grid.start,
        step=grid.step,
        resolving_power=POWER,
        lowest_resolving_power=400.0,
        counts_level=False,
        guesses_power=True,
        n_directions=6,
        margin=60,
    )
    return SpectrumBasis([rung])


def test_a_pixel_is_the_mean_of_those_of_the_emulator(grid, labels):
    some = {name: values[:2] for name, values in labels.items()}
    fine = SurveyGrid(grid.emulator, 1, np.inf).spectra(some)
    coarse = SurveyGrid(grid.emulator, 3, np.inf).spectra(some)
    np.testing.assert_allclose(coarse[:, 100], fine[:, 300:303].mean(axis=1), rtol=1e-6)
    native = grid.emulator.wavelength.double().numpy()
    np.testing.assert_allclose(grid.wavelength[100], native[301], rtol=1e-7)


def test_stars_of_the_grid_are_those_that_the_emulator_covers(grid, labels):
    table = np.stack([labels[name] for name in grid.emulator.config.label_names], axis=1)
    assert len(table) == 60 and grid.emulator.covers(table).all()


def smoothed(grid, flux, power):
    sigma = np.sqrt(power**-2.0 - POWER**-2.0) / 2.3548 / grid.step
    return gaussian_filter1d(flux, sigma, axis=1, mode="nearest")


def test_coefficients_and_how_they_change_with_velocity_and_resolution(grid, labels, basis):
    rung, some = basis.rungs[0], {name: values[:8] for name, values in labels.items()}
    found = coefficients_of(grid, rung, some, SEEN).astype(float)
    spectra, position = grid.spectra(some).astype(float), np.log(grid.wavelength)
    still = found[:, 0, :, 2:] / found[:, 0, :, :1]
    u, wider = -20.0 / 299792.458, 0.9 * SEEN
    moved = CubicSpline(position, smoothed(grid, spectra, SEEN), axis=1)(position + u)
    variance = (wider**-2.0 - SEEN**-2.0) / 2.3548**2
    cases = [
        (moved, found[:, 0] + u * 1e4 * found[:, 1] + 0.5 * u**2 * 1e8 * found[:, 2]),
        (smoothed(grid, spectra, wider), found[:, 0] + 0.5 * variance * 1e8 * found[:, 2]),
    ]
    matrices = fit_matrices(rung, grid.wavelength, SEEN)
    for flux, raw in cases:
        tokens = np.stack([flux[:, pixels] @ matrix.T for pixels, matrix in matrices], axis=1)
        change = tokens[..., 2:] / tokens[..., :1] - still
        miss = np.abs(raw[..., 2:] / raw[..., :1] - still - change)
        assert np.median(miss) < 0.1 * np.median(np.abs(change))


def test_coefficients_are_those_that_least_squares_finds_in_pixels(grid, labels, basis):
    rung = basis.rungs[0]
    wavelength = np.exp(np.arange(np.log(5_000.0), np.log(5_700.0), 1.0 / SEEN / 2.5))
    flux = as_seen(grid, labels, wavelength, np.full(len(wavelength), SEEN))
    found = basis.evidence(wavelength, flux, np.full(flux.shape, 300.0**2), SEEN)
    raw = coefficients_of(grid, rung, labels, SEEN)[:, 0].astype(float)
    warm = labels["teff"] > 4500
    expected = (raw[..., 2:] / raw[..., :1])[warm]
    own = (found.coefficients / np.maximum(found.reliability, 0.02))[warm][..., 2:]
    known = found.reliability[warm][..., 2:] > 0.9
    assert known.mean() > 0.3
    assert np.median(np.abs(own - expected)[known]) < 0.1 * np.median(np.abs(expected[known]))


def test_a_line_spread_function_that_changes_along_a_spectrum(grid, labels):
    some = {name: values[:3] for name, values in labels.items()}
    wavelength = np.arange(5_000.0, 6_000.0, 0.5)
    power = np.interp(wavelength, [5_000.0, 6_000.0], [1_200.0, 3_000.0])
    found = as_seen(grid, some, wavelength, power)
    for at in (5_200.0, 5_800.0):
        near = np.abs(wavelength - at) < 20.0
        one = as_seen(grid, some, wavelength, np.full(len(wavelength), np.interp(at, wavelength, power)))
        other = as_seen(grid, some, wavelength, np.full(len(wavelength), 5_000.0))
        assert np.abs(found - one)[:, near].max() < 0.15 * np.abs(other - one)[:, near].max()


def test_tokens_are_spread_as_they_say(grid, labels, basis):
    """Drawn tokens less what they would be without noise, over their own errors."""
    rung = basis.rungs[0]
    one = {name: np.repeat(values[:1], 4000) for name, values in labels.items()}
    raw = coefficients_of(grid, rung, {name: values[:1] for name, values in labels.items()}, POWER * 0.8)
    raw[:, 1:] = 0.0  # not moved, not blurred
    design = basis.design(grid.wavelength[50:-50], POWER)
    stars = SurveyStars(rung, raw.repeat(4000, axis=0), grid.known(one), [design], [POWER])
    drawn = stars.draw(4000, np.random.default_rng(1), snr=100.0, whole=True)
    found, known = drawn["coefficients"][..., 2:], drawn["reliability"][..., 2:]
    # Of a posterior mean: the spread is that of the noise that is left in it.
    best = known.mean(axis=(0, 1)) > 0.99
    sigma = np.sqrt(np.maximum(known * (1.0 - known), 1e-12))
    ratio = (found - found.mean(axis=0)) / sigma
    assert best.any() and 0.8 < ratio[..., best].std() < 1.25
    assert np.array_equal(drawn["interval_ids"][0], np.arange(INTERVALS))


def test_some_intervals_are_missing_and_say_nothing(grid, labels, basis):
    raw = coefficients_of(grid, basis.rungs[0], labels, SEEN)
    wavelength = np.exp(np.arange(np.log(5_000.0), np.log(5_700.0), 1.0 / SEEN / 2.5))
    stars = SurveyStars(basis.rungs[0], raw, grid.known(labels), [basis.design(wavelength, SEEN)], [SEEN])
    drawn = stars.draw(300, np.random.default_rng(2))
    seen = drawn["seen"]
    assert 0.3 < seen.mean() < 1.0 and seen.any(axis=1).all()
    assert not drawn["reliability"][~seen].any() and not drawn["coefficients"][~seen].any()
    again = stars.draw(300, np.random.default_rng(2))
    assert np.array_equal(drawn["coefficients"], again["coefficients"])


def test_faults_lie_where_the_air_and_the_sky_have_lines(grid):
    spectra = grid.spectra(grid.labels(40, np.random.default_rng(3))).astype(float)
    rung = make_rung(
        spectra,
        [],
        first_interval=0,
        edge=float(np.log(6_015.0)),
        width=0.03,
        n_intervals=5,
        start=grid.start,
        step=grid.step,
        resolving_power=POWER,
        lowest_resolving_power=400.0,
        n_directions=6,
        margin=60,
    )
    faults = Faults(rung, grid.wavelength, SEEN)
    drawn = faults.drawn(2000, np.random.default_rng(0))
    assert drawn.shape == (2000, 5, 8)
    air = np.abs(faults.lines.reshape(-1, 5, 8)).sum(axis=(0, 2))
    assert air[1] > 1.0 and air[2] > 1.0 and air[0] < 1e-6 * air[1], "clean: 6,015-6,198; not: 6,278-6,325"
    again = faults.drawn(2000, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, again)


def test_strange_spectra_have_no_lines_of_stars():
    wavelength = np.exp(np.arange(np.log(3_800.0), np.log(9_000.0), 1e-4))
    found = strange_spectra(wavelength, 400, np.random.default_rng(0))
    assert found.shape == (400, len(wavelength)) and found.min() >= 0.02
    # Lines of hydrogen in a quarter, at their places; emission in a quarter; in many hardly anything.
    at = np.searchsorted(wavelength, 4_862.7)
    deep = found[:, at] < found[:, at - 900 : at + 900].mean(axis=1) - 0.15
    assert 0.1 < deep.mean() < 0.4
    assert 0.1 < (found.max(axis=1) > 1.5).mean() < 0.4
    assert (found.std(axis=1) < 0.05).mean() > 0.2


def test_a_mismatch_is_found_and_added():
    generator = np.random.default_rng(0)
    stars = {"teff": generator.uniform(4000, 7000, 500), "logg": generator.uniform(1, 5, 500)}
    stars["fe_h"] = generator.uniform(-1, 0.4, 500)
    coefficients = np.zeros((500, 3, 2, 5), np.float32)
    coefficients[:, 0, :, 0] = 2.0
    true = np.zeros((500, 2, 5))
    true[..., 3] = 0.3 + 0.2 * (stars["fe_h"][:, None] + 0.3)
    seen = np.ones((500, 2, 5), bool)
    noise = 0.05 * generator.standard_normal((500, 2, 5))
    found = Mismatch(stars, true + noise, seen, directions=4)
    added = found.added_to(coefficients, stars)
    np.testing.assert_allclose(added[:, 0, :, 3] / 2.0, true[..., 3], atol=0.03)
    np.testing.assert_array_equal(added[:, 0, :, :2], coefficients[:, 0, :, :2])
    assert not found.white.any() and found.drawn(7, generator).shape == (7, 2, 5)
    assert found.spread.shape == (4, 10) and 0.03 < np.sqrt((found.spread**2).sum(axis=0)).mean() < 0.07


def test_where_no_star_was_observed_a_mismatch_is_as_large_as_beside():
    generator = np.random.default_rng(0)
    stars = {"teff": generator.uniform(4000, 7000, 300), "logg": generator.uniform(1, 5, 300)}
    stars["fe_h"] = generator.uniform(-1, 0.4, 300)
    difference = 0.3 * generator.standard_normal((300, 3, 4))
    known = np.ones((300, 3, 4), bool)
    known[:, 2] = False
    found = Mismatch(stars, np.where(known, difference, 0.0), known, directions=8)
    assert not found.white[:2].any()
    np.testing.assert_allclose(found.white[2], 0.3, rtol=0.15)
    assert np.abs(found.drawn(4000, generator)[:, 2].std() - 0.3) < 0.05


def test_labels_that_are_not_known_are_the_usual_ones(grid):
    known = {"teff": [5000.0, 5000.0, 30_000.0], "logg": [2.5, 2.5, 4.0], "fe_h": [-1.5, 0.0, 0.0]}
    found, covered = likely_labels(grid, known)
    assert covered.tolist() == [True, True, False]
    np.testing.assert_allclose(found["mg_fe"], [0.4, 0.0])
    np.testing.assert_allclose(found["teff"], [5000.0, 5000.0])
