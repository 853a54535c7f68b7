"""Tokens of optical stars drawn without pixels, and their faults."""

import numpy as np
from conftest import SEEN_POWER, SURVEY_EDGE, SURVEY_INTERVALS, SURVEY_POWER, make_survey_rung

from spectrafm_hf.synthesis.survey_stars import (
    Faults,
    Mismatch,
    SurveyStars,
    coefficients_of,
    fit_matrices,
    strange_spectra,
)


def test_the_scatter_of_tokens_agrees_with_their_reliability(survey_grid, survey_labels, survey_basis):
    """Drawn tokens less what they would be without noise, over their own errors."""
    rung = survey_basis.rungs[0]
    one = {name: np.repeat(values[:1], 4000) for name, values in survey_labels.items()}
    raw = coefficients_of(
        survey_grid, rung, {name: values[:1] for name, values in survey_labels.items()}, SURVEY_POWER * 0.8
    )
    raw[:, 1:] = 0.0  # not moved, not blurred
    design = survey_basis.design(survey_grid.wavelength[50:-50], SURVEY_POWER)
    stars = SurveyStars(rung, raw.repeat(4000, axis=0), survey_grid.known(one), [design], [SURVEY_POWER])
    drawn = stars.draw(4000, np.random.default_rng(1), snr=100.0, whole=True)
    found, known = drawn["coefficients"][..., 2:], drawn["reliability"][..., 2:]
    # Of a posterior mean: the spread is that of the noise that is left in it.
    best = known.mean(axis=(0, 1)) > 0.99
    sigma = np.sqrt(np.maximum(known * (1.0 - known), 1e-12))
    ratio = (found - found.mean(axis=0)) / sigma
    assert best.any() and 0.8 < ratio[..., best].std() < 1.25
    assert np.array_equal(drawn["interval_ids"][0], np.arange(SURVEY_INTERVALS))


def test_missing_intervals_have_no_information(survey_grid, survey_labels, survey_basis):
    raw = coefficients_of(survey_grid, survey_basis.rungs[0], survey_labels, SEEN_POWER)
    wavelength = np.exp(np.arange(np.log(5_000.0), np.log(5_700.0), 1.0 / SEEN_POWER / 2.5))
    stars = SurveyStars(
        survey_basis.rungs[0],
        raw,
        survey_grid.known(survey_labels),
        [survey_basis.design(wavelength, SEEN_POWER)],
        [SEEN_POWER],
    )
    drawn = stars.draw(300, np.random.default_rng(2))
    seen = drawn["seen"]
    assert 0.3 < seen.mean() < 1.0 and seen.any(axis=1).all()
    assert not drawn["reliability"][~seen].any() and not drawn["coefficients"][~seen].any()
    again = stars.draw(300, np.random.default_rng(2))
    assert np.array_equal(drawn["coefficients"], again["coefficients"])


def test_faults_lie_where_the_air_and_the_sky_have_lines(survey_grid):
    spectra = survey_grid.spectra(survey_grid.labels(40, np.random.default_rng(3))).astype(float)
    settings = {"n_intervals": 5, "counts_level": True, "guesses_power": False}
    rung = make_survey_rung(survey_grid, spectra, np.log(6_015.0), **settings)
    faults = Faults(rung, survey_grid.wavelength, SEEN_POWER)
    drawn = faults.drawn(2000, np.random.default_rng(0))
    assert drawn.shape == (2000, 5, 8)
    air = np.abs(faults.lines.reshape(-1, 5, 8)).sum(axis=(0, 2))
    assert air[1] > 1.0 and air[2] > 1.0 and air[0] < 1e-6 * air[1], "clean: 6,015-6,198; not: 6,278-6,325"
    again = faults.drawn(2000, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, again)


