"""Gaia XP spectra as coefficients, in every format, against `gaiaxpy.calibrate` (needs the extra `gaia`)."""

import gzip
import importlib.metadata
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.table import Table

import spectrafm_cli
from spectrafm_hf import save_checkpoint
from spectrafm_hf.data import xp_basis as module
from spectrafm_hf.data.readers import Failure, read_spectra
from spectrafm_hf.data.readers.gaia_continuous import COLUMNS, arrays_of, decimals
from spectrafm_hf.data.xp_basis import BANDS, N_COEFFICIENTS, XPBasis


SIZES = {"coefficients": 55, "coefficient_errors": 55, "coefficient_correlations": 1485}


def stars(n, missing=()):
    """Rows as the archive has them; `missing`: (star, band)."""
    rng, rows = np.random.default_rng(5), []
    for i in range(n):
        row = {"source_id": 5853498713190525696 + i, "solution_id": 4545469030156206080}
        for band in BANDS:
            known = (i, band) not in missing
            factor = rng.normal(size=(55, 80))
            covariance = factor @ factor.T
            scale = np.sqrt(np.diag(covariance))
            below = (covariance / scale / scale[:, None])[np.tril_indices(55, k=-1)]
            coefficients = rng.normal(size=55) * 1e3 / (1 + np.arange(55)) + 1e4 * (np.arange(55) == 0)
            values = (coefficients, rng.uniform(1, 30, 55).astype("f4"), below.astype("f4"))
            row[f"{band}_n_parameters"] = 55 if known else None
            row[f"{band}_standard_deviation"] = float(np.float32(rng.uniform(1, 1.4))) if known else None
            for name, value in zip(SIZES, values, strict=True):
                row[f"{band}_{name}"] = value if known else None
            row[f"{band}_n_relevant_bases"] = 40 if known else None
        rows.append(row)
    return rows


def text(value, brackets):
    if value is None:
        return "null"
    if np.ndim(value):
        return f'"{brackets[0]}{", ".join(repr(number.item()).replace("e", "E") for number in value)}{brackets[1]}"'
    return str(value)


def write(rows, path, brackets="[]", comments=0):
    names = list(rows[0])
    if path.name.endswith((".csv", ".csv.gz", ".ecsv")):
        # The archive describes its columns in comments, which may go on for pages.
        lines = ["# %ECSV 1.0", "# ---", "# delimiter: ','", *["#   name: a column of the archive"] * comments]
        lines += [",".join(names), *(",".join(text(row[name], brackets) for name in names) for row in rows)]
        content = "\n".join(lines) + "\n"
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in names}), path)
    else:
        kinds = {"coefficients": "D", "coefficient_errors": "E", "coefficient_correlations": "E"}
        columns = []
        for name in names:
            kind = kinds.get(name[3:])
            if kind is None:
                numbers = [0 if row[name] is None else row[name] for row in rows]
                columns.append(fits.Column(name, "D" if isinstance(rows[0][name], float) else "K", array=numbers))
                continue
            values = np.empty(len(rows), object)
            values[:] = [np.zeros(0) if row[name] is None else row[name] for row in rows]
            columns.append(fits.Column(name, f"P{kind}()", array=values))
        table = fits.BinTableHDU.from_columns(columns)
        if path.suffix == ".fits":
            table.writeto(path)
        else:
            from_table(Table.read(table)).to_xml(str(path))
    return path


def needs_gaiaxpy():
    try:
        importlib.metadata.version("gaiaxpy")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs GaiaXPy, the extra `gaia`")


@pytest.fixture(scope="session")
def calibrated():
    """Flux and error of `gaiaxpy.calibrate` for rows."""
    with np.printoptions(), mpl.rc_context():  # which its import changes
        gaiaxpy = pytest.importorskip("gaiaxpy")

    def calibrate(rows):
        table = pd.DataFrame(rows)
        found, sampling = gaiaxpy.calibrate(table, save_file=False)
        np.testing.assert_array_equal(sampling, np.arange(336, 1021, 2))
        return np.stack(found["flux"].to_list()), np.stack(found["flux_error"].to_list())

    return calibrate


