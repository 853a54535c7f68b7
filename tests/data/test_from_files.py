"""Data sets from user files: columns, splits and labels."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from spectrafm_hf.data.from_files import build_from_files, split_of_id
from spectrafm_hf.data.readers import Failure, find_files
from spectrafm_hf.data.schema import validate_table


@pytest.fixture
def files(tmp_path, stars):
    """Five stars in two files, of different lengths."""
    folder = tmp_path / "input"
    folder.mkdir()
    names = ("object_id", "wavelength", "flux", "flux_error", "mask")
    lists = {"wavelength": pa.list_(pa.float32()), "flux": pa.list_(pa.float32()), "flux_error": pa.list_(pa.float32())}
    schema = pa.schema({"object_id": pa.string(), **lists, "mask": pa.list_(pa.bool_())})
    for name, rows in {"a.parquet": stars[:2], "b.parquet": stars[2:]}.items():
        columns = {column: [row[column] for row in rows] for column in names}
        pq.write_table(pa.table(columns, schema=schema), folder / name)
    return find_files([folder])


def everything(folder) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("data/*.parquet")))


def test_the_rows_of_the_files_come_back_from_the_data_set(tmp_path, files, stars):
    folder, report = build_from_files(files, tmp_path / "set")
    table = everything(folder)
    validate_table(table)
    rows = {row["object_id"]: row for row in table.to_pylist()}
    for star in stars:
        row = rows[star["object_id"]]
        for name in ("wavelength", "flux", "flux_error", "mask"):
            np.testing.assert_array_equal(np.asarray(row[name], star[name].dtype), star[name])
        assert row["rest_frame"] is True
        assert row["file"] in ("a.parquet", "b.parquet")
    assert report.splits.total() == 5
    card = (folder / "README.md").read_text()
    assert "5 spectra from 2 files" in card
    assert str(tmp_path) not in card + json.dumps(json.loads((folder / "build.json").read_text()))
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == dict(report.splits)


def test_the_split_of_a_star_depends_on_its_name_alone():
    assert split_of_id("2M00452143+1634446") == "train"
    splits = [split_of_id(str(number)) for number in range(10_000)]
    assert abs(splits.count("test") - 1000) < 100
    assert abs(splits.count("validation") - 1000) < 100


def test_labels_are_joined_with_errors_and_scalars_and_unmatched_stars_are_reported(tmp_path, files):
    (tmp_path / "labels.csv").write_text(
        "ID,Teff,e_Teff,fe_h,J,remark,split\n"
        "star-0,5000,50,-1,10.5,x,test\nstar-1,,,,,,\nstar-1,1,1,1,1,,train\nstar-9,1,1,1,1,,train\nstar-3,4000,40,0,11,,validation\n"
    )
    folder, report = build_from_files(files, tmp_path / "set", labels=tmp_path / "labels.csv", split_by="split")
    rows = {row["object_id"]: row for row in everything(folder).to_pylist()}
    assert (rows["star-0"]["teff"], rows["star-0"]["teff_err"]) == (5000, 50)
    assert rows["star-0"]["j"] == 10.5
    assert np.isnan(rows["star-0"]["fe_h_err"])
    assert all(np.isnan(rows[name]["teff"]) for name in ("star-1", "star-2", "star-4"))
    assert "remark" not in rows["star-0"]
    assert report.splits == {"train": 3, "test": 1, "validation": 1}
    assert report.n_labelled == 3
    assert report.labels.unmatched_spectra == ["star-2", "star-4"]
    assert report.labels.unmatched_labels == ["star-9"]
    assert report.labels.duplicates == ["star-1"]
    card = (folder / "README.md").read_text()
    assert "3 of them with labels" in card
    assert "not in the table: 2." in card


def test_a_build_is_kept_until_a_file_or_a_setting_changes(tmp_path, files):
    folder, _ = build_from_files(files, tmp_path / "set")
    before = (folder / "README.md").stat().st_mtime_ns
    assert build_from_files(files, tmp_path / "set")[1].splits.total() == 0
    assert (folder / "README.md").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="split_by"):
        build_from_files(files, tmp_path / "set", split_by="none")
    with pytest.raises(ValueError, match="out_dir: expected a build with files="):
        build_from_files(files[:1], tmp_path / "set")
    assert build_from_files(files, tmp_path / "set", split_by="none", overwrite=True)[1].splits == {"train": 5}


def test_bad_settings_are_one_clear_line_and_leave_nothing(tmp_path, files):
    (tmp_path / "labels.csv").write_text("id,teff,part\nstar-0,1,holdout\n")
    for expected, settings in {
        "split_by: expected star, none or a column of the labels, got 'part'": {"split_by": "part"},
        "part: expected train, validation, test in this column of the labels, got 'holdout'": {
            "split_by": "part",
            "labels": tmp_path / "labels.csv",
        },
        "id_column: expected 'kic' among": {"labels": tmp_path / "labels.csv", "id_column": "kic"},
        "format: expected one of": {"format": "paper"},
    }.items():
        with pytest.raises(ValueError, match=expected):
            build_from_files(files, tmp_path / "set", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "labels.csv"]


def test_spectra_that_the_schema_cannot_hold_fail_alone(tmp_path, stars):
    stars[1]["mask"][:] = True
    stars[2]["wavelength"] = stars[2]["wavelength"].copy()
    stars[2]["wavelength"][3] = np.nan
    stars[3]["flux"] = stars[3]["flux"][:-1]
    columns = {name: [row[name] for row in stars] for name in ("object_id", "wavelength", "flux", "flux_error", "mask")}
    pq.write_table(pa.table(columns), tmp_path / "stars.parquet")
    failures: list[Failure] = []
    folder, _ = build_from_files([tmp_path / "stars.parquet"], tmp_path / "set", failures=failures, split_by="none")
    assert everything(folder)["object_id"].to_pylist() == ["star-0", "star-4"]
    assert [failure.cause.split(":")[0] for failure in failures] == ["star-1", "star-2", "star-3"]
    assert "no valid pixel" in failures[0].cause
    with pytest.raises(ValueError, match=r"stars.parquet: star-1: no valid pixel"):
        build_from_files([tmp_path / "stars.parquet"], tmp_path / "other")


def test_scalars_of_the_files_are_kept(tmp_path):
    wavelength = np.arange(336, 1021, 2)
    flux = 1e-17 * (2 + np.sin(wavelength / 50))
    lines = "\n".join(f"{w},{f},1e-19" for w, f in zip(wavelength, flux, strict=True))
    (tmp_path / "xp.csv").write_text(f"wavelength,flux,flux_error\n{lines}\n")
    (row,) = everything(build_from_files([tmp_path / "xp.csv"], tmp_path / "set")[0]).to_pylist()
    assert row["survey"] == "gaia-xp"
    np.testing.assert_allclose(np.array(row["flux"]) * row["medflux"], flux, rtol=1e-5)


def test_labels_of_the_user_take_precedence_over_those_of_the_data_set(tmp_path, files):
    table = pq.read_table(files[0])
    n = len(table)
    for name, value in {"teff": 4500.0, "teff_err": 50.0, "mg_fe": 0.1, "mg_fe_err": 0.02}.items():
        table = table.append_column(name, pa.array([value] * n, pa.float32()))
    pq.write_table(table, tmp_path / "labelled.parquet")
    first = table["object_id"][0].as_py()
    (tmp_path / "own.csv").write_text(f"object_id,teff,teff_err\n{first},6000,10\n")
    source = find_files([tmp_path / "labelled.parquet"])
    folder, report = build_from_files(source, tmp_path / "kept")
    assert everything(folder)["teff"].to_pylist() == [4500.0] * n and report.n_labelled == n
    folder, _ = build_from_files(source, tmp_path / "joined", labels=tmp_path / "own.csv")
    rows = {row["object_id"]: row for row in everything(folder).to_pylist()}
    assert rows[first]["teff"] == 6000 and rows[first]["mg_fe"] == pytest.approx(0.1)
    assert [row["teff"] for name, row in rows.items() if name != first] == [4500.0] * (n - 1)
