"""The gate: statements of an input are used, whatever its form, and missing ones are flagged."""

import gzip
import struct
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import Table

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.readers.base import OpenFile
from spectrafm_hf.data.readers.columns import find_columns, unit_of
from spectrafm_hf.data.readers.iraf import iraf_wavelengths
from spectrafm_hf.models.gate_spectrafm import Stated, admit, air_to_vacuum, overlaps, per_wavelength, vacuum_to_air


LIGHT = 299_792.458
H_ALPHA = 6564.61
WAVELENGTH = np.arange(6400.0, 6700.0, 0.5)


def star(wavelength=WAVELENGTH, velocity=0.0):
    """A star with one line, in a flux per wavelength."""
    return 3.0 - 1.8 * np.exp(-0.5 * ((wavelength - H_ALPHA * (1 + velocity / LIGHT)) / 1.5) ** 2)


FLUX, ERROR = star(), np.full(WAVELENGTH.size, 0.03)


def line(row):
    """Angstrom of the line, to a tenth of a pixel."""
    good = ~row["mask"] & (abs(row["wavelength"] - H_ALPHA) < 30)
    depth = np.clip(np.median(row["flux"][good]) - row["flux"][good], 0, None).astype(float)
    return float(np.sum(depth * row["wavelength"][good]) / depth.sum())


def one(path, **options):
    (row,) = read_spectra([path], **options)
    return row


def table(path, **columns):
    """A FITS table of pixels; a column is its values, or these and a unit."""
    parts = {name: values if isinstance(values, tuple) else (values, None) for name, values in columns.items()}
    made = [fits.Column(name, "D", array=values, unit=unit) for name, (values, unit) in parts.items()]
    fits.BinTableHDU.from_columns(made).writeto(path, overwrite=True)
    return path


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("erg cm**(-2) s**(-1) angstrom**(-1)", "erg s-1 cm-2 Angstrom-1"),
        ("10^-17 erg/s/cm^2/Ang", "1e-17 erg s-1 cm-2 Angstrom-1"),
        ("1E-17 erg/cm^2/s/A", "1e-17 erg s-1 cm-2 Angstrom-1"),
        ("FLAM", "erg s-1 cm-2 Angstrom-1"),
        ("ERG/CM2/S/A", "erg s-1 cm-2 Angstrom-1"),
        ("Wm-2um-1", "W m-2 um-1"),
        ("ANGSTROMS", "Angstrom"),
        ("A", "Angstrom"),
        ("micron", "um"),
        ("some Jy of sorts", "Jy"),
    ],
)
def test_units_are_read_as_people_write_them(text, unit):
    assert unit_of(text) == u.Unit(unit)


@pytest.mark.parametrize("text", ["", "NONE", "Relative Flux", "DN of the year", None])
def test_text_that_is_not_a_unit_gives_none(text):
    assert unit_of(text) is None


@pytest.mark.parametrize("unit", ["Jy", "erg s-1 cm-2 Hz-1", "photon s-1 cm-2 Angstrom-1", "W m-2", "MJy sr-1"])
def test_other_densities_become_flux_per_wavelength(unit):
    kind = u.Unit("W m-2 nm-1 sr-1") if "sr" in unit else u.Unit("W m-2 nm-1")
    # Surface brightness has the same shape.
    target = u.Unit(unit) * (u.sr if "sr" in unit else 1)
    changed = (FLUX * u.Unit("W m-2 nm-1")).to(target, u.spectral_density(WAVELENGTH * u.AA)).value
    star = admit(Stated(WAVELENGTH, changed, flux_unit=u.Unit(unit), wavelength_unit=u.AA))
    np.testing.assert_allclose(star.flux / star.flux[0], FLUX / FLUX[0], rtol=1e-9)
    assert per_wavelength(kind, WAVELENGTH) is None


@pytest.mark.parametrize("unit", [u.ABmag, u.mag, u.STmag, u.AB * u.mag])
def test_magnitudes_are_refused_with_the_conversion(unit):
    with pytest.raises(ValueError, match=r"^flux: expected a flux density.*got magnitudes.*convert them first"):
        per_wavelength(unit, WAVELENGTH)


@pytest.mark.parametrize(
    ("name", "values", "unit"),
    [
        ("flux_error", ERROR * 1e3, "mJy"),
        ("err", ERROR * 1e3, "mJy"),
        ("ivar", (ERROR * 1e3) ** -2.0, "mJy-2"),
        ("variance", (ERROR * 1e3) ** 2, "mJy2"),
        ("variance", (ERROR * 1e3) ** 2, "mJy"),  # as many files say it
        ("flux_error", 100 * ERROR / FLUX, "%"),
    ],
)
def test_an_error_comes_into_the_unit_of_the_flux(tmp_path, name, values, unit):
    row = one(
        table(tmp_path / "a.fits", wavelength=(WAVELENGTH, "Angstrom"), flux=(FLUX, "Jy"), **{name: (values, unit)})
    )
    np.testing.assert_allclose(row["flux_error"] / row["flux"], ERROR / FLUX, rtol=1e-5)


def test_a_flux_error_in_a_wrong_unit_is_refused(tmp_path):
    path = table(tmp_path / "a.fits", wavelength=WAVELENGTH, flux=(FLUX, "Jy"), err=(ERROR, "km/s"))
    with pytest.raises(ValueError, match=r"flux_error: expected the unit of flux, Jy, got km / s"):
        one(path)