@pytest.mark.parametrize(
    "name", ["a.csv", "a.ecsv", "XpContinuousMeanSpectrum_0-1.csv.gz", "a.fits", "a.xml", "a.parquet"]
)
def test_flux_and_error_are_those_of_gaiaxpy(tmp_path, calibrated, name):
    rows = stars(70)  # more than are dealt with at once
    flux, error = calibrated(rows[:3] + rows[-3:])
    path = write(rows, tmp_path / name, comments=400 if name.endswith("gz") else 3)
    found = list(read_spectra([path]))
    assert [row["object_id"] for row in found] == [str(row["source_id"]) for row in rows]
    for row, own_flux, own_error in zip(found[:3] + found[-3:], flux, error, strict=True):
        assert (row["survey"], row["rest_frame"], row["flags"]) == ("gaia-xp", True, [])
        np.testing.assert_array_equal(row["wavelength"], np.arange(3360, 10201, 20))
        assert row["medflux"] == pytest.approx(np.median(own_flux), rel=1e-9)
        np.testing.assert_allclose(row["flux"] * row["medflux"], own_flux, rtol=1e-6)
        np.testing.assert_allclose(row["flux_error"] * row["medflux"], own_error, rtol=1e-6)


def test_in_double_precision_they_are_equal_to_rounding(calibrated):
    # In single precision GaiaXPy divides the errors by the standard deviation, and multiplies again.
    rows = [
        {name: np.asarray(value, float) if np.ndim(value) else value for name, value in row.items()} for row in stars(4)
    ]
    flux, error = calibrated(rows)
    columns = {
        band: [np.stack([row[f"{band}_{name}"] for row in rows]).astype(float) for name in SIZES] for band in BANDS
    }
    found = module.xp_basis().sample({band: module.Band(*arrays) for band, arrays in columns.items()})
    np.testing.assert_allclose(found[0], flux, rtol=1e-10)
    np.testing.assert_allclose(found[1], error, rtol=1e-10)


@pytest.mark.parametrize("name", ["a.csv", "a.fits", "a.parquet"])
def test_without_a_band_the_other_reaches_as_far_as_it_does_in_gaiaxpy(tmp_path, calibrated, name):
    rows = stars(4, missing=[(1, "bp"), (2, "rp"), (3, "bp"), (3, "rp")])
    flux, error = calibrated(rows[:3])
    path = write(rows, tmp_path / name)
    found = list(read_spectra([path], keep_refused=True))
    assert [row["flags"] for row in found] == [[], ["no_bp"], ["no_rp"], []]
    for row, own_flux, own_error in zip(found, flux, error, strict=False):
        np.testing.assert_array_equal(row["mask"], np.isnan(own_flux))
        good = ~row["mask"]
        np.testing.assert_allclose((row["flux"] * row["medflux"])[good], own_flux[good], rtol=1e-6)
        np.testing.assert_allclose((row["flux_error"] * row["medflux"])[good], own_error[good], rtol=1e-6)
    assert found[3]["refused"] == "bp_coefficients, rp_coefficients: expected at least one of them, got none"
    failures: list[Failure] = []
    assert len(list(read_spectra([path], failures=failures))) == 3 and len(failures) == 1


def test_names_in_capitals_and_a_mark_of_the_encoding_do_not_matter(tmp_path):
    needs_gaiaxpy()
    rows = stars(2)
    expected = list(read_spectra([write(rows, tmp_path / "a.csv")]))
    capitals = [{name.upper(): value for name, value in row.items()} for row in rows]
    for name in ("b.csv", "b.parquet", "b.csv.gz"):
        path = write(capitals, tmp_path / name)
        if name == "b.csv":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().partition(b"\n")[2].partition(b"\n")[2])
            path.write_bytes(path.read_bytes().replace(b"# delimiter: ','\n", b""))
        for row, other in zip(read_spectra([path]), expected, strict=True):
            assert row["object_id"] == other["object_id"]
            np.testing.assert_allclose(row["flux"], other["flux"], rtol=1e-6)


