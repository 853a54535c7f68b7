"""JWST, ECSV and text without commas, and the list of formats."""

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import Table

from spectrafm_hf.data.readers import formats, read_spectra


WAVELENGTH = np.arange(5000.0, 5020.0)
FLUX = np.linspace(1.0, 2.0, 20)


def test_every_format_states_medium_and_frame():
    names = [format.name for format in formats()]
    assert len(names) == len(set(names))
    assert {"apogee-apstar", "gaia-xp", "lamost-lrs", "miles", "parquet", "text", "specutils"} <= set(names)
    for format in formats():
        assert format.wavelength_medium in ("vacuum", "air", "as stated")
        texts = (format.rest_frame, format.flux_unit, format.resolving_power, format.normalisation, format.note)
        assert all(texts), format.name


def test_a_format_that_is_named_is_taken_and_an_unknown_one_refused(tmp_path, read):
    (tmp_path / "m0001V.csv").write_text("wavelength,flux\n5000,1\n")
    assert read(tmp_path, format="text")[0]["survey"] == ""
    with pytest.raises(ValueError, match=r"^format: expected one of \[.*'miles'.*\], got 'mile'$"):
        read(tmp_path, format="mile")


@pytest.mark.parametrize("options", [{"wavelength_medium": "water"}, {"radial_velocity": 3e5}])
def test_options_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected "):
        next(read_spectra([tmp_path / "a.csv"], **options))


def test_units_of_an_ecsv_table_are_used(tmp_path, read):
    table = Table({"wavelength": WAVELENGTH / 10 * units.nm, "flux": FLUX, "flux_error": FLUX / 10})
    table.meta["object_id"] = "HD 1"
    table.write(tmp_path / "a.ecsv", format="ascii.ecsv")
    (row,) = read(tmp_path / "a.ecsv")
    assert row["object_id"] == "HD 1"
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-7)
    np.testing.assert_allclose(row["flux_error"], FLUX / 10, rtol=1e-6)


def test_an_ecsv_table_with_other_names_becomes_flux_per_wavelength(tmp_path, read):
    table = Table({"lambda": WAVELENGTH * units.AA, "f": FLUX * units.Jy})
    table.write(tmp_path / "a.ecsv", format="ascii.ecsv")
    (row,) = read(tmp_path / "a.ecsv")
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-7)
    np.testing.assert_allclose(row["flux"], FLUX * 2.99792458e12 / WAVELENGTH**2, rtol=1e-6)


@pytest.mark.parametrize("header", ["wavelength flux_error flux\n", "# by hand\n# wavelength flux_error flux\n"])
def test_text_with_blanks_between_named_columns_is_read(tmp_path, read, header):
    lines = "".join(f"{w:9.2f}  0.1 {f:.6f}\n" for w, f in zip(WAVELENGTH, FLUX, strict=True))
    (tmp_path / "HD2.txt").write_text(header + lines)
    (row,) = read(tmp_path)
    assert row["object_id"] == "HD2"
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-7)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"], 0.1, rtol=1e-6)


def test_text_with_semicolons_and_compression_is_read(tmp_path, read):
    import gzip

    lines = "".join(f"{w};{f}\n" for w, f in zip(WAVELENGTH, FLUX, strict=True))
    with gzip.open(tmp_path / "HD3.csv.gz", "wt") as stream:
        stream.write("wavelength;flux\n" + lines)
    (row,) = read(tmp_path)
    assert row["object_id"] == "HD3"
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)


def test_an_extracted_spectrum_of_jwst_is_in_vacuum_and_not_at_rest(tmp_path, read):
    names = ["WAVELENGTH", "FLUX", "FLUX_ERROR", "SURF_BRIGHT", "SB_ERROR", "DQ"]
    arrays = [WAVELENGTH / 1e4, FLUX, FLUX / 10, FLUX, FLUX, np.zeros(20)]
    unit = ["um", "Jy", "Jy", "MJy/sr", "MJy/sr", None]
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name, "D", array=array, unit=u) for name, array, u in zip(names, arrays, unit, strict=True)],
        name="EXTRACT1D",
    )
    table.header.update(SRCTYPE="POINT", VER=1)
    header = fits.Header({"TELESCOP": "JWST", "DATAMODL": "MultiSpecModel", "INSTRUME": "NIRSPEC"})
    asdf = fits.BinTableHDU.from_columns([fits.Column("ASDF_METADATA", "1B", array=[0])], name="ASDF")
    fits.HDUList([fits.PrimaryHDU(header=header), table, asdf]).writeto(tmp_path / "jw_x1d.fits")
    (row,) = read(tmp_path)
    assert (row["survey"], row["rest_frame"]) == ("jwst", False)
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-6)
    # From Jy to 1e-17 erg s-1 cm-2 Angstrom-1.
    np.testing.assert_allclose(row["flux"], FLUX * 2.99792458e12 / WAVELENGTH**2, rtol=1e-6)
    np.testing.assert_allclose(row["flux_error"] / row["flux"], 0.1, rtol=1e-6)


def test_the_velocity_of_the_caller_shifts_spectra_not_known_to_be_at_rest(tmp_path, read):
    (tmp_path / "a.csv").write_text("wavelength,flux\n5000,1\n5001,1\n")
    (row,) = read(tmp_path)
    assert (row["rest_frame"], row["wavelength"][0]) == (None, 5000)
    assert row["flags"] == ["medium_unstated", "frame_unstated"]
    (row,) = read(tmp_path, at_rest=True, wavelength_medium="vacuum")
    assert (row["rest_frame"], row["flags"]) == (True, [])
    (row,) = read(tmp_path, radial_velocity=100.0)
    assert row["wavelength"][0] == pytest.approx(5000 / (1 + 100 / 299_792.458), rel=1e-7)
    assert row["radial_velocity"] == 100