@pytest.mark.parametrize(("unit", "factor"), [("nm", 0.1), ("um", 1e-4), ("m", 1e-10)])
def test_wavelengths_come_in_their_unit_whichever_form_the_file_has(tmp_path, unit, factor):
    paths = [table(tmp_path / "a.fits", wave=(WAVELENGTH * factor, unit), flux=FLUX)]
    (tmp_path / "a.csv").write_text(
        f"wave[{unit}],flux\n"
        + "".join(f"{w!r},{f!r}\n" for w, f in zip((WAVELENGTH * factor).tolist(), FLUX.tolist(), strict=True))
    )
    Table({"lambda": WAVELENGTH * factor * u.Unit(unit), "flux": FLUX}).write(tmp_path / "a.ecsv")
    Table({"lambda": WAVELENGTH * factor * u.Unit(unit), "flux": FLUX}).write(tmp_path / "a.vot", format="votable")
    columns = {f"wave[{unit}]": pa.array([WAVELENGTH * factor]), "flux": pa.array([FLUX])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    paths += [tmp_path / name for name in ("a.csv", "a.ecsv", "a.vot", "a.parquet")]
    for path in paths:
        assert line(one(path)) == pytest.approx(H_ALPHA, abs=0.05), path.name


# ---------------------------------------------------------------------------------------------- null values and masks


@pytest.mark.parametrize("scaled", [False, True])
def test_blank_integers_are_masked_in_columns_and_images(tmp_path, scaled):
    counts = np.round(FLUX * 1000).astype(np.int32)
    blank = counts.copy()
    blank[50:60] = -32768
    columns = [
        fits.Column("wavelength", "D", array=WAVELENGTH, unit="Angstrom"),
        fits.Column("flux", "J", array=blank, null=-32768),
    ]
    hdu = fits.BinTableHDU.from_columns(columns)
    hdu.writeto(tmp_path / "a.fits")
    if scaled:  # astropy writes no scale beside a null value: by hand
        raw = (tmp_path / "a.fits").read_bytes()
        end = raw.index(b"END".ljust(80), 2880)
        cards = b"".join(
            f"{key:8s}= {value:>20}".ljust(80).encode() for key, value in (("TSCAL2", "0.5"), ("TZERO2", "7.0"))
        )
        (tmp_path / "a.fits").write_bytes(raw[:end] + cards + b"END".ljust(80) + raw[end + 240 :])
    image = fits.PrimaryHDU(blank)
    image.header.update(BLANK=-32768, CRVAL1=6400.0, CDELT1=0.5, CUNIT1="Angstrom")
    if scaled:
        image.header.update(BSCALE=0.5, BZERO=7.0)
    image.writeto(tmp_path / "b.fits")
    for name in ("a.fits", "b.fits"):
        row = one(tmp_path / name)
        np.testing.assert_array_equal(np.flatnonzero(row["mask"]), range(50, 60))
        expected = counts[0] * (0.5 if scaled else 1) + (7 if scaled else 0)
        assert row["flux"][0] == pytest.approx(expected)


def test_the_null_of_a_statement_counts_in_flux_and_error():
    changed = np.where(np.arange(WAVELENGTH.size) == 3, -9999.0, FLUX)
    star = admit(Stated(WAVELENGTH, changed, null=-9999.0))
    assert np.flatnonzero(star.mask).tolist() == [3]


def test_quality_bits_of_hst_and_jwst_mask_pixels_as_documented(tmp_path):
    flags = np.zeros(WAVELENGTH.size, int)
    flags[3], flags[5] = 16, 512  # HST: 16 is not serious here
    path = table(tmp_path / "x1d.fits", WAVELENGTH=(WAVELENGTH, "Angstroms"), FLUX=FLUX, ERROR=ERROR, DQ=flags)
    with fits.open(path, mode="update") as hdus:
        hdus[1].header["SDQFLAGS"] = 31743 & ~16
    assert np.flatnonzero(one(path)["mask"]).tolist() == [5]
    flags[7] = 1
    path = table(
        tmp_path / "j.fits", WAVELENGTH=(WAVELENGTH / 1e4, "um"), FLUX=(FLUX, "Jy"), FLUX_ERROR=(ERROR, "Jy"), DQ=flags
    )
    with fits.open(path, mode="update") as hdus:
        hdus[0].header["TELESCOP"], hdus[1].name = "JWST", "EXTRACT1D"
    row = one(path)
    assert (np.flatnonzero(row["mask"]).tolist(), row["survey"], row["rest_frame"]) == ([7], "jwst", False)


def test_a_quality_of_calspec_is_the_other_way_round(tmp_path):
    good = np.ones(WAVELENGTH.size, int)
    good[9] = 0
    path = table(
        tmp_path / "c.fits",
        WAVELENGTH=(WAVELENGTH, "ANGSTROMS"),
        FLUX=(FLUX, "FLAM"),
        STATERROR=(ERROR, "FLAM"),
        DATAQUAL=good,
    )
    row = one(path)
    assert np.flatnonzero(row["mask"]).tolist() == [9]
    np.testing.assert_allclose(row["flux_error"], ERROR, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- medium and frame


def image(path, **cards):
    hdu = fits.PrimaryHDU(star(WAVELENGTH))
    hdu.header.update({"CRVAL1": WAVELENGTH[0], "CDELT1": 0.5, "CRPIX1": 1.0} | cards)
    hdu.writeto(path, overwrite=True)
    return path


@pytest.mark.parametrize(
    ("cards", "medium"),
    [
        ({"CTYPE1": "AWAV", "CUNIT1": "Angstrom"}, "air"),
        ({"CTYPE1": "WAVE", "CUNIT1": "Angstrom"}, "vacuum"),
        ({"AIRORVAC": "air"}, "air"),
        ({"AIRORVAC": "vac"}, "vacuum"),
        ({"VACUUM": True}, "vacuum"),
        ({"INSTRUME": "UVES"}, "air"),
        ({"CTYPE1": "LINEAR"}, None),
    ],
)
def test_the_medium_follows_the_header_and_an_unstated_one_is_flagged(tmp_path, cards, medium):
    row = one(image(tmp_path / "a.fits", **cards), at_rest=True)
    expected = air_to_vacuum(WAVELENGTH) if medium == "air" else WAVELENGTH
    np.testing.assert_allclose(row["wavelength"], expected, rtol=1e-7)
    assert row["flags"] == (["medium_unstated"] if medium is None else [])
    # An option settles what nobody states, and nothing else.
    other = one(image(tmp_path / "a.fits", **cards), at_rest=True, wavelength_medium="air")
    assert other["flags"] == []
    assert (other["wavelength"][0] > WAVELENGTH[0] + 1) == (medium != "vacuum")


def test_a_coarse_spectrum_needs_neither_medium_nor_velocity(tmp_path):
    coarse = np.arange(3400.0, 10000.0, 20.0)
    row = one(table(tmp_path / "a.fits", wavelength=(coarse, "Angstrom"), flux=star(coarse)))
    assert (row["flags"], row["rest_frame"]) == ([], None)
    # At R = 22,500 both matter, whatever the sampling.
    changed = Stated(coarse, star(coarse), resolving_power=22_500.0)
    assert admit(changed).flags == ["medium_unstated", "frame_unstated"]


@pytest.mark.parametrize("name", ["RV", "VHELIO", "radial_velocity", "z"])
def test_a_velocity_column_is_not_passed_over(tmp_path, name):
    value = 200.0 / LIGHT if name == "z" else 200.0
    moving = star(WAVELENGTH, 200.0)
    columns = [
        fits.Column(key, f"{WAVELENGTH.size}D", array=[values, values])
        for key, values in (("wavelength", WAVELENGTH), ("flux", moving))
    ]
    columns += [fits.Column("object_id", "2A", array=["a", "b"]), fits.Column(name, "D", array=[value, np.nan])]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "a.fits")
    first, second = read_spectra([tmp_path / "a.fits"])
    # Whether it was shifted by already, nobody says.
    assert "frame_unstated" in first["flags"] and first["rest_frame"] is None
    assert first["radial_velocity"] == pytest.approx(200, rel=1e-3)
    if name != "z":
        first, second = read_spectra([tmp_path / "a.fits"], radial_velocity_column=name)
        assert (first["rest_frame"], second["rest_frame"]) == (True, False)
        assert line(first) == pytest.approx(H_ALPHA, abs=0.05)
        assert line(second) == pytest.approx(H_ALPHA * (1 + 200 / LIGHT), abs=0.05)


def test_a_frame_that_is_stated_counts(tmp_path):
    assert one(image(tmp_path / "a.fits", SPECSYS="SOURCE", VACUUM=True))["rest_frame"] is True
    row = one(image(tmp_path / "a.fits", SPECSYS="BARYCENT", VACUUM=True))
    assert (row["rest_frame"], row["flags"]) == (False, [])
    row = one(image(tmp_path / "a.fits", SPECSYS="BARYCENT", VACUUM=True), radial_velocity=50.0)
    assert row["rest_frame"] is True
    assert row["wavelength"][0] == pytest.approx(6400 / (1 + 50 / LIGHT), rel=1e-6)


@pytest.mark.parametrize(("kind", "redshift"), [("QSO", 2.1), ("GALAXY", 0.002), ("", 0.3)])
def test_quasars_and_galaxies_are_refused(kind, redshift):
    star = admit(Stated(WAVELENGTH, FLUX, frame="observed", redshift=redshift, object_class=kind))
    assert star.refused and star.rest_frame is False
    np.testing.assert_array_equal(star.wavelength, WAVELENGTH)


@pytest.mark.parametrize("velocity", [-9999.0, 9999.0, np.nan])
def test_a_velocity_of_no_star_is_unknown(velocity):
    star = admit(Stated(WAVELENGTH, FLUX, frame="observed", radial_velocity=velocity))
    assert star.rest_frame is False and np.isnan(star.radial_velocity)


def write_sdss(path, kind="STAR", redshift=5e-4, warning=0):
    loglam = np.arange(np.log10(6000), np.log10(7000), 1e-4)
    wavelength = 10**loglam
    columns = [
        ("flux", "E", star(wavelength, 150.0)),
        ("loglam", "E", loglam),
        ("ivar", "E", np.full(loglam.size, 400.0)),
    ]
    columns += [("and_mask", "J", np.full(loglam.size, 1 << 23)), ("or_mask", "J", np.full(loglam.size, 1 << 24))]
    coadd = fits.BinTableHDU.from_columns([fits.Column(name, form, array=array) for name, form, array in columns])
    about = [("Z", "E", [redshift]), ("ZWARNING", "J", [warning]), ("CLASS", "6A", [kind])]
    spall = fits.BinTableHDU.from_columns([fits.Column(name, form, array=array) for name, form, array in about])
    header = fits.Header({"TELESCOP": "SDSS 2.5-M"})
    fits.HDUList([fits.PrimaryHDU(header=header), coadd, spall]).writeto(path, overwrite=True)
    return path


def test_an_sdss_star_is_shifted_and_other_objects_are_refused(tmp_path):
    row = one(write_sdss(tmp_path / "spec.fits"))
    assert line(row) == pytest.approx(H_ALPHA, abs=0.3) and not row["mask"].any()
    assert one(write_sdss(tmp_path / "spec.fits", warning=1 << 4))["rest_frame"] is True  # many outliers
    assert one(write_sdss(tmp_path / "spec.fits", warning=1 << 2))["rest_frame"] is False  # no sure redshift
    for options in ({"kind": "QSO", "redshift": 2.1}, {"kind": "GALAXY", "redshift": 0.1}, {"warning": 1 << 7}):
        with pytest.raises(ValueError, match="expected a (spectrum of a )?star"):
            one(write_sdss(tmp_path / "spec.fits", **options))
        (row,) = read_spectra([tmp_path / "spec.fits"], keep_refused=True)
        assert row["refused"]
        failures = []
        assert list(read_spectra([tmp_path / "spec.fits"], failures=failures)) == []
        assert len(failures) == 1


# ------------------------------------------------------------------------------------------------ columns and layouts


def test_names_of_columns_are_found_in_any_spelling(tmp_path):
    found = find_columns(tmp_path, ["WAVE", "FLUX", "ERR", "QUAL", "FLUX_REDUCED"])
    assert found == {"wavelength": "WAVE", "flux": "FLUX", "flux_error": "ERR", "mask": "QUAL"}
    assert find_columns(tmp_path, ["loglam", "flux", "ivar"])["log_wavelength"] == "loglam"
    assert find_columns(tmp_path, ["lambda (nm)", "Flux [Jy]", "e_flux"])["flux_error"] == "e_flux"
    with pytest.raises(ValueError, match=r"name it with columns=\{'flux': 'NAME'\}"):
        find_columns(tmp_path, ["wave", "brightness"])
    wanted = {"flux": "brightness", "flux_error": "none"}
    assert find_columns(tmp_path, ["wave", "brightness", "err"], wanted) == {"flux": "brightness", "wavelength": "wave"}
    with pytest.raises(ValueError, match="columns: expected wavelength, "):
        find_columns(tmp_path, ["wave", "flux"], {"color": "wave"})


@pytest.mark.parametrize("header", ["", "# taken with care\n", "% a\n! b\n", "\n"])
@pytest.mark.parametrize("delimiter", [" ", ",", ";", "\t"])
def test_text_without_names_is_wavelength_flux_and_error(tmp_path, header, delimiter):
    lines = (
        delimiter.join(map(repr, row)) for row in zip(WAVELENGTH.tolist(), FLUX.tolist(), ERROR.tolist(), strict=True)
    )
    (tmp_path / "a.txt").write_text(header + "\n".join(lines) + "\n")
    row = one(tmp_path / "a.txt")
    assert line(row) == pytest.approx(H_ALPHA, abs=0.05)
    np.testing.assert_allclose(row["flux_error"], 0.03, rtol=1e-6)


def test_unnamed_columns_are_refused_with_the_option_to_use(tmp_path):
    np.savetxt(tmp_path / "a.txt", np.column_stack([WAVELENGTH, FLUX, ERROR, ERROR]))
    with pytest.raises(
        ValueError, match=r"expected names of the 4 columns .*columns=\{'wavelength': '1', 'flux': '2'\}"
    ):
        one(tmp_path / "a.txt")
    row = one(tmp_path / "a.txt", columns={"wavelength": "1", "flux": "2", "flux_error": "4"})
    np.testing.assert_allclose(row["flux_error"], 0.03, rtol=1e-6)


def test_placeholders_in_text_are_no_numbers(tmp_path):
    lines = [f"{w},{f},{'--' if i == 4 else 0.03}" for i, (w, f) in enumerate(zip(WAVELENGTH, FLUX, strict=True))]
    (tmp_path / "a.csv").write_text("lambda,flux,err\n" + "\n".join(lines) + "\n")
    assert np.isnan(one(tmp_path / "a.csv")["flux_error"][4])


def test_latin_1_is_read(tmp_path):
    lines = "".join(f"{w},{f}\n" for w, f in zip(WAVELENGTH, FLUX, strict=True))
    (tmp_path / "a.csv").write_bytes("# W\u00e4rme\nwave,flux\n".encode("latin-1") + lines.encode())
    assert line(one(tmp_path / "a.csv")) == pytest.approx(H_ALPHA, abs=0.05)


def test_a_row_of_vectors_as_eso_has_them_is_one_spectrum_in_the_medium_of_its_ucd(tmp_path):
    n = WAVELENGTH.size
    air = vacuum_to_air(WAVELENGTH) / 10
    columns = [
        fits.Column("WAVE", f"{n}D", unit="nm", array=[air]),
        fits.Column("FLUX", f"{n}E", unit="adu", array=[FLUX]),
    ]
    columns += [fits.Column("ERR", f"{n}E", unit="adu", array=[ERROR])]
    hdu = fits.BinTableHDU.from_columns(columns, name="SPECTRUM")
    hdu.header["TUCD1"] = "em.wl;obs.atmos"
    primary = fits.PrimaryHDU()
    primary.header.update(SPECSYS="BARYCENT", SPEC_RES=48000.0, CONTNORM=True)
    fits.HDUList([primary, hdu]).writeto(tmp_path / "ADP.fits")
    row = one(tmp_path / "ADP.fits", radial_velocity=0.0)
    assert line(row) == pytest.approx(H_ALPHA, abs=0.05)
    assert (row["object_id"], row["resolving_power"], row["normalised"], row["rest_frame"]) == (
        "ADP",
        48000,
        True,
        True,
    )


def test_orders_in_rows_are_one_star_and_stars_in_rows_are_many(tmp_path):
    starts = [6400.0, 6490.0, 6590.0]
    grids = [start + 0.5 * np.arange(220) for start in starts]
    columns = [fits.Column("WAVELENGTH", "220D", array=grids, unit="Angstroms")]
    columns += [fits.Column("FLUX", "220E", array=[star(grid) for grid in grids])]
    columns += [fits.Column("SPORDER", "I", array=[3, 2, 1]), fits.Column("NELEM", "I", array=[220, 220, 210])]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "x1d.fits")
    row = one(tmp_path / "x1d.fits")
    assert row["wavelength"].size == 650 and row["object_id"] == "x1d"
    columns[0] = fits.Column("WAVELENGTH", "220D", array=[grids[0]] * 3, unit="Angstroms")
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "stars.fits")
    assert [row["object_id"] for row in read_spectra([tmp_path / "stars.fits"])] == ["stars:0", "stars:1", "stars:2"]


