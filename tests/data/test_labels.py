"""Labels of catalogues: reading, the cuts of the paper, the join onto spectra."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table

from spectrafm_hf.data.allstar import read_allstar
from spectrafm_hf.data.cuts import CUTS, apply_cuts
from spectrafm_hf.data.labels import heading_units, join_labels, label_columns, read_labels, stated_units


GAIA_ID = 4295806720123456789


def write_allstar(path, **changes):
    """A table like APOGEE's, with its byte order, vectors and text; every entry passes all cuts unless changed."""
    n = 6
    columns = {
        "APOGEE_ID": np.array([f"2M0000000{i}+0000000" for i in range(n)]),
        "TELESCOPE": np.array(["apo25m"] * n),
        "FIELD": np.array(["M15"] * n),
        "FILE": np.array(["apStar-dr17-x.fits"] * n),
        "SNR": np.linspace(300, 400, n).astype(">f4"),
        "STARFLAG": np.zeros(n, ">i8"),
        "ASPCAPFLAG": np.zeros(n, ">i8"),
        "VSCATTER": np.full(n, 0.1, ">f4"),
        "GAIAEDR3_SOURCE_ID": GAIA_ID + np.arange(n),
        "FPARAM": np.zeros((n, 9), ">f4"),
    }
    for i, name in enumerate(("TEFF", "LOGG", "O_FE", "MG_FE", "FE_H")):
        columns |= {name: np.arange(n, dtype=">f4") + i, f"{name}_ERR": np.full(n, 0.01, ">f4")}
    columns["FE_H_FLAG"] = np.zeros(n, ">i4")
    Table(columns | changes).write(path)
    return path


def test_allstar_is_read_in_lower_case_and_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("spectrafm_hf.data.allstar.CHUNK_ROWS", 4)
    table = read_allstar(write_allstar(tmp_path / "allStar.fits"))
    assert table["apogee_id"].to_pylist()[5] == "2M00000005+0000000"
    assert table["gaiaedr3_source_id"].to_pylist()[1] == GAIA_ID + 1
    assert table["fe_h"].to_pylist() == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert table.schema.field("fe_h_err").type == pa.float32()
    assert "fparam" not in table.column_names
    assert label_columns(table) == ["teff", "logg", "o_fe", "mg_fe", "fe_h"]


def test_a_flagged_label_is_nan_with_its_error_and_others_stay(tmp_path):
    flags = np.array([0, 1 << 1, 1 << 5, 1 << 8, 1 << 6, 0], ">i4")  # calibration range, two warnings, TEFF_CUT
    aspcap = np.array([1 << 16, 0, 0, 0, 0, 1], ">i8")  # TEFF_BAD, TEFF_WARN
    logg = np.array([1, 1, -9999, 1, 1, np.nan], ">f4")
    path = write_allstar(tmp_path / "allStar.fits", FE_H_FLAG=flags, ASPCAPFLAG=aspcap, LOGG=logg)
    table = read_allstar(path)
    for name in ("fe_h", "fe_h_err"):
        assert np.isnan(table[name].to_numpy()).tolist() == [False, True, False, False, True, False]
    assert np.isnan(table["teff"].to_numpy()).tolist() == [True, *[False] * 5]
    assert np.isnan(table["logg_err"].to_numpy()).tolist() == [False, False, True, False, False, True]
    as_they_stand = read_allstar(path, bad_label_bits=())
    assert np.isfinite(as_they_stand["fe_h"].to_numpy()).all()
    assert np.isfinite(as_they_stand["teff"].to_numpy()).all()


def test_the_cuts_of_the_paper_take_one_entry_each_and_count(tmp_path):
    path = write_allstar(
        tmp_path / "allStar.fits",
        SNR=np.array([200, 300, 300, 300, 301, 302], ">f4"),
        STARFLAG=np.array([0, 1, 0, 0, 0, 0], ">i8"),
        VSCATTER=np.array([0, 0, 1.0, 0, 0, 0], ">f4"),
        ASPCAPFLAG=np.array([0, 0, 0, 1 << 23, 0, 0], ">i8"),
        APOGEE_ID=np.array(["a", "b", "c", "d", "e", "e"]),
    )
    table = read_allstar(path)
    left, counts = apply_cuts(table)
    assert counts == [
        ("all", 6), ("snr", 5), ("starflag", 4), ("vscatter", 3), ("star_bad", 2), ("best_snr", 1), ("labels", 1),
    ]  # fmt: skip
    assert left["snr"].to_pylist() == [302.0]
    assert apply_cuts(table, ["vscatter"])[1] == [("all", 6), ("vscatter", 5)]
    assert apply_cuts(table, [])[0] is table
    with pytest.raises(ValueError, match="cuts: expected names out of snr, .*, got magic"):
        apply_cuts(table, ["magic"])
    assert all(cut.description for cut in CUTS.values())


