"""Observed stars with published labels, also degraded as by other instruments."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from script_loader import load_script


SCRIPTS = Path(__file__).parents[3] / "scripts/paper"


@pytest.fixture(scope="module")
def script():
    return load_script("paper/evaluate_observed")


def test_stars_of_stelib_are_read_in_vacuum(tmp_path):
    samples = load_script("paper/observed_samples")
    content = io.BytesIO()
    image = fits.PrimaryHDU(np.linspace(0.0, 2.0, 50, dtype=np.float32))
    image.header["CRVAL1"], image.header["CDELT1"] = 5000.0, 1.0
    image.writeto(content)
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as archive:
        archive.writestr(samples.STELIB + "HD000001.fits", content.getvalue())
    rows = samples.stelib(tmp_path / "one.whl")
    assert list(rows) == ["HD000001"]
    row = rows["HD000001"]
    assert row["wavelength"][0] == pytest.approx(5001.39, abs=0.02)
    assert row["mask"].tolist() == [True] + 49 * [False] and row["resolving_power"] == pytest.approx(1618, abs=1)


def test_files_of_known_stars_are_found_by_their_names(tmp_path):
    samples = load_script("paper/observed_samples")
    wavelength = np.arange(5000.0, 5100.0, 0.5)
    for name in ("my-sick-sun.txt", "unknown.txt"):
        np.savetxt(tmp_path / name, np.stack([wavelength, np.ones(200), np.full(200, 0.01)], axis=1))
    (known,), (row,) = samples.published_files([tmp_path])
    assert known.star == "Sun" and known.labels[0] == 5771.0
    # Wavelengths of this file are in air, whatever it says.
    assert row["wavelength"][0] == pytest.approx(5001.39, abs=0.02)


def test_spectra_over_their_level_keep_their_lines_and_lose_their_shape():
    rivals = load_script("paper/synthetic_rivals")
    wavelength = np.arange(4_000.0, 9_000.0, 1.0)
    line = 1.0 - 0.6 * np.exp(-0.5 * ((wavelength - 5_500.0) / 3.0) ** 2)
    shape = np.exp((wavelength - 6_000.0) / 3_000.0)
    usable = np.ones((1, len(wavelength)), bool)
    usable[0, 100:110] = False
    found = rivals.over_level(wavelength, (7.0 * shape * line)[None], usable)[0]
    assert found[1_500] == pytest.approx(0.42, abs=0.05)
    quiet = (wavelength > 4_300) & (wavelength < 5_300)
    np.testing.assert_allclose(found[quiet], 1.0, atol=0.02)
    assert (found[100:110] == 1.0).all() and (found[(wavelength > 6_900) & (wavelength < 6_960)] == 1.0).all()


def test_spoilt_stars_have_wider_lines_the_air_and_a_resolving_power_that_is_wrong(script):
    wavelength = np.arange(4_000.0, 7_400.0, 0.9)
    sigma = 5_500.0 / script.MILES_POWER / 2.3548
    flux = 1.0 - 0.5 * np.exp(-0.5 * ((wavelength - 5_500.0) / sigma) ** 2)
    row = {"object_id": "a", "wavelength": wavelength, "flux": flux, "mask": np.zeros(len(wavelength), bool)}
    rows = script.spoilt([row] * 200)
    assert {found["resolving_power"] for found in rows} == {script.LAMOST_POWER}
    grid = rows[0]["wavelength"]
    mean = np.mean([found["flux"] / np.median(found["flux"]) for found in rows], axis=0)

    def around(low, high):
        return (grid > low) & (grid < high)

    near = around(5_485.0, 5_515.0)
    depth = 1.0 - mean[near] / np.median(mean[around(5_440.0, 5_560.0) & ~around(5_490.0, 5_510.0)])
    width = 0.94 * np.sum(depth * np.gradient(grid[near])) / depth.max()  # of a Gaussian
    assert 5_500.0 / width == pytest.approx(script.POWER_SEEN, rel=0.12)
    level = np.median(mean[around(6_750.0, 6_860.0)])
    assert mean[around(6_870.0, 6_958.0)].mean() < 0.9 * level
    scatter = np.std([np.diff(found["flux"][around(5_600.0, 5_900.0)]) for found in rows])
    assert 0.005 < scatter < 0.1