@pytest.mark.parametrize("way", ["rows", "columns", "cube"])
def test_an_image_of_wavelength_flux_and_error_may_lie_either_way(tmp_path, way):
    data = np.array([WAVELENGTH / 1e4, FLUX, ERROR])
    hdu = fits.PrimaryHDU({"rows": data, "columns": data.T, "cube": data[None]}[way].astype(np.float32))
    hdu.header.update(XUNITS="um", YUNITS="Wm-2um-1", RP=220)
    hdu.writeto(tmp_path / "a.fits")
    row = one(tmp_path / "a.fits")
    assert line(row) == pytest.approx(H_ALPHA, abs=0.05)
    np.testing.assert_allclose(row["flux_error"], 0.03, rtol=1e-6)
    assert row["resolving_power"] == 220


def test_extensions_of_flux_error_and_quality_belong_together(tmp_path):
    header = fits.Header(
        {"CRVAL1": 640.0, "CDELT1": 0.05, "CUNIT1": "nm", "CTYPE1": "LINEAR", "BUNIT": "erg/s/cm2/Angstrom"}
    )
    quality = (np.arange(WAVELENGTH.size) == 11).astype(np.int32)
    primary = fits.PrimaryHDU(FLUX, header)
    primary.header["EXTNAME"] = "FLUX"
    fits.HDUList([primary, fits.ImageHDU(ERROR, header, name="ERRS"), fits.ImageHDU(quality, name="QUAL")]).writeto(
        tmp_path / "x.fits"
    )
    row = one(tmp_path / "x.fits")
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], ERROR, rtol=1e-6)
    assert np.flatnonzero(row["mask"]).tolist() == [11]


