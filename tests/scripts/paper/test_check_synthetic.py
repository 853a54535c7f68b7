"""Realism of synthetic spectra: known parameters are recovered."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from script_loader import load_script

from spectrafm_hf import SpectrumEmulator, bundled


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "check_synthetic.py"
WAVELENGTH = 10 ** (4.179 + 6e-6 * np.arange(8575))


@pytest.fixture(scope="module")
def script():
    return load_script("paper/check_synthetic")


@pytest.fixture(scope="module")
def emulator():
    return SpectrumEmulator.from_pretrained(bundled("emulator-hband"))


def test_a_line_is_moved_and_broadened(script):
    x = np.arange(500.0)
    flux = 1 - 0.5 * np.exp(-0.5 * ((x - 200) / 3) ** 2)
    expected = 1 - 0.5 * (3 / 5) * np.exp(-0.5 * ((x - 207.4) / 5) ** 2)
    np.testing.assert_allclose(script.shift_and_broaden(flux, 7.4, 4.0), expected, atol=1e-6)


def test_the_continuum_of_each_piece_is_found_whatever_invalid_pixels_hold(script):
    x = np.linspace(-1, 1, 300)
    model = 1 - 0.3 * np.sin(40 * x) ** 2
    true = np.where(x < 0, 5 + x, 2 - x**3)
    flux, valid = true * model, np.ones(300, dtype=bool)
    flux[50:60], valid[50:60] = 1e6, False
    found = script.continuum(flux, model, valid, [slice(0, 140), slice(160, 300)], 3)
    np.testing.assert_allclose(found[:140], true[:140])
    np.testing.assert_allclose(found[160:], true[160:])
    assert np.isnan(found[140:160]).all()


def test_reddening_is_distinguished_from_a_change_of_temperature(script):
    x = np.linspace(0.4, 1.0, 200)

    def model(change):
        return np.exp(-(1 - change / 2000) / x) * (1 + 0.2 * np.sin(30 * x))

    curve = 1 / x
    reddened = 3.0 * model(150.0) * 10 ** (-0.4 * 0.7 * np.sqrt(x))
    (a_v, change), deviation = script.fit_reddened(reddened, model, np.sqrt(x), True)
    assert a_v == pytest.approx(0.7, abs=0.01) and change == pytest.approx(150, abs=5)
    assert deviation.std() < 1e-3
    (a_v, change), deviation = script.fit_reddened(2.0 * model(0.0) * 10 ** (-0.4 * 0.3 * curve), model, curve, False)
    assert a_v == pytest.approx(0.3, abs=1e-4) and change == 0


def test_an_apstar_file_becomes_its_combined_spectrum_without_bad_pixels(script):
    flux = np.full((3, 8575), 100.0)
    flux[1:] = 7.0
    error, mask = np.ones_like(flux), np.zeros(flux.shape, dtype=np.int64)
    mask[0, 1000], mask[0, 1001], mask[1, 1002] = 1, 1 << 11, 1  # bad; low persistence; bad in a visit only
    error[0, 1003], flux[0, 1004] = 50.0, np.nan
    content = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *map(fits.ImageHDU, (flux, error, mask))]).writeto(content)
    star = script.read_apstar(content.getvalue(), "some star")
    assert star.flux[star.valid].tolist() == [100.0] * int(star.valid.sum())
    assert star.valid[998:1006].tolist() == [True, True, False, True, True, False, False, True]
    assert sum(piece.stop - piece.start for piece in star.pieces) == 7514 == star.valid.sum() + 3
    assert not star.valid[:246].any()


def test_labels_velocity_and_broadening_of_a_synthetic_star_are_found(script, emulator):
    true = {"teff": 4650.0, "logg": 2.3, "fe_h": -0.35, "mg_fe": 0.2, "c_fe": -0.1}
    table = emulator.label_table(true)
    with torch.no_grad():
        flux = emulator(torch.from_numpy(table))[0][0].double().numpy()
    flux = script.shift_and_broaden(flux, 3.0 / script.PIXEL, 6.0 / script.PIXEL)
    flux *= 800 * (1 + 0.1 * np.linspace(-1, 1, 8575))
    generator = np.random.default_rng(0)
    error = np.full(8575, 4.0)
    valid = np.zeros(8575, dtype=bool)
    pieces = script.detector_slices(WAVELENGTH)
    for piece in pieces:
        valid[piece] = True
    star = script.Star("made", WAVELENGTH, flux + generator.normal(size=8575) * error, error, valid, pieces)
    start = np.append(emulator.label_table({"teff": 4800, "logg": 2.6, "fe_h": -0.2})[0], [0.0, 3.0])
    fit = script.fit_labels(emulator, star, start=start)
    found = dict(zip(emulator.config.label_names, fit.x, strict=False))
    assert found["teff"] == pytest.approx(4650, abs=30) and found["fe_h"] == pytest.approx(-0.35, abs=0.03)
    assert found["mg_fe"] == pytest.approx(0.2, abs=0.03) and found["logg"] == pytest.approx(2.3, abs=0.1)
    assert fit.x[-2] == pytest.approx(3.0, abs=0.1) and fit.x[-1] == pytest.approx(6.0, abs=0.3)
    rms, mad, correlation, median_error = fit.figures(valid)
    assert 0.0045 < rms < 0.0056 and 0.0045 < mad < 0.0056 and correlation > 0.99
    assert median_error == pytest.approx(0.005, rel=0.05)
    for low, high in script.LINES.values():
        assert abs(script.line_velocity(fit, star, low, high)) < 2
    star.valid[(WAVELENGTH > 15742) & (WAVELENGTH < 15748)] = False
    assert script.line_velocity(fit, star, 15742, 15748) is None


def test_stars_of_miles_without_labels_are_left_out(script):
    text = "#MILES  Teff  log g\n  0272  6024   4.50    -1.44\n  0838  2748   5.09  9999.0\n0001 99999 9999 9999\n"
    assert script.read_miles_labels(text) == [("0272", 6024.0, 4.5, -1.44)]


def test_the_card_shows_every_part_that_was_run_and_only_those(script):
    rows = [["giant", 0.0123, None], ["dwarf", 0.5, True]]
    result = {"tables": [script.table("Figures", ["star", "rms", "x"], rows)], "pictures": ["a.png"]}
    remarks = (SCRIPT.parents[2] / "model_cards" / "synthetic-realism.remarks.md").read_text()
    card = script.make_card({"miles": result}, remarks)
    assert card.startswith("# How real") and "Nothing is fitted but a polynomial" in card and "<!--" not in card
    assert "| giant | 0.0123 | -    |" in card and "| dwarf | 0.5    | True |" in card
    assert "](pictures/a.png)" in card and "## MILES" in card
    assert "## Gaia XP" not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdss"], "part: expected some of apogee, gaia-xp, miles, loggf, derivatives, got sdss"),
        (["loggf"], "loggf left out: apogee: expected its results"),
    ],
)
def test_unusable_input_is_one_line_on_stderr(script, tmp_path, capsys, arguments, message):
    try:
        code = script.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr().err
    assert code == 2 and message in captured and captured.count("\n") == 1
