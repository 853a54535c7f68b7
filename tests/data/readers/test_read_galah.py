"""GALAH DR3 spectra, in the layout of docs.datacentral.org.au/galah/dr3/galah-dr3-spectra."""

import numpy as np
from astropy.io import fits

from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


def write_galah(path, extensions=5):
    flux, relative = np.linspace(1000, 2000, 25), np.full(25, 0.02)
    contents = [flux, relative, flux * 1.1, relative, np.linspace(0.8, 1.0, 25)][:extensions]
    hdus = [fits.PrimaryHDU(contents[0]), *map(fits.ImageHDU, contents[1:])]
    for i, hdu in enumerate(hdus):
        # The normalised spectrum is at rest, and so has a grid of its own.
        rest = 1 if i == 4 else 1 + 40 / 299_792.458
        hdu.header.update(CRVAL1=4712.9 * rest, CDELT1=0.0455 * rest, CRPIX1=1.0, CUNIT1="Angstrom", ORIGIN="GALAH")
    fits.HDUList(hdus).writeto(path)
    return path


def test_the_normalised_spectrum_comes_with_absolute_errors_in_vacuum(tmp_path, read):
    (row,) = read(write_galah(tmp_path / "1704180037012051.fits"))
    assert (row["object_id"], row["survey"], row["rest_frame"]) == ("170418003701205", "galah", True)
    np.testing.assert_allclose(row["wavelength"], air_to_vacuum(4712.9 + 0.0455 * np.arange(25)), rtol=1e-7)
    np.testing.assert_allclose(row["flux"], np.linspace(0.8, 1.0, 25), rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], 0.02 * row["flux"], rtol=1e-6)


def test_a_star_without_a_normalised_spectrum_comes_in_counts(tmp_path, read):
    (row,) = read(write_galah(tmp_path / "1704180037012052.fits", extensions=4), radial_velocity=50.0)
    assert row["rest_frame"] is True
    np.testing.assert_allclose(row["flux"], np.linspace(1000, 2000, 25), rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], 0.02 * row["flux"], rtol=1e-6)