def test_fluxes_of_many_stars_may_share_a_grid_in_an_extension(tmp_path):
    fluxes = np.stack([FLUX, 2 * FLUX])
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(fluxes, name="FLUX"), fits.ImageHDU(WAVELENGTH, name="WAVELENGTH")]
    hdus += [fits.ImageHDU(fluxes**-2.0, name="IVAR")]
    hdus[2].header["BUNIT"] = "Angstrom"
    fits.HDUList(hdus).writeto(tmp_path / "many.fits")
    first, second = read_spectra([tmp_path / "many.fits"])
    assert (first["object_id"], second["object_id"]) == ("many:0", "many:1")
    np.testing.assert_allclose(second["flux_error"], 2 * FLUX, rtol=1e-6)


def test_metres_are_known_by_their_size(tmp_path):
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(FLUX, name="DATA"), fits.ImageHDU(WAVELENGTH * 1e-10, name="WAVELENGTH")]
    fits.HDUList(hdus).writeto(tmp_path / "r1d.fits")
    assert line(one(tmp_path / "r1d.fits")) == pytest.approx(H_ALPHA, abs=0.05)


@pytest.mark.parametrize(
    "cards",
    [{"DC-FLAG": 1}, {"CTYPE1": "LOG-LINEAR"}, {"WFITTYPE": "LOG-LINEAR"}, {"COEFF": 1}, {"CTYPE1": "WAVE-LOG"}],
)
def test_logarithmic_dispersions_are_read(tmp_path, cards):
    step = 1e-5
    wavelength = 6400 * 10 ** (step * np.arange(1900))
    hdu = fits.PrimaryHDU(star(wavelength))
    if "COEFF" in cards:
        hdu.header.update(COEFF0=np.log10(6400), COEFF1=step)
    elif cards.get("CTYPE1") == "WAVE-LOG":
        hdu.header.update(CRVAL1=6400.0, CDELT1=6400 * step * np.log(10), CRPIX1=1.0, CUNIT1="Angstrom", **cards)
    else:
        hdu.header.update(CRVAL1=np.log10(6400), CDELT1=step, CRPIX1=1.0, **cards)
    hdu.writeto(tmp_path / "a.fits")
    np.testing.assert_allclose(one(tmp_path / "a.fits")["wavelength"], wavelength, rtol=1e-6)


