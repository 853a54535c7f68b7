# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Prediction of spectra."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.schema import OVER_CONTINUUM, SURFACE
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.inference.emulated import EmulatedSpectra, _without_one, with_usual_labels
from spectrafm_hf.inference.spectrum import AS_GIVEN, SpectrumPredictor, best_fit
from spectrafm_hf.inference.spectrum_files import SpectrumWriter
from spectrafm_hf.models.modeling_emulator import CovarianceGroup
from spectrafm_hf.synthesis.emulation import fit_group
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.line_spread import FWHM
from spectrafm_hf.synthesis.synthetic import load_emulator


GIANT = {"teff": 4800.0, "logg": 2.5, "fe_h": -0.2}
RED = np.arange(15_250.0, 15_350.0, 0.25)


@pytest.fixture(scope="module")
def predictor():
    model, tokenizer = load_checkpoint("spectrafm-base")
    return SpectrumPredictor(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def xp():
    return next(row for row in read_spectra([DEMO_STARS]) if 4500 < row["teff"] < 5000 and row["fe_h"] > -0.5)


def test_on_its_own_pixels_it_is_the_emulator():
    emulator = load_emulator("emulator-hband")
    wavelength, flux = emulator.synthesize(**GIANT, wavelength_range=RED[[0, -1]])
    found = EmulatedSpectra(emulator, wavelength)(GIANT)
    np.testing.assert_allclose(found.flux, flux, atol=2e-3)
    assert found.unit == OVER_CONTINUUM
    assert found.resolving_power == 22_500
    # Where there are lines an emulator can be wrong; the median star's error is below 0.1 percent.
    assert 1e-5 < np.median(found.error) < 1e-3
    assert found.error[flux < 0.9].mean() > 1.5 * found.error[flux > 0.98].mean()


def test_a_lower_resolving_power_equals_smoothing():
    emulator = load_emulator("emulator-hband")
    wavelength, flux = emulator.synthesize(**GIANT)
    inside = slice(4000, 4400)
    found = EmulatedSpectra(emulator, wavelength[inside], 5000.0)(GIANT)
    step = np.log(wavelength[1] / wavelength[0])
    sigma = np.sqrt(5000.0**-2 - 22_500.0**-2) / FWHM / step
    np.testing.assert_allclose(found.flux[0], gaussian_filter1d(flux[0].astype(float), sigma)[inside], atol=5e-4)


def test_errors_of_labels_go_through_the_derivatives_of_the_flux():
    predictor = SpectrumPredictor()
    own = predictor.from_labels(GIANT, wavelength=RED)
    names = load_emulator("emulator-hband").config.label_names
    known = {**dict.fromkeys(names[3:13], 0.0), "vmicro": 1.5, **GIANT}
    exact = predictor.from_labels(known, dict.fromkeys(known, 0.0), wavelength=RED)
    wrong = predictor.from_labels(known, {"teff": 60.0}, wavelength=RED)
    sides = [predictor.from_labels({**known, "teff": 4800.0 + sign * 60}, wavelength=RED).flux for sign in (1, -1)]
    slope = 0.5 * (sides[0] - sides[1])
    np.testing.assert_allclose(wrong.error**2 - exact.error**2, slope**2, atol=2e-8)
    # What is not given may be off as well, where errors are stated at all.
    unsure = predictor.from_labels(GIANT, {"teff": 60.0}, wavelength=RED)
    assert np.median(unsure.error) > 2 * np.median(wrong.error)
    assert np.median(own.error) < np.median(wrong.error)


def test_alpha_m_is_the_mean_of_its_elements():
    predictor = SpectrumPredictor()
    with_alpha = predictor.from_labels({**GIANT, "alpha_m": 0.2}, wavelength=RED)
    each = dict.fromkeys(("o_fe", "mg_fe", "si_fe", "ca_fe", "ti_fe"), 0.2)
    np.testing.assert_allclose(with_alpha.flux, predictor.from_labels({**GIANT, **each}, wavelength=RED).flux)
    emulator = load_emulator("emulator-hband")
    known = {name: np.array([value]) for name, value in {**GIANT, "alpha_m": 0.2}.items()}
    labels, directions = with_usual_labels(emulator, known, {"alpha_m": np.array([0.05])})
    assert np.mean([labels[name] for name in each]) == pytest.approx(0.2, abs=1e-6)
    assert directions[-1, 0, [emulator.config.label_names.index(name) for name in each]].mean() == pytest.approx(0.05)
    assert labels["n_fe"][0] > 0.15  # as giants have it


def test_flux_at_the_surface_has_its_unit_and_follows_the_temperature():
    predictor = SpectrumPredictor()
    wavelength = np.arange(5000.0, 5200.0, 2.0)
    cool, warm = (
        predictor.from_labels({**GIANT, "teff": teff}, wavelength=wavelength, resolving_power=1000.0, normalised=False)
        for teff in (4800.0, 5300.0)
    )
    assert cool.unit == SURFACE
    # Of a black body at 5,100 Angstrom: 1.75.
    assert 1.5 < np.mean(warm.flux) / np.mean(cool.flux) < 2.3
    assert np.all(cool.error > 0)


@pytest.mark.parametrize(
    ("labels", "how", "expected"),
    [
        ({"teff": 4800.0, "logg": 2.5}, {}, r"labels: expected at least teff, logg and fe_h, got none for fe_h"),
        ({**GIANT, "mass": 1.0}, {}, r"labels: expected names out of .* got mass"),
        ({"teff": 4800.0, "loggg": 2.5, "fe_h": 0.0}, {}, "labels: expected names out of .*, got loggg"),
        ({**GIANT, "teff": 9000.0}, {}, "teff: expected 3122.3 to 6761.7"),
        (GIANT, {"wavelength": np.arange(1e4, 1.2e4)}, "wavelength: expected 15,101 to 17,000 or 3,301 to 10,300"),
        (GIANT, {"wavelength": RED[::-1]}, "wavelength: expected at least three increasing numbers"),
        (GIANT, {"resolving_power": 1e5}, "resolving_power: expected at most 22,500, .* got 100000"),
        (GIANT, {"normalised": False}, "normalised: expected True in the H band"),
    ],
)
def test_bad_input_is_named(labels, how, expected):
    with pytest.raises(ValueError, match=expected):
        SpectrumPredictor().from_labels(labels, **{"wavelength": RED, **how})


def test_leaving_a_star_out_needs_no_second_fit():
    torch.manual_seed(0)
    stars = torch.rand(60, 3, dtype=torch.float64) * 4 - 2
    truth = torch.stack([torch.sin(stars[:, 0]) + 0.3 * stars[:, 1], torch.cos(stars[:, 1] + stars[:, 2])], dim=1)
    targets = truth + 0.05 * torch.randn(60, 2, dtype=torch.float64)
    group = CovarianceGroup(3, 60, 2)
    fit_group(group, stars, targets, 60, "test")
    with torch.no_grad():
        covariance, weight = group.covariance(stars, stars), group.weight.double()
        left = targets - covariance @ weight
        noise = float((left * weight).sum() / (weight * weight).sum())
        expected = torch.empty(60, 2, dtype=torch.float64)
        for star in range(60):
            others = torch.arange(60) != star
            solved = torch.linalg.solve(covariance[others][:, others] + noise * torch.eye(59), targets[others])
            expected[star] = targets[star] - covariance[star, others] @ solved
        found = _without_one(group, stars)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.98
    assert float(found.std() / expected.std()) == pytest.approx(1.0, abs=0.15)


def test_spectra_are_filled_in_within_their_range_and_predicted_elsewhere(predictor, xp):
    within = predictor.from_spectra([xp])
    assert within.unit == AS_GIVEN
    z = (within.flux[0] - xp["flux"]) / xp["flux_error"]
    assert np.sqrt(np.mean(z**2)) < 1
    elsewhere = predictor.from_spectra([xp], wavelength=RED)
    assert elsewhere.unit == OVER_CONTINUUM
    # APOGEE's labels of the star, by the emulator: within the errors.
    labels = {name: xp[name] for name in ("teff", "logg", "fe_h", "alpha_m")}
    z = (elsewhere.flux - predictor.from_labels(labels, wavelength=RED).flux) / elsewhere.error
    assert 0.05 < np.sqrt(np.mean(z**2)) < 1.6
    assert 0.001 < np.median(elsewhere.error) < 0.03
    on_apogee = predictor.from_spectra([xp], wavelength=Instrument.load("apogee"))
    assert on_apogee.flux.shape == (1, 7514)


def test_a_predicted_abundance_beyond_the_grid_gives_the_spectrum_of_its_limit(predictor, xp, monkeypatch):
    emulator = load_emulator("emulator-hband")
    place = list(emulator.config.label_names).index("vmicro")
    lowest = emulator.config.label_minimum[place]
    known = {**GIANT, "vmicro": lowest - 0.1}
    labels = {name: np.array([value]) for name, value in known.items()}
    errors = {name: np.zeros(1) for name in known}
    monkeypatch.setattr(SpectrumPredictor, "_labels", lambda self, rows: (dict(labels), errors))
    found = predictor.from_spectra([xp], wavelength=RED)
    expected = predictor.from_labels({**GIANT, "vmicro": lowest}, errors, wavelength=RED)
    np.testing.assert_array_equal(found.flux, expected.flux)
    labels["teff"] = np.array([1000.0])
    with pytest.raises(ValueError, match="teff: expected"):
        predictor.from_spectra([xp], wavelength=RED)


@pytest.mark.parametrize("suffix", [".parquet", ".fits", ".csv"])
def test_a_written_instrument_is_read_again(predictor, xp, tmp_path, suffix):
    spectra = predictor.from_spectra([xp])
    path = tmp_path / f"star{suffix}"
    with SpectrumWriter(path) as writer:
        writer.write(spectra, ["a star"])
    (row,) = read_spectra([path], at_rest=True, wavelength_medium="vacuum")
    np.testing.assert_allclose(row["wavelength"], spectra.wavelength, rtol=1e-6)
    np.testing.assert_allclose(row["flux"], spectra.flux[0], rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], spectra.error[0], rtol=1e-6)
    assert row["object_id"] == ("star" if suffix == ".csv" else "a star")


def test_several_stars_need_a_table(predictor, xp, tmp_path):
    spectra = predictor.from_spectra([xp, xp])
    with SpectrumWriter(tmp_path / "stars.fits") as writer:
        writer.write(spectra, ["one", "two"])
    rows = list(read_spectra([tmp_path / "stars.fits"], at_rest=True, wavelength_medium="vacuum"))
    assert [row["object_id"] for row in rows] == ["one", "two"]
    refused = pytest.raises(ValueError, match=r"output: expected a .parquet or .fits file")
    with refused, SpectrumWriter(tmp_path / "stars.csv") as writer:
        writer.write(spectra, ["one", "two"])
    assert not (tmp_path / "stars.csv").exists()
    with pytest.raises(ValueError, match=r"output: expected a name that ends in .parquet, .fits or .csv, got .*\.txt"):
        SpectrumWriter(tmp_path / "stars.txt")


def test_the_fit_of_a_row_is_in_its_unit(predictor, xp):
    fit = best_fit(predictor.model, predictor.tokenizer, xp)
    z = (fit.model - xp["flux"]) / xp["flux_error"]
    assert np.nanstd(z) < 1
