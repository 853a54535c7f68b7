"""MILES, on stars of the library and on small files in its layouts."""

import numpy as np
from astropy.io import fits

from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


WAVELENGTH = 3540.5 + 0.9 * np.arange(60)
FLUX = np.linspace(0.5, 1.5, 60)


def test_an_image_with_a_linear_grid_in_air_comes_in_vacuum_without_errors(tmp_path, read):
    image = fits.PrimaryHDU(np.where(np.arange(60) < 3, 0, FLUX))
    image.header.update(TPLLIB="MILES", CRPIX1=1, CRVAL1=3540.5, CDELT1=0.9)
    image.writeto(tmp_path / "MILES_res2.50_star_m0042V.fits")
    (row,) = read(tmp_path)
    assert (row["object_id"], row["survey"], row["rest_frame"]) == ("m0042V", "miles", True)
    np.testing.assert_allclose(row["wavelength"], air_to_vacuum(WAVELENGTH), rtol=1e-7)
    assert np.isnan(row["flux_error"]).all()
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [0, 1, 2])


def test_a_text_file_of_the_library_is_the_same_star(tmp_path, read):
    np.savetxt(tmp_path / "m0042V", np.column_stack([WAVELENGTH, FLUX]))
    (row,) = read(tmp_path / "m0042V")
    assert (row["object_id"], row["survey"]) == ("m0042V", "miles")
    np.testing.assert_allclose(row["wavelength"], air_to_vacuum(WAVELENGTH), rtol=1e-7)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)


def test_stars_of_the_library_have_their_lines_where_they_belong_in_vacuum(package_members, read):
    folder = "mangadap/data/spectral_templates/miles"
    names = [f"{folder}/MILES_res2.50_star_m{i:04d}V.fits" for i in range(1, 9)]
    rows = read(*package_members("sdss-mangadap-4.5.0.whl", *names))
    assert [row["object_id"] for row in rows] == [f"m{i:04d}V" for i in range(1, 9)]
    offsets = []
    for row in rows:
        for line in (4862.68, 6564.61, 5185.05):  # H beta, H alpha, Mg b, Angstrom in vacuum
            near = abs(row["wavelength"] - line) < 6
            offsets.append(row["wavelength"][near][np.argmin(row["flux"][near])] - line)
    # In air they would lie 1.4 to 1.8 Angstrom off.
    assert abs(np.median(offsets)) < 0.5