def test_dispersions_of_iraf_give_their_wavelengths():
    pixel = np.arange(1, 101.0)
    np.testing.assert_allclose(iraf_wavelengths("1 1 0 5000. 0.5 100 0. 1 2", 100), 5000 + 0.5 * (pixel - 1))
    np.testing.assert_allclose(iraf_wavelengths("1 1 1 3.7 1e-4 100 0. 1 2", 100), 10 ** (3.7 + 1e-4 * (pixel - 1)))
    x = (2 * pixel - 101) / 99
    chebyshev = iraf_wavelengths("1 1 2 4975. 0.5 100 0. 1 2 1. 0. 1 3 1. 100. 5000. 25. 0.5", 100)
    np.testing.assert_allclose(chebyshev, 5000 + 25 * x + 0.5 * (2 * x**2 - 1))
    legendre = iraf_wavelengths("1 1 2 4975. 0.5 100 0.001 1 2 1. 0. 2 3 1. 100. 5000. 25. 0.5", 100)
    np.testing.assert_allclose(legendre, (5000 + 25 * x + 0.5 * (1.5 * x**2 - 0.5)) / 1.001)
    linear_spline = iraf_wavelengths("1 1 2 5000. 0.5 100 0. 1 2 1. 0. 4 1 1. 100. 5000. 5049.5", 100)
    np.testing.assert_allclose(linear_spline, 5000 + 0.5 * (pixel - 1))
    # Beyond the pixels that it is for, and where the function contradicts what stands beside it, there are none.
    assert np.isnan(iraf_wavelengths("1 1 0 5000. 0.5 90 0. 1 2", 100)[90:]).all()
    assert np.isnan(iraf_wavelengths("1 1 2 4975. 0.5 100 0. 1 2 1. 0. 1 2 1. 100. 900. 25.", 100)).all()


