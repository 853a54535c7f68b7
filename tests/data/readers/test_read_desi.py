"""DESI coadds, in the layout of desidatamodel.readthedocs.io (coadd-SURVEY-PROGRAM-PIXNUM.fits)."""

import numpy as np
from astropy.io import fits


ARMS = {"B": 3600 + 0.8 * np.arange(30), "R": 3620 + 0.8 * np.arange(30), "Z": 3700 + 0.8 * np.arange(10)}
LEVELS = {"B": 1.0, "R": 3.0, "Z": 5.0}
TARGETS = [39633123456789012, 39633123456789013]


def write_coadd(path):
    def image(name, data, unit=None):
        hdu = fits.ImageHDU(data, name=name)
        if unit:
            hdu.header["BUNIT"] = unit
        return hdu

    hdus = [fits.PrimaryHDU(header=fits.Header({"INFIL000": "spectra-main-bright-1.fits"}))]
    table = fits.BinTableHDU.from_columns([fits.Column("TARGETID", "K", array=TARGETS)], name="FIBERMAP")
    hdus += [table, fits.BinTableHDU(table.data, name="EXP_FIBERMAP")]
    for arm, wavelength in ARMS.items():
        flux = LEVELS[arm] * np.arange(1, 3)[:, None] * np.ones_like(wavelength)
        ivar, mask = np.full(flux.shape, 1.0 if arm == "R" else 3.0), np.zeros(flux.shape, np.int32)
        if arm == "B":
            mask[:, 3], ivar[:, 4], mask[0, 27] = 8, 0, 8
        hdus += [image(f"{arm}_WAVELENGTH", wavelength, "Angstrom")]
        hdus += [image(f"{arm}_FLUX", flux.astype(np.float32), "10**-17 erg/(s cm2 Angstrom)")]
        hdus += [image(f"{arm}_IVAR", ivar.astype(np.float32), "10**+34 (s2 cm4 Angstrom2) / erg2")]
        hdus += [image(f"{arm}_MASK", mask), image(f"{arm}_RESOLUTION", np.zeros((2, 11, len(wavelength)), np.float32))]
    hdus += [fits.BinTableHDU(table.data, name="SCORES")]
    fits.HDUList(hdus).writeto(path)
    return path


def test_the_arms_of_a_star_become_one_spectrum_with_overlaps_weighted(tmp_path, read):
    first, second = read(write_coadd(tmp_path / "coadd-main-bright-1.fits"))
    assert [first["object_id"], second["object_id"]] == list(map(str, TARGETS))
    assert (first["survey"], first["rest_frame"]) == ("desi", False)
    grid = np.unique(np.round(np.concatenate(list(ARMS.values())), 3))
    np.testing.assert_allclose(first["wavelength"], grid, rtol=1e-7)
    both = (grid >= 3620) & (grid < 3623.5)
    # Weights of 3 and 1; where one arm is bad, the other.
    np.testing.assert_allclose(second["flux"][both][:2], 2 * (3 * 1 + 3) / 4, rtol=1e-6)
    np.testing.assert_allclose(second["flux_error"][both][:2], 0.5, rtol=1e-6)
    assert first["flux"][np.isclose(grid, 3621.6)] == 3
    np.testing.assert_allclose(grid[first["mask"]], [3602.4, 3603.2])
    assert (first["flux"][grid >= 3700] == 5).all()