def test_a_folder_of_bulk_files_is_a_survey(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    needs_gaiaxpy()
    save_checkpoint(tiny_model, tiny_tokenizer, tmp_path / "tiny")
    monkeypatch.setattr("spectrafm_hf.inference.survey.LARGE_FILE", 1000)  # as those of the archive are
    (tmp_path / "bulk").mkdir()
    for number, rows in enumerate((stars(3), stars(5))):
        write(rows, tmp_path / "bulk" / f"XpContinuousMeanSpectrum_{number}.csv.gz")
    command = ["predict", str(tmp_path / "bulk"), "--model", str(tmp_path / "tiny"), "--output", str(tmp_path / "out")]
    assert spectrafm_cli.main(command) == 0
    written = sorted(path.name for path in (tmp_path / "out").rglob("*.parquet"))
    assert written == [f"XpContinuousMeanSpectrum_{number}.csv.gz.parquet" for number in range(2)]
    assert len(pd.read_parquet(tmp_path / "out").dropna(subset="teff")) == 8


def test_a_row_with_too_few_numbers_is_refused_and_the_others_stay(tmp_path):
    needs_gaiaxpy()
    rows = stars(3)
    rows[1]["rp_coefficients"] = rows[1]["rp_coefficients"][:54]
    for name in ("a.csv", "a.parquet"):
        found = list(read_spectra([write(rows, tmp_path / name, "()")], keep_refused=True))
        assert [row["refused"] for row in found] == ["", "rp_coefficients: expected 55 numbers, got 54", ""]


def test_a_file_that_is_cut_off_or_lacks_a_column_is_one_line(tmp_path):
    needs_gaiaxpy()
    path = write(stars(3), tmp_path / "a.csv.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a\.csv\.gz: expected a file"):
        list(read_spectra([path]))
    rows = [{name: value for name, value in row.items() if name != "rp_coefficient_errors"} for row in stars(2)]
    with pytest.raises(ValueError, match="rp_coefficient_errors: expected a column of this name in"):
        list(read_spectra([write(rows, tmp_path / "b.csv")]))


def test_without_gaiaxpy_the_message_names_the_extra(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    module.xp_basis.cache_clear()
    path = write(stars(1), tmp_path / "a.csv")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        failures: list[Failure] = []
        assert list(read_spectra([path], failures=failures)) == []
    assert "pip install 'spectrafm_hf[gaia]'" in failures[0].cause


def test_the_matrices_are_downloaded_once_and_again_if_the_file_is_damaged(tmp_path, monkeypatch, calibrated):
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    calls, ask = [], module._ask_gaiaxpy
    monkeypatch.setattr(module, "_ask_gaiaxpy", lambda: calls.append(1) or ask())
    printed = repr(np.float64(1.5))
    for damage, n_calls in ((False, 1), (False, 1), (True, 2)):
        if damage:
            (path,) = (tmp_path / "cache").glob("*.npz")
            path.write_bytes(path.read_bytes()[:1000])
        module.xp_basis.cache_clear()
        assert isinstance(module.xp_basis(), XPBasis) and len(calls) == n_calls
    assert repr(np.float64(1.5)) == printed
    module.xp_basis.cache_clear()


def test_numbers_are_read_as_python_reads_them():
    numbers = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.random.default_rng(1).integers(-12, 12, 2000)
    written = "[" + ", ".join(map(repr, numbers.tolist())) + "]"
    np.testing.assert_array_equal(decimals(written.encode()), numbers)
    np.testing.assert_array_equal(decimals(b"(1.5E-4,null, nan ,-2)"), [1.5e-4, np.nan, np.nan, -2.0])


@pytest.mark.parametrize("package", ["there", "absent"])
def test_arrays_are_the_same_with_simdjson_and_without(monkeypatch, package):
    if package == "absent":
        monkeypatch.setitem(sys.modules, "simdjson", None)
    else:
        pytest.importorskip("simdjson")
    texts = [b"[1.5, -2E-3]", b"(7,8.25)", b"[1, 0.1, 1e300]", b"[nan, null]", b"3.5", b"[-0.33333334]"]
    expected = [[1.5, -2e-3], [7, 8.25], [1, 0.1, 1e300], [np.nan, np.nan], [3.5], [-0.33333334]]
    for found, right in zip(arrays_of(texts), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    assert arrays_of([]) == []


def test_the_columns_are_those_of_the_data_model():
    assert sum(COLUMNS.values()) == 2 * (2 * N_COEFFICIENTS + 1485)
