"""Gaia XP and RVS spectra in the formats and structures of the archive."""

import gzip

import numpy as np
import pytest
from astropy import units
from astropy.io.votable import from_table, tree
from astropy.table import Table

from spectrafm_hf.data.readers import read_spectra


XP = np.arange(336.0, 1021.0, 2.0)
RVS = np.round(np.arange(846.0, 870.005, 0.01), 2)
ID = 4594961454434214144


def xp_table(seed=0, **columns):
    flux = 1e-15 * (2 + np.random.default_rng(seed).random(XP.size))
    table = Table({**columns, "wavelength": XP * units.nm, "flux": flux, "flux_error": flux / 50})
    table["flux"].unit = table["flux_error"].unit = "W m-2 nm-1"
    return table


def write(table, path):
    if path.suffix == ".xml":
        votable = from_table(table)
        source = tree.Param(votable, name="source_id", datatype="long", value=str(ID))
        votable.get_first_table().params.append(source)
        votable.to_xml(str(path))
    else:
        table.write(path, format={".ecsv": "ascii.ecsv", ".csv": "csv", ".fits": "fits"}[path.suffix])
    return path


@pytest.mark.parametrize("suffix", [".xml", ".fits", ".ecsv", ".csv"])
def test_an_individual_xp_spectrum_is_divided_by_its_median(tmp_path, read, suffix):
    table = xp_table()
    (row,) = read(write(table, tmp_path / f"XP_SAMPLED-Gaia DR3 {ID}{suffix}"))
    assert (row["object_id"], row["survey"], row["rest_frame"]) == (str(ID), "gaia-xp", True)
    np.testing.assert_array_equal(row["wavelength"], np.arange(3360, 10201, 20))
    assert np.median(row["flux"]) == 1
    assert row["medflux"] == pytest.approx(np.median(table["flux"]), rel=1e-9)
    np.testing.assert_allclose(row["flux_error"] / row["flux"], 0.02, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".xml", ".fits", ".csv"])
def test_a_combined_table_under_any_name_gives_each_star(tmp_path, read, suffix):
    from astropy.table import vstack

    tables = [xp_table(i, source_id=np.full(XP.size, ID + i)) for i in range(3)]
    rows = read(write(vstack(tables), tmp_path / f"download{suffix}"))
    assert [row["object_id"] for row in rows] == [str(ID + i) for i in range(3)]
    for row, table in zip(rows, tables, strict=True):
        assert row["survey"] == "gaia-xp"
        np.testing.assert_allclose(row["flux"], table["flux"] / np.median(table["flux"]), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".xml", ".fits", ".csv"])
def test_an_individual_spectrum_under_another_name_is_known_by_its_grid(tmp_path, read, suffix):
    (row,) = read(write(xp_table(), tmp_path / f"mine{suffix}"))
    assert (row["object_id"], row["survey"]) == (str(ID) if suffix == ".xml" else "mine", "gaia-xp")


def raw_lines(n, size):
    random = np.random.default_rng(1)
    for i in range(n):
        flux = random.random(size) + 1
        text = [f'"[{",".join(map(repr, values.tolist()))}]"' for values in (flux, flux / 20)]
        yield f"{ID + i},375316653866487564,56.1,12.3,{text[0]},{text[1]}", flux


def test_bulk_files_have_a_star_a_line_and_no_wavelengths(tmp_path, read):
    stars = list(raw_lines(4, XP.size))
    header = "# %ECSV 1.0\n# ---\nsource_id,solution_id,ra,dec,flux,flux_error\n"
    with gzip.open(tmp_path / "XpSampledMeanSpectrum_000000-003111.csv.gz", "wt") as stream:
        stream.write(header + "\n".join(line for line, _ in stars) + "\n")
    rows = read(tmp_path)
    assert [row["object_id"] for row in rows] == [str(ID + i) for i in range(4)]
    for row, (_, flux) in zip(rows, stars, strict=True):
        np.testing.assert_allclose(row["flux"], flux / np.median(flux), rtol=1e-6)
        assert row["wavelength"][[0, -1]].tolist() == [3360, 10200]


@pytest.mark.parametrize("suffix", [".xml", ".fits"])
def test_the_raw_structure_has_vectors(tmp_path, read, suffix):
    flux = np.random.default_rng(0).random((2, RVS.size)).astype(np.float32) + 0.5
    flux[:, :7] = np.nan
    table = Table({"source_id": [ID, ID + 1], "flux": flux, "flux_error": flux / 10})
    rows = read(write(table, tmp_path / f"raw{suffix}"))
    assert [(row["object_id"], row["survey"]) for row in rows] == [(str(ID), "gaia-rvs"), (str(ID + 1), "gaia-rvs")]
    np.testing.assert_allclose(rows[1]["wavelength"], RVS * 10, rtol=1e-7)
    np.testing.assert_array_equal(rows[1]["flux"], flux[1])
    np.testing.assert_array_equal(rows[1]["mask"], np.arange(RVS.size) < 7)


def test_an_rvs_spectrum_is_handed_on_as_it_is(tmp_path, read):
    flux = 1 - 0.5 * np.exp(-(((RVS - 854.444) / 0.05) ** 2))  # the middle line of the triplet, nm in vacuum
    table = Table({"wavelength": RVS, "flux": flux, "flux_error": np.full(RVS.size, 0.01)})
    (row,) = read(write(table, tmp_path / f"RVS-Gaia DR3 {ID}.csv"))
    assert (row["object_id"], row["survey"], row["rest_frame"]) == (str(ID), "gaia-rvs", True)
    assert row["wavelength"][np.argmin(row["flux"])] == pytest.approx(8544.4, abs=0.06)
    np.testing.assert_allclose(row["flux"], flux, rtol=1e-6)


def test_a_raw_file_of_another_length_names_the_file(tmp_path):
    line, _ = next(raw_lines(1, 7))
    (tmp_path / "XP_SAMPLED-raw.csv").write_text(f"source_id,solution_id,ra,dec,flux,flux_error\n{line}\n")
    with pytest.raises(ValueError, match=r"^flux: expected 343 values in .*XP_SAMPLED-raw.csv, got 7 \(4594"):
        list(read_spectra([tmp_path / "XP_SAMPLED-raw.csv"]))


def test_other_tables_with_a_source_id_are_not_taken_for_gaia(tmp_path, read):
    table = Table({"source_id": np.full(5, 7), "wavelength": np.arange(5000.0, 5005), "flux": np.ones(5)})
    table["flux_error"] = 0.1
    (row,) = read(write(table, tmp_path / "mine.csv"))
    assert (row["object_id"], row["survey"]) == ("7", "")
