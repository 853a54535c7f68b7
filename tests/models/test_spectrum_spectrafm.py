# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Complete spectra from parts of them: observed stars of Gaia XP, and stars of the emulator in the H band."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d
from transformers import pipeline

from spectrafm_hf import bundled, load_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.spectrum_spectrafm import STRANGE_SIGMA, best_fits, not_noise
from spectrafm_hf.synthesis.synthetic import load_emulator


SNR = 100.0
NOISE = 1 / SNR


@pytest.fixture(scope="module")
def base():
    model, tokenizer = load_checkpoint("spectrafm-base")
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def xp():
    """Observed stars of 3,500 to 6,500 K that nothing was trained on."""
    rows = [row for row in read_spectra([DEMO_STARS]) if 3500 < row["teff"] < 6500]
    return [{name: row[name] for name in ("wavelength", "flux", "flux_error", "mask")} for row in rows]


@pytest.fixture(scope="module")
def hband():
    """A giant over its continuum, with noise: wavelength, flux without noise, row."""
    emulator = load_emulator("emulator-hband")
    wavelength, flux = emulator.synthesize(teff=4800.0, logg=2.5, fe_h=-0.2, mg_fe=0.1, wavelength_range=(15152, 16952))
    clean = flux[0].astype(float)
    noisy = clean + np.random.default_rng(3).standard_normal(clean.size) * NOISE
    row = {"wavelength": wavelength, "flux": noisy, "flux_error": np.full(clean.size, NOISE)}
    return wavelength, clean, row | {"mask": np.zeros(clean.size, bool)}


def fit_of(base, row):
    model, tokenizer = base
    (fit,) = best_fits(model, tokenizer.basis, tokenizer(row, return_grids=True)["grids"])
    return fit


@pytest.mark.parametrize(("low", "high", "percent"), [(4000, 4800, 3.0), (6300, 7300, 1.2), (8000, 9200, 1.0)])
def test_a_hole_in_observed_xp_spectra_is_filled_to_its_error(base, xp, low, high, percent):
    model, tokenizer = base
    wavelength = np.asarray(xp[0]["wavelength"], float)
    hole = (wavelength > low) & (wavelength < high)
    masked = [{**row, "mask": np.asarray(row["mask"], bool) | hole} for row in xp]
    _, flux, error = model.predict_spectrum(tokenizer, masked, wavelength=wavelength[hole])
    hidden, noise = (np.stack([row[name] for row in xp])[:, hole].astype(float) for name in ("flux", "flux_error"))
    rms = np.sqrt(np.mean((flux - hidden) ** 2, axis=1)) / hidden.mean(axis=1)
    assert np.median(rms) < percent / 100
    z = (flux - hidden) / np.hypot(error, noise)
    assert 0.5 < np.sqrt(np.mean(np.clip(z, -5, 5) ** 2)) < 1.7


def test_kinds_of_stars_reduce_the_error_of_a_hole_by_a_third(base, xp):
    model, tokenizer = base
    wavelength = np.asarray(xp[0]["wavelength"], float)
    hole = (wavelength > 4000) & (wavelength < 4800)
    masked = [{**row, "mask": np.asarray(row["mask"], bool) | hole} for row in xp]
    hidden = np.stack([row["flux"] for row in xp])[:, hole].astype(float)
    xp_rung, *others = tokenizer.basis.rungs
    without = copy.copy(tokenizer)
    without.basis = SpectrumBasis([replace(xp_rung, kind_shares=()), *others])
    with_kinds, one_gaussian = (
        np.median(np.abs(model.predict_spectrum(each, masked, wavelength=wavelength[hole])[1] / hidden - 1))
        for each in (tokenizer, without)
    )
    assert with_kinds < 0.7 * one_gaussian


def test_absent_pixels_are_filled_as_masked_ones_are(base, xp):
    model, tokenizer = base
    wavelength = np.asarray(xp[0]["wavelength"], float)
    hole = (wavelength > 6300) & (wavelength < 7300)
    masked = {**xp[0], "mask": hole}
    absent = {name: np.asarray(values)[~hole] for name, values in xp[0].items()}
    found = [model.predict_spectrum(tokenizer, row, wavelength=wavelength[hole]) for row in (masked, absent)]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=2e-3)


def test_a_hole_in_the_h_band_is_filled_and_noise_is_taken_out(base, hband):
    model, tokenizer = base
    wavelength, clean, row = hband
    hole = (wavelength > 15_600) & (wavelength < 15_700)
    found, flux, error = model.predict_spectrum(tokenizer, {**row, "mask": hole})
    np.testing.assert_allclose(found, wavelength)
    deviation = flux[0] - clean
    assert np.std(deviation[hole]) < 0.35 * NOISE
    assert np.std(deviation[~hole]) < 0.25 * NOISE
    assert 0.5 < np.sqrt(np.mean((deviation / error[0]) ** 2)) < 1.5
    assert np.median(error[0, hole]) > np.median(error[0, ~hole])


def test_the_unit_of_the_flux_is_that_of_the_spectrum(base, xp):
    model, tokenizer = base
    scaled = {**xp[0], "flux": 3e-16 * np.asarray(xp[0]["flux"]), "flux_error": 3e-16 * np.asarray(xp[0]["flux_error"])}
    one, other = (model.predict_spectrum(tokenizer, row) for row in (xp[0], scaled))
    np.testing.assert_allclose(other[1], 3e-16 * one[1], rtol=1e-3)
    np.testing.assert_allclose(other[2], 3e-16 * one[2], rtol=1e-2)


