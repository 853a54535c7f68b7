"""Synthetic stars of the optical: their grid, their coefficients, and tokens that are drawn without pixels."""

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from spectrafm_hf.bases import make_rung
from spectrafm_hf.data.survey_stars import Mismatch, SurveyGrid, SurveyStars, coefficients_of, likely_labels, shrunk
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis, interval_matrices


POWER = 5_000.0
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


def test_coefficients_and_how_they_change_with_velocity(grid, labels, basis):
    some = {name: values[:8] for name, values in labels.items()}
    found = coefficients_of(grid, basis.rungs[0], some).astype(float)
    spectra, wavelength = grid.spectra(some).astype(float), grid.wavelength
    velocity = 20.0
    position = np.log(wavelength)
    moved = CubicSpline(position, spectra, axis=1)(position - velocity / 299792.458)
    matrices = interval_matrices(basis.rungs[0], wavelength)
    tokens = np.stack([moved[:, pixels] @ matrix.T for pixels, matrix in matrices], axis=1)
    u = -velocity / 299792.458
    raw = found[:, 0] + u * 1e4 * found[:, 1] + 0.5 * u**2 * 1e8 * found[:, 2]
    expected = raw[..., 2:] / raw[..., :1]
    still = found[:, 0, :, 2:] / found[:, 0, :, :1]
    miss = np.abs(tokens[..., 2:] / tokens[..., :1] - expected)
    assert np.median(miss) < 0.1 * np.median(np.abs(still - expected))


def test_tokens_are_spread_as_they_say(grid, labels, basis):
    """Drawn tokens less what they would be without noise, over their own errors."""
    rung = basis.rungs[0]
    one = {name: np.repeat(values[:1], 4000) for name, values in labels.items()}
    raw = np.repeat(coefficients_of(grid, rung, {name: values[:1] for name, values in labels.items()}), 4000, axis=0)
    design = basis.design(grid.wavelength[50:-50], POWER)
    truth = raw[:1, 0].astype(np.float32)
    truth[..., 1:] /= truth[..., :1]
    stars = SurveyStars(rung, truth.repeat(4000, axis=0)[:, None], grid.known(one), [design], [POWER], observed=True)
    drawn = stars.draw(4000, np.random.default_rng(1), snr=100.0, whole=True)
    found, known = drawn["coefficients"][..., 2:], drawn["reliability"][..., 2:]
    # Of a posterior mean: the spread is that of the noise that is left in it.
    best = known.mean(axis=(0, 1)) > 0.99
    sigma = np.sqrt(np.maximum(known * (1.0 - known), 1e-12))
    ratio = (found - found.mean(axis=0)) / sigma
    assert best.any() and 0.8 < ratio[..., best].std() < 1.25
    assert np.array_equal(drawn["interval_ids"][0], np.arange(INTERVALS))


def test_some_intervals_are_missing_and_say_nothing(grid, labels, basis):
    raw = coefficients_of(grid, basis.rungs[0], labels)
    design = basis.design(grid.wavelength[50:-50], POWER)
    stars = SurveyStars(basis.rungs[0], raw, grid.known(labels), [design], [POWER])
    drawn = stars.draw(300, np.random.default_rng(2))
    seen = drawn["seen"]
    assert 0.3 < seen.mean() < 1.0 and seen.any(axis=1).all()
    assert not drawn["reliability"][~seen].any() and not drawn["coefficients"][~seen].any()
    again = stars.draw(300, np.random.default_rng(2))
    assert np.array_equal(drawn["coefficients"], again["coefficients"])


def test_what_noise_hides_is_pulled_towards_the_mean(grid, labels, basis):
    raw = coefficients_of(grid, basis.rungs[0], labels)[:, 0].astype(np.float32)
    raw[..., 1:] /= raw[..., :1]
    design = basis.design(grid.wavelength[50:-50], POWER)
    little, much = shrunk(design, raw, 1e-8), shrunk(design, raw, 1.0)
    np.testing.assert_allclose(little[..., 2:], raw[..., 2:], atol=0.05)
    assert np.abs(much[..., 2:]).mean() < 0.5 * np.abs(little[..., 2:]).mean()


def test_a_mismatch_is_found_and_added():
    generator = np.random.default_rng(0)
    stars = {"teff": generator.uniform(4000, 7000, 500), "logg": generator.uniform(1, 5, 500)}
    stars["fe_h"] = generator.uniform(-1, 0.4, 500)
    coefficients = np.zeros((500, 3, 2, 5), np.float32)
    coefficients[:, 0, :, 0] = 2.0
    true = np.zeros((500, 2, 5))
    true[..., 3] = 0.3 + 0.2 * (stars["fe_h"][:, None] + 0.3)
    seen = np.ones((500, 10), bool)
    noise = 0.05 * generator.standard_normal((500, 10))
    found = Mismatch(stars, true.reshape(500, 10) + noise, seen, directions=4)
    added = found.added_to(coefficients, stars)
    np.testing.assert_allclose(added[:, 0, :, 3] / 2.0, true[..., 3], atol=0.03)
    np.testing.assert_array_equal(added[:, 0, :, :2], coefficients[:, 0, :, :2])
    assert found.spread.shape == (4, 10) and 0.03 < np.sqrt((found.spread**2).sum(axis=0)).mean() < 0.07


def test_labels_that_are_not_known_are_the_usual_ones(grid):
    known = {"teff": [5000.0, 5000.0, 30_000.0], "logg": [2.5, 2.5, 4.0], "fe_h": [-1.5, 0.0, 0.0]}
    found, covered = likely_labels(grid, known)
    assert covered.tolist() == [True, True, False]
    np.testing.assert_allclose(found["mg_fe"], [0.4, 0.0])
    np.testing.assert_allclose(found["teff"], [5000.0, 5000.0])
