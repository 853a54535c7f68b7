"""Velocities from lines, of synthetic stars and of spectra without lines."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter1d
from transformers import pipeline

import spectrafm_cli
from spectrafm_hf import SpectrumEmulator, bundled, load_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.inference.survey import ShardPredictor, list_shards
from spectrafm_hf.inference.velocities import at_measured_velocities
from spectrafm_hf.models import velocity_spectrafm
from spectrafm_hf.models.gate_spectrafm import to_rest
from spectrafm_hf.models.velocity_spectrafm import VelocityMeter
from spectrafm_hf.synthesis.synthetic import SyntheticStars


VELOCITIES = (-287.3, -41.0, 0.0, 12.6, 198.7)


@pytest.fixture(scope="module")
def base():
    return load_checkpoint("spectrafm-base")


@pytest.fixture(scope="module")
def meter(base):
    return VelocityMeter(base[1].basis, base[0])


@pytest.fixture(scope="module")
def stars():
    """Wavelength, and spectra (stars, pixels) of stars that move, with a continuum of no star; S/N 60."""
    rng = np.random.default_rng(2)
    source = SyntheticStars("apogee-apstar", seed=4)._stars
    wavelength, flux = source._synthesize(source._labels(len(VELOCITIES), rng))
    wavelength = np.asarray(wavelength, float)
    moved = [np.interp(to_rest(wavelength, v), wavelength, f) for v, f in zip(VELOCITIES, flux, strict=True)]
    spectra = 1e-15 * np.array(moved) * (1 + 0.2 * np.sin(wavelength / 200))
    error = np.full(spectra.shape, 1e-15 / 60)
    return wavelength, spectra + error * rng.normal(size=spectra.shape), error


def test_velocities_are_right_to_half_a_km_and_within_their_errors(meter, stars):
    wavelength, flux, error = stars
    good = np.zeros(len(wavelength), bool)
    found = [meter(wavelength, f, e, good) for f, e in zip(flux, error, strict=True)]
    off = np.array([each.value for each in found]) - VELOCITIES
    assert np.abs(off).max() < 0.6
    assert np.abs(off / [each.error for each in found]).max() < 4


def test_masked_pixels_and_their_order_play_no_part(meter, stars):
    wavelength, flux, error = stars[0], stars[1][4].copy(), stars[2][4]
    mask = np.random.default_rng(0).random(len(wavelength)) < 0.2
    flux[mask] = np.nan
    there = meter(wavelength, flux, error, mask)
    back = meter(wavelength[::-1], flux[::-1], error[::-1], mask[::-1])
    assert there.value == back.value == pytest.approx(VELOCITIES[4], abs=0.6)
    assert meter(wavelength, flux, np.full(flux.shape, np.nan), mask).value == pytest.approx(VELOCITIES[4], abs=0.6)


def test_spectra_without_lines_have_no_velocity(meter, stars):
    wavelength, rng = stars[0], np.random.default_rng(1)
    for level in (0.01, 0.1):
        noise = 1 + level * rng.normal(size=wavelength.size)
        found = meter(wavelength, noise, np.full(wavelength.size, level), np.zeros(wavelength.size, bool))
        assert np.isnan(found.value) and "radial_velocity: expected" in found.cause
    xp = np.arange(3360.0, 10201.0, 20.0)
    found = meter(xp, np.ones(xp.size), np.full(xp.size, 0.01), np.zeros(xp.size, bool))
    assert "expected a spectrum with narrow lines" in found.cause


def test_without_a_model_the_mean_star_of_the_basis_is_enough(base, stars):
    wavelength, flux, error = stars
    found = VelocityMeter(base[1].basis)(wavelength, flux[1], error[1], np.zeros(len(wavelength), bool))
    assert found.value == pytest.approx(VELOCITIES[1], abs=2.0)


@pytest.fixture
def table(tmp_path, stars):
    """A file whose frame nobody states, with the velocities in a column, and one star of noise."""
    wavelength, flux, error = stars
    noise = 1e-15 * (1 + np.random.default_rng(0).normal(0, 0.05, wavelength.size))
    rows = {
        "object_id": [f"star-{i}" for i in range(len(flux))] + ["noise"],
        "wavelength": [wavelength] * (len(flux) + 1),
        "flux": [*flux, noise],
        "err": [*error, np.full(wavelength.size, 5e-17)],
        "rv": [*VELOCITIES, np.nan],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "stars.parquet")
    return tmp_path / "stars.parquet"


def test_rows_are_put_at_rest_or_refused(base, table):
    rows = list(at_measured_velocities(read_spectra([table], radial_velocity="measure"), *base))
    assert [row["rest_frame"] for row in rows] == [True] * 5 + [False]
    np.testing.assert_allclose([row["radial_velocity"] for row in rows[:5]], VELOCITIES, atol=0.6)
    assert "expected lines" in rows[5]["refused"]
    # Those that are at rest stay there.
    still = read_spectra([table], at_rest=True, columns={"radial_velocity": "none"})
    np.testing.assert_array_equal(next(at_measured_velocities(still, *base))["wavelength"], rows[5]["wavelength"])


def test_the_command_line_measures_them_and_takes_a_column(table, tmp_path, capsys):
    command = ["predict", str(table), "--model", str(bundled("spectrafm-base"))]
    assert spectrafm_cli.main([*command, "--radial-velocity", "measure", "--output", str(tmp_path / "a.csv")]) == 1
    measured = pd.read_csv(tmp_path / "a.csv")
    np.testing.assert_allclose(measured["radial_velocity"][:5], VELOCITIES, atol=0.6)
    assert (measured["radial_velocity_err"][:5] < 1).all() and measured["teff"].notna().tolist() == [True] * 5 + [False]
    assert spectrafm_cli.main([*command, "--radial-velocity-column", "rv", "--output", str(tmp_path / "b.csv")]) == 1
    stated = pd.read_csv(tmp_path / "b.csv")
    assert (np.abs(measured["teff"] - stated["teff"]) < measured["teff_err"])[:5].all()
    capsys.readouterr()
    assert spectrafm_cli.main(["plot", str(table), "--radial-velocity", "measure"]) == 2
    assert "--radial-velocity: expected km/s for spectrafm plot, got measure" in capsys.readouterr().err


def test_a_survey_has_the_velocities_too(base, table, tmp_path):
    predictor = ShardPredictor(*base, tmp_path / "out", reading={"radial_velocity": "measure"})
    predictor(list_shards([table])[0])
    found = pd.read_parquet(tmp_path / "out")
    np.testing.assert_allclose(found["radial_velocity"][:5], VELOCITIES, atol=0.6)
    assert found["radial_velocity"].isna().tolist() == [False] * 5 + [True]


def test_the_pipeline_takes_a_velocity_for_each_star_or_measures_it(base, stars):
    predict = pipeline("stellar-labels", model=base[0], tokenizer=base[1], device="cpu")
    measured = predict(stars, radial_velocity="measure")
    stated = predict(stars, radial_velocity=VELOCITIES)
    one = predict((stars[0], stars[1][4], stars[2][4]), radial_velocity=VELOCITIES[4])
    assert one == stated[4] and "radial_velocity" not in one
    for answer, other, velocity in zip(measured, stated, VELOCITIES, strict=True):
        assert answer["radial_velocity"] == pytest.approx(velocity, abs=0.6)
        assert answer["teff"] == pytest.approx(other["teff"], abs=other["teff_err"])
    assert measured.to_pandas().attrs["units"]["radial_velocity"] == "km/s"
    with pytest.raises(ValueError, match=r"radial_velocity: expected one for each, got 2 for 5 spectra"):
        predict(stars, radial_velocity=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"radial_velocity: expected lines.*\(spectrum 0\)"):
        predict(
            [(stars[0], 1 + 0 * stars[1][0] + np.random.default_rng(0).normal(0, 0.1, stars[0].size))],
            radial_velocity="measure",
            on_error="raise",
        )


@pytest.fixture(scope="module")
def optical():
    """Wavelength and spectra of a giant and two dwarfs at R = 1,800, at VELOCITIES[1:4]; S/N 50."""
    rng = np.random.default_rng(3)
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-optical"))
    grid, flux = emulator.synthesize(teff=[4600.0, 5700.0, 4400.0], logg=[2.3, 4.4, 4.6], fe_h=[-0.5, 0.0, -0.1])
    even = np.linspace(*np.log(grid[[0, -1]]), len(grid))
    wavelength, spectra = 10 ** np.arange(3.57, 3.955, 1e-4), []
    for star, velocity in zip(flux, VELOCITIES[1:4], strict=True):
        blurred = gaussian_filter1d(np.interp(even, np.log(grid), star), 1 / 1800 / 2.3548 / (even[1] - even[0]))
        level = np.interp(np.log(to_rest(wavelength, velocity)), even, blurred / np.median(blurred))
        spectra.append(level * (1 + 0.02 * rng.normal(size=level.size)))
    return wavelength, np.array(spectra)


@pytest.mark.parametrize("power", [1800.0, None, np.nan])
def test_in_the_optical_at_low_resolution_they_are_right_to_10_km_and_within_their_errors(meter, optical, power):
    wavelength, flux = optical
    for star, velocity in zip(flux, VELOCITIES[1:4], strict=True):
        found = meter(wavelength, star, 0.02 * star, np.zeros(wavelength.size, bool), power)
        assert found.value == pytest.approx(velocity, abs=min(10.0, 4 * found.error)), found.cause


def test_in_the_optical_fast_stars_are_measured_and_faster_ones_are_not_taken_for_slower(meter, optical):
    wavelength, flux = optical
    for velocity, known in ((560.0, True), (-560.0, True), (2000.0, False)):
        moved = wavelength / to_rest(1.0, velocity - VELOCITIES[2])
        found = meter(moved, flux[1], 0.02 * flux[1], np.zeros(wavelength.size, bool), 1800.0)
        assert abs(found.value - velocity) < 10 if known else np.isnan(found.value), found


def test_in_the_optical_noise_and_waves_have_none(meter, optical):
    wavelength, rng = optical[0], np.random.default_rng(4)
    for trial in range(6):
        flux = 1 + 0.05 * rng.normal(size=wavelength.size) + 0.3 * np.sin(wavelength / (30 + 40 * trial))
        found = meter(wavelength, flux, np.full(flux.size, 0.05), np.zeros(flux.size, bool), 1800.0)
        assert np.isnan(found.value) and "radial_velocity: expected" in found.cause


def test_a_checkpoint_without_the_package_has_the_mean_star_in_the_optical(base, optical, monkeypatch):
    monkeypatch.setattr(velocity_spectrafm, "_emulated", lambda: None)
    wavelength, flux = optical
    found = VelocityMeter(base[1].basis)(wavelength, flux[1], 0.02 * flux[1], np.zeros(wavelength.size, bool), 1800.0)
    assert "expected a spectrum with narrow lines" in found.cause  # too coarse for the mean star
    found = VelocityMeter(base[1].basis)(wavelength, flux[1], 0.02 * flux[1], np.zeros(wavelength.size, bool))
    assert np.isnan(found.value) or abs(found.value - VELOCITIES[2]) < 30
