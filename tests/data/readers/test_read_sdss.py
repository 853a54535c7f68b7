"""SDSS optical spectra and SDSS-V mwmStar and mwmVisit files, in the layouts of data.sdss.org/datamodel."""

import numpy as np
import pytest
from astropy.io import fits

from spectrafm_hf.data.readers import APOGEE_PIXEL_BITS


LOGLAM = 3.58 + 1e-4 * np.arange(50)
APOGEE_LOGLAM = 4.179 + 6e-6 * np.arange(50)


def write_spec(path, redshift=0.0005, version="v5_13_0", **cards):
    header = fits.Header({"TELESCOP": "SDSS 2.5-M", "VERS2D": version, "FIBERID": 596, "PLATEID": 4055, **cards})
    mask = "and_mask" if version.startswith("v5") else "MASK"
    ivar = np.where(np.arange(50) == 7, 0, 25.0)
    columns = [("flux", "E", np.linspace(1, 2, 50)), ("loglam", "E", LOGLAM), ("ivar", "E", ivar)]
    columns += [
        (mask, "J", ((np.arange(50) == 3) << 24) | ((np.arange(50) == 5) << 23)),
        ("or_mask", "J", np.ones(50, int)),
    ]
    coadd = fits.BinTableHDU.from_columns([fits.Column(name, form, array=array) for name, form, array in columns])
    about = [("Z", "E", [redshift]), ("SN_MEDIAN_ALL", "E", [12.5])]
    spall = fits.BinTableHDU.from_columns([fits.Column(name, form, array=array) for name, form, array in about])
    coadd.name, spall.name = "COADD", "SPALL"
    fits.HDUList([fits.PrimaryHDU(header=header), coadd, spall]).writeto(path)
    return path


@pytest.mark.parametrize("version", ["v5_13_0", "v6_1_3"])
def test_an_optical_spectrum_is_shifted_to_rest_by_its_redshift(tmp_path, read, version):
    (row,) = read(write_spec(tmp_path / "spec-4055-55359-0596.fits", version=version))
    assert (row["object_id"], row["survey"], row["snr"]) == ("spec-4055-55359-0596", "sdss", 12.5)
    assert row["rest_frame"] is True
    assert row["radial_velocity"] == pytest.approx(149.86, abs=0.01)
    np.testing.assert_allclose(row["wavelength"], 10**LOGLAM / 1.0005, rtol=1e-6)
    # NODATA masks a pixel, BRIGHTSKY does not.
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [3, 7])
    np.testing.assert_allclose(row["flux_error"][~row["mask"]], 0.2, rtol=1e-6)


def test_a_placeholder_redshift_does_not_shift_the_spectrum(tmp_path, read):
    (row,) = read(write_spec(tmp_path / "spec.fits", redshift=-9999.0))
    assert row["rest_frame"] is False
    np.testing.assert_allclose(row["wavelength"], 10**LOGLAM, rtol=1e-6)


def mwm_table(name, loglam, stars, **more):
    pixels = len(loglam)
    flags = np.zeros((stars, pixels), np.int64)
    flags[:, 5], flags[:, 6] = 1 << APOGEE_PIXEL_BITS["PERSIST_LOW"], 1 << APOGEE_PIXEL_BITS["BADPIX"]
    flags[:, 7] = 1 << 24
    ivar = np.full((stars, pixels), 4.0)
    ivar[:, 9] = 0
    columns = [("sdss_id", "K", [42] * stars), ("telescope", "6A", ["apo25m"] * stars), ("snr", "E", [30.0] * stars)]
    if "mjd" not in more:
        columns += [("min_mjd", "J", [59804] * stars), ("max_mjd", "J", [59866] * stars)]
        columns += [("wavelength", f"{pixels}D", np.tile(10**loglam, (stars, 1)))]
    columns += [(key, "J", values) for key, values in more.items()]
    columns += [("flux", f"{pixels}E", np.arange(1.0, stars + 1)[:, None] * np.ones(pixels))]
    columns += [("ivar", f"{pixels}E", ivar), ("pixel_flags", f"{pixels}K", flags)]
    hdu = fits.BinTableHDU.from_columns([fits.Column(key, form, array=array) for key, form, array in columns])
    hdu.header.update(NPIXELS=pixels, CRVAL=loglam[0], CDELT=round(loglam[1] - loglam[0], 7), INSTRMNT=name[:6])
    hdu.name = name
    hdu.add_checksum()
    return hdu


def write_mwm(path, **more):
    stars = len(more.get("mjd", [1]))
    names = (("BOSS/APO", LOGLAM), ("BOSS/LCO", LOGLAM), ("APOGEE/APO", APOGEE_LOGLAM), ("APOGEE/LCO", APOGEE_LOGLAM))
    tables = [
        mwm_table(
            name,
            grid,
            stars if name.endswith("APO") else 0,
            **(more if name.endswith("APO") else dict.fromkeys(more, [])),
        )
        for name, grid in names
    ]
    header = fits.Header({"SDSS_ID": 42, "V_ASTRA": "0.6.0"})
    fits.HDUList([fits.PrimaryHDU(header=header), *tables]).writeto(path)
    return path


def test_an_mwm_star_gives_a_row_for_each_instrument_that_saw_it(tmp_path, read):
    boss, apogee = read(write_mwm(tmp_path / "mwmStar-0.6.0-42.fits"))
    assert (boss["object_id"], boss["survey"], boss["snr"]) == ("42", "sdss-v-boss", 30.0)
    assert (apogee["object_id"], apogee["survey"], apogee["rest_frame"]) == ("42", "sdss-v-apogee", True)
    np.testing.assert_allclose(apogee["wavelength"], 10**APOGEE_LOGLAM, rtol=1e-7)
    np.testing.assert_allclose(boss["flux_error"][:5], 0.5)
    # Persistence leaves a pixel of APOGEE usable; the flags of BOSS mean something else.
    np.testing.assert_array_equal(np.flatnonzero(apogee["mask"]), [6, 9])
    np.testing.assert_array_equal(np.flatnonzero(boss["mask"]), [7, 9])


def test_an_mwm_visit_file_gives_a_row_for_each_visit(tmp_path, read):
    rows = read(write_mwm(tmp_path / "mwmVisit-0.6.0-42.fits", mjd=[59804, 59866]))
    assert [(row["object_id"], row["visit"]) for row in rows] == [("42", "59804"), ("42", "59866")] * 2
    assert [row["flux"][0] for row in rows] == [1, 2, 1, 2]
    np.testing.assert_allclose(rows[0]["wavelength"], 10**LOGLAM, rtol=1e-7)