def test_of_equally_good_entries_the_first_stays_and_nan_is_the_worst():
    table = pa.table({"apogee_id": ["b", "a", "b", "a", "b"], "snr": np.array([np.nan, 5, 7, 5, 7], np.float32)})
    left, _ = apply_cuts(table.append_column("row", pa.array(range(5))), ["best_snr"])
    assert left["row"].to_pylist() == [1, 2]


def test_a_star_without_any_label_is_cut_and_one_with_some_stays(tmp_path):
    nothing = {name: np.array([np.nan, 1, 1, 1, 1, 1], ">f4") for name in ("TEFF", "LOGG", "O_FE", "MG_FE")}
    some = np.array([np.nan, np.nan, 1, 1, 1, 1], ">f4")
    table = read_allstar(write_allstar(tmp_path / "allStar.fits", **nothing, FE_H=some))
    assert apply_cuts(table, ["labels"])[1][-1] == ("labels", 5)


def test_a_broken_allstar_is_one_clear_line(tmp_path):
    good = write_allstar(tmp_path / "allStar.fits")
    (tmp_path / "short.fits").write_bytes(good.read_bytes()[:6000])
    Table({"APOGEE_ID": ["a"]}).write(tmp_path / "less.fits")
    fits.PrimaryHDU().writeto(tmp_path / "empty.fits")
    for name, expected in {
        "short.fits": "short.fits: expected an allStar table",
        "less.fits": "expected the columns TELESCOPE, FIELD",
        "empty.fits": "expected a table in its first extension",
        "none.fits": "No such file",
    }.items():
        with pytest.raises(ValueError, match=expected) as caught:
            read_allstar(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_tables_of_labels_are_the_same_from_all_formats(tmp_path):
    table = Table({"ID": ["Ü 1", "b"], "Teff": [5000.0, np.nan], "e_Teff": [50.0, 60.0], "[Fe/H]": [-1.0, 0.0]})
    table.write(tmp_path / "t.ecsv")
    table.write(tmp_path / "t.csv")
    pq.write_table(pa.table({name: table[name].tolist() for name in table.colnames}), tmp_path / "t.parquet")
    table["ID"][0] = "U 1"  # FITS knows ASCII only
    table["vectors"] = np.zeros((2, 3))
    table.rename_column("[Fe/H]", "FE_H")
    table.write(tmp_path / "t.fits")
    for suffix in ("ecsv", "csv", "parquet", "fits"):
        read = read_labels(tmp_path / f"t.{suffix}")
        assert read.column_names == ["id", "teff", "teff_err", "fe_h"], suffix
        assert read["id"].to_pylist() == ["U 1" if suffix == "fits" else "Ü 1", "b"]
        assert read["teff_err"].to_pylist() == [50.0, 60.0]
        assert label_columns(read) == ["teff", "fe_h"]


@pytest.mark.parametrize("suffix", ["csv", "ecsv", "parquet"])
def test_a_unit_in_a_heading_is_separated_from_the_name(tmp_path, suffix):
    headings = [
        "ID",
        "vsini[km/s]",
        "e_vsini",
        "Age [Gyr]",
        "Age [Gyr]_err",
        "[Fe/H]",
        "e_[Fe/H]",
        "[Mg/H] [dex]",
        "TEFF (K)",
    ]
    table = pa.table({heading: [1.0] for heading in headings})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "t.parquet")
    else:
        Table(table.to_pydict()).write(tmp_path / f"t.{suffix}")
    read = read_labels(tmp_path / f"t.{suffix}")
    assert read.column_names == ["id", "vsini", "vsini_err", "age", "age_err", "fe_h", "fe_h_err", "mg_h", "teff"]
    assert heading_units(read) == {"vsini": "km/s", "age": "Gyr", "mg_h": "dex", "teff": "K"}


def test_an_allstar_is_known_by_its_columns(tmp_path):
    assert "aspcapflag" in read_labels(write_allstar(tmp_path / "renamed.fits")).column_names


def test_a_masked_number_is_missing(tmp_path):
    Table({"id": [1, 2], "teff": MaskedColumn([1.0, 2.0], mask=[False, True])}).write(tmp_path / "t.ecsv")
    assert read_labels(tmp_path / "t.ecsv")["teff"].to_pylist() == [1.0, None]