def test_apertures_of_iraf_are_orders_where_they_cover_other_wavelengths(tmp_path):
    def write(name, starts):
        specs = " ".join(f'spec{i} = "{i} {i} 0 {start} 0.5 200 0. 1 2"' for i, start in enumerate(starts, 1))
        text = f"wtype=multispec {specs}"
        data = np.stack([[star(start + 0.5 * np.arange(200)) for start in starts], np.ones((len(starts), 200))])
        hdu = fits.PrimaryHDU(data)
        hdu.header.update(CTYPE1="MULTISPE", WAT0_001="system=multispec", WAT1_001="wtype=multispec units=angstroms")
        hdu.header.update(
            BANDID1="spectrum",
            BANDID2="sigma - background",
            **{f"WAT2_{i + 1:03d}": text[68 * i : 68 * i + 68] for i in range(-(-len(text) // 68))},
        )
        hdu.writeto(tmp_path / name)
        return tmp_path / name

    row = one(write("orders.fits", [6400.0, 6490.0, 6580.0]))
    assert row["wavelength"].size == 600
    np.testing.assert_allclose(row["flux_error"], 1)
    assert line(row) == pytest.approx(H_ALPHA, abs=0.1)
    assert len(list(read_spectra([write("fibres.fits", [6500.0, 6501.0, 6499.0])]))) == 3


def test_arrays_may_be_transposed_and_several_stars_share_a_grid(tmp_path):
    np.save(tmp_path / "a.npy", np.column_stack([WAVELENGTH, FLUX, ERROR]))
    assert line(one(tmp_path / "a.npy")) == pytest.approx(H_ALPHA, abs=0.05)
    np.savez(
        tmp_path / "b.npz", wave=WAVELENGTH, flux=np.column_stack([FLUX, 2 * FLUX]), err=np.column_stack([ERROR, ERROR])
    )
    first, second = read_spectra([tmp_path / "b.npz"])
    np.testing.assert_allclose(second["flux"], 2 * first["flux"])


def test_hdf5_is_read_or_h5py_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("HD1", "HD2"):
            file[f"{name}/wavelength"], file[f"{name}/flux"] = WAVELENGTH / 10, FLUX
            file[f"{name}/wavelength"].attrs["unit"] = "nm"
    rows = list(read_spectra([tmp_path / "a.h5"]))
    assert [row["object_id"] for row in rows] == ["HD1", "HD2"]
    assert line(rows[0]) == pytest.approx(H_ALPHA, abs=0.05)


def test_hdf5_without_h5py_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="pip install h5py"):
        one(tmp_path / "a.h5")


def test_orders_of_hires_have_polynomials_in_their_header(tmp_path):
    starts = [6400.0, 6490.0, 6580.0]
    grids = [start + 0.45 * np.arange(1, 221) + 1e-5 * np.arange(1, 221) ** 2 for start in starts]
    hdu = fits.PrimaryHDU(np.stack([star(grid) for grid in grids]))
    for order, start in enumerate(starts, 1):
        hdu.header[f"WV_0_{order:02d}"] = "".join(f"{value:17.9E}" for value in (start, 0.45, 1e-5, 0.0))
        hdu.header[f"WV_4_{order:02d}"] = "".join(f"{0.0:17.9E}" for _ in range(3))
    hdu.writeto(tmp_path / "hires.fits")
    row = one(tmp_path / "hires.fits")
    assert row["wavelength"].size == 660 and line(row) == pytest.approx(H_ALPHA, abs=0.1)


@pytest.mark.parametrize(
    "names", [("SCIDATA", "ERRDATA", "WAVEDATA_VAC_BARY"), ("SPEC", "SIG", "WAVE"), ("SCIFLUX", "SCIVAR", "SCIWAVE")]
)
def test_echelle_orders_in_extensions_are_one_star(tmp_path, names):
    grids = np.stack([start + 0.5 * np.arange(220) for start in (6400.0, 6490.0, 6580.0)])
    error = np.full(grids.shape, 0.03**2 if names[1] == "SCIVAR" else 0.03)
    hdus = [fits.ImageHDU(data, name=name) for data, name in zip((star(grids), error, grids), names, strict=True)]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(tmp_path / "e2ds.fits")
    row = one(tmp_path / "e2ds.fits")
    assert row["wavelength"].size == 660 and line(row) == pytest.approx(H_ALPHA, abs=0.1)
    np.testing.assert_allclose(row["flux_error"], 0.03, rtol=1e-6)
    assert ("medium_unstated" in row["flags"]) == ("VAC" not in names[2])


@pytest.mark.parametrize("columns", [2, 3, 6])
def test_reduced_spectra_of_espadons_and_narval_are_in_nm_and_air(tmp_path, columns):
    parts = [vacuum_to_air(WAVELENGTH) / 10, FLUX, *[np.zeros(WAVELENGTH.size)] * 3, ERROR]
    parts = parts if columns == 6 else [*parts[:2], ERROR][:columns]
    lines = "".join(" ".join(f"{value:.6f}" for value in row) + "\n" for row in zip(*parts, strict=True))
    (tmp_path / "hd.s").write_text(f"***Reduced spectrum of 'HD 1'\n {WAVELENGTH.size} {columns - 1}\n{lines}")
    row = one(tmp_path / "hd.s", radial_velocity=0.0)
    assert line(row) == pytest.approx(H_ALPHA, abs=0.05) and row["flags"] == []
    assert np.isfinite(row["flux_error"]).all() == (columns > 2)


def test_a_table_may_state_the_first_wavelength_and_the_step(tmp_path):
    columns = [fits.Column("WAVELENGTH", "E", array=[6400.0], unit="ANGSTROM"), fits.Column("DELTAW", "E", array=[0.5])]
    columns += [fits.Column("FLUX", f"{WAVELENGTH.size}E", array=[FLUX])]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "mxlo.fits")
    assert line(one(tmp_path / "mxlo.fits")) == pytest.approx(H_ALPHA, abs=0.05)


@pytest.mark.parametrize("form", ["csv", "txt", "npz"])
def test_a_velocity_column_shifts_in_other_forms_too(tmp_path, form):
    moving = star(WAVELENGTH, 200.0)
    if form == "npz":
        np.savez(tmp_path / "a.npz", wavelength=WAVELENGTH, flux=moving, rv=200.0)
    else:
        mark = "," if form == "csv" else " "
        lines = "".join(f"{w}{mark}{f}{mark}200\n" for w, f in zip(WAVELENGTH, moving, strict=True))
        (tmp_path / f"a.{form}").write_text(f"wave{mark}flux{mark}rv\n{lines}")
    assert one(tmp_path / f"a.{form}")["rest_frame"] is None
    row = one(tmp_path / f"a.{form}", radial_velocity_column="rv")
    assert row["rest_frame"] is True and line(row) == pytest.approx(H_ALPHA, abs=0.05)


# ---------------------------------------------------------------------------------------------------------- surveys


def test_the_velocity_of_a_visit_that_is_noise_is_not_used():
    from spectrafm_hf.data.readers.apogee import _trusted

    assert _trusted(30.0, 0.5, 4000.0) == 30
    for noise in ((30.0, 0.14, 4000.0), (585.0, 0.5, 4000.0), (30.0, 0.5, 7000.0)):
        assert np.isnan(_trusted(*noise))


def test_an_apstar_of_a_single_visit_has_flat_arrays(tmp_path):
    pixels = 60
    grid = {"CRVAL1": 4.179, "CDELT1": 6e-6, "CRPIX1": 1, "CTYPE1": "LOG-LINEAR"}
    header = fits.Header({**grid, "NWAVE": pixels, "OBJID": "2M0", "NVISITS": 1, "SNR": 99.0})
    contents = [np.full(pixels, 2.0), np.full(pixels, 0.1), np.zeros(pixels, np.int16), *[np.ones(pixels)] * 2]
    names = ["Flux (10^-17 erg/s/cm^2/Ang)"] * 2 + ["Pixel bitmask"] + ["Flux (10^-17 erg/s/cm^2/Ang)"] * 2
    hdus = [
        fits.ImageHDU(content, fits.Header({**grid, "BUNIT": name}))
        for content, name in zip(contents, names, strict=True)
    ]
    fits.HDUList([fits.PrimaryHDU(header=header), *hdus]).writeto(tmp_path / "apStar.fits")
    row = one(tmp_path / "apStar.fits")
    np.testing.assert_allclose(row["wavelength"], 10 ** (4.179 + 6e-6 * np.arange(pixels)), rtol=1e-7)
    assert (row["survey"], row["resolving_power"], row["flags"]) == ("apogee", 22_500, [])


def test_lamost_dr1_has_no_wavelengths_in_its_third_row(tmp_path):
    wavelength = 10 ** (3.5682 + 1e-4 * np.arange(3900))
    hdu = fits.PrimaryHDU(
        np.stack([star(wavelength), np.full(3900, 400.0), np.linspace(1, 2, 3900), np.zeros(3900), np.ones(3900)])
    )
    hdu.header.update(
        TELESCOP="LAMOST",
        COEFF0=3.5682,
        COEFF1=1e-4,
        Z=0.0,
        CLASS="STAR",
        EXTEN0="Flux Inverse Subcontinuum Andmask Ormask",
    )
    hdu.writeto(tmp_path / "spec.fits")
    assert line(one(tmp_path / "spec.fits")) == pytest.approx(H_ALPHA, abs=0.2)


def test_galah_of_reduction_6_is_shifted_by_the_velocity_in_its_header(tmp_path):
    grid = vacuum_to_air(H_ALPHA) * (1 + 40 / LIGHT) - 60 + 0.06 * np.arange(2000)
    flux = 1 - 0.6 * np.exp(-0.5 * ((grid - vacuum_to_air(H_ALPHA) * (1 + 40 / LIGHT)) / 0.6) ** 2)
    header = fits.Header(
        {
            "CRVAL1": grid[0],
            "CDELT1": 0.06,
            "CRPIX1": 1.0,
            "ORIGIN": "IRAF reduction pipeline",
            "RVCOM": 40.0,
            "RVCOM_OK": 1,
        }
    )
    hdus = [fits.PrimaryHDU(1e3 * flux, header), fits.ImageHDU(flux, header, name="normalized")]
    hdus += [fits.ImageHDU(np.full(2000, 0.02), header, name="relative_error")]
    fits.HDUList(hdus).writeto(tmp_path / "2101150001010023.fits")
    row = one(tmp_path / "2101150001010023.fits")
    assert (row["object_id"], row["rest_frame"], row["normalised"]) == ("210115000101002", True, True)
    assert line(row) == pytest.approx(H_ALPHA, abs=0.05)
    np.testing.assert_allclose(row["flux_error"], 0.02 * row["flux"], rtol=1e-6)


def test_desi_masks_that_are_scaled_integers_need_no_memory_map(tmp_path):
    hdus = [fits.PrimaryHDU()]
    columns = [fits.Column("TARGETID", "K", array=[7, 8]), fits.Column("OBJTYPE", "3A", array=["TGT", "SKY"])]
    hdus += [fits.BinTableHDU.from_columns(columns, name="FIBERMAP")]
    mask = np.zeros((2, WAVELENGTH.size), np.uint32)
    mask[:, 3] = 1
    for part, data in (
        ("WAVELENGTH", WAVELENGTH),
        ("FLUX", np.stack([FLUX] * 2)),
        ("IVAR", np.full((2, WAVELENGTH.size), 400.0)),
        ("MASK", mask),
    ):
        hdus.append(fits.ImageHDU(data, name=f"B_{part}"))
    fits.HDUList(hdus).writeto(tmp_path / "coadd.fits")
    assert fits.getheader(tmp_path / "coadd.fits", "B_MASK")["BZERO"] == 2**31
    first, second = read_spectra([tmp_path / "coadd.fits"], keep_refused=True)
    assert np.flatnonzero(first["mask"]).tolist() == [3] and not first["refused"]
    assert "SKY" in second["refused"]


@pytest.mark.parametrize("step", [2.0, 1.0])
def test_output_of_gaiaxpy_is_read_with_its_sampling_file(tmp_path, step):
    sampling = 400 + step * np.arange(343)
    flux = 1e-16 * star(10 * sampling)
    texts = [f'"({", ".join(map(repr, values.tolist()))})"' for values in (flux, flux / 30)]
    (tmp_path / "out.csv").write_text(f"source_id,flux,flux_error\n4594961454434214144,{texts[0]},{texts[1]}\n")
    with pytest.raises(ValueError, match="_sampling.csv, which gaiaxpy writes"):
        one(tmp_path / "out.csv")
    (tmp_path / "out_sampling.csv").write_text(f'pos\n"({", ".join(map(repr, sampling.tolist()))})"\n')
    row = one(tmp_path / "out.csv")
    np.testing.assert_allclose(row["wavelength"], 10 * sampling, rtol=1e-7)
    assert row["object_id"] == "4594961454434214144"
    with pytest.raises(ValueError, match="got only their sampling"):
        one(tmp_path / "out_sampling.csv")


@pytest.mark.parametrize("suffix", [".fits", ".ecsv", ".xml"])
def test_gaiaxpy_writes_its_sampling_into_other_files_with_the_types_of_numpy(tmp_path, suffix):
    from astropy.io.votable import from_table, tree

    sampling = 400 + 1.0 * np.arange(343)
    flux = 1e-16 * star(10 * sampling)
    path = tmp_path / f"out{suffix}"
    if suffix == ".fits":
        columns = [fits.Column("source_id", "K", array=[7])]
        columns += [
            fits.Column(name, "343D", array=[values]) for name, values in (("flux", flux), ("flux_error", flux))
        ]
        hdu = fits.BinTableHDU.from_columns(columns)
        hdu.header["Sampling"] = str(tuple(sampling))
        assert "np.float64" in hdu.header["Sampling"]
        hdu.writeto(path)
    elif suffix == ".ecsv":
        header = "# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n" + "".join(
            f"# -\n#   name: {name}\n#   datatype: string\n" for name in ("source_id", "flux", "flux_error")
        )
        text = f'"({", ".join(map(repr, flux.tolist()))})"'
        path.write_text(
            f"{header}# meta:\n#   sampling: {list(sampling)}\nsource_id,flux,flux_error\n7,{text},{text}\n"
        )
    else:
        votable = from_table(Table({"source_id": [7], "flux": [flux], "flux_error": [flux]}))
        parameter = tree.Param(
            votable, name="sampling", ID="_s", datatype="double", arraysize="*", value=list(sampling)
        )
        votable.get_first_table().params.append(parameter)
        votable.to_xml(str(path))
    row = one(path)
    np.testing.assert_allclose(row["wavelength"], 10 * sampling, rtol=1e-7)
    assert row["object_id"] == "7"


def test_spectra_of_gaiaxpy_convert_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "b.csv").write_text('source_id,xp,flux,flux_error\n1,BP,"(1.0, 2.0)","(1.0, 2.0)"\n')
    with pytest.raises(ValueError, match="pseudo-wavelengths"):
        one(tmp_path / "b.csv")


