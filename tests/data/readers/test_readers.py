"""Readers, on files written by common libraries."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.io import fits

from spectrafm_hf.data.readers import batched, count_spectra, find_files, read_spectra
from spectrafm_hf.data.schema import pixel_column
from spectrafm_hf.models.gate_spectrafm import air_to_vacuum


WAVELENGTH = np.arange(5000.0, 5040.0)
FLUX = np.linspace(1.0, 2.0, 40)


def write_parquet(path: Path, stars: int = 3, **columns) -> Path:
    pixels = {
        "wavelength": np.tile(WAVELENGTH, (stars, 1)),
        "flux": FLUX + np.arange(stars)[:, None],
        "flux_error": np.full((stars, 40), 0.1),
        "mask": np.arange(40) < np.arange(stars)[:, None],
    }
    table = {name: pixel_column(values) for name, values in pixels.items()}
    table = {"object_id": pa.array([f"star {i}" for i in range(stars)]), **table, **columns}
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return path


def write_csv(path: Path, header: str, rows) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def write_fits_table(path: Path, columns: dict[str, tuple], hdus=()) -> Path:
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name, form, array=array, unit=unit) for name, (form, array, unit) in columns.items()]
    )
    fits.HDUList([fits.PrimaryHDU(), *hdus, table]).writeto(path)
    return path


def test_parquet_rows_come_back_as_they_were_written(tmp_path):
    file = write_parquet(tmp_path / "stars.parquet")
    rows = list(read_spectra([file]))
    assert [row["object_id"] for row in rows] == ["star 0", "star 1", "star 2"]
    assert all(row["file"] == file for row in rows)
    np.testing.assert_allclose(rows[2]["wavelength"], WAVELENGTH)
    np.testing.assert_allclose(rows[2]["flux"], FLUX + 2, rtol=1e-6)
    np.testing.assert_array_equal(rows[2]["mask"], np.arange(40) < 2)
    assert count_spectra([file, file]) == 6


def test_labels_and_scalars_of_parquet_rows_are_handed_on(tmp_path):
    columns = {"teff": pa.array([4000.0, None, 6000.0], pa.float32()), "teff_err": pa.array([50.0] * 3, pa.float32())}
    columns |= {"survey": ["apogee"] * 3, "snr": pa.array([9.0] * 3, pa.float32()), "note": ["n"] * 3}
    first, second, _ = read_spectra([write_parquet(tmp_path / "a.parquet", **columns, parallax=pa.array([1.5] * 3))])
    known = ("survey", "snr", "teff", "teff_err", "parallax")
    assert {name: first[name] for name in known} == dict(zip(known, ("apogee", 9.0, 4000.0, 50.0, 1.5), strict=True))
    assert "note" not in first
    assert "teff" not in second


def test_parquet_rows_may_differ_in_length_and_may_lack_a_list_or_a_number(tmp_path):
    lists = pa.array([[1.0, None, 3.0], None, [4.0]], pa.list_(pa.float32()))
    table = {"wavelength": pa.array([[1.0, 2.0, 3.0], [], [4.0]], pa.large_list(pa.float64())), "flux": lists}
    table["mask"] = pa.array([[False, None, True], [], [False]])
    pq.write_table(pa.table(table), tmp_path / "stars.parquet")
    first, second, third = read_spectra([tmp_path / "stars.parquet"])
    np.testing.assert_array_equal(first["flux"], [1.0, np.nan, 3.0])
    np.testing.assert_array_equal(first["mask"], [False, True, True])
    assert second["flux"].size == 0
    assert third["object_id"] == "stars:2"
    np.testing.assert_array_equal(third["flux_error"], [np.nan])


def test_parquet_without_flux_or_with_another_type_names_column_and_file(tmp_path):
    file = write_parquet(tmp_path / "no_flux.parquet", flux=None)
    with pytest.raises(ValueError, match=r"^flux: expected a column of this name in .*no_flux.parquet, got object_id"):
        list(read_spectra([file]))
    file = write_parquet(tmp_path / "number.parquet", flux=pa.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"^flux: expected a column of type list<float> in .*, got double"):
        list(read_spectra([file]))
    file = write_parquet(tmp_path / "text.parquet", mask=pa.array([["no"]] * 3))
    with pytest.raises(ValueError, match=r"^mask: expected a column of type list<bool> in .*, got list<.*string>"):
        list(read_spectra([file]))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.fits"])
def test_a_file_with_the_wrong_suffix_is_a_clear_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=name):
        list(read_spectra([tmp_path / name]))


def test_a_truncated_parquet_or_fits_file_is_a_clear_error(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.parquet: expected a Parquet file"):
        list(read_spectra([tmp_path / "half.parquet"]))
    stars = np.ones((500, 40), np.float32)
    whole = write_fits_table(
        tmp_path / "whole.fits", {"wavelength": ("40E", stars, None), "flux": ("40E", stars, None)}
    ).read_bytes()
    (tmp_path / "half.fits").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.fits: expected a FITS file"):
        list(read_spectra([tmp_path / "half.fits"]))


def test_files_that_differ_in_an_unknown_ending_are_two_stars(tmp_path):
    paths = [tmp_path / "star.01", tmp_path / "star.02", tmp_path / "star.asc"]
    for path in paths:
        path.write_text("".join(f"{5000 + i}.0 1.0 0.01\n" for i in range(50)))
    assert [row["object_id"] for row in read_spectra(paths)] == ["star.01", "star.02", "star"]


def test_a_data_set_folder_gives_all_splits_or_one(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert len(find_files([tmp_path])) == 2
    assert [file.name for file in find_files([tmp_path], "test")] == ["test-00000-of-00001.parquet"]
    with pytest.raises(ValueError, match=r"split: expected one of \['test', 'train'\] in .*, got 'validation'"):
        find_files([tmp_path], "validation")


def test_invalid_inputs_are_refused_before_reading(tmp_path):
    good = write_parquet(tmp_path / "good.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nowhere.fits: expected a file or a folder, got nothing of this name"):
        find_files([good, tmp_path / "nowhere.fits"])
    with pytest.raises(ValueError, match=r"empty: expected a data set folder with data/\*.parquet"):
        find_files([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"split: expected a data set folder to take 'test' from, got the file"):
        find_files([good], "test")


def test_a_csv_file_without_identifiers_is_one_star(tmp_path):
    file = write_csv(
        tmp_path / "HD 1.csv", " wavelength, flux ,flux_error,note", [(5000, 1.5, 0.1, "x"), (5001, "nan", "", "")]
    )
    (row,) = read_spectra([file])
    assert row["object_id"] == "HD 1"
    np.testing.assert_array_equal(row["wavelength"], [5000.0, 5001.0])
    np.testing.assert_array_equal(row["flux"], [1.5, np.nan])
    np.testing.assert_array_equal(row["flux_error"], np.float32([0.1, np.nan]))
    np.testing.assert_array_equal(row["mask"], [False, True])
    assert count_spectra([file]) is None


def test_a_csv_file_that_numpy_wrote_is_read(tmp_path):
    np.savetxt(tmp_path / "a.csv", np.column_stack([WAVELENGTH, FLUX]), delimiter=",", header="wavelength,flux")
    (row,) = read_spectra([tmp_path / "a.csv"])
    np.testing.assert_array_equal(row["wavelength"], WAVELENGTH)
    assert np.isnan(row["flux_error"]).all()


def test_a_csv_file_larger_than_a_block_is_cut_into_its_stars(tmp_path):
    # Three megabytes: several blocks of the CSV reader, whose edges lie within stars.
    stars, pixels = 30, 3000
    lines = [(f"s{i}", 4000 + p, f"{i}.{p:04d}", p % 2) for i in range(stars) for p in range(pixels)]
    file = write_csv(tmp_path / "many.csv", "object_id,wavelength,flux,mask", lines)
    assert file.stat().st_size > 1.5e6
    rows = list(read_spectra([file]))
    assert [row["object_id"] for row in rows] == [f"s{i}" for i in range(stars)]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["wavelength"], 4000 + np.arange(pixels))
        np.testing.assert_allclose(row["flux"], i + np.arange(pixels) / 1e4, atol=1e-9)
        np.testing.assert_array_equal(row["mask"], np.arange(pixels) % 2 == 1)


def test_a_star_scattered_over_a_csv_file_is_refused(tmp_path):
    file = write_csv(tmp_path / "a.csv", "object_id,wavelength,flux", [("a", 1, 1), ("b", 1, 1), ("a", 2, 1)])
    with pytest.raises(ValueError, match=r"object_id: expected the lines of a star together in .*, got 'a' again"):
        list(read_spectra([file]))


def test_a_csv_file_with_text_for_a_number_or_without_a_column_names_the_file(tmp_path):
    file = write_csv(tmp_path / "text.csv", "wavelength,flux", [(5000, "bright")])
    with pytest.raises(ValueError, match=r"text.csv: .*bright"):
        list(read_spectra([file]))
    file = write_csv(tmp_path / "names.csv", "place,flux", [(5000, 1)])
    with pytest.raises(
        ValueError,
        match=r"names.csv, got place, flux; name it with columns=\{'wavelength': 'NAME'\}$",
    ):
        list(read_spectra([file]))
    (row,) = read_spectra([file], columns={"wavelength": "place"})
    assert row["wavelength"].tolist() == [5000]
    for name in ("ivar", "FLUX_ERROR", "flux_std", "Flux_Err", "variance"):
        file = write_csv(tmp_path / "error.csv", f"wavelength,flux,{name}", [(5000, 1, 4)])
        (row,) = read_spectra([file])
        assert row["flux_error"].tolist() == [{"ivar": 0.5, "variance": 2.0}.get(name, 4.0)]
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(ValueError, match=r"nothing.csv"):
        list(read_spectra([tmp_path / "nothing.csv"]))


def test_a_fits_table_has_one_spectrum_a_row_padded_with_nan(tmp_path):
    wavelength = np.tile(WAVELENGTH, (600, 1)).astype(np.float32)
    wavelength[1, 30:] = np.nan
    columns = {
        "object_id": ("8A", np.array([f"s{i}" for i in range(600)]), None),
        "wavelength": ("40E", wavelength / 10, "nm"),
        "flux": ("40E", FLUX + np.arange(600)[:, None], None),
        "mask": ("40L", np.tile(np.arange(40) == 3, (600, 1)), None),
    }
    rows = list(read_spectra([write_fits_table(tmp_path / "stars.fits", columns)]))
    assert [row["object_id"] for row in rows] == [f"s{i}" for i in range(600)]
    np.testing.assert_allclose(rows[0]["wavelength"], WAVELENGTH, rtol=1e-6)
    assert [rows[1][name].size for name in ("wavelength", "flux", "flux_error", "mask")] == [30] * 4
    np.testing.assert_allclose(rows[599]["flux"], FLUX + 599, rtol=1e-6)
    assert rows[599]["flux"].dtype.isnative
    np.testing.assert_array_equal(rows[599]["mask"], np.arange(40) == 3)


def test_a_fits_table_with_one_pixel_a_row_is_one_star(tmp_path):
    columns = {name: ("D", values, None) for name, values in (("wavelength", WAVELENGTH), ("flux", FLUX))}
    (row,) = read_spectra([write_fits_table(tmp_path / "HD1.fits", columns)])
    assert row["object_id"] == "HD1"
    np.testing.assert_array_equal(row["flux"], FLUX.astype(np.float32))


def test_a_fits_image_in_air_is_converted_to_vacuum(tmp_path):
    image = fits.PrimaryHDU(FLUX.astype(np.float32))
    image.header.update(CTYPE1="AWAV", CRVAL1=5000.0, CDELT1=1.0, CRPIX1=1, CUNIT1="Angstrom")
    image.writeto(tmp_path / "air.fits")
    (row,) = read_spectra([tmp_path / "air.fits"])
    np.testing.assert_allclose(row["wavelength"], air_to_vacuum(WAVELENGTH), rtol=1e-7)
    np.testing.assert_allclose(row["flux"], FLUX, rtol=1e-6)
    assert np.isnan(row["flux_error"]).all()


def test_a_spectrum_that_specutils_wrote_is_read_with_its_inverse_variance(tmp_path):
    from astropy.nddata import InverseVariance
    from specutils import Spectrum

    ivar = np.full(40, 25.0)
    Spectrum(flux=FLUX * units.Jy, spectral_axis=WAVELENGTH * 1e-4 * units.um, uncertainty=InverseVariance(ivar)).write(
        tmp_path / "s.fits", format="tabular-fits"
    )
    (row,) = read_spectra([tmp_path / "s.fits"])
    np.testing.assert_allclose(row["wavelength"], WAVELENGTH, rtol=1e-7)
    np.testing.assert_allclose(row["flux_error"] / row["flux"], 0.2 / FLUX, rtol=1e-6)


def test_a_fits_file_without_a_spectrum_is_refused_with_the_expectation(tmp_path):
    write_fits_table(tmp_path / "table.fits", {"ra": ("D", np.ones(3), None), "FLUX": ("D", np.ones(3), None)})
    with pytest.raises(
        ValueError, match=r"table.fits: expected a table with columns wavelength and flux.*got the columns ra, FLUX"
    ):
        list(read_spectra([tmp_path / "table.fits"]))


def test_wavelengths_without_a_unit_take_the_unit_and_medium_of_the_caller(tmp_path):
    file = write_csv(tmp_path / "a.csv", "wavelength,flux", [(500, 1), (501, 1)])
    (row,) = read_spectra([file], wavelength_unit="nm", wavelength_medium="air")
    np.testing.assert_allclose(row["wavelength"], air_to_vacuum([5000.0, 5010.0]), rtol=1e-7)
    with pytest.raises(ValueError, match=r"wavelength_unit: expected a unit of length, got 'kg'"):
        list(read_spectra([file], wavelength_unit="kg"))
    with pytest.raises(ValueError, match=r"wavelength_unit: expected a unit of length, got 'furlongs!'"):
        list(read_spectra([file], wavelength_unit="furlongs!"))


def test_batches_hold_all_rows_in_order():
    rows = [{"object_id": str(i)} for i in range(7)]
    assert [len(batch) for batch in batched(rows, 3)] == [3, 3, 1]
    assert [row for batch in batched(rows, 3) for row in batch] == rows


def test_rows_are_read_lazily(tmp_path):
    rows = read_spectra([write_parquet(tmp_path / "a.parquet"), tmp_path / "not there.parquet"])
    assert next(rows)["object_id"] == "star 0"


def test_an_unusual_header_and_long_names_give_one_line_with_the_format(tmp_path):
    image = fits.PrimaryHDU(np.ones(40))
    image.header.update(TPLLIB="MILES", CRPIX1=1, CRVAL1="here", CDELT1=0.9)
    image.writeto(tmp_path / "m0001V.fits")
    with pytest.raises(ValueError, match=r"m0001V\.fits: expected a file of the format miles, got \w+: "):
        list(read_spectra([tmp_path / "m0001V.fits"]))
    (tmp_path / "a.csv").write_text(",".join(f"column{i}" for i in range(9000)) + "\n1\n")
    with pytest.raises(ValueError, match=r"wavelength: expected a column of this name in .*a\.csv") as error:
        list(read_spectra([tmp_path / "a.csv"]))
    assert len(str(error.value)) < 1100
