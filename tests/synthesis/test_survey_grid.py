"""Synthetic stars of the optical on the grid of a rung, and their coefficients."""

import numpy as np
from conftest import SEEN_POWER, SURVEY_INTERVALS, SURVEY_POWER
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

from spectrafm_hf.synthesis.survey_grid import (
    SurveyGrid,
    as_seen,
    coefficients_of,
    fit_matrices,
    in_pixels,
    likely_labels,
)


def test_a_pixel_is_the_mean_of_those_of_the_emulator(survey_grid, survey_labels):
    some = {name: values[:2] for name, values in survey_labels.items()}
    fine = SurveyGrid(survey_grid.emulator, 1, np.inf).spectra(some)
    coarse = SurveyGrid(survey_grid.emulator, 3, np.inf).spectra(some)
    np.testing.assert_allclose(coarse[:, 100], fine[:, 300:303].mean(axis=1), rtol=1e-6)
    native = survey_grid.emulator.wavelength.double().numpy()
    np.testing.assert_allclose(survey_grid.wavelength[100], native[301], rtol=1e-7)


def test_stars_of_the_grid_are_those_that_the_emulator_covers(survey_grid, survey_labels):
    table = np.stack([survey_labels[name] for name in survey_grid.emulator.config.label_names], axis=1)
    assert len(table) == 60 and survey_grid.emulator.covers(table).all()


def smoothed(survey_grid, flux, power):
    sigma = np.sqrt(power**-2.0 - SURVEY_POWER**-2.0) / 2.3548 / survey_grid.step
    return gaussian_filter1d(flux, sigma, axis=1, mode="nearest")


def test_coefficients_and_how_they_change_with_velocity_and_resolution(survey_grid, survey_labels, survey_basis):
    rung, some = survey_basis.rungs[0], {name: values[:8] for name, values in survey_labels.items()}
    found = coefficients_of(survey_grid, rung, some, SEEN_POWER).astype(float)
    spectra, position = survey_grid.spectra(some).astype(float), np.log(survey_grid.wavelength)
    still = found[:, 0, :, 2:] / found[:, 0, :, :1]
    u, wider = -20.0 / 299792.458, 0.9 * SEEN_POWER
    moved = CubicSpline(position, smoothed(survey_grid, spectra, SEEN_POWER), axis=1)(position + u)
    variance = (wider**-2.0 - SEEN_POWER**-2.0) / 2.3548**2
    cases = [
        (moved, found[:, 0] + u * 1e4 * found[:, 1] + 0.5 * u**2 * 1e8 * found[:, 2]),
        (smoothed(survey_grid, spectra, wider), found[:, 0] + 0.5 * variance * 1e8 * found[:, 2]),
    ]
    matrices = fit_matrices(rung, survey_grid.wavelength, SEEN_POWER)
    for flux, raw in cases:
        tokens = np.stack([flux[:, pixels] @ matrix.T for pixels, matrix in matrices], axis=1)
        change = tokens[..., 2:] / tokens[..., :1] - still
        miss = np.abs(raw[..., 2:] / raw[..., :1] - still - change)
        assert np.median(miss) < 0.1 * np.median(np.abs(change))


def test_coefficients_are_those_that_least_squares_finds_in_pixels(survey_grid, survey_labels, survey_basis):
    rung = survey_basis.rungs[0]
    wavelength = np.exp(np.arange(np.log(5_000.0), np.log(5_700.0), 1.0 / SEEN_POWER / 2.5))
    flux = as_seen(survey_grid, survey_labels, wavelength, np.full(len(wavelength), SEEN_POWER))
    found = survey_basis.evidence(wavelength, flux, np.full(flux.shape, 300.0**2), SEEN_POWER)
    raw = coefficients_of(survey_grid, rung, survey_labels, SEEN_POWER)[:, 0].astype(float)
    warm = survey_labels["teff"] > 4500
    expected = (raw[..., 2:] / raw[..., :1])[warm]
    own = (found.coefficients / np.maximum(found.reliability, 0.02))[warm][..., 2:]
    known = found.reliability[warm][..., 2:] > 0.9
    assert known.mean() > 0.3
    assert np.median(np.abs(own - expected)[known]) < 0.1 * np.median(np.abs(expected[known]))


def test_a_line_spread_function_that_changes_along_a_spectrum(survey_grid, survey_labels):
    some = {name: values[:3] for name, values in survey_labels.items()}
    wavelength = np.arange(5_000.0, 6_000.0, 0.5)
    power = np.interp(wavelength, [5_000.0, 6_000.0], [1_200.0, 3_000.0])
    found = as_seen(survey_grid, some, wavelength, power)
    for at in (5_200.0, 5_800.0):
        near = np.abs(wavelength - at) < 20.0
        one = as_seen(survey_grid, some, wavelength, np.full(len(wavelength), np.interp(at, wavelength, power)))
        other = as_seen(survey_grid, some, wavelength, np.full(len(wavelength), 5_000.0))
        assert np.abs(found - one)[:, near].max() < 0.15 * np.abs(other - one)[:, near].max()


def test_labels_that_are_not_known_are_the_usual_ones(survey_grid):
    known = {"teff": [5000.0, 5000.0, 30_000.0], "logg": [2.5, 2.5, 4.0], "fe_h": [-1.5, 0.0, 0.0]}
    found, covered = likely_labels(survey_grid, known)
    assert covered.tolist() == [True, True, False]
    np.testing.assert_allclose(found["mg_fe"], [0.4, 0.0])
    np.testing.assert_allclose(found["teff"], [5000.0, 5000.0])


def test_the_change_of_flux_by_coefficients(survey_grid, survey_labels, survey_basis):
    rung, (pixels, matrix) = (
        survey_basis.rungs[0],
        fit_matrices(survey_basis.rungs[0], survey_grid.wavelength, SURVEY_POWER)[1],
    )
    coefficients = np.zeros((2, SURVEY_INTERVALS, 8))
    coefficients[1, 1, 3:5] = 0.5, -1.0
    added = in_pixels(rung, coefficients)
    assert added.shape == (2, survey_grid.size) and not added[0].any()
    outside = np.ones(survey_grid.size, bool)
    outside[pixels] = False
    assert not added[1, outside].any()
    np.testing.assert_allclose(matrix @ added[1, pixels], coefficients[1, 1], atol=0.05)