def test_a_flux_that_rises_changes_coefficients_as_it_does_in_pixels(survey_grid, survey_labels, survey_basis):
    rung, spectra = survey_basis.rungs[0], survey_grid.spectra(survey_labels).astype(float)
    faults = Faults(rung, survey_grid.wavelength, SURVEY_POWER)
    matrices = fit_matrices(rung, survey_grid.wavelength, SURVEY_POWER)
    position, slope = np.log(survey_grid.wavelength), 0.05

    def coefficients(flux):
        return np.stack([flux[:, pixels] @ matrix.T for pixels, matrix in matrices], axis=1)

    x = 2.0 * ((position - rung.edge) / rung.width % 1.0) - 1.0
    raw = coefficients(spectra)
    expected = coefficients(spectra * (1.0 + slope * x)) - raw
    found = slope * np.einsum("ntk,tkj->ntj", raw, faults.tilt)
    np.testing.assert_allclose(found[..., 1], expected[..., 1], atol=0.1 * np.abs(expected[..., 1]).max())
    warm = survey_labels["teff"] > 4500  # a few directions hold little of cool stars
    together = np.corrcoef(found[warm][..., 2:].ravel(), expected[warm][..., 2:].ravel())[0, 1]
    assert together > 0.8
    assert (faults.dust > 0).all(), "dust makes spectra rise to the red"
    drawn = faults.tilted(raw.astype(np.float32), np.random.default_rng(0))
    assert drawn.shape == raw.shape and drawn.std() > 0


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


def test_a_mismatch_without_observed_stars_is_extrapolated():
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


def test_mixed_stars_lie_between_a_star_and_one_of_its_neighbours(survey_grid, survey_labels, survey_basis):
    raw = coefficients_of(survey_grid, survey_basis.rungs[0], survey_labels, SEEN_POWER).astype(np.float32)
    raw /= raw[:, :1, :, :1]
    seen = np.ones((len(raw), SURVEY_INTERVALS), bool)
    seen[::3, 0] = False
    design = survey_basis.design(survey_grid.wavelength[50:-50], SURVEY_POWER)
    settings = {"seen": seen, "known": survey_grid.known(survey_labels), "designs": [design], "powers": [SURVEY_POWER]}
    stars = SurveyStars(survey_basis.rungs[0], raw, **settings, mixed=0.5)
    chosen = np.repeat(np.arange(len(raw)), 40)
    mixed, known, complete = stars._chosen(chosen, np.random.default_rng(0))
    changed = known["teff"] != settings["known"]["teff"][chosen]
    assert 0.4 < changed.mean() < 0.6
    np.testing.assert_array_equal(mixed[~changed], raw[chosen][~changed])
    # Coefficients and labels go the same part of the way, to one star; what either lacks, the sum lacks.
    star = np.flatnonzero(changed)[0]
    others = stars.neighbours[chosen[star]]
    way = {name: known[name][star] - settings["known"][name][chosen[star]] for name in ("teff", "logg", "fe_h")}
    parts = [
        {name: way[name] / (settings["known"][name][i] - settings["known"][name][chosen[star]]) for name in way}
        for i in others
    ]
    spread = [np.ptp(list(part.values())) for part in parts]
    one, part = others[int(np.argmin(spread))], parts[int(np.argmin(spread))]["logg"]
    assert min(spread) < 0.02 and 0.0 < part < 0.5
    expected = (1.0 - part) * raw[chosen[star]] + part * raw[one]
    np.testing.assert_allclose(mixed[star], expected, atol=0.02 * np.abs(expected).max())
    assert not complete[changed & ~seen[chosen, 0], 0].any() and complete[:, 1:].all()


def test_stars_are_not_drawn_on_grids_where_none_was_observed(survey_grid, survey_labels, survey_basis):
    raw = coefficients_of(survey_grid, survey_basis.rungs[0], survey_labels, SEEN_POWER)
    step = 1.0 / SEEN_POWER / 2.5
    edges = SURVEY_EDGE + 0.03 * np.arange(SURVEY_INTERVALS + 1)
    grids = [np.exp(np.arange(*part, step)) for part in ((edges[0], edges[-1]), (edges[2], edges[3]))]
    designs = [survey_basis.design(wavelength, SEEN_POWER) for wavelength in grids]
    seen = np.ones((len(raw), SURVEY_INTERVALS), bool)
    seen[:, 2] = False
    stars = SurveyStars(
        survey_basis.rungs[0], raw, survey_grid.known(survey_labels), designs, [SEEN_POWER, 0.9 * SEEN_POWER], seen=seen
    )
    assert len(stars.modes) == 1 and stars.powers == [SEEN_POWER]
    assert stars.draw(50, np.random.default_rng(0))["seen"][:, :2].any()