# -------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_cut_in_the_middle_of_their_overlap():
    first, second = np.arange(5000.0, 5100.0), np.arange(5060.3, 5160.0)
    left = overlaps(np.concatenate([first, second]))
    kept = np.concatenate([first, second])[~left]
    assert np.all(np.diff(kept) > 0) and np.diff(kept).max() < 1.6
    assert left.sum() == pytest.approx(39, abs=1)
    # On one grid, the other way round, and one within another.
    left = overlaps(np.concatenate([second - 0.3, first]))
    assert len(set(np.concatenate([second - 0.3, first])[~left])) == (~left).sum()
    assert overlaps(np.concatenate([first[::-1], second[::-1]])).sum() == pytest.approx(39, abs=1)
    assert overlaps(np.concatenate([first, first[20:60] + 0.4])).sum() == 40
    # Parts of one spectrum in any order, or pixels without any order, are no arms.
    assert not overlaps(np.concatenate([first[50:], first[:50]])).any()
    assert not overlaps(np.random.default_rng(0).permutation(first)).any()


def test_a_refusal_takes_less_than_a_second(tmp_path):

    fits.PrimaryHDU(np.zeros((50, 60))).writeto(tmp_path / "two.fits")
    fits.BinTableHDU.from_columns([fits.Column("ra", "D", array=np.ones(3))]).writeto(tmp_path / "catalogue.fits")
    (tmp_path / "notes.txt").write_text("these are notes\nand no spectrum\n")
    for path in tmp_path.iterdir():
        start = time.perf_counter()
        with pytest.raises(ValueError, match=path.name):
            one(path)
        assert time.perf_counter() - start < 1