def test_a_lower_resolving_power_is_smoother(base, hband):
    model, tokenizer = base
    wavelength = np.arange(15_300.0, 15_400.0, 0.3)
    fine, coarse = (
        model.predict_spectrum(tokenizer, hband[2], wavelength=wavelength, resolving_power=power)[1][0]
        for power in (None, 3000.0)
    )
    assert np.std(coarse) < 0.8 * np.std(fine)
    assert np.mean(coarse) == pytest.approx(np.mean(fine), abs=3e-3)


def test_unknown_ranges_and_resolving_powers_are_refused(base, hband):
    model, tokenizer = base
    for wavelength, power, expected in (
        (np.arange(4000.0, 4100.0), None, r"wavelength: expected 15,1.* Angstrom, got 4,000.0"),
        (np.array([15_300.0, 15_299.0]), None, "wavelength: expected increasing numbers"),
        (np.arange(15_300.0, 15_310.0), 50_000.0, "resolving_power: expected at most 22500, got 50000"),
    ):
        with pytest.raises(ValueError, match=expected):
            model.predict_spectrum(tokenizer, hband[2], wavelength=wavelength, resolving_power=power)


def test_the_best_fit_of_a_star_leaves_noise_alone(base, hband):
    wavelength, clean, row = hband
    fit = fit_of(base, row)
    assert fit.chi2 / fit.degrees_of_freedom == pytest.approx(1.0, abs=0.06)
    assert fit.no_noise == []
    assert np.std(fit.model - clean) < 0.2 * NOISE
    assert np.nanstd(fit.residual) == pytest.approx(1.0, abs=0.05)


def test_features_that_no_star_has_are_significant(base, hband):
    wavelength, _, row = hband
    wrong = (wavelength > 16_000) & (wavelength < 16_012)
    fit = fit_of(base, {**row, "flux": row["flux"] - 0.05 * wrong})
    (low, high, sigma), *_ = fit.no_noise
    assert 15_995 < low < 16_003
    assert 16_009 < high < 16_017
    assert sigma < -STRANGE_SIGMA


def test_noise_is_no_discovery_and_a_step_is():
    residual = np.random.default_rng(0).standard_normal(8000)
    wavelength = np.linspace(15_000.0, 17_000.0, 8000)
    assert not_noise(wavelength, residual) == []
    residual[4000:4020] += 3.0
    ((low, high, sigma),) = not_noise(wavelength, np.where(np.arange(8000) == 10, np.nan, residual))
    assert abs(low - wavelength[4000]) < 7
    assert abs(high - wavelength[4019]) < 7
    assert sigma > STRANGE_SIGMA


def test_the_pipeline_returns_the_fit_with_the_labels(xp):
    predict = pipeline("stellar-labels", model=bundled("spectrafm-base"))
    with_fit = predict(xp[:3], spectrum=True, batch_size=2)
    assert [len(answer["spectrum"].wavelength) for answer in with_fit] == [343] * 3
    fit = with_fit[0]["spectrum"]
    np.testing.assert_allclose(fit.flux, xp[0]["flux"], rtol=1e-5)
    assert np.nanmax(np.abs(fit.residual)) < 6
    assert "BestFit(chi2=" in repr(with_fit[0])
    assert "spectrum" not in with_fit.to_pandas()
    assert "spectrum" not in predict(xp[0])


def test_nothing_is_predicted_in_telluric_bands(base):
    """The line of the sky at 5,577 A, to which the rung of the optical is blind: no flux of zero, no misfit."""
    wavelength = np.arange(5400.0, 5800.0, 0.5)
    emulator = load_emulator("emulator-optical")
    grid, flux = emulator.synthesize(teff=5000.0, logg=3.0, fe_h=-0.3, wavelength_range=(5390, 5810))
    row = {"wavelength": wavelength, "flux": np.interp(wavelength, grid, flux[0] / np.median(flux))}
    row |= {"flux_error": np.full(wavelength.size, 0.02), "mask": np.zeros(wavelength.size, bool)}
    sky = (wavelength > 5572) & (wavelength < 5586)
    fit = fit_of(base, row)
    assert np.isnan(fit.model[sky]).all() and np.isfinite(fit.model[~sky]).all()
    assert fit.chi2 < 10 * fit.degrees_of_freedom  # the line spread function is not stated
    whole, flux, error = base[0].predict_spectrum(base[1], row)
    assert np.array_equal(np.isnan(flux[0]), (whole > 5572) & (whole < 5586))


def test_a_fit_is_drawn_at_the_resolving_power_in_which_its_pixels_are_read(base):
    """Where nobody states it, as guessed from the pixels, not the highest that the rung has."""
    wavelength = np.exp(np.arange(np.log(4500.0), np.log(5600.0), 1.0 / 3000.0))
    grid, flux = load_emulator("emulator-optical").synthesize(
        teff=5000.0, logg=3.0, fe_h=-0.3, wavelength_range=(4480, 5630)
    )
    even = np.exp(np.arange(np.log(grid[0]), np.log(grid[-1]), 2e-5))
    width = 1.0 / 1000.0 / 2.3548 / 2e-5  # a FWHM of three pixels
    smooth = gaussian_filter1d(np.interp(even, grid, flux[0] / np.median(flux)), width)
    row = {"wavelength": wavelength, "flux": np.interp(wavelength, even, smooth)}
    row |= {"flux_error": np.full(wavelength.size, 0.01), "mask": np.zeros(wavelength.size, bool)}
    fit = fit_of(base, row)
    stated = fit_of(base, {**row, "resolving_power": 1000.0})
    assert 700 < fit.resolving_power < 1500 and stated.resolving_power == 1000.0
    assert fit.chi2 < 4 * fit.degrees_of_freedom and stated.chi2 < 4 * stated.degrees_of_freedom
