"""Tables of labels: reading, matching with spectra, and splits."""

import numpy as np
import pytest

from spectrafm_hf.data.joining import join, read_label_table, split_stars


def test_units_are_read_from_headings_and_capitals_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text(
        "object_id,[Fe/H],age [Gyr],age_err,ra\nx,-0.1,4,0.2,10\ny,0.1,5,-1,11\nz,0.2,-9999,1,12\n"
    )
    labels = read_label_table(tmp_path / "a.csv")
    assert labels.units == {"fe_h": "dex", "age": "Gyr"}
    assert np.isnan(labels.values["age"]).tolist() == [False, False, True]
    assert np.isnan(labels.values["age_err"]).tolist() == [False, True, False]
    assert [note.split(":")[0] for note in labels.notes] == [
        "numeric columns that are not used as labels (choose with --label)",
        "age",
        "age_err",
    ]
    assert read_label_table(tmp_path / "a.csv", ["age"], {"age": "yr"}).units == {"age": "yr"}


@pytest.mark.parametrize(
    ("columns", "learnt"),
    [
        ("source_id,ak_targ", {"ak_targ": ""}),  # what else could be meant
        ("source_id,ra,vsini[km/s],e_vsini", {"vsini": "km/s"}),
        ("source_id,ra,age,j", {"age": ""}),
        ("source_id,teff,age,age_err", {"teff": "K", "age": ""}),
    ],
)
def test_the_labels_to_learn_are_seen_from_the_table(tmp_path, columns, learnt):
    (tmp_path / "a.csv").write_text(f"{columns}\n" + ",".join(["1"] * (columns.count(",") + 1)) + "\n")
    assert read_label_table(tmp_path / "a.csv").units == learnt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["mass"]}, r"labels: expected columns of numbers in a.csv \(age, empty, teff\), got mass"),
        ({"names": ["empty"]}, "empty: expected values in this column of a.csv, got none in 2 rows"),
        ({"names": ["age"], "units": {"teff": "K"}}, "units: expected units of labels to learn"),
        ({"names": ["teff"], "units": {"teff": "eV"}, "known": {"teff": "K"}}, "teff: expected K, the unit of the"),
    ],
)
def test_a_label_that_cannot_be_learnt_is_told(tmp_path, options, message):
    (tmp_path / "a.csv").write_text("object_id,age,empty,teff\nx,1,-9999,4000\ny,2,-9999,5000\n")
    with pytest.raises(ValueError, match=message):
        read_label_table(tmp_path / "a.csv", **options)


def test_labels_are_joined_by_file_where_that_fits(tmp_path):
    (tmp_path / "a.csv").write_text(
        "file,apogee_id,age[Gyr]\nspectra/one.fits,A,1\ntwo,A,2\ntwo,A,2\nthree,B,1\nthree,B,9\n"
    )
    labels = read_label_table(tmp_path / "a.csv")
    names = ["one", "two", "three", "four"]
    rows, stars, how = join(labels, names, [f"other/{name}.fits" for name in names])
    assert rows.tolist() == [0, 1, -2, -1]  # what the table says twice and differently is not believed
    assert stars == ["A", "A", "three", "four"] and how == "file = column file"


def test_no_star_is_in_two_splits_whatever_the_order():
    stars = [f"star {i // 3}" for i in range(1200)]
    splits = split_stars(stars)
    assert all(len(set(splits[3 * i : 3 * i + 3])) == 1 for i in range(400))
    assert [int((splits == name).sum()) for name in ("train", "test")] == [960, 240]
    assert np.array_equal(split_stars(stars[::-1])[::-1], splits)
    assert set(split_stars(stars[:600])) == {"train"}, "few are judged by cross-validation"