def test_bad_tables_of_labels_are_one_clear_line(tmp_path):
    (tmp_path / "twice.csv").write_text("id,TEFF,teff\n1,2,3\n")
    (tmp_path / "noise.parquet").write_bytes(b"\x80\x04 no parquet")
    (tmp_path / "noise.fits").write_bytes(b"\x80\x04 no fits")
    (tmp_path / "t.xls").write_text("x")
    for name, expected in {
        "twice.csv": "expected each column once, .* got teff again",
        "noise.parquet": "noise.parquet: expected a table of labels",
        "noise.fits": "noise.fits: expected a table of labels",
        "t.xls": "expected a name that ends in",
        "none.csv": "none.csv: expected a table of labels",
    }.items():
        with pytest.raises(ValueError, match=expected) as caught:
            read_labels(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_join_finds_rows_and_reports_unmatched_and_repeated_ones():
    labels = pa.table({"APOGEE_ID".lower(): ["a", " b ", "c", "b", None, "ü"], "teff": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    joined = join_labels(["b", "x", "ü", "b"], labels)
    assert joined.index.tolist() == [1, -1, 5, 1]
    assert joined.unmatched_spectra == ["x"]
    assert joined.unmatched_labels == ["a", "c"]
    assert joined.duplicates == ["b"]


@pytest.mark.parametrize("stated", [[GAIA_ID], [str(GAIA_ID)], [f"Gaia DR3 {GAIA_ID}"], [np.int64(GAIA_ID)]])
@pytest.mark.parametrize("kept", [[GAIA_ID], [str(GAIA_ID)], [f"Gaia EDR3 {GAIA_ID}"]])
def test_gaia_identifiers_match_as_numbers_and_texts(stated, kept):
    assert join_labels(stated, pa.table({"source_id": kept})).index.tolist() == [0]


def test_identifiers_that_lost_their_digits_and_missing_columns_are_refused():
    with pytest.raises(ValueError, match="source_id: expected identifiers as text or whole numbers, got decimals"):
        join_labels([GAIA_ID], pa.table({"source_id": [float(GAIA_ID)]}))
    with pytest.raises(ValueError, match=r"id_column: expected one of object_id, .* got \['star'\]"):
        join_labels(["a"], pa.table({"star": ["a"]}))
    with pytest.raises(ValueError, match="id_column: expected 'kic' among"):
        join_labels(["a"], pa.table({"star": ["a"]}), "kic")
    assert join_labels(["a"], pa.table({"star": ["a"]}), "Star").index.tolist() == [0]


@pytest.mark.parametrize("suffix", ["fits", "ecsv", "xml"])
def test_the_unit_of_a_column_counts_for_labels_and_their_errors(tmp_path, suffix):
    """Labels that this project knows come in its units, and the error of any other in that of the label."""
    columns = {"object_id": ["007", "8"], "teff": [5.8, 4.5], "e_teff": [90.0, 60.0], "vmicro": [1100.0, 1500.0]}
    stars = Table({**columns, "age": [4.5, 9.0], "age_err": [500.0, 700.0], "logg": [4.4, 2.5]})
    units = {"teff": "kK", "e_teff": "K", "vmicro": "m/s", "age": "Gyr", "age_err": "Myr", "logg": "cm/s2"}
    for name, unit in units.items():
        stars[name].unit = unit
    path = tmp_path / f"labels.{suffix}"
    stars.write(path, format={"xml": "votable", "ecsv": "ascii.ecsv"}.get(suffix))
    table = read_labels(path)
    assert table["object_id"].to_pylist() == ["007", "8"]
    assert table["teff"].to_pylist() == [5800.0, 4500.0] and table["teff_err"].to_pylist() == [90.0, 60.0]
    assert table["vmicro"].to_pylist() == pytest.approx([1.1, 1.5])
    assert table["age"].to_pylist() == [4.5, 9.0] and table["age_err"].to_pylist() == pytest.approx([0.5, 0.7])
    assert table["logg"].to_pylist() == [4.4, 2.5]  # of what the logarithm was taken of
    assert stated_units(table)["age"] == "Gyr"


def test_the_unit_of_a_heading_counts_in_the_same_way(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("object_id,teff [kK],e_teff [K],age [Gyr],e_age [Myr]\n007,5.8,90,4.5,500\n8,4.5,60,9,700\n")
    table = read_labels(path)
    assert table["object_id"].to_pylist() == ["007", "8"]
    assert table["teff"].to_pylist() == [5800.0, 4500.0] and table["teff_err"].to_pylist() == [90.0, 60.0]
    assert table["age_err"].to_pylist() == pytest.approx([0.5, 0.7])
    assert heading_units(table)["age"] == "Gyr" and heading_units(table)["teff"] == "K"


def test_a_label_error_in_a_wrong_unit_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("object_id,age [Gyr],e_age [km/s]\na,4.5,1\n")
    with pytest.raises(ValueError, match=r"labels.csv: age_err: expected an error in the unit of age, Gyr, got km/s"):
        read_labels(path)


@pytest.mark.parametrize(
    ("spectra", "table", "expected"),
    [
        (["007", "12"], ["007", "12"], [0, 1]),
        (["007", "12"], [7, 12], [0, 1]),  # a number has lost them
        (["7"], ["007"], [0]),
        (["0x7", "00a"], ["00a", "0x7"], [1, 0]),
        (["000"], ["0"], [0]),
    ],
)
def test_leading_zeros_are_kept_and_a_number_that_lost_them_is_found(spectra, table, expected):
    labels = pa.table({"object_id": table, "teff": [5000.0] * len(table)})
    assert join_labels(spectra, labels).index.tolist() == expected
