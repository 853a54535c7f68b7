"""Scalars of a table are joined with spectra, by identifier or by file."""

import numpy as np
import pytest

from spectrafm_hf.data.scalars import ScalarTable, join_scalars


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "scalars.csv"
    path.write_text("source_id,file,bp_rp,parallax,parallax_error\n12,a.fits,0.8,2.5,0.1\n,b.fits.gz,,3.5,\n")
    return path


def test_a_star_is_found_by_its_identifier_or_its_file(table):
    scalars = ScalarTable(table, ["bp_rp", "parallax"])
    assert scalars.of({"object_id": "Gaia DR3 12"}) == {"bp_rp": 0.8, "parallax": 2.5, "parallax_err": 0.1}
    found = scalars.of({"object_id": "x", "file": "/data/b.fits"})
    assert found["parallax"] == 3.5 and np.isnan(found["bp_rp"]) and np.isnan(found["parallax_err"])
    assert all(np.isnan(value) for value in scalars.of({"object_id": "13", "file": "c.fits"}).values())


def test_attributes_of_a_spectrum_take_precedence(table):
    (row,) = join_scalars([{"object_id": "12", "bp_rp": 0.9, "parallax": np.nan}], ["bp_rp", "parallax"], table)
    assert row["bp_rp"] == 0.9 and row["parallax"] == 2.5


def test_only_known_suffixes_of_files_are_cut_off(tmp_path):
    path = tmp_path / "scalars.csv"
    path.write_text("file,parallax\nstar.01,1.0\nstar.02,2.0\nother.FITS.gz,3.0\n")
    scalars = ScalarTable(path, ["parallax"])
    found = [scalars.of({"object_id": "", "file": file})["parallax"] for file in ("star.02", "/x/other.dat", "star.03")]
    assert found[:2] == [2.0, 3.0] and np.isnan(found[2])


def test_missing_columns_and_identifiers_are_named(table, tmp_path):
    with pytest.raises(ValueError, match=r"scalar_table: expected columns of numbers called g_mag in .*, got bp_rp"):
        ScalarTable(table, ["g_mag"])
    other = tmp_path / "other.csv"
    other.write_text("bp_rp,ra\n1.0,2.0\n")
    with pytest.raises(ValueError, match="scalar_table: expected identifiers in"):
        ScalarTable(other, ["bp_rp"])
