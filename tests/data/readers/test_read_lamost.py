"""LAMOST files of low and medium resolution, in the layouts before and after DR8 (www.lamost.org, each release)."""

import numpy as np
import pytest
from astropy.io import fits


WAVELENGTH = 10 ** (3.5682 + 1e-4 * np.arange(30))
FLUX = np.linspace(100, 200, 30)
IVAR = np.where(np.arange(30) == 4, 0, 0.04)
AND_MASK, OR_MASK = np.arange(30) == 8, np.arange(30) % 2
ABOUT = {"TELESCOP": "LAMOST", "OBSID": 101001, "DESIG": "LAMOST J220848.54-020324.3", "Z": -0.0001, "SNRG": 21.5}


def vectors(name, **columns):
    columns = [fits.Column(key, f"{len(values)}D", array=np.array([values])) for key, values in columns.items()]
    return fits.BinTableHDU.from_columns(columns, name=name)


def pixels(name, **columns):
    hdu = fits.BinTableHDU.from_columns(
        [fits.Column(key, "D", array=values) for key, values in columns.items()], name=name
    )
    hdu.header["SNR"] = 40
    return hdu


def write(path, *hdus, **about):
    fits.HDUList([fits.PrimaryHDU(header=fits.Header(ABOUT | about)), *hdus]).writeto(path)
    return path


def write_image(path):
    image = fits.PrimaryHDU(np.stack([FLUX, IVAR, WAVELENGTH, AND_MASK, OR_MASK]).astype(np.float32))
    image.header.update(ABOUT | {"COEFF0": 3.5682, "COEFF1": 1e-4})
    image.writeto(path)
    return path


def write_table(path):
    columns = {"FLUX": FLUX, "IVAR": IVAR, "WAVELENGTH": WAVELENGTH, "ANDMASK": AND_MASK, "ORMASK": OR_MASK}
    return write(path, vectors("COADD", **columns, NORMALIZATION=FLUX / 150))


@pytest.mark.parametrize("write_file", [write_image, write_table])
def test_low_resolution_before_and_after_dr8_is_the_same_spectrum(tmp_path, read, write_file):
    (row,) = read(write_file(tmp_path / "spec-55859-F5902_sp01-001.fits"))
    assert (row["object_id"], row["survey"], row["snr"], row["rest_frame"]) == ("101001", "lamost-lrs", 21.5, True)
    assert row["radial_velocity"] == pytest.approx(-29.98, abs=0.01)
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH / (1 - 1e-4), rtol=3e-7)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"][:4], 5.0, rtol=1e-6)
    # A pixel is bad where every exposure was, or nothing was measured; not where one exposure was.
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [4, 8])


def test_low_resolution_with_an_unknown_redshift_is_not_at_rest(tmp_path, read):
    file = write_image(tmp_path / "a.fits")
    fits.setval(file, "Z", value=-9999.0)
    (row,) = read(file)
    assert row["rest_frame"] is False


BLUE, RED = np.linspace(4950, 5350, 20), np.linspace(6300, 6800, 25)


def arm(name, wavelength, level, old):
    flags = {"PIXMASK" if name[1] == "-" else "ANDMASK": np.arange(len(wavelength)) == 1}
    columns = {"FLUX": level * np.ones_like(wavelength), "IVAR": np.full_like(wavelength, 0.25), **flags}
    if old:
        return pixels(name, **columns, LOGLAM=np.log10(wavelength))
    hdu = vectors(name, **columns, WAVELENGTH=wavelength)
    hdu.header["SNR"] = 40
    return hdu


@pytest.mark.parametrize("old", [True, False])
def test_medium_resolution_joins_the_two_arms_and_gives_exposures_on_request(tmp_path, read, old):
    hdus = [fits.BinTableHDU.from_columns([fits.Column("A", "D", array=[1.0])], name="Information")]
    hdus += [arm("COADD_B", BLUE, 5, old), arm("COADD_R", RED, 7, old)]
    hdus += [arm("B-84420148-23", BLUE, 1, old), arm("R-84420148-23", RED, 2, old), arm("B-84420171-23", BLUE, 3, old)]
    file = write(tmp_path / "med-58625-HIP9645901_sp01-001.fits", *hdus, Z=-9999)
    (row,) = read(file)
    assert (row["object_id"], row["survey"], row["snr"], row["rest_frame"]) == ("101001", "lamost-mrs", 40, False)
    np.testing.assert_allclose(row["wavelength"], [*BLUE, *RED], rtol=1e-7)
    np.testing.assert_array_equal(row["flux"], [5] * 20 + [7] * 25)
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [1, 21])
    np.testing.assert_allclose(row["flux_error"], 2)
    first, second = read(file, visits=True, radial_velocity=30.0)
    assert first["object_id"] == second["object_id"] == "101001"
    assert (first["visit"], second["visit"]) == ("84420148-23", "84420171-23")
    assert (len(first["flux"]), len(second["flux"])) == (45, 20)
    assert first["rest_frame"] is True
    np.testing.assert_allclose(second["wavelength"], BLUE / (1 + 30 / 299_792.458), rtol=1e-7)
