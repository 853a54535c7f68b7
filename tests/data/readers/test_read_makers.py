"""Files in the documented layouts of instruments, pipelines and archives: values are read as written."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from spectrafm_hf.data.readers import Failure, read_spectra
from spectrafm_hf.models.gate_spectrafm import Stated, admit, air_to_vacuum, vacuum_to_air


WAVELENGTH = 5000.0 + 0.25 * np.arange(400)
FLUX = 100 * (1 + 0.3 * np.sin(WAVELENGTH / 3))
ERROR = FLUX / (50 + 20 * np.sin(WAVELENGTH / 20))
GRID = {"CRVAL1": 5000.0, "CDELT1": 0.25, "CRPIX1": 1.0}


def all_of(path, **how):
    return list(read_spectra([path], keep_refused=True, **how))


def only(path, **how):
    (row,) = all_of(path, **how)
    return row


def is_the_star(row, errors=True, wavelength=WAVELENGTH):
    assert row["refused"] == ""
    np.testing.assert_allclose(row["wavelength"], wavelength, rtol=1e-6)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-4)
    if errors:
        np.testing.assert_allclose(row["flux_error"], ERROR, rtol=1e-3)
    else:
        assert np.isnan(row["flux_error"]).all()
    assert not row["mask"].any()
    return True


def image(values, name=None, kind=fits.ImageHDU, **cards):
    hdu = kind(np.asarray(values, float))
    hdu.header.update({card.replace("_", "-"): value for card, value in cards.items()})
    if name:
        hdu.name = name
    return hdu


def table(name=None, kind=fits.BinTableHDU, **columns):
    made = []
    for column, values in columns.items():
        values = np.asarray(values)
        letter = {"f": "D", "i": "J", "b": "L", "U": "20A"}[values.dtype.kind]
        length = values.shape[1] if values.ndim == 2 else ""
        made.append(fits.Column(column, f"{length}{letter}", array=values))
    return kind.from_columns(made, name=name)


def saved(path, *hdus, **cards):
    primary = fits.PrimaryHDU()
    primary.header.update(cards)
    hdus = hdus if isinstance(hdus[0], fits.PrimaryHDU) else (primary, *hdus)
    fits.HDUList(list(hdus)).writeto(path)
    return path


def written(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


PLAIN = [f"{a:.2f} {b:.5f} {c:.6f}" for a, b, c in zip(WAVELENGTH, FLUX, ERROR, strict=True)]
TWO = [line.rpartition(" ")[0] for line in PLAIN]


# --------------------------------------------------------------------------------------------------------------- masks


def test_pypeit_masks_with_true_for_good_pixels(tmp_path):
    good = np.arange(400) > 2
    coadd = table("SPECTRUM", wave=WAVELENGTH, flux=FLUX, ivar=np.where(good, ERROR**-2.0, 0), mask=good.astype(int))
    coadd.header["PYP_SPEC"] = "keck_deimos"
    row = only(saved(tmp_path / "coadd1d.fits", coadd))
    assert row["mask"].tolist() == (~good).tolist() and "medium_unstated" not in row["flags"]


def test_slits_of_pypeit_are_stars_of_their_own_with_the_weighted_extraction(tmp_path):
    pixels = {"OPT_WAVE": WAVELENGTH, "OPT_FLAM": FLUX, "OPT_FLAM_SIG": ERROR, "OPT_FLAM_IVAR": ERROR**-2.0}
    pixels |= {"OPT_COUNTS": FLUX * 9, "OPT_MASK": np.ones(400, bool)}
    pixels |= {"BOX_WAVE": WAVELENGTH, "BOX_FLAM": FLUX * 2, "BOX_MASK": np.ones(400, bool)}
    slits = [table(f"SPAT{number}-SLIT{number}-DET01", **pixels) for number in (100, 200)]
    rows = all_of(saved(tmp_path / "spec1d.fits", *slits, PYP_SPEC="keck_deimos"))
    assert [row["object_id"] for row in rows] == ["spec1d:SPAT100-SLIT100-DET01", "spec1d:SPAT200-SLIT200-DET01"]
    assert all(map(is_the_star, rows))


@pytest.mark.parametrize("mask", [np.ones(400, int), (np.arange(400) > 4).astype(int)])
def test_a_mask_of_all_measured_pixels_is_refused_with_the_option_to_use(tmp_path, mask):
    ivar = np.where(mask, ERROR**-2.0, 0)
    path = saved(tmp_path / "a.fits", table(wave=WAVELENGTH, flux=FLUX, ivar=ivar, pixel_mask=mask))
    assert "columns={'good': 'pixel_mask'}" in only(path)["refused"]
    row = only(path, columns={"wavelength": "wave", "flux": "flux", "ivar": "ivar", "good": "pixel_mask"})
    assert row["mask"].tolist() == (mask == 0).tolist()
    # A spectrum of which nothing was measured is no contradiction.
    dead = saved(tmp_path / "b.fits", table(wave=WAVELENGTH, flux=FLUX, ivar=FLUX * 0, mask=np.ones(400, int)))
    failures: list[Failure] = []
    assert not list(read_spectra([dead], failures=failures)) and "masked or not finite" in failures[0].cause


def test_a_column_flag_masks(tmp_path):
    lines = [f"{line} {int(i in (3, 4))}" for i, line in enumerate(PLAIN)]
    assert np.flatnonzero(only(written(tmp_path / "a.txt", "wave flux err flag", *lines))["mask"]).tolist() == [3, 4]


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_of_zero_for_all_pixels_are_unknown(tmp_path):
    lines = [f"{line} 0.0" for line in TWO]
    assert is_the_star(only(written(tmp_path / "a.dat", "# lambda flux std", *lines)), errors=False)
    # An inverse variance of zero says that nothing was measured.
    assert admit(Stated(WAVELENGTH, FLUX, FLUX * 0, error_kind="ivar")).mask.all()


def test_a_third_column_without_a_name_may_be_no_error(tmp_path):
    path = written(tmp_path / "a.spec", *(f"{line} {1e6 * flux:.3f}" for line, flux in zip(TWO, FLUX, strict=True)))
    with pytest.raises(ValueError, match="a.spec: expected errors in the third column, which has no name"):
        only(path)
    assert is_the_star(only(path, columns={"wavelength": "1", "flux": "2"}), errors=False)
    np.save(tmp_path / "a.npy", [WAVELENGTH, FLUX, FLUX])
    with pytest.raises(ValueError, match="a.npy: expected errors after wavelength and flux"):
        only(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.fits: expected rows of wavelength, flux and error"):
        only(saved(tmp_path / "a.fits", image([WAVELENGTH, FLUX, FLUX], kind=fits.PrimaryHDU)))


@pytest.mark.parametrize("name", ["STATERR", "uflux", "dflux", "yerr", "flux_sig", "flux_err_mjy"])
def test_more_names_of_errors(tmp_path, name):
    flux = "flux_mjy" if "mjy" in name else "flux"
    row = only(saved(tmp_path / "a.fits", table(**{"wave": WAVELENGTH, flux: FLUX, name: ERROR})))
    np.testing.assert_allclose(row["flux"] / row["flux_error"], FLUX / ERROR, rtol=1e-4)
    shape = row["flux"] * (WAVELENGTH**2 if "mjy" in name else 1) / FLUX
    np.testing.assert_allclose(shape, shape[0], rtol=1e-4)


# ------------------------------------------------------------------------------------------------- columns and tables


def test_a_wavelength_next_to_one_in_air_is_in_vacuum(tmp_path):
    pixels = {"wavelength": WAVELENGTH, "wavelength_air": vacuum_to_air(WAVELENGTH), "flux": FLUX, "error": ERROR}
    row = only(saved(tmp_path / "ESPRE_S1D_A.fits", table(**pixels)))
    assert is_the_star(row) and "medium_unstated" not in row["flags"]


def test_columns_that_begin_alike_are_orders_of_a_chip(tmp_path):
    halves = {"01_01": slice(0, 200), "02_01": slice(200, 400)}
    names = {"WL": WAVELENGTH, "SPEC": FLUX, "ERR": ERROR}
    columns = {f"{order}_{name}": values[part] for order, part in halves.items() for name, values in names.items()}
    assert is_the_star(only(saved(tmp_path / "cr2res.fits", table("CHIP1.INT1", **columns))))


def test_numbered_orders_are_one_star(tmp_path):
    parts = {name: np.reshape(values, (4, 100)) for name, values in (("WAVELENGTH", WAVELENGTH), ("FLUX", FLUX))}
    path = saved(tmp_path / "nres.fits", table("SPECTRUM", ID=np.arange(4), ORDER=np.arange(4), **parts))
    assert is_the_star(only(path), errors=False)


def test_tables_of_letters_have_no_zero_where_they_are_blank(tmp_path):
    columns = [("WAVE", "F10.3", WAVELENGTH), ("FLUX", "E14.6", FLUX), ("ERR", "E14.6", ERROR)]
    path = tmp_path / "a.fits"
    saved(path, fits.TableHDU.from_columns([fits.Column(name, kind, array=part) for name, kind, part in columns]))
    assert is_the_star(only(path))
    content = bytearray(path.read_bytes())
    with fits.open(path) as hdus:
        first, place = hdus.fileinfo(1)["datLoc"], hdus[1].header["TBCOL2"] - 1
    content[first + place : first + place + 14] = b" " * 14
    path.write_bytes(content)
    row = only(path)
    assert np.isnan(row["flux"][0]) and np.flatnonzero(row["mask"]).tolist() == [0]


def test_a_struct_of_a_spectrum_is_read_as_columns(tmp_path):
    star = {"wave": WAVELENGTH.tolist(), "flux": FLUX.tolist(), "error": ERROR.tolist()}
    pq.write_table(pa.table({"source_id": [7, 8], "spectrum": [star, star]}), tmp_path / "a.parquet")
    rows = all_of(tmp_path / "a.parquet")
    assert [row["object_id"] for row in rows] == ["7", "8"] and all(map(is_the_star, rows))


def test_wavelengths_of_an_array_may_fall(tmp_path):
    np.save(tmp_path / "a.npy", np.array([WAVELENGTH / 1e4, FLUX, ERROR])[:, ::-1])
    row = only(tmp_path / "a.npy", wavelength_unit="um")
    assert is_the_star({**row, **{name: row[name][::-1] for name in ("wavelength", "flux", "flux_error")}})


def test_a_quality_of_the_star_is_no_mask_of_its_pixels(tmp_path):
    stars = {"wavelength": [WAVELENGTH] * 2, "flux": [FLUX] * 2, "error": [ERROR] * 2, "quality": [1, 0]}
    pq.write_table(pa.table({name: list(values) for name, values in stars.items()}), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", **{name: np.array(values) for name, values in stars.items()})
    saved(tmp_path / "a.fits", table(**stars))
    for path in tmp_path.iterdir():
        rows = all_of(path)
        assert len(rows) == 2 and all(map(is_the_star, rows))


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "above",
    [
        ["HD 25 G0V", "Lick, 2001"],
        ["start: synth", "the model of the sun"],
        ["400"],
        ["BITPIX  =    -32  /", "OBJECT  = 'HD 25'", "CRVAL1  =   5000.", "END", ""],
        ["#Column\tlambda\t(F8.2)", "", "lambda Flux e_Flux", "0.1nm --- ---", "-------- -------- --------"],
    ],
)
def test_titles_cards_and_rules_above_the_numbers(tmp_path, above):
    assert is_the_star(only(written(tmp_path / "a.dat", *above, *PLAIN)))


def test_an_unknown_heading_is_not_a_title(tmp_path):
    with pytest.raises(ValueError, match="got Wellenlaenge, Fluss, Fehler; name it with"):
        only(written(tmp_path / "a.dat", "Wellenlaenge Fluss Fehler", *PLAIN))


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["<!DOCTYPE html>", "<html><body>404 Not Found</body></html>"], "a web page"),
        (["version https://git-lfs.github.com/spec/v1", "oid sha256:4d7a", "size 12345"], "a pointer of Git LFS"),
        ([*PLAIN, "", "", *PLAIN], "all 400 twice, as of two stars"),
    ],
)
def test_files_without_exactly_one_spectrum_are_refused(tmp_path, lines, what):
    with pytest.raises(ValueError, match=f"a.fits: expected.*{what}"):
        only(written(tmp_path / "a.fits", *lines))


def test_stars_of_fortran_are_no_numbers(tmp_path):
    lines = [*PLAIN]
    lines[5] = lines[5].split()[0] + " ********* 1.0"
    for path in (
        written(tmp_path / "a.dat", *lines),
        written(tmp_path / "a.csv", *(",".join(x.split()) for x in lines)),
    ):
        assert np.flatnonzero(only(path)["mask"]).tolist() == [5]


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("says", [True, False])
def test_bands_of_iraf_are_the_spectrum_and_its_errors(tmp_path, says):
    bands = np.array([FLUX, FLUX * 0.9, FLUX * 0.1, ERROR])[:, None]
    cards = {"BANDID1": "spectrum - background fit", "BANDID4": "sigma - background fit"} if says else {}
    path = saved(tmp_path / "a.fits", image(bands, kind=fits.PrimaryHDU, CTYPE1="LINEAR", WCSDIM=3, **GRID, **cards))
    assert is_the_star(only(path))


def test_rows_of_fibres_have_the_names_in_their_table_and_the_sky_is_refused(tmp_path):
    fibres = table("FIBRES", NAME=["star A", "sky"], TYPE=["P", "S"])
    two = [image([values, values], name, kind, **GRID) for values, name, kind in
           ((FLUX, None, fits.PrimaryHDU), (ERROR**2, "VARIANCE", fits.ImageHDU))]  # fmt: skip
    star, sky = all_of(saved(tmp_path / "aaomega.fits", *two, fibres))
    assert is_the_star(star) and star["object_id"] == "star A" and "means sky" in sky["refused"]


def test_counts_of_weave_are_multiplied_by_the_sensitivity(tmp_path):
    factor = 1 + 0.5 * np.sin(WAVELENGTH / 700)
    parts = {"RED_DATA": FLUX / factor, "RED_IVAR": (factor / ERROR) ** 2, "RED_SENSFUNC": factor}
    images = [image([values] * 3, name, **GRID) for name, values in parts.items()]
    rows = all_of(saved(tmp_path / "l1.fits", *images, table("FIBTABLE", CNAME=["a", "b", "c"])))
    assert [row["object_id"] for row in rows] == ["a", "b", "c"] and all(map(is_the_star, rows))


def test_a_plate_of_sdss_has_inverse_variance_and_mask_after_the_flux(tmp_path):
    logs = np.log10(5000.0) + 1e-4 * np.arange(400)
    flux = image([FLUX] * 2, kind=fits.PrimaryHDU, COEFF0=logs[0], COEFF1=1e-4)
    others = [image([ERROR**-2.0] * 2), image(np.zeros((2, 400)))]
    rows = all_of(saved(tmp_path / "spPlate.fits", flux, *others, table("PLUGMAP", OBJTYPE=["STAR", "SKY"])))
    assert is_the_star(rows[0], wavelength=10**logs) and rows[0]["rest_frame"] is False
    assert "expected a target, got SKY" in rows[1]["refused"]


def test_rows_of_espadons_are_in_nm_and_air(tmp_path):
    rows = np.zeros((12, 400))
    rows[:3] = WAVELENGTH / 10, FLUX, ERROR
    row = only(saved(tmp_path / "1234567i.fits", image(rows, kind=fits.PrimaryHDU, INSTRUME="ESPaDOnS")))
    assert is_the_star(row, wavelength=air_to_vacuum(WAVELENGTH)) and row["normalised"] and row["rest_frame"] is False


def test_arms_of_desi_that_are_joined(tmp_path):
    parts = {"WAVELENGTH": WAVELENGTH, "FLUX": [FLUX], "IVAR": [ERROR**-2.0], "MASK": [FLUX * 0]}
    images = [image(values, f"BRZ_{name}") for name, values in parts.items()]
    row = only(saved(tmp_path / "coadd.fits", table("FIBERMAP", TARGETID=[39627]), *images))
    assert is_the_star(row) and (row["survey"], row["object_id"]) == ("desi", "39627")


def test_rows_without_names_are_refused_with_what_to_do(tmp_path):
    cube = np.ones((11, 5, 400))
    cube[0], cube[1] = WAVELENGTH, FLUX
    with pytest.raises(ValueError, match="11 x 5 x 400 pixels without a description of its rows; save"):
        only(saved(tmp_path / "ceres.fits", image(cube, kind=fits.PrimaryHDU)))