def test_a_block_that_is_not_filled_up_at_the_end_loses_nothing(tmp_path):
    path = image(tmp_path / "a.fits", CUNIT1="Angstrom")
    whole = path.read_bytes()
    used = 2880 + WAVELENGTH.size * 8
    path.write_bytes(whole[:used])
    with OpenFile(path) as file:
        assert len(file.hdus) == 1
    assert line(one(path)) == pytest.approx(H_ALPHA, abs=0.05)
    # Ten bytes less of the filling: lost somewhere before, as what a transfer as text takes away.
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="got one that ends too early"):
        one(path)


@pytest.mark.parametrize("length", [10**10, 10**18])
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_larger_than_the_file_is_refused_before_memory_is_allocated(tmp_path, length, packed):
    content = image(tmp_path / "a.fits", CUNIT1="Angstrom").read_bytes()
    place = content.index(b"NAXIS1  =")
    content = content[:place] + f"NAXIS1  = {length:>20}".encode().ljust(80) + content[place + 80 :]
    path = tmp_path / ("b.fits.gz" if packed else "b.fits")
    path.write_bytes(gzip.compress(content) if packed else content)
    start = time.perf_counter()
    end = f"{length * 8 + 2880:,}"
    expected = rf"ends too early \(truncated\): HDU 0 should end at byte {end}, but the file ends at {len(content):,}"
    with pytest.raises(ValueError, match=expected):
        one(path)
    assert time.perf_counter() - start < 1


def test_arrays_too_large_for_memory_are_a_clear_error(tmp_path, monkeypatch):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("wavelength", "flux"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(800))
    # Said by the header, and found out before memory is asked for.
    with pytest.raises(ValueError, match="got wavelength.npy with 800 bytes instead of 8,000,000,000,000,000"):
        one(tmp_path / "a.npz")

    def no_memory(*how, **more):
        raise MemoryError("8 PB")

    monkeypatch.setattr("numpy.load", no_memory)
    np.save(tmp_path / "b.npy", WAVELENGTH)
    with pytest.raises(ValueError, match="expected a file whose arrays fit into memory.*8 PB"):
        one(tmp_path / "b.npy")


def test_a_resolving_power_that_is_named_counts_before_that_of_the_file(tmp_path):
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name, "D", array=array) for name, array in (("wave", WAVELENGTH), ("flux", WAVELENGTH))]
    )
    table.header["SPEC_RES"] = 3000.0
    table.writeto(tmp_path / "a.fits")
    assert next(read_spectra([tmp_path / "a.fits"]))["resolving_power"] == 3000.0
    assert next(read_spectra([tmp_path / "a.fits"], resolving_power=1800.0))["resolving_power"] == 1800.0
    with pytest.raises(ValueError, match="resolving_power: expected wavelength / FWHM, a number above 1, got 0"):
        next(read_spectra([tmp_path / "a.fits"], resolving_power=0))
