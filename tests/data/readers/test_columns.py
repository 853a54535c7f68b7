"""Names and units of columns as people write them, compared with the written spectrum."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.models.gate_spectrafm import vacuum_to_air


LIGHT = 299_792.458
WAVELENGTH = np.linspace(4800.0, 5400.0, 601)
FLUX = (WAVELENGTH / 5000) ** -1.5 * (1 - 0.5 * np.exp(-0.5 * ((WAVELENGTH - 5100) / 3) ** 2))
ERROR = 0.01 * FLUX * (1 + 0.3 * np.sin(WAVELENGTH / 50))
FLUX_NU, ERROR_NU = FLUX * WAVELENGTH**2 / 1e8, ERROR * WAVELENGTH**2 / 1e8
BAD = np.isin(np.arange(WAVELENGTH.size), (7, 300))


def fits_table(path, units=None, **columns):
    """One pixel a row."""
    codes = {"f": "D", "i": "J", "b": "L"}
    made = [
        fits.Column(name, codes[np.asarray(values).dtype.kind], array=values, unit=(units or {}).get(name))
        for name, values in columns.items()
    ]
    fits.BinTableHDU.from_columns(made).writeto(path)
    return path


def one(path, **options):
    (row,) = read_spectra([path], **options)
    order = np.argsort(row["wavelength"])
    return {**row, **{name: row[name][order] for name in ("wavelength", "flux", "flux_error", "mask")}}


def same_shape(row, wavelength=WAVELENGTH):
    assert row["wavelength"] == pytest.approx(wavelength, rel=1e-6)
    ratio = row["flux"] / FLUX
    assert ratio == pytest.approx(np.median(ratio), rel=1e-4)
    assert row["flux_error"] / row["flux"] == pytest.approx(ERROR / FLUX, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "values", "unit"),
    [
        ("loglam", np.log10(WAVELENGTH), "log(Angstrom)"),
        ("loglam", np.log10(WAVELENGTH / 10), "log10(nm)"),
        ("loglam", np.log(WAVELENGTH), None),  # no common logarithm is so large
        ("wave", np.log10(WAVELENGTH), "log(Angstrom)"),
        ("wave", np.log10(WAVELENGTH), "dex(Angstrom)"),
        ("wavelength", np.log(WAVELENGTH / 1e4), "ln(um)"),
        ("lnlam", np.log(WAVELENGTH), None),
        ("ln_wave", np.log(WAVELENGTH / 10), "nm"),
        ("frequency", 2.99792458e18 / WAVELENGTH, None),
        ("freq", 2.99792458e9 / WAVELENGTH, "GHz"),
        ("wavenumber", 1e8 / WAVELENGTH, None),
        ("wavelength", WAVELENGTH, "0.1nm"),
    ],
)
def test_logarithms_frequencies_and_wavenumbers_are_wavelengths(tmp_path, name, values, unit):
    row = one(fits_table(tmp_path / "a.fits", {name: unit}, **{name: values}, flux=FLUX, flux_error=ERROR))
    same_shape(row)
    # A frequency is in no medium.
    assert ("medium_unstated" in row["flags"]) == (name not in ("frequency", "freq", "wavenumber"))


@pytest.mark.parametrize(
    ("unit", "power"),
    [
        ("milliJansky", 2), ("Janskys", 2), ("Jy/beam", 2), ("PHOTLAM", 1), ("photnu", 3), ("ph/s/cm2/A", 1),
        ("erg/s/cm2", 1), ("erg/s/cm2/Angstrom/pix", 0), ("DN/s", 0), ("electron", 0), ("ct", 0), ("du", 0),
    ],
)  # fmt: skip
def test_units_of_flux_give_the_shape_per_wavelength(tmp_path, unit, power):
    scale = (WAVELENGTH / 5000) ** power
    path = fits_table(tmp_path / "a.fits", {"flux": unit}, wave=WAVELENGTH, flux=FLUX * scale, err=ERROR * scale)
    same_shape(one(path))


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("erg s-1 cm-2 km-1 s", "flux: expected a flux density, counts or numbers without a unit, got erg"),
        ("K", "flux: expected a flux density, counts or numbers without a unit, got K"),
        ("log(erg/s/cm2/A)", r"flux: expected a flux density or numbers without a unit, got its logarithm \(dex"),
        ("ABmag", r"flux: expected .*, got magnitudes \(mag"),
        ("STMAG", r"flux: expected .*, got magnitudes \(mag"),
    ],
)
def test_units_that_are_not_of_flux_are_refused(tmp_path, unit, expected):
    path = fits_table(tmp_path / "a.fits", {"flux": unit}, wave=WAVELENGTH, flux=FLUX, err=ERROR)
    with pytest.raises(ValueError, match=expected):
        one(path)


@pytest.mark.parametrize(
    ("flux", "error", "values"),
    [
        ("f_nu", "e_f_nu", ERROR_NU),
        ("f_nu", "f_nu_error", ERROR_NU),
        ("fnu", "fnu_ivar", ERROR_NU**-2.0),
        ("f_nu", "var_f_nu", ERROR_NU**2),
    ],
)
def test_the_error_of_a_flux_has_its_name(tmp_path, flux, error, values):
    same_shape(one(fits_table(tmp_path / "a.fits", wave=WAVELENGTH, **{flux: FLUX_NU, error: values})))


def test_a_parquet_table_may_have_one_pixel_a_row(tmp_path):
    columns = {"wave_air": vacuum_to_air(WAVELENGTH), "flux": FLUX, "err": ERROR, "good": ~BAD}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    row = one(tmp_path / "a.parquet")
    same_shape(row)
    assert row["object_id"] == "a" and (row["mask"] == BAD).all() and row["flags"] == ["frame_unstated"]
    pq.write_table(pa.table({name: [values] for name, values in columns.items()}), tmp_path / "b.parquet")
    vectors = one(tmp_path / "b.parquet")
    assert all((vectors[name] == row[name]).all() for name in ("wavelength", "flux", "flux_error", "mask"))


def test_names_of_eso_where_nothing_is_calibrated(tmp_path):
    same_shape(one(fits_table(tmp_path / "a.fits", WAVE=WAVELENGTH, FLUX_REDUCED=FLUX, ERR_REDUCED=ERROR)))


@pytest.mark.parametrize(
    ("name", "values"),
    [("good", ~BAD), ("goodpix", (~BAD).astype(int)), ("valid", ~BAD), ("bad_pix", BAD), ("bpm", BAD.astype(int))],
)
def test_masks_of_good_and_of_bad_pixels_are_known_by_their_names(tmp_path, name, values):
    row = one(fits_table(tmp_path / "a.fits", wave=WAVELENGTH, flux=FLUX, err=ERROR, **{name: values}))
    assert (row["mask"] == BAD).all()


@pytest.mark.parametrize("null", [-999.0, -9999.0, -99999.0])
def test_placeholders_of_a_flux_are_masked(tmp_path, null):
    row = one(fits_table(tmp_path / "a.fits", wave=WAVELENGTH, flux=np.where(BAD, null, FLUX), err=ERROR))
    assert (row["mask"] == BAD).all()


@pytest.mark.parametrize("form", ["fits", "ecsv", "xml", "csv", "txt", "parquet", "npz"])
def test_a_column_of_velocities_has_a_unit(tmp_path, form):
    """100 km/s, written in m/s."""
    moved = WAVELENGTH * np.sqrt((1 + 100 / LIGHT) / (1 - 100 / LIGHT))
    path, velocity = tmp_path / f"a.{form}", np.full(WAVELENGTH.size, 1e5)
    name = "rv" if form in ("fits", "ecsv", "xml") else "rv[m/s]"
    columns = {"wave": moved, "flux": FLUX, "err": ERROR, name: velocity}
    if form == "fits":
        fits_table(path, {"rv": "m/s"}, **columns)
    elif form in ("ecsv", "xml"):
        made = Table(columns)
        made["rv"].unit = "m/s"
        made.write(path, format="ascii.ecsv" if form == "ecsv" else "votable")
    elif form == "parquet":
        pq.write_table(pa.table(columns), path)
    elif form == "npz":
        np.savez(path, **{**columns, name: 1e5})
    else:
        delimiter = "," if form == "csv" else " "
        np.savetxt(
            path, np.transpose([*columns.values()]), delimiter=delimiter, header=delimiter.join(columns), comments=""
        )
    row = one(path, radial_velocity_column=name)
    assert row["radial_velocity"] == pytest.approx(100)
    same_shape(row)
    # Without the option nobody says whether the wavelengths are shifted already.
    assert "frame_unstated" in one(path)["flags"]


def test_a_velocity_in_another_unit_is_refused(tmp_path):
    path = fits_table(tmp_path / "a.fits", {"rv": "mag"}, wave=WAVELENGTH, flux=FLUX, rv=np.ones(WAVELENGTH.size))
    with pytest.raises(ValueError, match="radial_velocity: expected a unit of velocity, got 'mag'"):
        one(path)


@pytest.mark.parametrize("form", ["csv", "txt", "ecsv", "xml", "fits", "parquet"])
@pytest.mark.parametrize("name", ["007", "1234567890123456789"])
def test_identifiers_are_texts(tmp_path, form, name):
    """With zeros in front, and with more digits than a number has."""
    path, ids = tmp_path / f"a.{form}", np.full(WAVELENGTH.size, name)
    columns = {"object_id": ids, "wavelength": WAVELENGTH, "flux": FLUX, "flux_error": ERROR}
    if form in ("csv", "txt"):
        delimiter = "," if form == "csv" else " "
        rows = [delimiter.join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join([delimiter.join(columns), *rows]))
    elif form == "parquet":
        pq.write_table(pa.table(columns), path)
    elif form == "fits":
        vectors = [fits.Column(key, "601D", array=values[None]) for key, values in list(columns.items())[1:]]
        fits.BinTableHDU.from_columns([fits.Column("object_id", "20A", array=[name]), *vectors]).writeto(path)
    else:
        Table(columns).write(path, format="ascii.ecsv" if form == "ecsv" else "votable")
    row = one(path)
    assert row["object_id"] == name
    same_shape(row)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_numbers_may_have_decimal_commas(tmp_path, delimiter):
    lines = [
        delimiter.join(f"{x:.9g}".replace(".", ",") for x in row) for row in zip(WAVELENGTH, FLUX, ERROR, strict=True)
    ]
    (tmp_path / "a.csv").write_text("\n".join([delimiter.join(("wavelength", "flux", "flux_error")), *lines]))
    same_shape(one(tmp_path / "a.csv"))


def test_numbers_may_have_the_exponents_of_fortran(tmp_path):
    lines = [" ".join(f"{x:.9E}".replace("E", "D") for x in row) for row in zip(WAVELENGTH, FLUX, ERROR, strict=True)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    same_shape(one(tmp_path / "a.txt"))


def test_comments_below_the_numbers_are_skipped(tmp_path):
    lines = [f"{x},{y},{z}" for x, y, z in zip(WAVELENGTH, FLUX, ERROR, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["wavelength,flux,flux_error", *lines, "# made by hand"]))
    same_shape(one(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("\n".join(["wavelength,flux,flux_error", *lines, "5400.5,1"]))
    with pytest.raises(ValueError, match="Expected 3 columns, got 2"):
        one(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("remark", "flagged"),
    [("# wavelengths in air", False), ("# air wavelengths converted to vacuum", True), ("# medium: vacuum", False)],
)
def test_a_remark_states_the_medium_unless_it_mentions_a_conversion(tmp_path, remark, flagged):
    np.savetxt(tmp_path / "a.txt", np.transpose([WAVELENGTH, FLUX]), header=f"{remark[2:]}\nwave flux")
    row = one(tmp_path / "a.txt")
    assert ("medium_unstated" in row["flags"]) == flagged
    assert (row["wavelength"][0] > 4801) == (remark == "# wavelengths in air")
